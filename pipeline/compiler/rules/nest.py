"""The loops around a register tile: in which order, which of them in parallel, and what is made inside them."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV

from pipeline.compiler.rules import blocks, injective, inline, registers, tails, terms
from pipeline.compiler.rules.blocks import Block
from pipeline.compiler.rules.choices import Choices
from pipeline.compiler.rules.machine import Machine, itemsize
from pipeline.compiler.rules.registers import Tile

_MOST_NODES = 600  # of an unrolled elementwise part
_MOST_ROUNDS = 640  # results times rounds of the reduction that are unrolled
_PARTS = (1.0, 0.25, 0.5, 2.0, 8.0)  # times the usual number of parts, the usual first


class Order(enum.Enum):
    """How the loops outside a tile lie."""

    PARTS = "parts"  # parts of the image, in each the tiles of the last axis, in each the points: weights stay near
    WEIGHTS = "weights"  # the tiles of the last axis, in each all points: every weight is read once
    POINTS = "points"  # parts of the image, in each the points, in each the tiles of the last axis: points stay near


@dataclass
class Nest:
    """Builds the loops around a tile."""

    sch: s_tir.Schedule
    block: Block
    tail: Block
    producers: Sequence[Block]
    tile: Tile
    machine: Machine
    choices: Choices

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
            if part is None or not self.choices.pick("inside", (True, False)):
                injective.schedule(sch, producer, self.machine, Choices())
            else:
                self._make_inside(producer, part)

    def _order(self, outer: list[LoopRV], wide: LoopRV, is_parallel: bool) -> tuple[LoopRV, LoopRV | None]:
        """Puts the loops outside the tile in order: what runs in parallel, then the last axis' tiles, then the rest.

        Returns the innermost, and the one over parts of the other axes where those come first."""
        sch = self.sch
        if not outer:
            if is_parallel:
                sch.parallel(wide)
            return wide, None
        usual = Order.WEIGHTS if self._weights_dominate() else Order.PARTS
        order = self.choices.pick("order", [usual, *(each for each in Order if each is not usual)])
        if order is not Order.WEIGHTS:
            return self._in_parts(outer, wide, order, is_parallel)
        sch.reorder(wide, *outer)
        if is_parallel:
            sch.parallel(wide)
        return outer[-1], None

    def _in_parts(
        self, outer: list[LoopRV], wide: LoopRV, order: Order, is_parallel: bool
    ) -> tuple[LoopRV, LoopRV | None]:
        """As `_order`, for the orders that begin with parts of the image."""
        sch = self.sch
        spread = outer[:-1] if len(outer) > 1 else outer
        rest = outer[len(spread) :]
        count = blocks.product(int(sch.get(loop).extent) for loop in spread)
        extent = int(sch.get(spread[-1]).extent)
        parts = [max(1, int(self.machine.chunks() * times)) for times in _PARTS]
        chunk = self.choices.pick("parts", list(dict.fromkeys(_divisor(extent, max(1, count // n)) for n in parts)))
        # Cut before merging: an axis that runs across the borders of merged ones is more than TVM can follow.
        *before, last = spread
        last, row = sch.split(last, [None, chunk])
        if order is Order.PARTS:
            sch.reorder(*before, last, wide, row, *rest)
        else:
            sch.reorder(*before, last, row, *rest, wide)
        part = sch.fuse(*before, last) if before else last
        if is_parallel:
            sch.parallel(part)
        # Where the last tile of a part moves back, what is made inside the part would lie elsewhere.
        moves = not rest and self.block.spatial[-2].extent % self.tile.across != 0
        innermost = wide if order is Order.POINTS else rest[-1] if rest else row
        return innermost, None if moves else part

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
            if blocks.stride(load, last, registers.natural_tile(load, last)) == 1:
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
        reduced = self._unroll_rounds(reduced)
        sch.decompose_reduction(block.rv, reduced[0])

    def _unroll_rounds(self, reduced: list[LoopRV]) -> list[LoopRV]:
        """Unrolls some of the innermost rounds, where a search decides so."""
        sch = self.sch
        extents = [int(sch.get(loop).extent) for loop in reduced]
        results = self.tile.vectors * self.tile.across * self.tile.down
        rounds = self.choices.pick("unroll", _unrollable(extents, _MOST_ROUNDS // results))
        at = len(reduced)
        while rounds > 1:
            at -= 1
            if rounds < extents[at]:
                outer, inner = sch.split(reduced[at], [None, rounds])
                sch.unroll(inner)
                return [*reduced[:at], outer, inner, *reduced[at + 1 :]]
            sch.unroll(reduced[at])
            rounds //= extents[at]
        return reduced


def _unrollable(extents: Sequence[int], most: int) -> list[int]:
    """How many of the innermost rounds may be unrolled: 1, a part of the last loop, that loop, those outside it.

    (3, 3, 64)  →  1, 4, 2, 8        (3, 3)  →  1, 3, 9
    """
    last = extents[-1]
    found = [part for part in (4, 2, 8) if part < last and last % part == 0]
    whole = 1
    for extent in reversed(extents):
        whole *= extent
        found.append(whole)
    return [1, *dict.fromkeys(each for each in found if 1 < each <= most)]


def _divisor(extent: int, most: int) -> int:
    return next(each for each in range(min(extent, most), 0, -1) if extent % each == 0)
