"""extract: a skeleton and a target → the plan, the bytecode objects, and each unique workload."""

from __future__ import annotations

from typing import cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from pipeline.compiler import passes
from pipeline.compiler.frontends import raw
from pipeline.compiler.lowering import ENTRY, Lowered, Watch, lower
from pipeline.hashing import Digest
from pipeline.stages import Inputs, Options, Outputs
from pipeline.types import ModelKind, Plan, TensorSpec, Weight, WeightUse, Workload


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: skeleton. Options: kind; weights, names in order; target, its attributes; layout, one of lowering's;
    host, this machine's attributes where the target is another; patterns, [library, identity] of those that group.

    Outputs: plan; main, and prepare where weights need preparation; f<digest> for each workload; c0, c1, … for the
    constants that lowering made.
    """
    lowered, constants = lower_skeleton(inputs["skeleton"], options)
    outputs: dict[str, bytes | memoryview] = {"main": lowered.main}
    if lowered.prepare:
        outputs["prepare"] = lowered.prepare
    made = []
    for i, (name, array) in enumerate(constants.items()):
        outputs[f"c{i}"] = data = raw(array)
        made.append(Weight(TensorSpec(name, tuple(array.shape), str(array.dtype)), Digest.of(data)))
    workloads = []
    for digest, function in lowered.functions.items():
        outputs[f"f{digest}"] = function.canonical
        workloads.append(
            Workload(
                function.name,
                Digest(digest, len(function.canonical)),
                function.structural_hash,
                function.shapes,
                function.calls,
                function.prepares,
                function.written,
                function.copies,
            )
        )
    plan = Plan(
        inputs=lowered.inputs,
        outputs=lowered.outputs,
        weights=tuple(WeightUse(*use) for use in lowered.weights),
        packing=lowered.packing,
        constants=tuple(made),
        workloads=tuple(workloads),
        prepares=bool(lowered.prepare),
    )
    outputs["plan"] = msgspec.json.encode(plan)
    return outputs


def lower_skeleton(skeleton: bytes, options: Options, **watch: Watch) -> tuple[Lowered, dict[str, NDArray[np.generic]]]:
    """Imports and lowers a skeleton. Returns that, and the arrays of the constants that importing made."""
    weights = cast("list[str]", options["weights"])
    constants: dict[str, NDArray[np.generic]] = {}
    if ModelKind(cast(str, options["kind"])) is ModelKind.ONNX:
        from pipeline.compiler.frontends import onnx

        mod, returned = onnx.load(skeleton)
        mod, constants = passes.detach_constants(mod, ENTRY, "constant_")
    else:
        from pipeline.compiler.frontends import relax

        mod, returned = relax.load(skeleton)
    attributes = cast("dict[str, object]", options["target"])
    layout = cast(str, options.get("layout", "NHWC"))
    host = cast("dict[str, object] | None", options.get("host"))
    patterns = [name for name, _ in cast("list[tuple[str, str]]", options.get("patterns", []))]
    lowered = lower(
        mod, [*weights, *constants], returned, attributes, layout=layout, host=host, patterns=patterns, **watch
    )
    return lowered, constants
