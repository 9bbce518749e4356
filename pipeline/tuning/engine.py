"""The engine of a night: candidates are proposed and compiled by whatever runs stages, and measured at its posts.

    prepare   search → codegen of each candidate            several operators at once
    measure   one link of all, compared with the default's results, timed in turn with the baseline
    retest    the leader and the best winner, on other seeds, timed longer
    learn     the cost model of the target takes in what was measured

Candidates are many and only few are ever wanted again, so all that is made of them lies in a store of its own, which
ends with the run. What they are measured against (the default, the baseline, libraries) comes from the user's store:
it is what a build has made. What runs stages is the build's executor (pipeline.executors), beside that other store:
processes of this machine, which is then the one post; or a cluster's workers, and those of them that are the device
that this machine is are posts.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline import stages
from pipeline.compiler import search
from pipeline.devices.contract import MeasuredOn
from pipeline.devices.identity import said as identity_of
from pipeline.dispatch import REFERENCE, Dispatcher, Linked, measuring
from pipeline.errors import ConfigError, StageError, StoreError, WorkerDiedError, WorkerLostError, first_line
from pipeline.executors import Job
from pipeline.executors.contract import HERE
from pipeline.hashing import Digest, key_of
from pipeline.measuring import TOLERANCE
from pipeline.memoizer import Action, Memoizer
from pipeline.store import ActionEntry, Store
from pipeline.store.scratch import Scratch
from pipeline.tuning.calls import post
from pipeline.tuning.night import Batch, PostLostError
from pipeline.tuning.records import (
    TOOLS,
    TRANSIENT,
    Certificate,
    ExhaustedRecord,
    Outcome,
    Record,
    RetestRecord,
    Standing,
    TrialRecord,
    encoded,
    ratio,
)
from pipeline.tuning.scheduler import Operator
from pipeline.types import Candidate, Cause, Packed, Terms, Trial, symbol_of

if TYPE_CHECKING:
    from pipeline.build import Build
    from pipeline.composition import Target
    from pipeline.executors.contract import Executor

_log = logging.getLogger(__name__)

BASELINE = "baseline"
TUNED = "tuned"
_SEEDS, _OTHER_SEEDS = (0, 1), (2, 3, 4)
_TIDY = 600.0  # seconds after which what was made of a candidate is of no use
_LESSON = 40  # candidates of an operator that are learnt from together
_LONGER = 8  # times as long as a trial is timed, a retest is
_OUTCOMES = {
    Cause.WRONG: Outcome.WRONG,
    Cause.FAILED: Outcome.FAILED,
    Cause.CRASHED: Outcome.CRASHED,
    Cause.TIMED_OUT: Outcome.TIMED_OUT,
}


@dataclass(frozen=True)
class Prepared:
    """A candidate on its way: compiled in the end, or `outcome` says why it is not."""

    candidate: str
    space: str
    version: int
    decisions: Any
    objects: Mapping[str, Digest] = field(default_factory=dict)
    packed: tuple[Packed, ...] = ()
    outcome: Outcome | None = None
    said: str = ""

    @property
    def symbol(self) -> str:
        return f"tuned_{self.candidate[:32]}"


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
        self._session = secrets.token_hex(8)  # other searches than any other run's
        self._clock = time.time() - time.monotonic()
        self._begun = time.time()
        self._scratch = Scratch()
        self._memoizer = self._made_memoizer(jobs)
        self.workers = jobs or self._memoizer.workers.limit
        self._compiling = ThreadPoolExecutor(self.workers, "compiling")
        self._grounds: dict[str, _Ground] = {}
        self._grounding = threading.Lock()
        self._taken: set[str] = set()  # blobs of the user's store that are in the scratch store
        self._tidied = time.time()
        self._models: dict[str, Digest] = {}  # by target: the cost model, in the scratch store
        self._recent: dict[str, dict[str, Prepared]] = {}  # of each operator, the last batch and what was retested
        self._failing: set[tuple[str, str]] = set()  # operators by key, and spaces that failed for them
        self._learner = ThreadPoolExecutor(1)
        self._unlearnt: dict[tuple[str, str], list[TrialRecord]] = {}  # by operator and space
        self._preparing = 0

    def _made_memoizer(self, jobs: int) -> Memoizer:
        """Runs stages by the means of the build, with results of its own."""
        by, temporary = self._build.memoizer, self._scratch.temporary
        store = Store(self._scratch.folder, durable=False)
        job = Job(store, by.toolchain, jobs or by.workers.limit, temporary=temporary, durable=False, say=_log.warning)
        return Memoizer(store, by.workers.beside(job), by.toolchain)

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
        return posts_of(self._build.target(target), self._memoizer.workers)

    def now(self) -> float:
        """Unix time, as a clock that only goes forward."""
        return self._clock + time.monotonic()

    def close(self) -> None:
        """Ends the processes, whatever they are at, and throws away what was made of candidates."""
        self._memoizer.workers.stop()
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self._learner.shutdown(wait=True, cancel_futures=True)
        self._scratch.close()

    # what Night asks

    def prepare(self, operator: Operator, standing: Standing, count: int) -> Batch:
        """Up to `count` candidates that were not tried, compiled. Raises StageError where none can be made at all."""
        self._preparing += 1
        try:
            self._ground(operator)
            found = self._again(operator, standing, count)
            exhausted = []
            failed: list[StageError] = []
            for name in self._spaces(operator):
                version = self._space(operator, name)[0].version
                if len(found) >= count or (name, version) in standing.exhausted:
                    continue
                try:
                    proposed, reason = self._proposed(operator, standing, name, count - len(found))
                except StageError as error:
                    failed.append(self._fallen(operator, name, error))
                    continue
                found += proposed
                if not proposed:
                    exhausted.append(ExhaustedRecord(space=name, space_version=version, reason=reason))
            if failed and not found and not exhausted:
                raise failed[0]
            compiled = list(self._compiled(operator, found))
            refused = [self._record(each) for each in compiled if each.outcome is not None]
            return Batch({each.candidate: each for each in compiled if each.outcome is None}, (*refused, *exhausted))
        finally:
            self._preparing -= 1

    def _fallen(self, operator: Operator, space: str, error: StageError) -> StageError:
        """What is said of a space that fails for an operator: once, as others may go on. Raises it where the night is
        being stopped."""
        if self._memoizer.workers.stopped:
            raise error
        if (operator.key, space) not in self._failing:
            self._failing.add((operator.key, space))
            _log.warning("the search space %s fails for %s: %s", space, operator.name, first_line(error))
        return error

    def measure(self, operator: Operator, batch: Batch) -> list[Record]:
        """What became of each candidate."""
        self._tidy()
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
        recent, has = self._recent.setdefault(operator.key, {}), self._memoizer.store.has
        kept = {each.candidate: each for each in recent.values() if all(map(has, each.objects.values()))}
        missing = [self._remade(operator, trial) for trial in trials if trial.candidate not in kept]
        recent |= {each.candidate: each for each in self._compiled(operator, missing)}
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
        for record in records:
            if isinstance(record, TrialRecord) and self._learns(operator, record.space):
                self._unlearnt.setdefault((operator.key, record.space), []).append(record)
        for (key, space), measured in list(self._unlearnt.items()):
            if key == operator.key and len(measured) >= _LESSON:
                self._learner.submit(self._learn, operator, space, self._unlearnt.pop((key, space)))

    def _tidy(self) -> None:
        """Throws away what was made of candidates some time ago, but for what others are measured against."""
        if self.now() - self._tidied > _TIDY:
            self._tidied = self.now()
            self._memoizer.forget()
            self._scratch.remove_old(self._taken | {digest.hash for digest in self._models.values()}, _TIDY)

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
            self._take([*each.objects.values(), *each.shared.values()])
        self._take([workload.function])
        return _Ground(linked[REFERENCE], linked[BASELINE])

    def _dispatcher(self, operator: Operator) -> Dispatcher:
        return self._build.dispatcher(operator.target)

    def _take(self, digests: Iterable[Digest]) -> None:
        """Has the scratch store hold these blobs of the user's store."""
        ours, theirs = self._build.memoizer.store, self._memoizer.store
        for digest in digests:
            self._taken.add(digest.hash)
            if not theirs.has(digest):
                path = ours.path(digest)
                if path is None:
                    raise StoreError(f"blob {digest} is missing from the store", hint="run: doit build")
                theirs.put_file(path)

    def _terms(self, operator: Operator) -> Terms:
        file = self._build.target(operator.target).file
        return Terms(_SEEDS, file.tune.seconds, file.measure.patience)

    # candidates

    def _spaces(self, operator: Operator) -> Sequence[str]:
        target = self._build.target(operator.target)
        return target.file.tune.spaces or search.usual(str(target.attributes["kind"]))

    def _space(self, operator: Operator, name: str) -> tuple[search.Space, Mapping[str, Digest]]:
        return self._build.composition(operator.target).space(name)

    def _source(self, operator: Operator, name: str) -> Mapping[str, Digest]:
        """The file of a space, where it is the workspace's."""
        source = self._space(operator, name)[1]
        self._take(source.values())
        return source

    def _learns(self, operator: Operator, name: str) -> bool:
        return isinstance(self._space(operator, name)[0], search.Guided)

    def _proposed(
        self, operator: Operator, standing: Standing, space: str, count: int
    ) -> tuple[list[tuple[Prepared, Mapping[str, Digest]]], str]:
        """Proposals of a space with their functions by name, or why there are none."""
        store = self._memoizer.store
        tried = [[each.decisions, ratio(each)] for each in standing.trials if each.space == space]
        # What failed and may be tried again is `_again`'s to choose: no space shall propose it at once.
        known = standing.tried.union(each.candidate for each in (*standing.trials, *standing.claims))
        inputs = {
            "function": operator.workload.function,
            "tried": store.put(msgspec.json.encode(tried)),
            "known": store.put(json.dumps(sorted(known)).encode()),
        }
        if (model := self._model(operator, space)) is not None:
            inputs["model"] = model
        version = self._space(operator, space)[0].version
        inputs |= self._source(operator, space)
        options: dict[str, object] = {
            "space": space,
            "space version": version,
            "count": count,
            "seed": _seed(self._session, operator.key, len(standing.tried)),
            "target": self._build.target(operator.target).attributes,
            "threads": max(1, self.workers // max(1, self._preparing)),
        }
        entry = self._run_stage(stages.SEARCH, operator, inputs, options)
        listed = json.loads(self._memoizer.blob(entry.outputs["proposed"]))
        found = []
        for i, each in enumerate(listed):
            packed = msgspec.convert(each["packed"], tuple[Packed, ...])
            decisions = json.loads(self._memoizer.blob(entry.outputs[f"d{i}"]))
            functions: Mapping[str, Digest] = {"function": entry.outputs[f"f{i}"]}
            found.append((Prepared(each["candidate"], space, version, decisions, packed=packed), functions))
        reason = self._memoizer.blob(entry.outputs["reason"]).decode() if "reason" in entry.outputs else ""
        return found, reason

    def _again(self, operator: Operator, standing: Standing, count: int) -> list[tuple[Prepared, Mapping[str, Digest]]]:
        """Winners of another compiler, what others claim, and what failed in an earlier run by the machine's fault, as
        may be."""
        failed = [each for each in standing.trials if each.outcome in TRANSIENT and each.at < self._begun]
        due = (each for each in (*standing.claims, *failed) if each.candidate not in standing.tried)
        proven_elsewhere = (winner.trial for winner in standing.unproven)
        here = [each for each in (*proven_elsewhere, *due) if self._is_here(operator, each.space)]
        return [self._remade(operator, trial) for trial in here[:count]]

    def _is_here(self, operator: Operator, space: str) -> bool:
        """Whether a search space can be asked: another workspace that shares the store may have one of its own."""
        try:
            self._space(operator, space)
        except ConfigError:
            return False
        return True

    def _remade(self, operator: Operator, trial: TrialRecord) -> tuple[Prepared, Mapping[str, Digest]]:
        """A candidate made again from its record."""
        prepared = Prepared(trial.candidate, trial.space, trial.space_version, trial.decisions)
        inputs = {"function": operator.workload.function, "winner0": self._memoizer.store.put(encoded(trial))}
        options: dict[str, object] = {"strategy": TUNED, "target": self._build.target(operator.target).attributes}
        try:
            inputs |= {f"space.{trial.space}": source for source in self._source(operator, trial.space).values()}
            entry = self._run_stage(stages.APPLY, operator, inputs, options)
        except (StageError, ConfigError, ValueError) as error:
            return self._not_built(prepared, error), {}
        if "function" not in entry.outputs:
            return replace(prepared, outcome=Outcome.NOT_BUILT, said="it does not apply"), {}
        packed = msgspec.json.decode(self._memoizer.blob(entry.outputs["packed"]), type=tuple[Packed, ...])
        return replace(prepared, packed=packed), {"function": entry.outputs["function"]}

    def _compiled(
        self, operator: Operator, proposed: Sequence[tuple[Prepared, Mapping[str, Digest]]]
    ) -> Iterator[Prepared]:
        """Each with its objects, or why it has none; compiled in parallel."""

        def compiled(each: tuple[Prepared, Mapping[str, Digest]]) -> Prepared:
            prepared, functions = each
            if prepared.outcome is not None:
                return prepared
            try:
                objects = {f"{prepared.symbol}.o": self._codegen(operator, functions["function"], prepared.symbol)}
                for packed in prepared.packed:
                    symbol = symbol_of(packed.function.hash)
                    objects[f"{symbol}.o"] = self._codegen(operator, packed.function, symbol, hasty=True)
            except StageError as error:
                return self._not_built(prepared, error)
            return replace(prepared, objects=objects)

        yield from self._compiling.map(compiled, proposed)

    def _not_built(self, prepared: Prepared, error: Exception) -> Prepared:
        """A candidate that there is no code of, and why. Raises the error where the night is being stopped."""
        if self._memoizer.workers.stopped:
            raise error
        if isinstance(error, WorkerDiedError):
            outcome = Outcome.BUILD_TIMEOUT if error.timed_out else Outcome.CRASHED
            return replace(prepared, outcome=outcome, said=f"build: {first_line(error)}")
        return replace(prepared, outcome=Outcome.NOT_BUILT, said=first_line(error))

    def _codegen(self, operator: Operator, function: Digest, symbol: str, hasty: bool = False) -> Digest:
        """The object of a function; `hasty`: unoptimised, for what is run once and never timed."""
        attributes = self._build.target(operator.target).attributes
        if hasty and attributes["kind"] == "llvm":
            attributes = {**attributes, "opt-level": 0}
        options: dict[str, object] = {"symbol": symbol, "target": attributes}
        return self._run_stage(stages.CODEGEN, operator, {"function": function}, options).outputs["object"]

    def _run_stage(
        self,
        stage: stages.Stage,
        operator: Operator,
        inputs: Mapping[str, Digest],
        options: Mapping[str, object],
    ) -> ActionEntry:
        file = self._build.target(operator.target).file
        limit = file.tune.timeout if stage is stages.CODEGEN else file.timeout
        return self._memoizer.run(Action(stage, operator.name, inputs, options, limit))

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
        self._take([*more.values(), *shared.values()])
        candidates = [Linked(each.candidate, each.symbol, {**together, **more}, shared, each.packed) for each in ready]
        target = self._build.target(operator.target)
        action = measuring(operator.workload, [ground.reference, ground.baseline, *candidates], terms, target)
        is_away = target.measured_on is MeasuredOn.RPC
        entry = self._memoizer.run(action) if is_away else self._timed(target, action)
        if "lost" in entry.outputs:
            said = self._memoizer.blob(entry.outputs["lost"]).decode()
            _log.warning("%s, while candidates of %s were measured", said, operator.name)
        return msgspec.json.decode(self._memoizer.blob(entry.outputs["trials"]), type=dict[str, Trial])

    def _timed(self, target: Target, action: Action) -> ActionEntry:
        """Measures at a post. Raises PostLostError where that is gone."""
        own = self._posts_of(target.name)
        if (at := post() or HERE) in own:
            action = replace(action, post=at)
        # Builds and other tuners that share the user's store time nothing meanwhile on this machine.
        is_here = self._memoizer.workers.runs_here(action)
        try:
            with self._build.memoizer.store.locked("measuring") if is_here else contextlib.nullcontext():
                return self._memoizer.run(action)
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

    # the cost model

    def _model_key(self, operator: Operator, space: str) -> str:
        target = self._build.target(operator.target)
        return key_of({"cost model": space, "target": target.attributes, "device": target.device})

    def _model(self, operator: Operator, space: str) -> Digest | None:
        """The cost model of a target, begun with what the last run left."""
        if not self._learns(operator, space):
            return None
        key = self._model_key(operator, space)
        with self._grounding:
            if key not in self._models:
                kept = self._build.memoizer.store.lookup(key)
                if kept is None:
                    return None
                self._take([kept.outputs["model"]])
                self._models[key] = kept.outputs["model"]
            return self._models[key]

    def _learn(self, operator: Operator, space: str, measured: Sequence[TrialRecord]) -> None:
        results = [[each.decisions, ratio(each)] for each in measured]
        inputs = {
            "function": operator.workload.function,
            "results": self._memoizer.store.put(msgspec.json.encode(results)),
            **self._source(operator, space),
        }
        if (model := self._model(operator, space)) is not None:
            inputs["model"] = model
        options: dict[str, object] = {
            "space": space,
            "target": self._build.target(operator.target).attributes,
        }
        learnt = self._run_stage(stages.LEARN, operator, inputs, options).outputs["model"]
        key = self._model_key(operator, space)
        with self._grounding:
            self._models[key] = learnt
        store = self._build.memoizer.store
        outputs = {"model": store.put(self._memoizer.blob(learnt))}
        store.commit(key, ActionEntry(stages.LEARN.name, {"cost model": space}, outputs, 0.0))


def posts_of(target: Target, by: Executor) -> tuple[str, ...]:
    """Where candidates of a target are measured side by side: at workers that are its device, here, or on as many
    devices behind a tracker as may be used at once."""
    away = target.file.device
    if away is None:
        return by.posts(target.device)
    if away.label:
        return by.posts(identity_of(away) or "", away.label)
    return tuple(f"{away.key} {i + 1}" for i in range(away.parallel)) if away.parallel > 1 else (HERE,)


def _seed(*parts: object) -> int:
    """From 1 to 2³¹-2: what TVM's random numbers may start from."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") % (2**31 - 2) + 1
