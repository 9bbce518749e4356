"""Attention, read from a function's structure: softmax(scale * q k' + mask) v, whatever the names.

Like pipeline.compiler.anatomy for one product: what is not sure is None.

    t = transpose(q); u = transpose(k); s = t u; d = s / 8; softmax(d); w = transpose(v); y = softmax w
    →  q, k and v as they lie in memory, scale 1/8, y
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import sym, tirx

from pipeline.compiler import ir, windows
from pipeline.compiler.anatomy import Cut, Nest, dissect, dtype, extents, loads, nests_of, row_major, terms


@dataclass(frozen=True)
class Operand:
    """A tensor by its own rows and columns, after the batch's dimensions: extents, and strides in elements."""

    buffer: Any
    extents: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Heads:
    """q: batch..., rows, depth; k: batch..., keys, depth; v: batch..., keys, width; y: batch..., rows, width; mask:
    batch..., rows, keys."""

    q: Operand
    k: Operand
    v: Operand
    y: Operand
    mask: Operand | None
    scale: float

    @property
    def work(self) -> int:
        """Multiplications."""
        return math.prod(self.q.extents) * self.k.extents[-2] + math.prod(self.y.extents) * self.k.extents[-2]


def read(func: tirx.PrimFunc) -> Heads | None:
    """Reads a function. What is found accounts for all that the function writes."""
    nests = nests_of(func)
    if nests is None or len({nest.buffer for nest in nests}) != len(nests) or len(ir.written(func)) != 1:
        return None
    if any(-1 in extents(nest.buffer) or dtype(nest.buffer) != "float32" for nest in nests):
        return None
    for at in range(1, len(nests) - 4):
        softmax = windows.softmax(_part(func, nests[at : at + 4]))
        if softmax is not None and softmax.axis == len(extents(softmax.source)) - 1:
            return _around(func, nests, nests[:at], softmax)
    return None


def _part(func: tirx.PrimFunc, nests: Sequence[Nest], *results: Any) -> tirx.PrimFunc:
    """Some of a function's statements as a function, to be read; `results` are those of its buffers that are wanted."""
    statements = [nest.statement for nest in nests]
    body = statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)
    root = tvm.s_tir.SBlock([], [], [], "root", body)
    return tirx.PrimFunc([*func.params, *results], tvm.s_tir.SBlockRealize([], True, root))


def _around(
    func: tirx.PrimFunc, nests: Sequence[Nest], before: Sequence[Nest], softmax: windows.Softmax
) -> Heads | None:
    """What stands before a softmax and after it."""
    made = {nest.buffer: nest for nest in nests}
    found = dissect(_part(func, before, softmax.source))
    cut = None if found is None else next((each for each in found.cuts if each.result.same_as(softmax.source)), None)
    last = [nest for nest in nests[len(before) + 4 :] if nest.block.init is not None]
    biased = None if cut is None else _scale_and_mask(cut)
    if found is None or biased is None or len(last) != 1:
        return None
    scores = _product(func, made[found.core.result], made)
    values = _product(func, last[0], made)
    y = _result(func, last[0].buffer, nests)
    if scores is None or values is None or y is None or not _is_weighed(scores, values, softmax):
        return None
    scale, mask = biased
    heads = Heads(
        scores.left.operand(scores, (_ROWS, _SUMMED)),
        scores.right.operand(scores, (_COLUMNS, _SUMMED)),
        values.right.operand(values, (_SUMMED, _COLUMNS)),
        y,
        None if mask is None else _broadcast(mask, scores.shape),
        scale * scores.left.factor * scores.right.factor,
    )
    read_only = [each.buffer for each in (heads.q, heads.k, heads.v, heads.mask) if each is not None]
    return heads if all(_is_parameter(func, buffer) for buffer in read_only) else None


def _is_parameter(func: tirx.PrimFunc, buffer: Any) -> bool:
    return any(param.same_as(buffer) for param in func.params)


def _is_weighed(scores: _Product, values: _Product, softmax: windows.Softmax) -> bool:
    """Whether the second product is of the softmax of the first one's result, row by row, under whatever shape."""
    *batch, rows, keys = scores.shape
    weights, compact = values.left, row_major(scores.shape)
    # In the order batch..., rows, columns of the result, keys.
    wanted = [stride if n > 1 else 0 for stride, n in zip(compact, scores.shape, strict=True)]
    wanted.insert(-1, 0)
    return (
        weights.buffer.same_as(softmax.result)
        and weights.factor == 1
        and extents(softmax.source)[-1] == keys == values.summed
        and values.shape[:-1] == (*batch, rows)
        and list(weights.strides) == wanted
    )


def _scale_and_mask(cut: Cut) -> tuple[float, Any] | None:
    """What the scores are multiplied by, and what is added to them then."""
    scale, mask = 1.0, None
    for step in cut.steps:
        if step.name == "linear" and step.numbers[1] == 0 and mask is None:
            scale *= step.numbers[0]
        elif step.name == "add" and step.operand is not None and mask is None:
            mask = step.operand
        else:
            return None
    return scale, mask


def _broadcast(mask: Any, shape: Sequence[int]) -> Operand:
    return Operand(mask.buffer, tuple(n if s else 1 for n, s in zip(shape, mask.strides, strict=True)), mask.strides)


# --- products


@dataclass(frozen=True)
class _Factor:
    """One factor of a product: its strides along batch..., rows, columns and what is summed over; and a number."""

    buffer: Any
    strides: tuple[int, ...]
    factor: float

    def operand(self, product: _Product, axes: tuple[int, int]) -> Operand:
        """The factor as a matrix of two of these axes, after the batch's."""
        shape = (*product.shape, product.summed)
        chosen = [*range(len(shape) - 3), *axes]
        return Operand(self.buffer, tuple(shape[at] for at in chosen), tuple(self.strides[at] for at in chosen))


@dataclass(frozen=True)
class _Product:
    shape: tuple[int, ...]  # batch..., rows, columns
    summed: int
    left: _Factor
    right: _Factor


_ROWS, _COLUMNS, _SUMMED = -3, -2, -1  # places among the strides of a factor


def _product(func: tirx.PrimFunc, nest: Nest, made: Mapping[Any, Nest]) -> _Product | None:
    """y[..., m, n] = sum over k of left[..., m, k] * right[..., k, n], each factor as it lies in memory.

    Transposes and multiplications by a number on the way to a factor become strides and the number.
    """
    found = dissect(_part(func, [nest], nest.buffer))
    if found is None:
        return None
    core = found.core
    size = {var: n for var, n, _ in core.axes}
    summed = [var for var, _, is_summed in core.axes if is_summed]
    results, shape = list(core.result_indices), extents(core.result)
    whole = len(set(results)) == len(results) >= 2 and tuple(size.get(each, -1) for each in results) == shape
    if not whole or len(summed) != 1 or len(size) != len(results) + 1:
        return None
    axes = {var: size[var] for var in (*results, *summed)}
    left = _factor(core.left, core.left_indices, axes, made)
    right = _factor(core.right, core.right_indices, axes, made)
    if left is None or right is None or left.strides[_COLUMNS] or right.strides[_ROWS]:
        return None
    return _Product(shape, size[summed[0]], left, right)


def _factor(buffer: Any, indices: Sequence[Any], axes: Mapping[Any, int], made: Mapping[Any, Nest]) -> _Factor | None:
    """What is read at these indices, followed back through nests that only move and scale."""
    factor = 1.0
    while (nest := made.get(buffer)) is not None and (moved := _moved(nest)) is not None:
        load, number = moved
        here = dict(zip(nest.store.indices, indices, strict=True))
        buffer, factor = load.source, factor * number
        indices = [_substituted(index, here) for index in load.indices]
    if dtype(buffer) != "float32" or -1 in extents(buffer):
        return None
    strides = _strides(buffer, indices, axes)
    return None if strides is None else _Factor(buffer, strides, factor)


def _moved(nest: Nest) -> tuple[Any, float] | None:
    """x[...] * 2, 2 * x[...] or x[...] / 0.5, to each element  →  the load of x, and 2"""
    value, number = nest.store.value, 1.0
    if not nest.is_elementwise():
        return None
    if isinstance(value, tirx.Mul) and isinstance(value.a, tirx.FloatImm):
        value, number = value.b, float(value.a.value)
    elif isinstance(value, tirx.Mul | tirx.Div) and isinstance(value.b, tirx.FloatImm) and float(value.b.value):
        number = float(value.b.value) if isinstance(value, tirx.Mul) else 1 / float(value.b.value)
        value = value.a
    return (value, number) if isinstance(value, tvm.ir.TensorLoad) else None


def _substituted(expr: Any, values: Mapping[Any, Any]) -> Any:
    return tvm_ffi.structural_map(expr, (tirx.Var, lambda var: values.get(var, var)))


def _strides(buffer: Any, indices: Sequence[Any], axes: Mapping[Any, int]) -> tuple[int, ...] | None:
    """How far apart in memory neighbours along each axis are; 0 for one that the indices do not hang on."""
    analyzer = sym.Analyzer()
    for var, size in axes.items():
        kind = str(var.ty.dtype)
        analyzer.bind(var, tvm.ir.Range.from_min_extent(tirx.IntImm(kind, 0), tirx.IntImm(kind, size)))
    offset: Any = tirx.IntImm("int64", 0)
    for index, stride in zip(indices, row_major(extents(buffer)), strict=True):
        offset = offset + index.astype("int64") * tirx.IntImm("int64", stride)
    found = terms(analyzer.simplify(offset), list(axes))
    if found is None or any(divisor != 1 for _, divisor in found) or min(found.values(), default=0) < 0:
        return None
    return tuple(found.get((var, 1), 0) for var in axes)


def _result(func: tirx.PrimFunc, buffer: Any, nests: Sequence[Nest]) -> Operand | None:
    """Where a buffer's elements end up: in a parameter, under other places where nests transpose them on the way."""
    shape = extents(buffer)
    if _is_parameter(func, buffer):
        return Operand(buffer, shape, row_major(shape))
    others = [nest for nest in nests if not nest.buffer.same_as(buffer)]
    users = [nest for nest in others if any(load.source.same_as(buffer) for load in loads(nest.store.value))]
    moved = _moved(users[0]) if len(users) == 1 else None
    if moved is None or moved[1] != 1 or math.prod(extents(users[0].buffer)) != math.prod(shape):
        return None
    further = _result(func, users[0].buffer, nests)
    if further is None:
        return None
    stride = dict(zip(users[0].store.indices, further.strides, strict=True))
    places = list(moved[0].indices)
    long = [place for place, n in zip(places, shape, strict=True) if n > 1]
    if len(set(long)) != len(long) or not all(place in stride for place in long):
        return None
    strides = tuple(stride[place] if n > 1 else 0 for place, n in zip(places, shape, strict=True))
    return Operand(further.buffer, shape, strides)
