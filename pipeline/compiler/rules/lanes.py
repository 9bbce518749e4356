"""The innermost part of a reduction cut into vectors, whatever its length.

    for k in range(214): s = s + x[k]
    →  for o in range(14): for l in range(16):  s = s + select(k >= o*16, x[k], 0),  k = min(o*16, 198) + l

The last vector moves back until it fits, and what an earlier one has counted adds the value that the sum starts from.
A split of TVM's would leave a predicate there, which later steps of a schedule lose.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import SBlockRealize

from pipeline.compiler.rules import blocks, terms
from pipeline.compiler.rules.blocks import Block


def count(block: Block) -> int:
    """How many of the last reduced axes can be walked as one: those contiguous in everything that is read."""
    found = 1
    while found < len(block.reduced):
        outer, inner = block.reduced[-found - 1], block.reduced[-found]
        steps = [(blocks.stride(load, outer), blocks.stride(load, inner)) for load in block.loads]
        if not all(a is not None and b is not None and a == b * inner.extent for a, b in steps):
            break
        found += 1
    return found


def width(block: Block, lanes: int) -> int:
    """How many partial results to keep: 0 where the reduction is too short, several vectors where it is long."""
    extent = blocks.product(axis.extent for axis in block.reduced[-count(block) :])
    if extent < 2 * lanes:
        return 0
    return lanes * (4 if extent >= 128 * lanes else 2 if extent >= 32 * lanes else 1)


def widths(block: Block, lanes: int) -> list[int]:
    """That width, and what else may be tried: other numbers of vectors, and one that leaves no tail."""
    first = width(block, lanes)
    if not first:
        return [0]
    extent = blocks.product(axis.extent for axis in block.reduced[-count(block) :])
    exact = [n for n in range(lanes // 2, 8 * lanes + 1, lanes // 2) if extent % n == 0] if lanes > 1 else []
    others = [*exact[::-1][:3], *(n * lanes for n in (4, 2, 1, 8) if 2 * n * lanes <= extent)]
    return list(dict.fromkeys([first, *others]))


def cut(func: tirx.PrimFunc, nest: Any, block: Block, lanes: int) -> tirx.PrimFunc:
    """The function with the nest of a block, which starts at the loop `nest`, replaced as shown above."""
    new = _nest(block, lanes)
    return func.with_body(terms.rewrite(func.body, tirx.For, lambda loop: new if loop.same_as(nest) else loop))


def _nest(block: Block, lanes: int) -> Any:
    merged = count(block)
    kept, last = [*block.spatial, *block.reduced[:-merged]], block.reduced[-merged:]
    extent = blocks.product(axis.extent for axis in last)
    dtype = terms.dtype(last[0].var)
    rounds, lane = tirx.Var("round", dtype), tirx.Var("lane", dtype)
    start = rounds * lanes if extent % lanes == 0 else tirx.min(rounds * lanes, terms.integer(extent - lanes, rounds))
    place: dict[Any, Any] = {}
    below = 1
    for axis in reversed(last):
        index = tirx.floordiv(start + lane, terms.integer(below, lane)) if below > 1 else start + lane
        place[axis.var] = tirx.floormod(index, terms.integer(axis.extent, lane)) if len(last) > 1 else index
        below *= axis.extent
    store = block.store
    value = terms.substitute(store.value, place)
    if extent % lanes:
        value = _counted_once(value, block, start + lane >= rounds * lanes)
    body = tirx.BufferStore(store.buffer, value, store.indices)
    spatial = {axis.var for axis in block.spatial}
    axes = [tirx.IterVar(blocks.span(a.var, a.extent), a.var, 0 if a.var in spatial else 2) for a in kept]
    axes += [tirx.IterVar(blocks.span(rounds, -(-extent // lanes)), rounds, 2)]
    axes += [tirx.IterVar(blocks.span(lane, lanes), lane, 2)]
    stmt = block.stmt
    loads = terms.nodes(value, tvm.ir.TensorLoad)
    reads = [_region(load) for load in loads if not load.source.same_as(block.target)]
    made = tvm.s_tir.SBlock(axes, reads, stmt.writes, stmt.name_hint, body, stmt.init, [], [], stmt.annotations)
    loops = [tirx.Var(f"i{at}", dtype) for at in range(len(axes))]
    nest: Any = SBlockRealize(loops, tirx.const(True, "bool"), made)
    for loop, axis in reversed(list(zip(loops, axes, strict=True))):
        nest = tirx.For(loop, terms.integer(0, loop), axis.dom.extent, tirx.ForKind.SERIAL, nest)
    return nest


def _counted_once(value: Any, block: Block, is_new: Any) -> Any:
    """s + x  →  s + select(is_new, x, start). Reductions are written as one operation on the result and a term."""
    kind, start = type(value), block.stmt.init.value
    a, b = value.a, value.b
    if _is_result(a, block):
        return kind(a, tirx.Select(is_new, b, start))
    return kind(tirx.Select(is_new, a, start), b)


def combines(block: Block) -> bool:
    """Whether a block's update has the form result + term, result * term, max or min of them."""
    value = block.store.value
    return isinstance(value, tirx.Add | tirx.Mul | tirx.Max | tirx.Min) and (
        _is_result(value.a, block) != _is_result(value.b, block)
    )


def _is_result(value: Any, block: Block) -> bool:
    return isinstance(value, tvm.ir.TensorLoad) and bool(value.source.same_as(block.target))


def _region(load: Any) -> Any:
    return tirx.BufferRegion(load.source, [tvm.ir.Range(index, index + 1) for index in load.indices])
