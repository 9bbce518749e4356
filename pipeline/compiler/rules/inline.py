"""Elementwise blocks merged into the blocks that read them, so that a value is made where it is used.

t = x + b;  u = max(t, 0)            →  u = max(x + b, 0)
e = x * x;  s += e                   →  s += x * x
p = pad(x);  y += p[..] * w[..]      →  as it is: a window reads each element of p many times
e = exp(x);  s += e;  y = e / s      →  as it is: e would be worked out twice
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import ir, s_tir

from pipeline.compiler.rules import blocks, terms
from pipeline.compiler.rules.blocks import Block

# Merging may repeat an expression that is used more than once; past this many nodes it is no longer worth it.
_MOST_NODES = 400
# Calls that cost no more than an addition.
_CHEAP = {"", "if_then_else", "likely", "reinterpret", "fabs", "sqrt", "floor", "ceil", "round", "nearbyint", "trunc"}


def inline(sch: s_tir.Schedule) -> list[Block] | None:
    """Merges what can be merged. Returns the blocks that are left, in order; None where one is not plain."""
    while True:
        found = blocks.all_blocks(sch)
        if found is None:
            return None
        candidate = next((block for block in found if _merges(block, found)), None)
        if candidate is None:
            return found
        sch.compute_inline(candidate.rv)


def _merges(block: Block, everything: Sequence[Block]) -> bool:
    if block.is_reduction or not block.writes_in_order:
        return False
    readers = [other for other in everything if blocks.reads(other, block.target)]
    if not readers or (len(readers) > 1 and calls_functions(block) and any(r.is_reduction for r in readers)):
        return False
    return all(_takes(reader, block) for reader in readers)


def _takes(reader: Block, block: Block) -> bool:
    """Whether a reader may work out a block's value each time that it reads it."""
    uses = sum(load.buffer.same_as(block.target) for load in reader.loads)
    if terms.size(reader.store.value) + uses * terms.size(block.store.value) > _MOST_NODES:
        return False
    return not reader.is_reduction or is_view(block) or reader.points * uses <= block.points


def is_view(block: Block) -> bool:
    """Whether a block only moves elements: a transposition, a reshape, a slice."""
    return isinstance(block.store.value, ir.TensorLoad)


def calls_functions(block: Block) -> bool:
    """Whether a block's value needs exp, tanh or the like."""
    return any(terms.function_name(call) not in _CHEAP for call in terms.nodes(block.store.value, ir.Call))
