"""What only copies is told from what computes or moves, by where elements go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tvm
from tvm import te, topi
from tvm.script import tirx as T  # noqa: N812

from pipeline.compiler import ir
from pipeline.compiler.copies import is_copy


def function(make: Callable[..., Any], *shapes: tuple[Any, ...], dtype: str = "float32") -> tvm.tirx.PrimFunc:
    """The canonical function of an operator on tensors of these shapes."""
    given = [te.placeholder(shape, dtype, name=f"x{i}") for i, shape in enumerate(shapes)]
    func = te.create_prim_func([*given, make(*given)]).without_attr("global_symbol")
    return ir.load(ir.canonical(func))


COPIES = {
    "reshape": function(lambda x: topi.reshape(x, (6, 4)), (2, 3, 4)),
    "reshape to one more axis": function(lambda x: topi.reshape(x, (2, 2, 6)), (4, 6)),
    "flatten": function(topi.nn.flatten, (2, 3, 4, 5)),
    "expand_dims": function(lambda x: topi.expand_dims(x, 1), (3, 4)),
    "squeeze": function(topi.squeeze, (1, 3, 1, 4)),
    "identity": function(topi.identity, (3, 4)),
    "transpose of axes of one": function(lambda x: topi.transpose(x, (1, 0, 2)), (1, 5, 3)),
    "reshape of whole numbers": function(lambda x: topi.reshape(x, (12,)), (3, 4), dtype="int64"),
    "the first rows": function(lambda x: topi.strided_slice(x, [0, 0], [2, 4]), (3, 4)),
}

OTHERS = {
    "transpose": function(topi.transpose, (3, 4)),
    "transpose to channels last": function(lambda x: topi.transpose(x, (0, 2, 3, 1)), (1, 3, 4, 5)),
    "concat": function(lambda x, y: topi.concatenate([x, y], 0), (2, 4), (3, 4)),
    "concat of one with itself": function(lambda x: topi.concatenate([x, x], 0), (2, 4)),
    "pad": function(lambda x: topi.nn.pad(x, (1, 1)), (3, 4)),
    "relu": function(topi.nn.relu, (3, 4)),
    "softmax": function(topi.nn.softmax, (3, 4)),
    "add": function(topi.add, (3, 4), (3, 4)),
    "cast": function(lambda x: topi.cast(x, "int32"), (3, 4)),
    "broadcast": function(lambda x: topi.broadcast_to(x, (3, 4)), (1, 4)),
    "sum": function(lambda x: topi.sum(x, 1), (3, 4)),
    "the last rows": function(lambda x: topi.strided_slice(x, [1, 0], [3, 4]), (3, 4)),
    "the first columns": function(lambda x: topi.strided_slice(x, [0, 0], [3, 2]), (3, 4)),
    "backwards": function(lambda x: topi.flip(x, 1), (3, 4)),
    "take": function(lambda x, i: topi.take(x, topi.cast(i, "int32"), 0), (3, 4), (3,)),
    "reshape of what was transposed": function(lambda x: topi.reshape(topi.transpose(x), (12,)), (3, 4)),
}


@pytest.mark.parametrize("name", COPIES)
def test_what_leaves_every_element_where_it_lies_is_a_copy(name: str) -> None:
    assert is_copy(COPIES[name])


@pytest.mark.parametrize("name", OTHERS)
def test_what_computes_or_moves_is_none(name: str) -> None:
    assert not is_copy(OTHERS[name])


@T.prim_func(s_tir=True)
def _reshaped(x: T.handle, y: T.handle):
    n = T.int64()
    X = T.match_buffer(x, (n, 4, 2))  # noqa: N806
    Y = T.match_buffer(y, (n, 8))  # noqa: N806
    for i, j in T.grid(n, 8):
        with T.sblock("reshape"):
            vi, vj = T.axis.remap("SS", [i, j])
            Y[vi, vj] = X[vi, vj // 2, vj % 2]


@T.prim_func(s_tir=True)
def _two(x: T.Buffer((4, 8), "float32"), y: T.Buffer((4, 8), "float32"), z: T.Buffer((4, 8), "float32")):
    for i, j in T.grid(4, 8):
        with T.sblock("y"):
            vi, vj = T.axis.remap("SS", [i, j])
            y[vi, vj] = x[vi, vj]
    for i, j in T.grid(4, 8):
        with T.sblock("z"):
            vi, vj = T.axis.remap("SS", [i, j])
            z[vi, vj] = x[vi, vj]


def test_open_shapes_are_proved_as_well() -> None:
    assert is_copy(_reshaped)


def test_two_outputs_are_no_copy() -> None:
    assert not is_copy(_two)


def test_a_function_without_blocks_is_none() -> None:
    assert not is_copy(tvm.tirx.PrimFunc([], tvm.tirx.Evaluate(0)))
