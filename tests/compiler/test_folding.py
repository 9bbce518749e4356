"""Scales and shifts that leave inference: what is left of each chain, and that the numbers stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from relax_graphs import at_run_time, graph, require_same
from tvm import relax

from pipeline.compiler.folding import fold_scales

op = relax.op
X = {"x": (1, 4, 5, 5)}
CONV = {"w": (8, 4, 3, 3), "b": (8, 1, 1), "s": (1, 8, 1, 1), "t": (8, 1, 1)}


def check(mod: tvm.IRModule, left: list[str]) -> None:
    after = fold_scales(mod)
    assert at_run_time(after) == left
    require_same(mod, after)


def test_a_scale_goes_into_the_convolution_and_a_shift_stays() -> None:
    def body(emit, x, w, b, s, t):
        y = emit(op.add(emit(op.nn.conv2d(x, w)), b))
        return emit(op.add(t, emit(op.multiply(s, y))))

    check(graph(X, CONV, body), ["nn.conv2d", "add"])


@pytest.mark.parametrize("step", [op.divide, op.subtract, op.multiply, op.add])
@pytest.mark.parametrize("number", [0.5, np.full((1,), 0.5, "float32"), np.full((1, 1, 1, 1), 0.5, "float32")])
def test_numbers_are_folded_as_well(step: Callable, number: object) -> None:
    def body(emit, x, w, b, s, t):
        y = emit(op.subtract(emit(op.nn.conv2d(x, w)), b))
        constant = relax.const(number, "float32") if isinstance(number, float) else relax.const(number)
        return emit(step(y, constant))

    check(graph(X, CONV, body), ["nn.conv2d", "add"])


def test_a_convolution_with_another_use_is_left() -> None:
    def body(emit, x, w, b, s, t):
        y = emit(op.nn.conv2d(x, w))
        return [emit(op.multiply(y, s)), emit(op.nn.relu(y))]

    check(graph(X, CONV, body), ["nn.conv2d", "nn.relu", "multiply"])


def test_a_scale_along_another_axis_is_left() -> None:
    def body(emit, x, w, v):
        return emit(op.multiply(emit(op.nn.conv2d(x, w)), v))

    check(graph(X, {"w": (3, 4, 3, 3), "v": (3, 1)}, body), ["nn.conv2d", "multiply"])


def test_a_scale_that_widens_its_operand_is_left() -> None:
    def body(emit, x, w, v):
        return emit(op.multiply(emit(op.nn.conv2d(x, w)), v))

    check(graph(X, {"w": (1, 4, 3, 3), "v": (6, 1, 1)}, body), ["nn.conv2d", "multiply"])


@pytest.mark.parametrize(("groups", "kernel"), [(2, (8, 2, 3, 3)), (4, (8, 1, 3, 3))])
def test_grouped_convolutions(groups: int, kernel: tuple[int, ...]) -> None:
    def body(emit, x, w, b, s, t):
        return emit(op.add(emit(op.multiply(emit(op.nn.conv2d(x, w, groups=groups)), s)), t))

    check(graph(X, {**CONV, "w": kernel}, body), ["nn.conv2d", "add"])


def test_transposed_convolutions_and_products_of_matrices() -> None:
    def body(emit, x, w, s, v, r):
        y = emit(op.multiply(emit(op.nn.conv2d_transpose(x, w, strides=(2, 2))), s))
        return emit(op.divide(emit(op.matmul(y, v)), r))

    weights = {"w": (4, 6, 2, 2), "s": (6, 1, 1), "v": (10, 7), "r": (7,)}
    check(graph(X, weights, body), ["nn.conv2d_transpose", "matmul"])


def test_scales_in_a_row_become_one() -> None:
    def body(emit, x, s, b, r, t):
        y = emit(op.add(emit(op.multiply(x, s)), b))
        return emit(op.add(emit(op.multiply(y, r)), t))

    weights = {"s": (1, 4, 1, 1), "b": (4, 1, 1), "r": (4, 1, 1), "t": (1, 4, 1, 1)}
    check(graph(X, weights, body), ["multiply", "add"])


def test_scales_along_different_axes_are_not_multiplied_out() -> None:
    def body(emit, x, s, r):
        return emit(op.multiply(emit(op.multiply(x, s)), r))

    check(graph(X, {"s": (4, 1, 1), "r": (5, 1)}, body), ["multiply", "multiply"])


def test_weights_by_weights_and_inputs_by_inputs_are_no_business_of_this() -> None:
    def body(emit, x, w, s):
        scaled = emit(op.multiply(w, s))
        return emit(op.multiply(emit(op.nn.conv2d(x, scaled)), emit(op.nn.conv2d(x, w))))

    check(graph(X, {"w": (8, 4, 3, 3), "s": (8, 1, 1, 1)}, body), ["nn.conv2d", "nn.conv2d", "multiply"])


def test_doubles_stay_doubles() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([2, 3], "float64"))
    w, half = relax.Var("w", relax.TensorType([3, 4], "float64")), relax.const(np.full((1, 4), 0.5), "float64")
    with builder.function("main", [x, w], attrs={"num_input": 1}):
        with builder.dataflow():
            y = builder.emit(op.multiply(builder.emit(op.multiply(builder.emit(op.matmul(x, w)), half)), half))
            out = builder.emit_output(op.add(y, half))
        builder.emit_func_output(out)
    after = fold_scales(builder.get())
    assert at_run_time(after) == ["matmul", "add"]
    relax.analysis.well_formed(after)
