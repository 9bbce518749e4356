"""embed: the bytecode and the device code of the functions that it calls → the object that carries both."""

from __future__ import annotations

from typing import cast

from pipeline.compiler import objects
from pipeline.stages import Inputs, Options, Outputs


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: main; d<digest> for each workload with device code. Options: target. Outputs: object."""
    attributes = cast("dict[str, object]", options["target"])
    devices = [inputs[name] for name in sorted(inputs) if name != "main"]
    return {"object": objects.embed(inputs["main"], devices, attributes)}
