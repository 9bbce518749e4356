"""What the rules make of real networks' operators stays as it is, byte for byte, until it is meant to change.

scheduled.json holds it: network → beginnings of digests, the workload's → the scheduled function's. After a change
that is meant, raise the strategy's version and write it anew: python -m tests.compiler.rules.test_scheduled
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import zoo
from pipeline.compiler import ir, passes, rules, targets
from pipeline.compiler.frontends import onnx
from pipeline.compiler.lowering import ENTRY, lower
from pipeline.hashing import Digest

GOLDEN = Path(__file__).with_name("scheduled.json")
NETWORKS = ("squeezenet", "shufflenet", "densenet121")
TARGET = {"kind": "llvm", "mcpu": "znver4", "mtriple": "x86_64-linux-gnu"}


def scheduled(network: str) -> dict[str, str]:
    """The beginnings of digests, the workload's → the scheduled function's."""
    attributes = targets.resolve(TARGET)
    read = onnx.read(lambda: zoo.light(network), {}, [])
    mod, returned = onnx.load(read.skeleton)
    mod, constants = passes.detach_constants(mod, ENTRY, "constant_")
    lowered = lower(mod, [*(spec.name for spec, _ in read.weights), *constants], returned, attributes)
    found = {}
    for digest, function in lowered.functions.items():
        made = rules.schedule(ir.load(function.canonical), targets.load(attributes))
        found[digest[:16]] = "" if made is None else Digest.of(ir.canonical(made)).hash[:16]
    return found


@pytest.mark.parametrize("network", [*NETWORKS[:2], pytest.param(NETWORKS[2], marks=pytest.mark.slow)])
def test_schedules_stay_as_they_are(network: str) -> None:
    kept, found = json.loads(GOLDEN.read_text())[network], scheduled(network)
    # Another version of TVM's importer may make another workload of an operator: what is new says nothing.
    known = [workload for workload in found if workload in kept]
    assert len(known) > 0.5 * len(kept)
    assert {workload: found[workload] for workload in known} == {workload: kept[workload] for workload in known}


if __name__ == "__main__":
    GOLDEN.write_text(
        json.dumps({network: scheduled(network) for network in NETWORKS}, indent=0, sort_keys=True) + "\n"
    )
