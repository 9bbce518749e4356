"""What artifacts are checked against: the model itself, run by another implementation on the same inputs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.tensors import Array
from pipeline.weightfile import dtype_of

Feeds = Mapping[str, Array]
Run = Callable[[Feeds], dict[str, Array]]


@dataclass(frozen=True)
class Implementation:
    """One way to run an ONNX model: what to call it, and a function from inputs by name to outputs by name."""

    name: str
    run: Run


# The reference evaluator is written for clarity: with more elements of weights than this it takes minutes.
_PATIENT = 2_000_000


def onnx_implementations(skeleton: bytes, weights: Feeds) -> Sequence[Callable[[], Implementation]]:
    """The installed ones that will do, the most trusted first. Each may refuse the model by raising when made or run.

    The skeleton takes the weights as inputs, so that a model of any size is checked without being put together again.
    """
    fast = importlib.util.find_spec("onnxruntime") is not None
    if not fast and sum(weight.size for weight in weights.values()) > _PATIENT:
        return ()
    makers = [lambda: _onnxruntime(skeleton, weights)] if fast else []
    return (*makers, lambda: _onnx_reference(skeleton, weights))


def _onnxruntime(skeleton: bytes, weights: Feeds) -> Implementation:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(skeleton, options, providers=["CPUExecutionProvider"])
    outputs = [value.name for value in session.get_outputs()]

    def run(feeds: Feeds) -> dict[str, Array]:
        return dict(zip(outputs, session.run(outputs, {**weights, **feeds}), strict=True))

    return Implementation(f"onnxruntime {onnxruntime.__version__}", run)


def _onnx_reference(skeleton: bytes, weights: Feeds) -> Implementation:
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load_model_from_string(skeleton)
    evaluator = ReferenceEvaluator(model)
    outputs = [value.name for value in model.graph.output]

    def run(feeds: Feeds) -> dict[str, Array]:
        results = evaluator.run(outputs, {**weights, **feeds})
        return {name: np.asarray(result) for name, result in zip(outputs, results, strict=True)}

    return Implementation(f"onnx reference {importlib.metadata.version('onnx')}", run)


def recorded(case: bytes) -> tuple[str, dict[str, Array], dict[str, Array]]:
    """The origin, inputs and outputs of a recorded case."""
    with np.load(io.BytesIO(case), allow_pickle=False) as stored:

        def array(entry: str) -> Array:
            found: Array = stored[entry]
            dtype = f"dtype:{entry}"
            return found.view(dtype_of(str(stored[dtype]))) if dtype in stored.files else found

        inputs = {name[3:]: array(name) for name in stored.files if name.startswith("in:")}
        outputs = {name[4:]: array(name) for name in stored.files if name.startswith("out:")}
        return str(stored["origin"]), inputs, outputs


def difference(ours: Array, theirs: Any) -> str:
    """Why two outputs are not even near each other, in words."""
    theirs = np.asarray(theirs)
    if ours.shape != theirs.shape:
        return f"has shape {list(ours.shape)} instead of {list(theirs.shape)}"
    if (ours.dtype.kind in "biu") != (theirs.dtype.kind in "biu"):
        return f"has dtype {ours.dtype} instead of {theirs.dtype}"
    if ours.dtype.kind in "biu":
        return f"differs in {int((ours != theirs).sum())} of {ours.size} elements"
    return "is not finite where the reference is, or the other way round"


def error_of(ours: Array, theirs: Any) -> float:
    """max |y - r| / max |r| over the finite elements; infinite where shapes, kinds or non-finite elements disagree.

    What is not a floating-point number must be equal.
    """
    theirs = np.asarray(theirs)
    if ours.shape != theirs.shape or (ours.dtype.kind in "biu" and theirs.dtype.kind not in "biu"):
        return float("inf")
    if ours.dtype.kind in "biu":
        return 0.0 if np.array_equal(ours, theirs) else float("inf")
    kind = np.complex128 if ours.dtype.kind == "c" else np.float64
    y, r = ours.astype(kind), theirs.astype(kind)
    finite = np.isfinite(r)
    if not np.array_equal(y[~finite], r[~finite], equal_nan=True) or not np.isfinite(y[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    largest = float(np.abs(r[finite]).max())
    difference = float(np.abs(y[finite] - r[finite]).max())
    return difference / largest if largest > 0 else difference
