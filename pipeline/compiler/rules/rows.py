"""Reductions along the innermost axis, alone or in a chain: softmax, normalisation, means of channels.

Every block of the chain is worked out for one row after the other, rows in parallel. A reduction keeps as many partial
results as a vector has lanes, and adds them up at the end:

    m[i] = max over k of x[i, k];  e = exp(x - m[i]);  s[i] = sum over k of e[i, k];  y = e / s[i]
    →  for i in parallel:
           for k by 16: for l in vectorized(16): p[l] = max(p[l], x[i, k + l]);   m = max over l of p[l]
           for k by 16: …                                                         e, s, y alike
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from tvm import ir, s_tir, tirx
from tvm.s_tir.schedule import SBlockRV

from pipeline.compiler.rules import blocks, injective, lanes, terms, work
from pipeline.compiler.rules.blocks import Block
from pipeline.compiler.rules.choices import Choices
from pipeline.compiler.rules.machine import Machine

_MOST_ROUNDS = 64  # that may be unrolled


def suits(chain: Sequence[Block]) -> bool:
    """Whether blocks share leading axes, and every reduction among them is along contiguous elements."""
    reductions = [block for block in chain if block.is_reduction]
    return bool(reductions) and all(map(_reduces_inside, reductions)) and shared_rows(chain) is not None


def schedule(
    sch: s_tir.Schedule, chain: Sequence[Block], cut: Collection[str], machine: Machine, choices: Choices
) -> None:
    """Schedules blocks that suit; the last hosts the others. `cut` names those whose last axis is one of lanes."""
    lead = shared_rows(chain)
    assert lead is not None
    is_parallel = work.pick_parallel(chain, choices)
    vectors = choices.pick("vectors", injective.VECTORS)
    rounds = choices.pick("rounds", (0, _MOST_ROUNDS)) if cut else 0
    partials: list[SBlockRV] = []
    within: list[SBlockRV] = []
    for block in chain:
        if block.name in cut:
            partials.append(sch.rfactor(sch.get_loops(block.rv)[-1], 0))
            within.append(partials[-1])
        within.append(block.rv)
    loops = sch.get_loops(within[-1])[:lead]
    row = sch.fuse(*loops) if len(loops) > 1 else loops[0]
    if is_parallel:
        sch.parallel(row)
    for rv in reversed(within[:-1]):
        sch.compute_at(rv, row, preserve_unit_loops=True)
    for block in chain:
        if not block.is_reduction:
            _vectorize(sch, block, lead, machine, vectors)
    for partial in partials:
        _finish(sch, partial, rounds)


def divides(block: Block) -> bool:
    """Whether an elementwise block divides by what is the same along a row."""
    return not block.is_reduction and any(_is_of_row(each, block) for each in terms.nodes(block.store.value, tirx.Div))


def multiplied(func: tirx.PrimFunc, block: Block) -> tirx.PrimFunc:
    """y = e / s[i]  →  y = e * (1 / s[i]), where one division does for a row. The result may differ in its last bit."""

    def inverse(division: Any) -> Any:
        if not _is_of_row(division, block):
            return division
        return division.a * (tirx.const(1, block.dtype) / division.b)

    store = block.store
    value = terms.rewrite(store.value, tirx.Div, inverse)
    new = tirx.BufferStore(store.buffer, value, store.indices)
    return func.with_body(terms.rewrite(func.body, tirx.BufferStore, lambda each: new if each.same_as(store) else each))


def _is_of_row(division: Any, block: Block) -> bool:
    last = block.spatial[-1]
    is_float = terms.dtype(division).startswith("float") and terms.dtype(division) == block.dtype
    is_constant = not terms.nodes(division.b, ir.TensorLoad)
    return is_float and not is_constant and all(not var.same_as(last.var) for var in terms.variables(division.b))


def shared_rows(chain: Sequence[Block]) -> int | None:
    """How many leading axes all blocks have in common, one result of a row depending on that row alone."""
    host = chain[-1]
    lead = 0
    for i, axis in enumerate(host.spatial):
        if not all(len(b.spatial) > i and b.spatial[i].extent == axis.extent and b.kinds[i] == "S" for b in chain):
            break
        lead = i + 1
    written = {block.target: block for block in chain}
    while lead and not all(_stays_in_row(block, written, lead) for block in chain):
        lead -= 1
    return lead or None


def _stays_in_row(block: Block, written: dict[object, Block], lead: int) -> bool:
    accesses = [block.result, *(load for load in block.loads if load.buffer in written)]
    return all(blocks.is_identity(access.indices[:lead], block.spatial[:lead]) for access in accesses)


def _reduces_inside(block: Block) -> bool:
    if not block.kinds.endswith("R") or not lanes.combines(block):
        return False
    return all(blocks.stride(load, block.reduced[-1]) in (0, 1) for load in block.loads)


def _finish(sch: s_tir.Schedule, partial: SBlockRV, unrolled: int) -> None:
    """Puts the lanes innermost, as one vector, and clears them before the first round. As many rounds as are to be
    unrolled are: each then knows whether it is the last, whose vector may overlap.

    An rfactor makes the lane the first axis of the block of partial results."""
    sch.set_scope(partial, 0, "local")
    axes = sch.get(partial).iter_vars
    loops = sch.get_loops(partial)[-len(axes) :]
    rounds = [loop for loop, axis in zip(loops, axes, strict=True) if axis.iter_type == 2]
    sch.reorder(*rounds, loops[0])
    sch.vectorize(loops[0])
    sch.decompose_reduction(partial, rounds[0])
    if unrolled and int(sch.get(rounds[-1]).extent) <= unrolled:
        sch.unroll(rounds[-1])


def _vectorize(sch: s_tir.Schedule, block: Block, lead: int, machine: Machine, vectors: int) -> None:
    count = min(injective.mergeable(block), len(block.spatial) - lead)
    if count:
        injective.vectorize(sch, block, sch.get_loops(block.rv), count, machine, vectors)
