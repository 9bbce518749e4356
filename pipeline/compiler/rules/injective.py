"""Blocks without reductions: contiguous axes are merged, the innermost is vectorised, the rest runs in parallel.

for n, h, w, c: y[n, h, w, c] = max(x[n, h, w, c] + b[c], 0)
→  for nhw in parallel: for co: for ci in vectorized(16): …
"""

from __future__ import annotations

import itertools
from typing import Any

from tvm import ir, s_tir, sym, tirx
from tvm.s_tir.schedule import LoopRV

from pipeline.compiler.rules import blocks, terms, work
from pipeline.compiler.rules.blocks import Access, Axis, Block
from pipeline.compiler.rules.choices import Choices
from pipeline.compiler.rules.machine import Machine

# Vectors in one innermost step, the usual first, and the side of the square in which a transposition walks.
VECTORS = (4, 1, 2, 8)
_SIDES = (16, 8, 32, 4)
_MOST_PARTS = 8


def schedule(sch: s_tir.Schedule, block: Block, machine: Machine, choices: Choices) -> None:
    """Schedules one block at the root. Any block without reductions will do."""
    loops = sch.get_loops(block.rv)
    if not loops:
        return
    count = mergeable(block)
    outer = loops[: len(loops) - max(1, count)]
    if count:
        most = max(1, blocks.product(axis.extent for axis in block.spatial[-count:]) // machine.lanes(block.dtype))
        vectors = choices.pick("vectors", list(dict.fromkeys(min(each, most) for each in VECTORS)))
        outer = [*outer, *vectorize(sch, block, loops, count, machine, vectors)]
    bounds = [] if count else _bounds(block)
    if not count and not bounds:
        outer = _walk_in_squares(sch, block, loops, choices.pick("square", _SIDES))
    if outer and work.pick_parallel([block], choices):
        sch.parallel(sch.fuse(*outer))
    if bounds:
        part(sch, block)


def part(sch: s_tir.Schedule, block: Block) -> None:
    """Cuts the last loop where a condition changes along its axis, if it runs along it from its start."""
    loop = sch.get(sch.get_loops(block.rv)[-1])
    realize = loop.body
    if not isinstance(realize, s_tir.SBlockRealize) or not realize.iter_values[-1].same_as(loop.loop_var):
        return
    bounds = [bound for bound in _bounds(block) if bound < int(loop.extent)]
    if bounds:
        sizes = [end - start for start, end in itertools.pairwise([0, *bounds])]
        sch.loop_partition(sch.get_loops(block.rv)[-1], [*sizes, None])


def vectorize(
    sch: s_tir.Schedule, block: Block, loops: list[LoopRV], count: int, machine: Machine, most: int
) -> list[LoopRV]:
    """Merges the last `count` loops and vectorises them, at most `most` vectors a step. Returns the loop over steps,
    where there is one."""
    inner = sch.fuse(*loops[-count:]) if count > 1 else loops[-1]
    extent = blocks.product(axis.extent for axis in block.spatial[-count:])
    lanes = machine.lanes(block.dtype)
    if extent <= lanes:
        if extent > 1:
            sch.vectorize(inner)
        return []
    vectors = min(most, extent // lanes)
    outer, inner = sch.split(inner, [None, vectors * lanes])
    sch.vectorize(inner)
    return [outer]


def mergeable(block: Block) -> int:
    """How many of the last axes can be walked as one, with every address moving by 0 or 1 and no condition changing."""
    for count in range(len(block.spatial), 0, -1):
        if _is_contiguous(block, count):
            return count
    return 0


def _is_contiguous(block: Block, count: int) -> bool:
    last = block.spatial[-count:]
    merged = Axis(tirx.Var("merged", terms.dtype(last[0].var)), blocks.product(axis.extent for axis in last))
    place: dict[Any, Any] = {}
    below = 1
    for axis in reversed(last):
        place[axis.var] = tirx.floormod(tirx.floordiv(merged.var, below), axis.extent)
        below *= axis.extent
    if len(last) == 1:
        place = {last[0].var: merged.var}
    if _is_conditional(block, last):
        return False
    steps = [_step(access, place, merged, block) for access in (block.result, *block.loads)]
    return merged.extent == 1 or (steps[0] == 1 and all(step in (0, 1) for step in steps))


def _step(access: Access, place: dict[Any, Any], merged: Axis, block: Block) -> int | None:
    analyzer = sym.Analyzer()
    for axis in block.spatial:
        analyzer.bind(axis.var, blocks.span(axis.var, axis.extent))
    indices = tuple(analyzer.simplify(terms.substitute(index, place)) for index in access.indices)
    return blocks.stride(Access(access.buffer, indices), merged)


def _is_conditional(block: Block, axes: tuple[Axis, ...]) -> bool:
    """Whether a condition in the block's value depends on one of these axes."""
    conditions = [
        c.args[0] for c in terms.nodes(block.store.value, ir.Call) if terms.function_name(c) == "if_then_else"
    ]
    moving = [axis.var for axis in axes if axis.extent > 1]
    return any(var.same_as(each) for c in conditions for var in terms.variables(c) for each in moving)


def _bounds(block: Block) -> list[int]:
    """Where along the last axis a condition changes: the seams of a concatenation, the edges of padding. Nothing where
    one of them depends on more than that axis, or where they are many."""
    last, found = block.spatial[-1], set()
    calls = (c for c in terms.nodes(block.store.value, ir.Call) if terms.function_name(c) == "if_then_else")
    for condition in (each for call in calls for each in terms.conjuncts(call.args[0])):
        if isinstance(condition, tirx.LE) and condition.b.same_as(last.var) and isinstance(condition.a, tirx.IntImm):
            found.add(int(condition.a))
        elif isinstance(condition, tirx.LT) and condition.a.same_as(last.var) and isinstance(condition.b, tirx.IntImm):
            found.add(int(condition.b))
        elif any(var.same_as(last.var) for var in terms.variables(condition)):
            return []
    inside = sorted(bound for bound in found if 0 < bound < last.extent)
    return inside if len(inside) <= _MOST_PARTS else []


def _walk_in_squares(sch: s_tir.Schedule, block: Block, loops: list[LoopRV], side: int) -> list[LoopRV]:
    """Where no axis is contiguous in all that is accessed: both contiguous axes in small squares, so that cache lines
    are used whole. Returns the outer loops."""
    other = next((i for i, axis in enumerate(block.spatial[:-1]) if axis.extent > 1 and _is_inner(block, axis)), None)
    if other is None or block.spatial[-1].extent == 1:
        return loops[:-1]
    outer, inner = sch.split(loops[other], [None, min(side, block.spatial[other].extent)])
    last_outer, last = sch.split(loops[-1], [None, min(side, block.spatial[-1].extent)])
    rest = [loop for i, loop in enumerate(loops[:-1]) if i != other]
    sch.reorder(*rest, outer, last_outer, inner, last)
    return [*rest, outer, last_outer]


def _is_inner(block: Block, axis: Axis) -> bool:
    return any(blocks.stride(load, axis) == 1 for load in block.loads)
