"""How long a block takes, roughly, and so whether starting threads for it pays."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.compiler.rules import terms
from pipeline.compiler.rules.blocks import Block
from pipeline.compiler.rules.inline import calls_functions

# Starting a parallel loop costs a few microseconds, so what takes less than this many nanoseconds stays serial.
_WORTH_THREADS = 15_000
_MACS_PER_NS = 50
_NODES_PER_NS = 20
_CALLS_PER_NS = 1


def nanoseconds(block: Block) -> float:
    """Of one core with wide vectors, when scheduled well."""
    nodes = terms.size(block.store.value)
    if block.is_reduction:
        return block.points * nodes / 15 / _MACS_PER_NS
    return block.points * (nodes / _NODES_PER_NS + calls_functions(block) / _CALLS_PER_NS)


def is_worth_threads(blocks: Iterable[Block]) -> bool:
    return sum(map(nanoseconds, blocks)) > _WORTH_THREADS
