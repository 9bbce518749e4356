"""codegen: a scheduled function and a target → one object file or C source, and its device code."""

from __future__ import annotations

from typing import cast

from pipeline.compiler import ir, objects
from pipeline.platforms import is_source
from pipeline.stages import Inputs, Options, Outputs
from pipeline.toolchain import ABSENT


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: function. Options: symbol; target; nvcc, its identity, for targets of kind cuda.

    Outputs: object, or source where the target's kind is c; where there is device code, device, as `embed` takes it,
    and the same to look at or to ship, by suffix: kernels.cl, kernels.wgsl, kernels.metal, kernels.cu, kernels.cubin.
    """
    func = ir.load(inputs["function"])
    attributes = cast("dict[str, object]", options["target"])
    machine_code = options.get("nvcc", ABSENT) != ABSENT
    made = objects.compile_parts(func, cast(str, options["symbol"]), attributes, cubin=machine_code)
    outputs: dict[str, bytes | memoryview] = {"source" if is_source(attributes) else "object": made.code}
    if made.device:
        outputs["device"] = made.device
    return outputs | {f"kernels{suffix}": text for suffix, text in made.kernels.items()}
