"""cc: C source that TVM generated → an object file, by the compiler driver for the target's triple."""

from __future__ import annotations

from typing import cast

from pipeline.linker import compile_source
from pipeline.platforms import triple_of
from pipeline.stages import Inputs, Options, Outputs


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: source. Options: target; driver, what tells its compiler from another. Outputs: object."""
    return {"object": compile_source(inputs["source"], triple_of(cast("dict[str, object]", options["target"])))}
