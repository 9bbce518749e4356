"""MetaSchedule's own search space, its mutators and its evolutionary search, as a call that keeps nothing.

What MetaSchedule remembers between rounds is given to it anew each time: the best of what was tried as a database, what
was learnt as a cost model, and another seed. The work is in pipeline.compiler.search.evolution, which needs TVM.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tvm

    from pipeline.compiler.search import Proposal, Tried
    from pipeline.compiler.search.costmodel import CostModel


class PostOrderApply:
    """MetaSchedule's rules, applied block by block; decisions are traces (see pipeline.compiler.search.traces).

    threads  of the search: one for each processor where not given. On one, a seed gives one answer; several race
    model    which candidates it is to expect to be fast; none: it draws at random
    """

    name = "post-order-apply"
    version = 1

    def __init__(self, threads: int | None = None, model: CostModel | None = None) -> None:
        self._threads = threads
        self._model = model

    def guided(self, model: CostModel | None, threads: int | None) -> PostOrderApply:
        return PostOrderApply(threads, model)

    def propose(
        self,
        func: tvm.tirx.PrimFunc,
        target: tvm.target.Target,
        tried: Sequence[Tried],
        known: Collection[str],
        count: int,
        seed: int,
    ) -> Sequence[Proposal]:
        from pipeline.compiler.search import evolution

        return evolution.propose(func, target, tried, known, count, seed, self._model, self._threads)

    def make(self, func: tvm.tirx.PrimFunc, target: tvm.target.Target, decisions: Any) -> tvm.tirx.PrimFunc:
        from pipeline.compiler.search import traces

        return traces.make(func, target, decisions)
