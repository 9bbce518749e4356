"""Which register tile a reduction gets: points of the result that are worked out at once, each vector in a register.

A tile is chosen by an estimate of what the whole reduction costs with it: for each round of the innermost loop the most
of arithmetic, loads and waiting for results. What is done twice at the ends, where a tile does not divide, counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.compiler.rules import blocks
from pipeline.compiler.rules.blocks import Access, Axis, Block
from pipeline.compiler.rules.machine import Machine

_LATENCY = 4  # steps until a result of the vector unit can be used again, with two of them started in each
_LOAD = 0.6  # a vector or a broadcast; two can start in each step, where the first cache has them
_OVERHEAD = 1.0  # what a step of the innermost loop costs besides

_WIDEST = 6  # vectors of a row of a weight that is laid out anew
_TRIED, _OF_EACH_WIDTH = 8, 2  # tiles that a search may try


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


def ranked(block: Block, machine: Machine, *, divides: bool = False) -> list[Tile]:
    """The tile that `choose` takes, then the best others, of each width a few."""
    best: list[Tile] = [choose(block, machine, divides=divides)]
    widths: dict[int, int] = {best[0].vectors: 1}
    for _, tile in sorted(_tiles(block, machine), key=lambda candidate: candidate[0]):
        if tile not in best and widths.get(tile.vectors, 0) < _OF_EACH_WIDTH:
            best.append(tile)
            widths[tile.vectors] = widths.get(tile.vectors, 0) + 1
    return best[:_TRIED]


def _tiles(block: Block, machine: Machine) -> Iterator[tuple[float, Tile]]:
    """The tiles that fit the registers, each with what the whole costs."""
    limit = machine.accumulators(block.dtype)
    *outer, last = block.spatial
    across = outer[-1].extent if outer else 1
    down = outer[-2].extent if len(outer) > 1 else 1
    lanes, most = _lanes(block, machine)
    for vectors in (n for n in range(1, min(limit, most) + 1) if most % n == 0 or not natural(block)):
        for wide in range(1, min(across, limit // vectors) + 1):
            downs = range(1, min(down, limit // vectors // wide) + 1) if wide == across else (1,)
            for deep in (n for n in downs if down % n == 0):
                tiles = -(-last.extent // (vectors * lanes)) * -(-across // wide) * -(-down // deep)
                yield tiles * _step(block, vectors, wide, deep), Tile(vectors, lanes, wide, deep)


def natural(block: Block) -> int:
    return max((natural_tile(load, block.spatial[-1]) for load in block.loads), default=0)


def _lanes(block: Block, machine: Machine) -> tuple[int, int]:
    """Lanes of a vector, a power of two, and how many of them a tile may have along the last axis.

    Where groups of channels cut the axis, a tile must not cross from one to the next."""
    group = natural(block)
    whole, lanes = group or block.spatial[-1].extent, 1
    while 2 * lanes <= min(whole, machine.lanes(block.dtype)) and not (group and group % (2 * lanes)):
        lanes *= 2
    return lanes, whole // lanes


def _step(block: Block, vectors: int, wide: int, deep: int) -> float:
    """Processor steps of one round of the innermost loop: the most of arithmetic, loads and waiting for results."""
    *outer, last = block.spatial
    results = vectors * wide * deep
    loads = 0
    for load in block.loads:
        count = vectors if blocks.stride(load, last, natural_tile(load, last)) else 1
        count *= wide if outer and blocks.stride(load, outer[-1]) != 0 else 1
        count *= deep if len(outer) > 1 and blocks.stride(load, outer[-2]) != 0 else 1
        loads += count
    return max(results / 2, loads * _LOAD, _LATENCY) + _OVERHEAD


def natural_tile(load: Access, axis: Axis) -> int:
    """0 where an address is linear in the axis, else the longest tile in which it is: the channels of one group."""
    if blocks.stride(load, axis) is not None:
        return 0
    tiles = (axis.extent // groups for groups in range(2, axis.extent) if axis.extent % groups == 0)
    return next((tile for tile in tiles if blocks.stride(load, axis, tile) is not None), 0)
