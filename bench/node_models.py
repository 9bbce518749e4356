"""ONNX's own backend node tests as small models with recorded inputs and outputs.

Owns choosing among them. The onnx package makes all of them in memory when asked for the first one, which takes
seconds; that happens at the first call here, once a process, and never at import.

    python -m bench.node_models [N] [SEED]     prints what a sample holds
"""

from __future__ import annotations

import random
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.errors import SetupError

if TYPE_CHECKING:
    import onnx


class NodeCase(NamedTuple):
    """One test: a model of one operator or of its expansion, inputs in order, what must come out and how exactly."""

    name: str
    model: onnx.ModelProto
    inputs: list[np.ndarray]
    outputs: list[np.ndarray]
    rtol: float = 1e-3
    atol: float = 1e-7


@dataclass(frozen=True)
class Sample:
    """Cases in order of name, how many there were to choose from, and how many were left out, by reason."""

    cases: tuple[NodeCase, ...]
    usable: int
    left_out: dict[str, int]


def sample(n: int = 250, seed: int = 0) -> Sample:
    """`n` of the usable node tests, or all where there are fewer: the same ones for the same seed, in every process."""
    usable, left_out = _all_cases()
    chosen = random.Random(seed).sample(usable, min(n, len(usable)))
    return Sample(tuple(sorted(chosen, key=lambda case: case.name)), len(usable), dict(left_out))


@cache
def _all_cases() -> tuple[list[NodeCase], Counter[str]]:
    try:
        from onnx.backend.test.loader import load_node_model_tests
    except ImportError as error:
        raise SetupError("the package onnx is not installed", hint="pip install 'tvmake[onnx]'") from error
    state = np.random.get_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tests overflow and divide by zero on purpose
        tests = sorted(load_node_model_tests(), key=lambda test: test.name)
    np.random.set_state(state)  # making the tests seeds the global generator
    usable, left_out = [], Counter[str]()
    for test in tests:
        if reason := _unusable(test):
            left_out[reason] += 1
            continue
        inputs, outputs = ([_array(value) for value in values] for values in test.data_sets[0])
        usable.append(NodeCase(test.name, test.model, inputs, outputs, test.rtol, test.atol))
    return usable, left_out


def _unusable(test: Any) -> str:
    """Why a case is not one of tensors in and tensors out; "" where it is."""
    import onnx

    interface = (*test.model.graph.input, *test.model.graph.output)
    for kind in ("sequence_type", "optional_type", "sparse_tensor_type", "map_type"):
        if any(value.type.WhichOneof("value") == kind for value in interface):
            return f"{kind.removesuffix('_type')} as input or output"
    if any(value.type.tensor_type.elem_type == onnx.TensorProto.STRING for value in interface):
        return "strings as input or output"
    recorded = tuple(value for values in test.data_sets[0] for value in values)
    if len(recorded) != len(interface) or any(isinstance(value, list) or value is None for value in recorded):
        return "recorded values that are not its inputs and outputs"
    return ""


def _array(value: Any) -> np.ndarray:
    """A recorded value, which may be an array, a NumPy scalar or a TensorProto."""
    import onnx

    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value, order="C")


def _print_sample(n: int, seed: int) -> None:
    from bench.cpu import table

    drawn = sample(n, seed)
    operators = Counter(node.op_type for case in drawn.cases for node in case.model.graph.node)
    table(f"{len(drawn.cases)} of {drawn.usable} usable node tests", ("operator", "nodes"), operators.most_common(20))
    table("left out", ("reason", "cases"), sorted(drawn.left_out.items()))


if __name__ == "__main__":
    _print_sample(*map(int, [*sys.argv[1:], *("250", "0")[len(sys.argv) - 1 :]]))
