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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV

from pipeline.compiler.rules import blocks, injective, inline, tails, terms, work
from pipeline.compiler.rules.blocks import Access, Axis, Block
from pipeline.compiler.rules.machine import Machine, itemsize

_LATENCY = 4  # steps until a result of the vector unit can be used again, with two of them started in each
_LOAD = 0.6  # a vector or a broadcast; two can start in each step, where the first cache has them
_OVERHEAD = 1.0  # what a step of the innermost loop costs besides

_WIDEST = 6  # vectors of a row of a weight that is laid out anew
_MOST_NODES = 600  # of an unrolled elementwise part


@dataclass(frozen=True)
class Tile:
    """Points along the last axis (vectors of lanes), the one before it (across) and the one before that (down).

    The vectors of one row are separate: LLVM keeps a value of 48 lanes in memory, three of 16 in registers.
    """

    vectors: int
    lanes: int
    across: int
    down: int

    @property
    def width(self) -> int:
        return self.vectors * self.lanes


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
) -> None:
    """Schedules a reduction that suits, the elementwise block behind it, and those that only it reads.

    `free` are the parameters that may be laid out anew."""
    is_parallel = work.is_worth_threads([block, epilogue] if epilogue else [block])
    tail = _own_buffer(sch, block, epilogue)
    groups = _groups(block, tail)
    _collapse_buffer(sch, block, groups)
    _collapse(sch, block, groups, [[i] for i, axis in enumerate(block.reduced) if axis.extent > 1])
    _collapse(sch, tail, groups, [])
    block, tail = _reread(sch, block), _reread(sch, tail)
    block, tail = _part_channels(sch, block, tail)
    weight = _free_weight(block, free)
    tile = choose(block, machine, divides=weight is not None)
    if weight is not None and block.spatial[-1].extent % tile.width == 0:
        _lay_out(sch, block, weight, tile.width)
    _Nest(sch, block, tail, producers, tile, machine).build(is_parallel)


def _can_vectorize(block: Block) -> bool:
    axis = next((axis for axis in reversed(block.spatial) if axis.extent > 1), None)
    if axis is None:
        return False
    strides = [blocks.stride(load, axis, tile=_natural_tile(load, axis)) for load in block.loads]
    return all(step in (0, 1) for step in strides) and 1 in strides


def _natural_tile(load: Access, axis: Axis) -> int:
    """0 where an address is linear in the axis, else the longest tile in which it is: the channels of one group."""
    if blocks.stride(load, axis) is not None:
        return 0
    tiles = (axis.extent // groups for groups in range(2, axis.extent) if axis.extent % groups == 0)
    return next((tile for tile in tiles if blocks.stride(load, axis, tile) is not None), 0)


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
    natural, last = _natural(block), len(block.spatial) - 1
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
        if is_last and any(buffer.same_as(each) for each in free) and not _natural(block):
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


def choose(block: Block, machine: Machine, *, divides: bool = False) -> Tile:
    """The tile with the least work for the whole, what is done twice at the ends included.

    With `divides`, a width that divides the last axis is preferred to a slightly better one."""
    last = block.spatial[-1]
    candidates = list(_tiles(block, machine))
    cost, tile = min(candidates, key=lambda candidate: candidate[0])
    exact = [each for each in candidates if last.extent % each[1].width == 0 and each[1].vectors <= _WIDEST]
    if divides and exact:
        near, other = min(exact, key=lambda candidate: candidate[0])
        return other if near <= 1.1 * cost else tile
    return tile


def _tiles(block: Block, machine: Machine) -> Iterator[tuple[float, Tile]]:
    """The tiles that fit the registers, each with what the whole costs."""
    limit = machine.accumulators(block.dtype)
    *outer, last = block.spatial
    across = outer[-1].extent if outer else 1
    down = outer[-2].extent if len(outer) > 1 else 1
    lanes, most = _lanes(block, machine)
    for vectors in (n for n in range(1, min(limit, most) + 1) if most % n == 0 or not _natural(block)):
        for wide in range(1, min(across, limit // vectors) + 1):
            downs = range(1, min(down, limit // vectors // wide) + 1) if wide == across else (1,)
            for deep in (n for n in downs if down % n == 0):
                tiles = -(-last.extent // (vectors * lanes)) * -(-across // wide) * -(-down // deep)
                yield tiles * _step(block, vectors, wide, deep), Tile(vectors, lanes, wide, deep)


def _natural(block: Block) -> int:
    return max((_natural_tile(load, block.spatial[-1]) for load in block.loads), default=0)


def _lanes(block: Block, machine: Machine) -> tuple[int, int]:
    """Lanes of a vector, a power of two, and how many of them a tile may have along the last axis.

    Where groups of channels cut the axis, a tile must not cross from one to the next."""
    natural = _natural(block)
    whole, lanes = natural or block.spatial[-1].extent, 1
    while 2 * lanes <= min(whole, machine.lanes(block.dtype)) and not (natural and natural % (2 * lanes)):
        lanes *= 2
    return lanes, whole // lanes


def _divisor(extent: int, most: int) -> int:
    return next(each for each in range(min(extent, most), 0, -1) if extent % each == 0)


def _step(block: Block, vectors: int, wide: int, deep: int) -> float:
    """Processor steps of one round of the innermost loop: the most of arithmetic, loads and waiting for results."""
    *outer, last = block.spatial
    results = vectors * wide * deep
    loads = 0
    for load in block.loads:
        count = vectors if blocks.stride(load, last, _natural_tile(load, last)) else 1
        count *= wide if outer and blocks.stride(load, outer[-1]) != 0 else 1
        count *= deep if len(outer) > 1 and blocks.stride(load, outer[-2]) != 0 else 1
        loads += count
    return max(results / 2, loads * _LOAD, _LATENCY) + _OVERHEAD


@dataclass
class _Nest:
    """Builds the loops around a tile."""

    sch: s_tir.Schedule
    block: Block
    tail: Block
    producers: Sequence[Block]
    tile: Tile
    machine: Machine

    def build(self, is_parallel: bool) -> None:
        sch, tile = self.sch, self.tile
        *outer, last = sch.get_loops(self.tail.rv)
        wide, *vector = sch.split(last, [None, tile.vectors, tile.lanes])
        inner: list[LoopRV] = []
        if outer:
            outer[-1], across = sch.split(outer[-1], [None, tile.across])
            inner.append(across)
        if len(outer) > 1 and tile.down > 1:
            outer[-2], down = sch.split(outer[-2], [None, tile.down])
            inner.insert(0, down)
        sch.reorder(*outer, wide, *inner, *vector)
        at, part = self._order(outer, wide, is_parallel)
        self._unroll([*inner, *vector], is_small=self._is_small())
        self._compute_at(at)
        for producer in reversed(self.producers):
            if part is None:
                injective.schedule(sch, producer, self.machine)
            else:
                self._make_inside(producer, part)

    def _order(self, outer: list[LoopRV], wide: LoopRV, is_parallel: bool) -> tuple[LoopRV, LoopRV | None]:
        """Puts the loops outside the tile in order: what runs in parallel, then the last axis' tiles, then the rest.

        Returns the innermost, and the one over parts of the other axes where those come first."""
        sch = self.sch
        if not outer or self._weights_dominate():
            sch.reorder(wide, *outer)
            if is_parallel:
                sch.parallel(wide)
            return outer[-1] if outer else wide, None
        spread = outer[:-1] if len(outer) > 1 else outer
        rest = outer[len(spread) :]
        count = blocks.product(int(sch.get(loop).extent) for loop in spread)
        chunk = _divisor(int(sch.get(spread[-1]).extent), max(1, count // self.machine.chunks()))
        # Cut before merging: an axis that runs across the borders of merged ones is more than TVM can follow.
        *before, last = spread
        last, row = sch.split(last, [None, chunk])
        sch.reorder(*before, last, wide, row, *rest)
        part = sch.fuse(*before, last) if before else last
        if is_parallel:
            sch.parallel(part)
        # Where the last tile of a part moves back, what is made inside the part would lie elsewhere.
        moves = not rest and self.block.spatial[-2].extent % self.tile.across != 0
        return rest[-1] if rest else row, None if moves else part

    def _make_inside(self, producer: Block, part: LoopRV) -> None:
        """A block that only this reduction reads, such as padding, is made where it is used, a part at a time."""
        sch, lanes = self.sch, self.machine.lanes(producer.dtype)
        is_contiguous = injective.mergeable(producer) > 0
        sch.compute_at(producer.rv, part, preserve_unit_loops=True)
        sch.annotate(producer.rv, tails.EXACT, True)
        inner = sch.get_loops(producer.rv)[-1]
        extent = producer.spatial[-1].extent
        if is_contiguous and extent % lanes == 0 and int(sch.get(inner).extent) == extent:
            sch.vectorize(sch.split(inner, [None, lanes])[1])

    def _weights_dominate(self) -> bool:
        """Whether the operand that moves along the last axis is larger than the others, so that it is read once."""
        last = self.block.spatial[-1]
        if len(self.block.inputs) < 2 or -(-last.extent // self.tile.width) < 4:
            return False
        along, others = 0, 0
        for buffer in self.block.inputs:
            load = next(load for load in self.block.loads if load.buffer.same_as(buffer))
            bytes_ = blocks.product(int(extent) for extent in buffer.shape) * itemsize(str(buffer.dtype))
            if blocks.stride(load, last, _natural_tile(load, last)) == 1:
                along += bytes_
            else:
                others += bytes_
        return others > 0 and along > others

    def _is_small(self) -> bool:
        """Whether repeating the elementwise part for each vector of a tile keeps the code short."""
        results = self.tile.vectors * self.tile.across * self.tile.down
        return results * terms.size(self.tail.store.value) <= _MOST_NODES and not inline.calls_functions(self.tail)

    def _unroll(self, loops: Sequence[LoopRV], is_small: bool = True) -> None:
        """The loops within a tile: the last is one vector."""
        for loop in loops[:-1] if is_small else ():
            self.sch.unroll(loop)
        if self.tile.lanes > 1:
            self.sch.vectorize(loops[-1])

    def _compute_at(self, loop: LoopRV) -> None:
        sch, block = self.sch, self.block
        sch.compute_at(block.rv, loop, preserve_unit_loops=True)
        sch.set_scope(block.rv, 0, "local")
        loops = sch.get_loops(block.rv)[-len(block.kinds) :]
        spatial, reduced = loops[: len(block.spatial)], loops[len(block.spatial) :]
        sch.reorder(*reduced, *spatial)
        self._unroll([*spatial[:-1], *sch.split(spatial[-1], [self.tile.vectors, self.tile.lanes])])
        sch.decompose_reduction(block.rv, reduced[0])
