"""link: the bytecode's object and one object for each workload → the shared library."""

from __future__ import annotations

from typing import cast

from pipeline.linker import link
from pipeline.platforms import triple_of
from pipeline.stages import Inputs, Options, Outputs


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: main; o<digest> for each workload; weights, where they go inside; l0, l1, … libraries.

    Options: target, where it is not this machine; driver, what tells its linker from another; libraries, the file names
    of those that will lie beside, in order. Outputs: library.
    """
    attributes = cast("dict[str, object]", options.get("target", {"kind": "llvm"}))
    names = cast("list[str]", options.get("libraries", []))
    beside = {name: inputs.file(f"l{i}") for i, name in enumerate(names)}
    objects = {f"{name}.o": inputs.file(name) for name in inputs if name[0] in "mo"}
    weights = inputs.file("weights") if "weights" in inputs else None
    return {"library": link(objects, weights, libraries=beside, triple=triple_of(attributes))}
