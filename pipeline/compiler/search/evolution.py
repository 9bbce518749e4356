"""One round of MetaSchedule's evolutionary search, from nothing: pipeline.compiler.search.metaschedule says what for.

space        rules applied to the workload              one to three traces with open decisions; none to sample: ends
population   traces drawn at random, and mutations      as many as candidates are wanted, and a quarter more
generations  mutated, scored by the cost model
candidates   the best, and a few at random              less what is known already
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import tvm
from tvm.s_tir import Schedule, meta_schedule

from pipeline.compiler import intrinsics, records
from pipeline.compiler.search import Proposal, Tried, traces
from pipeline.compiler.search.costmodel import CostModel
from pipeline.processor import cores

_ROUNDS = 3  # with nothing new in any of them the space counts as exhausted
_POPULATION = 16  # at least
_GENERATIONS, _BLIND_GENERATIONS = 2, 1  # without a model, the second mutates what nobody has chosen
_PARENTS = 12  # of what was tried
_MEASURED, _BLIND_MEASURED = 0.25, 0.5  # of the population, at most: what was tried
_AT_RANDOM = 0.08  # of the candidates
_FEW = 4  # drawn at random that are enough to begin with: most are refused where tiles hardly ever fit

# What MetaSchedule says while it searches is for nobody.
_QUIET = logging.getLogger("pipeline.search.metaschedule")
_QUIET.addHandler(logging.NullHandler())
_QUIET.propagate = False


def propose(
    func: tvm.tirx.PrimFunc,
    target: tvm.target.Target,
    tried: Sequence[Tried],
    known: Collection[str],
    count: int,
    seed: int,
    model: CostModel | None,
    threads: int | None,
) -> list[Proposal]:
    """See `Space.propose`. Rounds go on while candidates are missing and one brings something new."""
    intrinsics.register(target)
    search = _Search(func, _with_cores(target), tried, model or CostModel(), threads or cores())
    draws = random.Random(seed)
    found: dict[str, Proposal] = {}
    for _ in range(_ROUNDS):
        before = len(found)
        for schedule in search.round(count - before, draws):
            function = traces.made(schedule, func)
            digest = records.digest_of(function)
            if digest not in known and digest not in found:
                found[digest] = Proposal(traces.plain(schedule.trace), function)
            if len(found) == count:
                return list(found.values())
        if found and len(found) == before:
            break
    return list(found.values())


class _Search:
    """What the rounds of one search share."""

    def __init__(
        self, func: tvm.tirx.PrimFunc, target: tvm.target.Target, tried: Sequence[Tried], model: CostModel, threads: int
    ) -> None:
        self._mod = traces.module_of(func)
        self._target = target
        self._tried = tried
        self._model = model
        self._threads = threads

    def round(self, count: int, draws: random.Random) -> Iterator[Schedule]:
        """More than `count` candidates, where there are as many, in the order in which they are to be taken."""
        context = self._context(draws.randrange(1, 2**31 - 1), count)
        space = context.generate_design_space()
        if not any(_is_open(each) for each in space):
            return
        asked = count + count // 4 + 4  # some are known
        scores = self._model.as_metaschedules(draws.randrange(2**31))
        context.pre_tuning(asked, asked, space, self._parents(), scores)
        listed = [candidate.sch for candidate in context.generate_measure_candidates() or ()]
        context.post_tuning()
        # The best come first, and those at random last: these go before the best that would be left out.
        best = max(1, count - max(1, int(len(listed) * _AT_RANDOM)))
        yield from listed[:best]
        yield from reversed(listed[best:])

    def _context(self, seed: int, count: int) -> Any:
        is_blind = self._model.is_blind
        search = meta_schedule.search_strategy.EvolutionarySearch(
            population_size=max(_POPULATION, count + count // 4),
            init_measured_ratio=_BLIND_MEASURED if is_blind else _MEASURED,
            init_min_unmeasured=_FEW,
            genetic_mutate_prob=1.0,  # the best of all generations are taken: none need live on
            genetic_num_iters=_BLIND_GENERATIONS if is_blind else _GENERATIONS,
            eps_greedy=_AT_RANDOM,
        )
        with intrinsics.standing_in():
            return meta_schedule.TuneContext(
                mod=self._mod,
                target=self._target,
                space_generator="post-order-apply",
                search_strategy=search,
                rand_state=seed,
                num_threads=self._threads,
                logger=_QUIET,
            )

    def _parents(self) -> Any:
        """The best of what was tried, as a database. One that this TVM no longer replays is no parent."""
        database = meta_schedule.database.MemoryDatabase()
        workload = database.commit_workload(self._mod)
        arguments = meta_schedule.arg_info.ArgInfo.from_entry_func(self._mod)
        best = sorted((each for each in self._tried if each.ratio > 0), key=lambda each: -each.ratio)
        for each in best[:_PARENTS]:
            try:
                trace = traces.replayed(self._mod, self._target, traces.searched(each.decisions)).trace
            except ValueError:
                continue
            runs = [1 / each.ratio]
            database.commit_tuning_record(
                meta_schedule.database.TuningRecord(trace, workload, runs, self._target, arguments)
            )
        return database


def _with_cores(target: tvm.target.Target) -> tvm.target.Target:
    """The target with the number of processors by which MetaSchedule cuts parallel work: this machine's by default."""
    if target.kind.name != "llvm" or target.attrs.get("num-cores"):
        return target
    return tvm.target.Target({**json.loads(str(target)), "num-cores": cores()})


def _is_open(space: Schedule) -> bool:
    """Whether a space leaves anything to decide: not where no loop is tiled, as in a copy."""
    return any(instruction.kind.name.startswith("Sample") for instruction in space.trace.insts)
