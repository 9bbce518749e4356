"""link: the bytecode's object and one object for each workload → the shared library."""

from __future__ import annotations

from pipeline.linker import link
from pipeline.stages import Inputs, Options, Outputs


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: main; o<digest> for each workload; weights, where they go inside. Outputs: library."""
    objects = {f"{name}.o": inputs.file(name) for name in inputs if name != "weights"}
    weights = inputs.file("weights") if "weights" in inputs else None
    return {"library": link(objects, weights)}
