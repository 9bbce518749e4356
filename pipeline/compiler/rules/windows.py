"""Reductions that read in steps along the last axis: pooling with strides where channels come first.

No vector can be loaded there as it lies. The loop along the last axis is left to LLVM, with the window unrolled in it:
LLVM loads whole vectors and takes from them what the steps need. Padding is made for each point, and so never written:
it becomes a mask of the loads.

    p = pad(x);  for c, h, w: for kh, kw: y[c, h, w] = max(y[c, h, w], p[c, 2*h + kh, 2*w + kw])
    →  for c in parallel: for h, w:  p made for one window;  y[c, h, w] = lowest
                                     for kh, kw in unrolled: y[c, h, w] = max(y[c, h, w], p[…])
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import s_tir

from pipeline.compiler.rules import blocks, injective, tails, work
from pipeline.compiler.rules.blocks import Block
from pipeline.compiler.rules.choices import Choices

_WINDOW = 32  # points that may be unrolled
_FARTHEST = 4  # elements from one step to the next: beyond, most of what is loaded is not needed


def suits(block: Block) -> bool:
    """Whether a reduction over a window moves by a few elements at a time along the last axis of the result."""
    is_ordered = block.kinds == "S" * len(block.spatial) + "R" * len(block.reduced)
    if not block.is_reduction or not is_ordered or len(block.spatial) < 3 or not block.writes_in_order:
        return False
    steps = [blocks.stride(load, block.spatial[-1]) for load in block.loads]
    is_near = all(step is not None and 0 <= step <= _FARTHEST for step in steps)
    return block.spatial[-1].extent > 1 and is_near and any(steps)


def schedule(sch: s_tir.Schedule, chain: Sequence[Block], producers: Sequence[Block], choices: Choices) -> None:
    """Schedules a reduction that suits, the block that takes its results, where there is one, and the blocks that only
    it reads, such as padding."""
    block, host = chain[0], chain[-1]
    *outer, row, last = sch.get_loops(host.rv)[: len(host.spatial)]
    image = sch.fuse(*outer) if len(outer) > 1 else outer[0]
    if work.pick_parallel([*chain, *producers], choices):
        sch.parallel(image)
    if host is not block:
        sch.compute_at(block.rv, row, preserve_unit_loops=True)
        sch.set_scope(block.rv, 0, "local")
    *_, last = sch.get_loops(block.rv)[: -len(block.reduced)]
    reduced = sch.get_loops(block.rv)[-len(block.reduced) :]
    is_small = blocks.product(axis.extent for axis in block.reduced) <= _WINDOW
    is_inside = is_small and choices.pick("unroll", (True, False))
    sch.reorder(*((last, *reduced) if is_inside else (*reduced, last)))
    at = choices.pick("inside", (last, row, image) if is_inside else (row, image)) if producers else image
    for producer in reversed(producers):
        sch.compute_at(producer.rv, at, preserve_unit_loops=True)
        sch.annotate(producer.rv, tails.EXACT, True)
        if at is last:
            for loop in sch.get_loops(producer.rv)[-len(producer.spatial) :]:
                sch.unroll(loop)
        else:
            injective.part(sch, producer)
    sch.decompose_reduction(block.rv, reduced[0])
    for loop in reduced if is_inside else ():
        sch.unroll(loop)
