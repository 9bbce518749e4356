"""export: candidates of workloads that were timed here → a database of MetaSchedule's."""

from __future__ import annotations

from typing import cast

import msgspec

from pipeline.compiler import exchange, ir, targets
from pipeline.stages import Inputs, Options, Outputs


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: f0, f1, …, functions; t0, t1, …, JSON: decisions and seconds of each one's candidates. Options: target.

    Outputs: workloads, records, the database's two files; broken, how many candidates are not in it.
    """
    count = sum(name[0] == "f" for name in inputs)
    pairs = [(ir.load(inputs[f"f{i}"]), msgspec.json.decode(inputs[f"t{i}"])) for i in range(count)]
    made = exchange.given(pairs, targets.load(cast("dict[str, object]", options["target"])))
    return {"workloads": made.workloads, "records": made.records, "broken": str(made.broken).encode()}
