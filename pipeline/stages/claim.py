"""claim: MetaSchedule's records of a workload → claims, to be tried here before they count."""

from __future__ import annotations

from typing import cast

import msgspec

from pipeline.compiler import exchange, ir, targets
from pipeline.compiler.records import Group
from pipeline.stages import Inputs, Options, Outputs


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: function; group, the workload's records. Options: target.

    Outputs: claims, a JSON list of trial records; others and broken, JSON: how many were measured on another target,
    or do not replay, by which and why; failed, how many have no time.
    """
    target = targets.load(cast("dict[str, object]", options["target"]))
    made = exchange.taken(Group.from_bytes(inputs["group"]), ir.load(inputs["function"]), target)
    return {
        "claims": msgspec.json.encode(made.claims),
        "others": msgspec.json.encode(made.others),
        "broken": msgspec.json.encode(made.broken),
        "failed": str(made.failed).encode(),
    }
