"""What importers write at length: before, after, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from relax_graphs import at_run_time, graph, require_same
from tvm import relax, te, tirx

from pipeline.compiler.simplify import extremum, simplify

op = relax.op
X = {"x": (2, 3), "y": (2, 3)}


def check(left: list[str], body: Callable, weights: dict[str, tuple[int, ...]] | None = None) -> tvm.IRModule:
    mod = graph(X, weights or {}, body)
    after = simplify(mod)
    assert at_run_time(after) == left
    require_same(mod, after)
    return after


@pytest.mark.parametrize(
    ("reduce", "left"),
    [
        (op.sum, ["add", "add"]),
        (op.max, ["maximum", "maximum"]),
        (op.min, ["minimum", "minimum"]),
        (op.mean, ["add", "add", "divide"]),
    ],
)
def test_a_reduction_of_a_stack(reduce: Callable, left: list[str]) -> None:
    def body(emit, x, y):
        parts = [emit(op.broadcast_to(relax.const(0.5), (2, 3))), x, emit(op.broadcast_to(y, (2, 3)))]
        return emit(reduce(emit(op.stack(parts, axis=0)), axis=0))

    check(left, body)


def test_a_stack_that_is_reduced_along_another_axis_stays() -> None:
    check(["stack", "sum"], lambda emit, x, y: emit(op.sum(emit(op.stack([x, y], axis=0)), axis=1)))


def test_dropout_gives_what_it_is_given() -> None:
    def body(emit, x, y):
        return emit(op.add(emit(relax.TupleGetItem(emit(op.nn.dropout(x, 0.5)), 0)), y))

    check(["add"], body)


def test_a_clip() -> None:
    def body(emit, x, y):
        return emit(op.minimum(emit(op.maximum(x, relax.const(-0.5))), relax.const(np.full((1,), 0.5, "float32"))))

    check(["clip"], body)


def test_limits_the_wrong_way_round_are_no_clip() -> None:
    def body(emit, x, y):
        return emit(op.minimum(emit(op.maximum(x, relax.const(0.5))), relax.const(-0.5)))

    check(["maximum", "minimum"], body)


def extremum_of(combine: Callable, limit: tuple[int, ...] = (), scale: float | None = None) -> tirx.PrimFunc:
    x, low = te.placeholder((2, 3), name="x"), te.placeholder(limit, name="low")
    index = tuple(0 for _ in limit)

    def element(i: tirx.Var, j: tirx.Var) -> tirx.PrimExpr:
        value = combine(x[i, j], low[index])
        return value if scale is None else value * tirx.const(scale, "float32")

    return te.create_prim_func([x, low, te.compute((2, 3), element, name="z")]).without_attr("global_symbol")


def test_functions_that_are_extrema_are_told_from_others() -> None:
    assert extremum(extremum_of(te.max)) == "maximum"
    assert extremum(extremum_of(te.min)) == "minimum"
    assert extremum(extremum_of(te.max, limit=(1,))) == ""
    assert extremum(extremum_of(te.max, scale=2.0)) == ""
    assert extremum(extremum_of(lambda a, b: a + b)) == ""
    x, low = te.placeholder((2, 3), name="x"), te.placeholder((), name="low")
    turned = te.compute((2, 3), lambda i, j: te.max(x[1 - i, j], low[()]), name="z")
    assert extremum(te.create_prim_func([x, low, turned])) == ""


def test_limits_that_are_handed_over_as_tensors() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([2, 3], "float32"))
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            y = x
            for combine, number in ((te.max, -0.5), (te.min, 0.5)):
                gvar = builder.add_func(extremum_of(combine), "limit")
                missing = builder.emit(op.isnan(relax.const(number)))
                low = builder.emit(op.where(missing, relax.const(-1e9), relax.const(number)))
                y = builder.emit(relax.call_tir(gvar, (y, low), relax.TensorType([2, 3], "float32")))
            out = builder.emit_output(y)
        builder.emit_func_output(out)
    before = builder.get()
    after = simplify(before)
    assert at_run_time(after) == ["clip"]
    require_same(before, after)


def test_reshapes_in_a_row_are_one_and_those_to_the_same_shape_none() -> None:
    def body(emit, x, y, w):
        column = emit(op.expand_dims(emit(op.expand_dims(w, 1)), 2))
        row = emit(op.squeeze(emit(op.reshape(column, (1, 3, 1))), [0, 2]))
        there = emit(op.reshape(emit(op.reshape(x, (6,))), (2, 3)))
        return [emit(op.add(there, row)), emit(op.expand_dims(emit(op.reshape(y, (6,))), 0))]

    check(["add", "reshape"], body, {"w": (3,)})


def test_a_slice_of_everything_is_nothing_unless_it_turns_around() -> None:
    def body(emit, x, y):
        whole = emit(op.strided_slice(x, (0, 1), (0, 0), (1000, 1000)))
        return emit(op.strided_slice(whole, (1,), (2,), (-4,), (-1,)))

    check(["strided_slice"], body)


def test_a_square() -> None:
    def body(emit, x, y):
        return emit(op.power(emit(op.power(x, relax.const(2.0))), relax.const(0.75)))

    check(["multiply", "power"], body)


def test_a_number_in_a_tensor_becomes_part_of_the_code() -> None:
    after = check(["add"], lambda emit, x, y: emit(op.add(x, relax.const(np.full((1, 1), 3, "float32")))))
    (call,) = [binding.value for binding in after["main"].body.blocks[0].bindings if hasattr(binding.value, "args")]
    assert len(call.args[1].ty.shape.values) == 0


def test_a_number_that_widens_its_operand_stays_as_it_is() -> None:
    check(["add"], lambda emit, x, y: emit(op.add(x, relax.const(np.full((1, 1, 1), 3, "float32")))))


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64"])
def test_a_number_keeps_its_type(dtype: str) -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([2, 3], dtype))
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            out = builder.emit_output(op.add(x, relax.const(np.full((1,), 3, dtype), dtype)))
        builder.emit_func_output(out)
    assert simplify(builder.get())["main"].ret_ty.dtype == dtype
    relax.analysis.well_formed(simplify(builder.get()))
