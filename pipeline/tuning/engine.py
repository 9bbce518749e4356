"""The engine of a night: candidates are proposed and compiled by whatever runs stages, and measured at its posts.

    prepare   search → codegen of each candidate            several operators at once
    measure   one link of all, compared with the default's results, timed in turn with the baseline
    retest    the leader and the best winner, on other seeds, timed longer
    learn     the cost model of the target takes in what was measured

What runs stages is the build's executor (pipeline.executors), for a store that ends with the run (workshop.py):
processes of this machine, which is then the one post; or a cluster's workers, and those of them that are the device
that this machine is are posts. What candidates are measured against (the default, the baseline, libraries) comes from
the user's store: it is what a build has made.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from pipeline.devices.contract import MeasuredOn
from pipeline.devices.identity import said as identity_of
from pipeline.dispatch import REFERENCE, Dispatcher, Linked, measuring
from pipeline.errors import StageError, WorkerLostError
from pipeline.executors.contract import HERE
from pipeline.hashing import Digest
from pipeline.measuring import TOLERANCE
from pipeline.memoizer import Action
from pipeline.store import ActionEntry
from pipeline.tuning.calls import post
from pipeline.tuning.candidates import Candidates, Prepared
from pipeline.tuning.lessons import Lessons
from pipeline.tuning.night import Batch, PostLostError
from pipeline.tuning.records import TOOLS, Certificate, Outcome, Record, RetestRecord, Standing, TrialRecord
from pipeline.tuning.states import Operator
from pipeline.tuning.workshop import Workshop
from pipeline.types import TUNED, Candidate, Cause, Terms, Trial

if TYPE_CHECKING:
    from pipeline.build import Build
    from pipeline.composition import Target
    from pipeline.executors.contract import Executor

_log = logging.getLogger(__name__)

BASELINE = "baseline"
_SEEDS, _OTHER_SEEDS = (0, 1), (2, 3, 4)
_LONGER = 8  # times as long as a trial is timed, a retest is
_OUTCOMES = {
    Cause.WRONG: Outcome.WRONG,
    Cause.FAILED: Outcome.FAILED,
    Cause.CRASHED: Outcome.CRASHED,
    Cause.TIMED_OUT: Outcome.TIMED_OUT,
}


@dataclass(frozen=True)
class _Ground:
    """What the candidates of an operator are measured against."""

    reference: Linked
    baseline: Linked


class StageEngine:
    """Tunes by stages, of which at most `jobs` run at once: an Engine (see pipeline.tuning.night). 0: as many as the
    build's executor takes.

    Every method may be called from any thread.
    """

    def __init__(self, build: Build, targets: Iterable[str], jobs: int = 0) -> None:
        self._build = build
        self._targets = tuple(targets)
        self._clock = time.time() - time.monotonic()
        self._workshop = Workshop(build, jobs)
        self.workers = jobs or self._workshop.workers.limit
        self._lessons = Lessons(self._workshop)
        self._candidates = Candidates(self._workshop, self._lessons, self.workers)
        self._grounds: dict[str, _Ground] = {}
        self._grounding = threading.Lock()
        self._recent: dict[str, dict[str, Prepared]] = {}  # of each operator, the last batch and what was retested

    @property
    def posts(self) -> int:
        return len(self._all_posts())

    @property
    def post_names(self) -> Sequence[str]:
        """None where this machine is the one post."""
        there = self._all_posts()
        return () if there == (HERE,) else there

    def _all_posts(self) -> tuple[str, ...]:
        """Those of all targets. What is for another target than its post's is measured in turn with the others, at one
        of its own target's."""
        first, *others = (self._posts_of(each) for each in self._targets)
        return first if not others else tuple(dict.fromkeys(itertools.chain(first, *others)))

    def _posts_of(self, target: str) -> tuple[str, ...]:
        return posts_of(self._build.target(target), self._workshop.workers)

    def now(self) -> float:
        """Unix time, as a clock that only goes forward."""
        return self._clock + time.monotonic()

    def close(self) -> None:
        """Ends the processes, whatever they are at, and throws away what was made of candidates."""
        self._workshop.stop()
        self._candidates.close()
        self._lessons.close()
        self._workshop.close()

    # what Night asks

    def prepare(self, operator: Operator, standing: Standing, count: int) -> Batch:
        """Up to `count` candidates that were not tried, compiled. Raises StageError where none can be made at all."""
        self._ground(operator)
        compiled, exhausted = self._candidates.prepared(operator, standing, count)
        refused = [self._record(each) for each in compiled if each.outcome is not None]
        return Batch({each.candidate: each for each in compiled if each.outcome is None}, (*refused, *exhausted))

    def measure(self, operator: Operator, batch: Batch) -> list[Record]:
        """What became of each candidate."""
        self._workshop.tidy(self._lessons.models)
        ready = list(batch.candidates.values())
        self._recent[operator.key] = {each.candidate: each for each in ready}
        trials = self._tried(operator, ready, self._terms(operator))
        return [self._trial(operator, each, trials) for each in ready]

    def retest(self, operator: Operator, standing: Standing, leader: TrialRecord) -> list[Record]:
        """The leader, and the winner that it would replace, timed longer and compared on other seeds."""
        best = standing.best.trial if standing.best is not None else leader
        named = {each.candidate: each for each in (leader, best)}
        made = self._at_hand(operator, list(named.values()))
        ready = [each for each in made if each.outcome is None]
        if made[0].outcome is not None:
            return [self._record(made[0])]
        terms = self._terms(operator)
        trials = self._tried(operator, ready, Terms(_OTHER_SEEDS, terms.seconds * _LONGER, terms.patience))
        return [self._retested(operator, each, trials) for each in ready]

    def _at_hand(self, operator: Operator, trials: Sequence[TrialRecord]) -> list[Prepared]:
        """Candidates compiled: those of the last batch are, others are made again from their records."""
        recent, has = self._recent.setdefault(operator.key, {}), self._workshop.store.has
        kept = {each.candidate: each for each in recent.values() if all(map(has, each.objects.values()))}
        missing = [self._candidates.made_again(operator, trial) for trial in trials if trial.candidate not in kept]
        recent |= {each.candidate: each for each in self._candidates.compiled(operator, missing)}
        return [recent[trial.candidate] for trial in trials]

    def _retested(self, operator: Operator, prepared: Prepared, trials: Mapping[str, Trial]) -> Record:
        trial, baseline = trials[prepared.candidate], trials[BASELINE]
        if trial.refused or not trial.seconds or not baseline.seconds:
            return self._trial(operator, prepared, trials)
        return RetestRecord(
            candidate=prepared.candidate,
            seconds=trial.seconds,
            baseline=baseline.seconds,
            noise=max(trial.noise, baseline.noise),
            certificate=self._certificate(operator, _OTHER_SEEDS, trial),
            tools=self._tools(),
        )

    def learn(self, operator: Operator, records: Sequence[Record]) -> None:
        """Has the cost model of the operator's target take in what was measured, while the night goes on."""
        self._lessons.take(operator, records)

    # what they are measured against

    def _ground(self, operator: Operator) -> _Ground:
        with self._grounding:
            if operator.key not in self._grounds:
                self._grounds[operator.key] = self._laid(operator)
            return self._grounds[operator.key]

    def _laid(self, operator: Operator) -> _Ground:
        workload, dispatcher = operator.workload, self._dispatcher(operator)
        plain = Candidate(REFERENCE, workload.function, workload.function)
        try:
            chosen = dispatcher.decide(workload, without=TUNED).candidate
        except StageError:
            chosen = plain  # nothing but tuned functions is in the order
        linked = {}
        for name, candidate in ((REFERENCE, plain), (BASELINE, chosen)):
            made = dispatcher.linked(candidate, dispatcher.objects(workload, candidate), workload.symbol)
            linked[name] = replace(made, name=name)
        for each in linked.values():
            self._workshop.take([*each.objects.values(), *each.shared.values()])
        self._workshop.take([workload.function])
        return _Ground(linked[REFERENCE], linked[BASELINE])

    def _dispatcher(self, operator: Operator) -> Dispatcher:
        return self._build.dispatcher(operator.target)

    def _terms(self, operator: Operator) -> Terms:
        file = self._build.target(operator.target).file
        return Terms(_SEEDS, file.tune.seconds, file.measure.patience)

    # measuring

    def _tried(self, operator: Operator, ready: Sequence[Prepared], terms: Terms) -> dict[str, Trial]:
        """What became of the baseline and of each candidate, by name.

        They are linked together. Where all fail, one that cannot be linked may have taken the others with it, and each
        is linked alone.
        """
        trials = self._measured(operator, ready, terms)
        if len(ready) > 1 and all(trials[each.candidate].cause is Cause.FAILED for each in ready):
            for each in ready:
                trials |= self._measured(operator, [each], terms)
        return trials

    def _measured(self, operator: Operator, ready: Sequence[Prepared], terms: Terms) -> dict[str, Trial]:
        ground, dispatcher = self._ground(operator), self._dispatcher(operator)
        together: dict[str, Digest] = {name: digest for each in ready for name, digest in each.objects.items()}
        more, shared = dispatcher.composition.linked_with([])
        self._workshop.take([*more.values(), *shared.values()])
        candidates = [Linked(each.candidate, each.symbol, {**together, **more}, shared, each.packed) for each in ready]
        target = self._build.target(operator.target)
        action = measuring(operator.workload, [ground.reference, ground.baseline, *candidates], terms, target)
        is_away = target.measured_on is MeasuredOn.RPC
        entry = self._workshop.memoizer.run(action) if is_away else self._timed(target, action)
        if "lost" in entry.outputs:
            said = self._workshop.blob(entry.outputs["lost"]).decode()
            _log.warning("%s, while candidates of %s were measured", said, operator.name)
        return msgspec.json.decode(self._workshop.blob(entry.outputs["trials"]), type=dict[str, Trial])

    def _timed(self, target: Target, action: Action) -> ActionEntry:
        """Measures at a post. Raises PostLostError where that is gone."""
        own = self._posts_of(target.name)
        if (at := post() or HERE) in own:
            action = replace(action, post=at)
        # Builds and other tuners that share the user's store time nothing meanwhile on this machine.
        is_here = self._workshop.workers.runs_here(action)
        try:
            with self._build.memoizer.store.locked("measuring") if is_here else contextlib.nullcontext():
                return self._workshop.memoizer.run(action)
        except WorkerLostError as error:
            raise PostLostError(error.message, hint=error.hint) from error

    def _trial(self, operator: Operator, prepared: Prepared, trials: Mapping[str, Trial]) -> TrialRecord:
        trial, baseline = trials[prepared.candidate], trials[BASELINE]
        record = self._record(prepared)
        if trial.refused:
            outcome = _OUTCOMES[trial.cause or Cause.FAILED]
            return msgspec.structs.replace(record, outcome=outcome, said=trial.refused)
        return msgspec.structs.replace(
            record,
            seconds=trial.seconds,
            baseline=baseline.seconds,
            noise=max(trial.noise, baseline.noise),
            certificate=self._certificate(operator, _SEEDS, trial),
        )

    def _record(self, prepared: Prepared) -> TrialRecord:
        return TrialRecord(
            candidate=prepared.candidate,
            space=prepared.space,
            space_version=prepared.version,
            decisions=prepared.decisions,
            outcome=prepared.outcome or Outcome.TIMED,
            said=prepared.said,
            tools=self._tools(),
        )

    def _tools(self) -> dict[str, str]:
        return self._build.memoizer.toolchain.pick(TOOLS)

    def _certificate(self, operator: Operator, seeds: tuple[int, ...], trial: Trial) -> Certificate:
        parameters = operator.workload.parameters
        tolerance = max(TOLERANCE.get(parameters[i].dtype, 0.0) for i in operator.workload.written)
        return Certificate(REFERENCE, seeds, tolerance, trial.error or 0.0)


def posts_of(target: Target, by: Executor) -> tuple[str, ...]:
    """Where candidates of a target are measured side by side: at workers that are its device, here, or on as many
    devices behind a tracker as may be used at once."""
    away = target.file.device
    if away is None:
        return by.posts(target.device)
    if away.label:
        return by.posts(identity_of(away) or "", away.label)
    return tuple(f"{away.key} {i + 1}" for i in range(away.parallel)) if away.parallel > 1 else (HERE,)
