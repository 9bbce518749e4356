"""Reductions without weights, read from a function's structure: pooling over windows, and softmax.

Like pipeline.compiler.anatomy for products: names are nothing, and what is not sure is None.

    pad(x); s = sum over a window of x; y = s / count   →   mean pooling of x into y
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from tvm import tirx

from pipeline.compiler.anatomy import REDUCE, Nest, dtype, extents, loads, nests_of, terms, unpadded

_LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Dimension:
    """One dimension of a pooled tensor: its extent and the result's, and the window, 1 where there is none."""

    extent: int
    result: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0

    @property
    def is_pooled(self) -> bool:
        return self.kernel > 1 or self.stride > 1 or self.before > 0 or self.after > 0


@dataclass(frozen=True)
class Pooling:
    """max, mean (of the elements inside the tensor) or padded-mean, over the windows of one to three dimensions."""

    of: str
    source: Any
    result: Any
    dimensions: tuple[Dimension, ...]
    after: tuple[Any, ...]


@dataclass(frozen=True)
class Softmax:
    source: Any
    result: Any
    axis: int
    after: tuple[Any, ...] = ()


# --- pooling


def pooling(func: tirx.PrimFunc) -> Pooling | None:
    """Reads a function that pools: a nest that pads or none, one that reduces, and one that divides a sum."""
    nests = nests_of(func)
    if nests is None or any(-1 in extents(nest.buffer) for nest in nests):
        return None
    at = next((i for i, nest in enumerate(nests) if nest.block.init is not None), None)
    if at is None or at > 1:
        return None
    reduced = _reduced(nests[at])
    if reduced is None:
        return None
    is_max, load = reduced
    source, before, after = load.source, (0,) * len(load.indices), (0,) * len(load.indices)
    if at == 1:
        padding = unpadded(nests[0], is_wanted=_is_lowest if is_max else _is_zero)
        if padding is None or not nests[0].buffer.same_as(source):
            return None
        source, before, after = padding
    dimensions = _dimensions(nests[at], load, extents(source), before, after)
    if dimensions is None or not 1 <= sum(each.is_pooled for each in dimensions) <= 3:
        return None
    if len(dimensions) - sum(each.is_pooled for each in dimensions) not in (1, 2):
        return None
    rest = nests[at + 1 :]
    if is_max:
        return _kept(func, Pooling("max", source, nests[at].buffer, dimensions, ()), rest)
    of = _mean(rest[0], nests[at].buffer, dimensions) if rest else None
    return None if of is None else _kept(func, Pooling(of, source, rest[0].buffer, dimensions, ()), rest[1:])


def _kept(func: tirx.PrimFunc, made: Pooling, rest: Sequence[Nest]) -> Pooling | None:
    """With the nests that remain, where these are elementwise and read nothing of the way to the result."""
    if not all(nest.is_elementwise() for nest in rest):
        return None
    known = {*func.params, made.result, *(nest.buffer for nest in rest)}
    if not all(load.source in known for nest in rest for load in loads(nest.store.value)):
        return None
    return replace(made, after=tuple(nest.statement for nest in rest))


def _reduced(nest: Nest) -> tuple[bool, Any] | None:
    """y[...] = max(y[...], x[...]) from the lowest number, or the sum from 0; and the load of x."""
    init, value = nest.block.init, nest.store.value
    kinds: Mapping[type, tuple[bool, Callable[[Any], bool]]] = {
        tirx.Max: (True, _is_lowest),
        tirx.Add: (False, _is_zero),
    }
    if type(value) not in kinds or dtype(nest.buffer) != "float32":
        return None
    is_max, is_neutral = kinds[type(value)]
    both = value.a, value.b
    if not is_neutral(init.value) or not all(isinstance(each, tvm.ir.TensorLoad) for each in both):
        return None
    if not value.a.source.same_as(nest.buffer) or dtype(value.b.source) != "float32":
        return None
    return is_max, value.b


def _is_lowest(value: Any) -> bool:
    return isinstance(value, tirx.FloatImm) and float(value.value) <= _LOWEST


def _is_zero(value: Any) -> bool:
    return isinstance(value, tirx.FloatImm) and float(value.value) == 0.0


def _dimensions(
    nest: Nest, load: Any, shape: Sequence[int], before: Sequence[int], after: Sequence[int]
) -> tuple[Dimension, ...] | None:
    """Each dimension of the source, if the result's are the same in the same order, or left out where reduced to 1."""
    axes = {axis.var: (int(axis.dom.extent), int(axis.iter_type) == REDUCE) for axis in nest.block.iter_vars}
    made: list[Dimension] = []
    order: list[Any] = []
    for at, index in enumerate(load.indices):
        read = terms(index, list(axes))
        if read is None or any(divisor != 1 for _, divisor in read):
            return None
        outer = [(var, step) for (var, _), step in read.items() if not axes[var][1]]
        inner = [(var, step) for (var, _), step in read.items() if axes[var][1]]
        if len(outer) > 1 or len(inner) > 1 or (not outer and not inner):
            return None
        (y, stride), (r, dilation) = (*outer, (None, 1))[0], (*inner, (None, 1))[0]
        result = axes[y][0] if y is not None else 1
        kernel = axes[r][0] if r is not None else 1
        if min(stride, dilation) < 1 or (r is None and stride != 1):
            return None
        order += [y] if y is not None else []
        made.append(Dimension(shape[at], result, kernel, stride, dilation, before[at], after[at]))
    written = [index for index in nest.store.indices if axes.get(index, (0,))[0] > 1]
    if [var for var in order if axes[var][0] > 1] != written:
        return None
    return tuple(made)


def _mean(nest: Nest, summed: Any, dimensions: Sequence[Dimension]) -> str | None:
    """Whether a nest divides a sum by how many elements a window has, or has inside the tensor."""
    value = nest.store.value
    if not nest.is_elementwise() or not isinstance(value, tirx.Div) or not isinstance(value.a, tvm.ir.TensorLoad):
        return None
    if not value.a.source.same_as(summed) or extents(nest.buffer) != extents(summed):
        return None
    if any(not a.same_as(b) for a, b in zip(value.a.indices, nest.store.indices, strict=True)):
        return None
    shape = extents(nest.buffer)
    grid = dict(zip(nest.store.indices, np.indices(shape, sparse=True), strict=True))
    divisor = _evaluated(value.b, grid)
    if divisor is None:
        return None
    inside = _inside(dimensions).reshape(shape) if math.prod(shape) == _size(dimensions) else None
    if inside is not None and np.array_equal(np.broadcast_to(divisor, shape), inside):
        return "mean"
    whole = math.prod(each.kernel for each in dimensions)
    return "padded-mean" if np.all(divisor == whole) else None


def _size(dimensions: Sequence[Dimension]) -> int:
    return math.prod(each.result for each in dimensions)


def _inside(dimensions: Sequence[Dimension]) -> Any:
    """How many elements of each window lie inside the tensor."""
    counts: Any = np.ones((), np.int64)
    for each in dimensions:
        begin = np.arange(each.result)[:, None] * each.stride - each.before
        places = begin + np.arange(each.kernel) * each.dilation
        counts = counts[..., None] * ((places >= 0) & (places < each.extent)).sum(axis=1)
    return counts


_INTEGERS: dict[type, Callable[[Any, Any], Any]] = {
    tirx.Add: np.add,
    tirx.Sub: np.subtract,
    tirx.Mul: np.multiply,
    tirx.Max: np.maximum,
    tirx.Min: np.minimum,
    tirx.FloorDiv: np.floor_divide,
    tirx.FloorMod: np.mod,
}


def _evaluated(expr: Any, grid: Mapping[Any, Any]) -> Any | None:
    """An expression of indices at all places at once; None where it holds anything but arithmetic."""
    if isinstance(expr, tirx.Var):
        return grid.get(expr)
    if isinstance(expr, tirx.IntImm | tirx.FloatImm):
        return np.asarray(expr.value)
    if isinstance(expr, tirx.Cast):
        return _evaluated(expr.value, grid)
    if type(expr) not in _INTEGERS:
        return None
    a, b = _evaluated(expr.a, grid), _evaluated(expr.b, grid)
    return None if a is None or b is None else _INTEGERS[type(expr)](a, b)


# --- softmax


def softmax(func: tirx.PrimFunc) -> Softmax | None:
    """Reads the four nests of a softmax: m = max(x), e = exp(x - m), s = sum(e), y = e / s."""
    nests = nests_of(func)
    if nests is None or len(nests) != 4:
        return None
    highest, powers, total, divided = nests
    top, bottom = _reduced_axis(highest, True), _reduced_axis(total, False)
    if top is None or bottom is None or top[1] != bottom[1]:
        return None
    source, axis = top
    if not bottom[0].same_as(powers.buffer) or not (powers.is_elementwise() and divided.is_elementwise()):
        return None
    power, quotient = powers.store.value, divided.store.value
    is_exp = isinstance(power, tvm.ir.Call) and str(power.op.name).rpartition(".")[2] == "exp"
    if not is_exp or not isinstance(power.args[0], tirx.Sub) or not isinstance(quotient, tirx.Div):
        return None
    pairs = ((powers, power.args[0], source, highest.buffer), (divided, quotient, powers.buffer, total.buffer))
    if not all(_is_row_by_row(nest, value, whole, per_row, axis) for nest, value, whole, per_row in pairs):
        return None
    return Softmax(source, divided.buffer, axis)


def _reduced_axis(nest: Nest, is_max: bool) -> tuple[Any, int] | None:
    """What a nest reduces, and along which one dimension, all of it."""
    reduced = _reduced(nest) if nest.block.init is not None else None
    if reduced is None or reduced[0] is not is_max:
        return None
    load = reduced[1]
    axes = {axis.var: (int(axis.dom.extent), int(axis.iter_type) == REDUCE) for axis in nest.block.iter_vars}
    along = [at for at, index in enumerate(load.indices) if axes.get(index, (0, False))[1]]
    if len(along) != 1 or any(index not in axes for index in load.indices) or len(axes) != len(load.indices):
        return None
    rest = [index for at, index in enumerate(load.indices) if at != along[0]]
    if len(nest.store.indices) != len(rest) or any(
        not a.same_as(b) for a, b in zip(nest.store.indices, rest, strict=True)
    ):
        return None
    whole = all(axes[index][0] == n for index, n in zip(load.indices, extents(load.source), strict=True))
    return (load.source, along[0]) if whole else None


def _is_row_by_row(nest: Nest, value: Any, whole: Any, per_row: Any, axis: int) -> bool:
    """Whether a nest combines whole[i, j] with per_row[i], at i, j."""
    both = value.a, value.b
    if not all(isinstance(each, tvm.ir.TensorLoad) for each in both) or extents(nest.buffer) != extents(whole):
        return False
    here = list(nest.store.indices)
    rest = [index for at, index in enumerate(here) if at != axis]
    return (
        value.a.source.same_as(whole)
        and value.b.source.same_as(per_row)
        and len(value.b.indices) == len(rest)
        and all(a.same_as(b) for a, b in zip(value.a.indices, here, strict=True))
        and all(a.same_as(b) for a, b in zip(value.b.indices, rest, strict=True))
    )
