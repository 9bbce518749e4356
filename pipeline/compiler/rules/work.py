"""How long a block takes, roughly, and so whether starting threads for it pays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.compiler.rules import terms
from pipeline.compiler.rules.blocks import Block
from pipeline.compiler.rules.choices import Choices
from pipeline.compiler.rules.inline import calls_functions

# Starting a parallel loop costs a few microseconds, so what takes less than this many nanoseconds stays serial.
_WORTH_THREADS = 15_000
_DOUBT = 4  # how many times more or less it may take in truth
_MACS_PER_NS = 50
_NODES_PER_NS = 20
_CALLS_PER_NS = 1


def nanoseconds(block: Block) -> float:
    """Of one core with wide vectors, when scheduled well."""
    nodes = terms.size(block.store.value)
    if block.is_reduction:
        return block.points * nodes / 15 / _MACS_PER_NS
    return block.points * (nodes / _NODES_PER_NS + calls_functions(block) / _CALLS_PER_NS)


def pick_parallel(blocks: Sequence[Block], choices: Choices) -> bool:
    """Whether to start threads: where it pays, unless it is close and a search decides otherwise."""
    total = sum(map(nanoseconds, blocks))
    is_worth = total > _WORTH_THREADS
    if not _WORTH_THREADS / _DOUBT < total < _WORTH_THREADS * _DOUBT:
        return is_worth
    return choices.pick("parallel", (is_worth, not is_worth))


def is_worth_threads(blocks: Iterable[Block]) -> bool:
    return sum(map(nanoseconds, blocks)) > _WORTH_THREADS
