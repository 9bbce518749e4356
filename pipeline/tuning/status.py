"""Where each operator of the built models stands: what it runs on, what was tuned for it, and what to do next.

    manifests and profiles    what the last build made, and where the time goes
    summaries of record sets  what tuning found
    [stale], tuning.lock      what to make of it

Owns what `doit status` shows and what `doit check` judges. Changes nothing but the summaries beside the sets. Needs no
TVM.
"""

from __future__ import annotations

import enum
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline.composition import names
from pipeline.config import TargetFile, load_target
from pipeline.errors import ArtifactError, ConfigError
from pipeline.hashing import Digest
from pipeline.lock import FILE, Entry, read
from pipeline.manifests import read_manifest
from pipeline.report import UNTUNED
from pipeline.tasks import remembered_plan
from pipeline.tuning.operators import Model, spaces_of, why_none, why_not
from pipeline.tuning.records import BEST, NONE, Outcome
from pipeline.tuning.staleness import Present, Reason, can_be_tuned_away, days, reasons
from pipeline.tuning.summaries import Summaries, Summary
from pipeline.types import TUNED, Operator, Plan, Profile, Trial, Workload, symbol_of

if TYPE_CHECKING:
    from pipeline.workspace import Selection, Workspace

Values = Callable[[str], Mapping[str, Any] | None]  # what doit remembers of a task


class State(enum.StrEnum):
    """Where an operator stands."""

    FAILED = "failed"  # nothing of what was tried can be used
    STALE = "stale"  # by the rules of the target
    NEVER = "never tuned"
    READY = "not built in"  # a build would use what was found since
    ROLLED_BACK = "rolled back"  # somebody decided what is applied
    LOCKED = "locked"  # tuning.lock decides what is applied
    FRESH = "fresh"
    LEFT = "left"  # tuning would change nothing


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One operator of one model.

    seconds    of all its calls in one inference; None where nothing is known. share: of all operators' time
    per_call   seconds of a call as it was last measured alone, None where it was not
    gain       how many times as fast as the default, or where that was not timed, as without tuning; None: not known
    found      how many times as fast as without tuning what was tuned is, in use or not; 1 where nothing was found
    spent      seconds of tuning
    validated  of a tuned function: whether it was with the tools of today; None where it runs on something else
    age        days since what is applied was validated, or where nothing is, since a candidate was last measured
    why        of the state, in words
    next       what to type, "" where nothing needs doing
    """

    operator: str
    workload: str
    shapes: tuple[str, ...]
    calls: int
    seconds: float | None
    share: float | None
    per_call: float | None
    implementation: str
    gain: float | None
    found: float
    trials: int
    spent: float
    validated: bool | None
    age: float | None
    state: State
    why: str
    next: str

    @property
    def urgency(self) -> float:
        """Seconds of an inference that doing something about it is about: what `by_urgency` orders by."""
        seconds = self.seconds or 0.0
        match self.state:
            # Nobody knows what there is to be gained: half of the time is what tuning hopes for, too.
            case State.NEVER | State.FAILED:
                return seconds / 2
            # What may be lost: what it would take without its tuned function.
            case State.STALE:
                return seconds * max(self.found - 1, 0.5)
            case State.READY:
                return seconds * (1 - 1 / self.found)
        return 0.0


def by_urgency(rows: Iterable[Row]) -> list[Row]:
    """What needs doing first, by the time that it is about; then the rest, by the time that it takes. So what one can
    do something about is seen first, and of that what pays most; where nothing is to be done, where the time goes."""
    return sorted(rows, key=lambda row: (-row.urgency, -(row.seconds or 0.0), row.operator))


@dataclass(frozen=True)
class Standing:
    """One model on one target.

    problem  why there are no rows, in words: it is not built, or cannot be read; "" where there are
    seconds  of an inference, None where it was not timed
    file     of the target
    locked   entries of tuning.lock for the target, by workload
    """

    target: str
    model: str
    file: TargetFile
    problem: str = ""
    seconds: float | None = None
    rows: Sequence[Row] = ()
    locked: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.target}:{self.model}"

    def total(self) -> float:
        """Seconds of all operators in an inference, as far as they are known."""
        return sum(row.seconds or 0.0 for row in self.rows)

    def implementations(self) -> dict[str, float]:
        """Each implementation's share of the operators' time, the largest first; nothing where no time is known."""
        return self._shares(lambda row: row.implementation)

    def states(self) -> dict[str, float]:
        """The same by state."""
        return self._shares(lambda row: row.state)

    def tuned(self) -> float:
        """The share of the operators' time in those that do not run on rules or the default: that run on what was
        tuned, written by hand or taken from a library. Where no time is known, the share of the operators."""
        if not self.total():
            kept = sum(row.implementation not in UNTUNED for row in self.rows)
            return kept / len(self.rows) if self.rows else 1.0
        return sum(share for name, share in self.implementations().items() if name not in UNTUNED)

    def _shares(self, of: Callable[[Row], str]) -> dict[str, float]:
        spent: Counter[str] = Counter()
        for row in self.rows:
            spent[of(row)] += row.seconds or 0.0  # type: ignore[assignment]
        total = sum(spent.values())
        return {name: seconds / total for name, seconds in spent.most_common() if seconds} if total else {}


def look(workspace: Workspace, selection: Selection, values: Values) -> list[Standing]:
    """The standings of a selection's models, in the order of targets and models.

    Raises ConfigError where there is no model, or a target's file is wrong.
    """
    pairs = workspace.pairs(selection)
    if not pairs:
        raise ConfigError("there is no model to look at", hint="write: Workspace(Model.onnx('name', 'model.onnx'))")
    eyes = _Eyes(workspace, values)
    made = [eyes.standing(target, model) for target, model in pairs]
    eyes.save()
    return made


class _Eyes:
    """What is read once for several models."""

    def __init__(self, workspace: Workspace, values: Values) -> None:
        self._workspace, self._values = workspace, values
        self._now = time.time()
        self._option = len(workspace.target_names()) > 1  # whether a command must say for which target
        self._summaries: dict[float, Summaries] = {}

    def standing(self, target: str, model: Any) -> Standing:
        file = self._file(target)
        try:
            manifest = read_manifest(self._workspace.artifact(target, model))
        except ArtifactError as error:
            is_there = self._workspace.artifact(target, model).is_dir()
            said = error.message if is_there else "it is not built"
            return Standing(target, model.name, file, problem=said)
        kept = (self._values(f"profile:{target}:{model.name}") or {}).get("profile")
        profile = msgspec.convert(kept, Profile) if kept else None
        record = (self._values(f"artifact:{target}:{model.name}") or {}).get("record") or {}
        plan = remembered_plan(target, model)
        built = Model(
            model.name, self._workspace.folder, target, manifest.target_spec, file, plan or _NO_PLAN, manifest, profile
        )
        option = f" -t {target}" if self._option else ""
        sight = _Sight(built, self._known(file), self._now, record.get("at", 0) / 1e9, self._locked(target), option)
        return Standing(
            target,
            model.name,
            file,
            seconds=profile.seconds if profile else None,
            rows=sight.rows(),
            locked=sight.locked,
        )

    def save(self) -> None:
        for known in self._summaries.values():
            known.save()

    def _file(self, target: str) -> TargetFile:
        return load_target(self._workspace.target_file(target), self._names)

    @functools.cached_property
    def _names(self) -> list[str]:
        return names(self._workspace.folder)

    def _known(self, file: TargetFile) -> Summaries:
        noise = file.measure.noise
        if noise not in self._summaries:
            self._summaries[noise] = Summaries.here(self._workspace.store, noise)
        return self._summaries[noise]

    def _locked(self, target: str) -> dict[str, Entry]:
        lock = self._lock
        return {each.workload: each for each in lock.targets.get(target, {}).values()} if lock is not None else {}

    @functools.cached_property
    def _lock(self) -> Any:
        return read(self._workspace.folder / FILE)


_NO_PLAN = Plan((), (), (), (), (), (), False)


@dataclass
class _Sight:
    """One built model, and what its operators are held against.

    built   Unix time of its last build, 0 where that is not known
    option  what a command must be given so that it is about this target alone
    """

    model: Model
    known: Summaries
    now: float
    built: float
    locked: Mapping[str, Entry]
    option: str

    def rows(self) -> list[Row]:
        profile = self.model.profile.operators if self.model.profile else {}
        workloads = {each.digest: each for each in self.model.plan.workloads}
        used = [each for each in self.model.manifest.operators if each.calls]
        seconds = {each.workload: _seconds(each, profile) for each in used}
        total = sum(each or 0.0 for each in seconds.values())
        return [
            self._row(each, workloads.get(each.workload) or _plain(each), seconds[each.workload], total)
            for each in used
        ]

    def _row(self, operator: Operator, workload: Workload, seconds: float | None, total: float) -> Row:
        key = self.model.sets.of(workload.digest)
        summary = self.known.of(key)
        state, why, command = self._state(operator, workload, summary)
        is_tuned = operator.implementation == TUNED
        in_use = self._in_use(operator, key, summary)
        return Row(
            operator=operator.name,
            workload=operator.workload,
            shapes=operator.shapes,
            calls=operator.calls,
            seconds=seconds,
            share=seconds / total if seconds is not None and total else None,
            per_call=_alone(operator, in_use),
            implementation=operator.implementation,
            gain=_gain(operator, in_use),
            found=max(summary.gain, 1.0),
            trials=summary.trials,
            spent=summary.spent,
            validated=(bool(in_use.candidate) and in_use.is_proven) if is_tuned else None,
            age=days(in_use.validated or summary.measured, self.now),
            state=state,
            why=why,
            next=command.format(f"'*-{operator.workload[:8]}'{self.option}"),
        )

    def _in_use(self, operator: Operator, key: str, summary: Summary) -> Summary:
        """The summary as what the build applied has it: under a lock that need not be what tuning would apply now."""
        entry = self.locked.get(operator.workload)
        if entry is None or entry.use != TUNED or operator.implementation != TUNED or not entry.candidate:
            return summary
        return self.known.applying(key, entry.candidate)

    # the state

    def _state(self, operator: Operator, workload: Workload, summary: Summary) -> tuple[State, str, str]:
        """The state, why, and what to type: "{}" stands for the operator's name."""
        state, why, command = self._unless_locked(operator, workload, summary)
        entry = self.locked.get(operator.workload)
        if entry is not None and state is State.READY:
            return State.LOCKED, f"{FILE} holds back what is {why}", "doit lock {}"
        if entry is not None and state is State.FRESH:
            return State.LOCKED, f"{FILE} says {entry.use}", ""
        return state, why, command

    def _unless_locked(self, operator: Operator, workload: Workload, summary: Summary) -> tuple[State, str, str]:
        if summary.preferred not in (None, BEST):
            said = "no tuned function" if summary.preferred == NONE else f"to {summary.preferred[:8]}"
            return State.ROLLED_BACK, said, "doit rollback {} --to best"
        if reason := self._why_none or why_not(self.model, workload, operator.implementation):
            return State.LEFT, reason, ""
        if found := reasons(summary, self.model.file.stale, self._present(operator, summary)):
            return State.STALE, "; ".join(map(str, found)), self._against(found, summary)
        return self._unless_stale(operator, summary)

    def _unless_stale(self, operator: Operator, summary: Summary) -> tuple[State, str, str]:
        trial = next((each for each in operator.candidates if each.strategy == TUNED), None)
        if summary.is_empty:
            claimed = f"{summary.claims} claims to try" if summary.claims else ""
            return State.NEVER, "what was found was thrown away" if summary.withdrawn else claimed, "doit tune {}"
        if not summary.timed:
            return State.FAILED, _most(summary.failures), "doit why {}"
        if trial is not None and trial.refused:
            return State.FAILED, f"put aside: {trial.refused}", "doit why {}"
        if not summary.candidate:
            return State.FRESH, "nothing faster was found", ""
        if operator.implementation != TUNED and trial is not None:
            return State.FRESH, f"{operator.implementation} is faster than what was tuned", ""
        if operator.implementation != TUNED or 0 < self.built < summary.validated:
            return State.READY, f"{summary.gain:.2f} times as fast", f"doit build {self.model.name}{self.option}"
        return State.FRESH, "", ""

    def _against(self, found: list[Reason], summary: Summary) -> str:
        is_exhausted = self._spaces <= frozenset(summary.exhausted)
        return "doit tune {}" if can_be_tuned_away(found, is_exhausted) else "doit invalidate {}"

    @functools.cached_property
    def _spaces(self) -> frozenset[tuple[str, int]]:
        return spaces_of(self.model)

    @functools.cached_property
    def _why_none(self) -> str:
        return why_none(self.model)

    def _present(self, operator: Operator, summary: Summary) -> Present:
        others = self._elsewhere.get(operator.workload, ()) if summary.is_empty else ()
        return Present(self.now, self.known.tools, self.model.file.tune.patience, others)

    @functools.cached_property
    def _elsewhere(self) -> Mapping[str, list[str]]:
        if not self.model.file.stale.device:
            return {}
        return self.known.elsewhere(self.model.attributes, self.model.device)


def _plain(operator: Operator) -> Workload:
    """A workload as a manifest tells it, where the plan is gone."""
    name = operator.name.rpartition("-")[0]
    function = Digest(operator.workload, 0)
    return Workload(name, function, operator.structural_hash, operator.shapes, operator.calls, False, written=(0,))


def _trial(operator: Operator, strategy: str) -> Trial | None:
    return next((each for each in operator.candidates if each.strategy == strategy), None)


def _seconds(operator: Operator, profile: Mapping[str, float]) -> float | None:
    """Of all calls, as the model's profile tells; where there is none, as the operator was timed alone."""
    if (seconds := profile.get(symbol_of(operator.workload))) is not None:
        return seconds
    chosen = _trial(operator, operator.implementation)
    return chosen.seconds * operator.calls if chosen is not None and chosen.seconds is not None else None


def _alone(operator: Operator, summary: Summary) -> float | None:
    """Seconds of a call, timed alone: what a lock compares."""
    if operator.implementation == TUNED and summary.candidate:
        return summary.seconds
    chosen = _trial(operator, operator.implementation)
    return chosen.seconds if chosen is not None else None


def _gain(operator: Operator, summary: Summary) -> float | None:
    plain, chosen = _trial(operator, "default"), _trial(operator, operator.implementation)
    if plain is not None and chosen is not None and plain.seconds and chosen.seconds:
        return plain.seconds / chosen.seconds
    if operator.implementation == "default":
        return 1.0
    is_tuned = operator.implementation == TUNED and summary.candidate
    return summary.gain if is_tuned else None


def _most(failures: Mapping[str, int]) -> str:
    """{"wrong": 3, "crashed": 9} → "9 crashed, 3 wrong"."""
    if list(failures) == [Outcome.WRONG]:
        return "every candidate gave another result than the default"
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(failures.items(), key=lambda each: -each[1]))
