"""Reductions in register tiles: convolution, matrix product, depthwise convolution, pooling, sums over outer axes.

The innermost spatial axis of the result is vectorised, and a few points of the axes beside it are worked out at once,
so that each vector that is loaded is used several times:

    y[n, h, w, c] = sum over kh, kw, k of x[n, h + kh, w + kw, k] * f[kh, kw, k, c];  z = max(y + b[c], 0)
    →  for n, h in parallel: for c by 32: for w by 7:
           t[7, 32] = 0
           for kh, kw, k: for w in unrolled(7): for c in vectorized(32): t += x * f
           z = max(t + b, 0)

The tile t stays in registers. Axes whose addresses are contiguous are merged first, so that the tile of a 1x1
convolution runs over the whole image. Tiles that do not divide are left to pipeline.compiler.rules.tails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import s_tir, tirx

from pipeline.compiler.rules import blocks, registers, terms, work
from pipeline.compiler.rules.blocks import Block
from pipeline.compiler.rules.choices import Choices
from pipeline.compiler.rules.machine import Machine
from pipeline.compiler.rules.nest import Nest


def suits(block: Block) -> bool:
    """Whether every load moves by 0 or 1 along the last axis of the result."""
    is_ordered = block.kinds == "S" * len(block.spatial) + "R" * len(block.reduced)
    has_rounds = any(axis.extent > 1 for axis in block.reduced)
    return is_ordered and has_rounds and block.writes_in_order and _can_vectorize(block)


def schedule(
    sch: s_tir.Schedule,
    block: Block,
    epilogue: Block | None,
    producers: Sequence[Block],
    free: Sequence[Any],
    machine: Machine,
    choices: Choices,
) -> None:
    """Schedules a reduction that suits, the elementwise block behind it, and those that only it reads.

    `free` are the parameters that may be laid out anew."""
    is_parallel = work.pick_parallel([block, epilogue] if epilogue else [block], choices)
    tail = _own_buffer(sch, block, epilogue)
    groups = _groups(block, tail)
    _collapse_buffer(sch, block, groups)
    _collapse(sch, block, groups, [[i] for i, axis in enumerate(block.reduced) if axis.extent > 1])
    _collapse(sch, tail, groups, [])
    block, tail = _reread(sch, block), _reread(sch, tail)
    block, tail = _part_channels(sch, block, tail)
    weight = _free_weight(block, free)
    tile = choices.pick("tile", registers.ranked(block, machine, divides=weight is not None))
    if weight is not None and block.spatial[-1].extent % tile.width == 0 and choices.pick("packed", (True, False)):
        _lay_out(sch, block, weight, tile.width)
    Nest(sch, block, tail, producers, tile, machine, choices).build(is_parallel)


def _can_vectorize(block: Block) -> bool:
    axis = next((axis for axis in reversed(block.spatial) if axis.extent > 1), None)
    if axis is None:
        return False
    strides = [blocks.stride(load, axis, tile=registers.natural_tile(load, axis)) for load in block.loads]
    return all(step in (0, 1) for step in strides) and 1 in strides


def _own_buffer(sch: s_tir.Schedule, block: Block, epilogue: Block | None) -> Block:
    """The block that takes the tile's result: the epilogue, or a copy where there is none."""
    if epilogue is not None:
        return epilogue
    rv = sch.cache_write(block.rv, 0, "local")
    copy = blocks.read(sch, rv)
    assert copy is not None
    return copy


def _part_channels(sch: s_tir.Schedule, block: Block, tail: Block) -> tuple[Block, Block]:
    """Where the last axis is cut into groups of channels, makes the group an axis of its own, before all others.

    y[p, c], c in range(272), that reads x[p, c // 68 * 68 + k]
    →  y[g, p, c], g in range(4), c in range(68), that reads x[p, g * 68 + k]
    """
    natural, last = registers.natural(block), len(block.spatial) - 1
    if not natural or any(axis.extent == 1 for axis in block.spatial):
        return block, tail

    def parted(*axes: Any) -> list[Any]:
        group, channel = tirx.floordiv(axes[last], natural), tirx.floormod(axes[last], natural)
        return [group, *axes[:last], channel, *axes[last + 1 :]]

    dtype = terms.dtype(block.spatial[0].var)
    count = len(block.spatial)
    for each in (block, tail):
        index_map = tirx.IndexMap.from_func(parted, len(each.kinds), index_dtype=dtype)
        sch.transform_block_layout(each.rv, index_map)
    sch.transform_layout(block.rv, ("write", 0), tirx.IndexMap.from_func(parted, count, index_dtype=dtype))
    return _reread(sch, block), _reread(sch, tail)


def _reread(sch: s_tir.Schedule, block: Block) -> Block:
    """A block as it is after a change of its axes."""
    changed = blocks.read(sch, block.rv)
    assert changed is not None
    return changed


def _groups(block: Block, tail: Block) -> list[list[int]]:
    """Which spatial axes can be walked as one: neighbours along which every address moves evenly. The last that counts
    stays alone, and axes of extent 1 go with any neighbour."""
    last = max(i for i, axis in enumerate(block.spatial) if axis.extent > 1)
    own, behind = _strides(block), _strides(tail)
    groups: list[list[int]] = []
    for i in range(last):
        real = [j for j in groups[-1] if block.spatial[j].extent > 1] if groups else []
        extent = block.spatial[i].extent
        if groups and (
            not real or extent == 1 or (_even(own, real[-1], i, extent) and _even(behind, real[-1], i, extent))
        ):
            groups[-1].append(i)
        else:
            groups.append([i])
    return [*groups, list(range(last, len(block.spatial)))]


def _strides(block: Block) -> list[list[int | None]]:
    return [[blocks.stride(load, axis) for axis in block.spatial] for load in block.loads]


def _even(strides: list[list[int | None]], outer: int, inner: int, extent: int) -> bool:
    pairs = [(each[outer], each[inner]) for each in strides]
    return all(a is not None and b is not None and a == b * extent for a, b in pairs)


def _collapse(sch: s_tir.Schedule, block: Block, spatial: list[list[int]], reduced: list[list[int]]) -> None:
    """Makes one axis of each group; reduced axes in no group have extent 1 and go, but for one."""
    if block.reduced and not reduced:
        reduced = [[0]]
    own = iter(range(len(block.spatial))), iter(range(len(block.reduced)))
    where = [(kind, next(own[kind == "R"])) for kind in block.kinds]
    axes = {"S": block.spatial, "R": block.reduced}

    def index_map(*variables: Any) -> list[Any]:
        at = dict(zip(where, variables, strict=True))

        def merged(kind: str, group: list[int]) -> Any:
            return _flat([(at[kind, i], axes[kind][i].extent) for i in group])

        return [*(merged("S", group) for group in spatial), *(merged("R", group) for group in reduced)]

    dtype = terms.dtype(block.spatial[0].var)
    sch.transform_block_layout(block.rv, tirx.IndexMap.from_func(index_map, len(where), index_dtype=dtype))


def _collapse_buffer(sch: s_tir.Schedule, block: Block, groups: list[list[int]]) -> None:
    """Gives the buffer between a reduction and the block behind it one dimension for each group."""

    def index_map(*indices: Any) -> list[Any]:
        return [_flat([(indices[i], block.spatial[i].extent) for i in group]) for group in groups]

    dtype = terms.dtype(block.spatial[0].var)
    merged = tirx.IndexMap.from_func(index_map, len(block.spatial), index_dtype=dtype)
    sch.transform_layout(block.rv, ("write", 0), merged)


def _flat(parts: list[tuple[Any, int]]) -> Any:
    """[(i, 4), (j, 8)]  →  i*8 + j"""
    index = parts[0][0]
    for part, extent in parts[1:]:
        index = index * extent + part
    return index


def _free_weight(block: Block, free: Sequence[Any]) -> int | None:
    """Which of a block's inputs is a weight that may be laid out anew: one whose last dimension is the last axis."""
    last = block.spatial[-1].var
    for index, buffer in enumerate(block.inputs):
        loads = [load for load in block.loads if load.buffer.same_as(buffer)]
        is_last = len(loads) == 1 and loads[0].indices[-1].same_as(last)
        if is_last and any(buffer.same_as(each) for each in free) and not registers.natural(block):
            return index
    return None


def _lay_out(sch: s_tir.Schedule, block: Block, weight: int, width: int) -> None:
    """Copies a weight so that a tile reads it in order. The copy is marked as one that may run once, ahead.

    f[kh, kw, k, c]  →  packed[c // 32, kh, kw, k, c % 32]
    """

    def index_map(*indices: Any) -> list[Any]:
        return [tirx.floordiv(indices[-1], width), *indices[:-1], tirx.floormod(indices[-1], width)]

    buffer = block.inputs[weight]
    place = next(i for i, region in enumerate(sch.get(block.rv).reads) if region.source.same_as(buffer))
    copy = sch.cache_read(block.rv, place, "global")
    dtype = terms.dtype(block.spatial[0].var)
    packed = tirx.IndexMap.from_func(index_map, len(buffer.shape), index_dtype=dtype)
    sch.transform_layout(copy, ("write", 0), packed)
    sch.annotate(copy, "meta_schedule.layout_rewrite_preproc", True)
