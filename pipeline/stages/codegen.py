"""codegen: a scheduled function and a target → one object file."""

from __future__ import annotations

from typing import cast

from pipeline.compiler import ir, objects
from pipeline.stages import Inputs, Options, Outputs


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: function. Options: symbol, target. Outputs: object."""
    func = ir.load(inputs["function"])
    attributes = cast("dict[str, object]", options["target"])
    return {"object": objects.compile_function(func, cast(str, options["symbol"]), attributes)}
