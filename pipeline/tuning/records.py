"""Tuning records: what became of every candidate that was ever tried, and what follows from it.

A set of records belongs to one workload, target and device. Its members are immutable and self-contained, so that the
union of two sets is their merge and nothing that was measured once is measured again by whoever shares them:

    TrialRecord      one candidate: how it is made again, and its time or why it has none
    RetestRecord     a candidate that led, timed longer, in turn with the one that it would replace
    ExhaustedRecord  a search space that has nothing more to propose
    CompletedRecord  a budget that was used to its end, the operator being one of those that it was for

and what people decided about them, which travels with them:

    WithdrawnRecord  records that count no longer, whoever has or brings them
    PreferredRecord  the candidate that is to be applied, in place of the best

All that is known of an operator (`Standing`: the best, what was spent, whether its curve is flat) is computed from its
set, whatever order the members come in. Needs no TVM.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from pipeline.hashing import Encoded, is_sha256, key_of

FORMAT = 2  # the newest that is read; what the first could not tell is of the second
_KEY = 1  # of the sets

# Raise it when what passes the comparison with the default would no longer: certificates of others count no more.
VALIDATOR = 1

# What compiles a candidate: where one of these is another, a winner is validated again before it is applied.
TOOLS = ("tvm", "tvm-ffi", "libtvm")

ATTEMPTS = 2  # at a candidate whose failure may be the machine's


class Outcome(enum.StrEnum):
    """What became of a candidate."""

    TIMED = "timed"
    WRONG = "wrong"  # another result than the default's: in quarantine, never tried again
    NOT_BUILT = "not built"  # the compiler refuses it
    FAILED = "failed"  # it says an error when it is called
    BUILD_TIMEOUT = "build timed out"  # from here on the machine may be to blame: tried once more, later
    TIMED_OUT = "timed out"
    CRASHED = "crashed"
    CLAIMED = "claimed"  # timed elsewhere, by who knows whom: to be tried here before it can win


TRANSIENT = frozenset({Outcome.BUILD_TIMEOUT, Outcome.TIMED_OUT, Outcome.CRASHED})


# What is read must make sense: whoever shares a set may have written it. (msgspec checks this when it decodes.)
Positive = Annotated[float, msgspec.Meta(gt=0)]
Amount = Annotated[float, msgspec.Meta(ge=0)]


class Certificate(msgspec.Struct, frozen=True):
    """That a candidate's results are the reference's: on which seeds, within which tolerance, how far at most.

    tolerance and error  max |y - r| / max |r| over all outputs and seeds
    """

    reference: str
    seeds: tuple[int, ...]
    tolerance: Amount
    error: Amount
    validator: int = VALIDATOR

    @property
    def holds(self) -> bool:
        """Whether it proves anything today."""
        return self.validator == VALIDATOR and bool(self.seeds) and self.error <= self.tolerance


class TrialRecord(msgspec.Struct, frozen=True, tag="trial", kw_only=True):
    """One candidate that was tried.

    candidate  digest of the scheduled function: what is never measured twice
    space      the search space that proposed it, its version, and the decisions by which it makes it again
    seconds    least seconds of a run, None where it was not timed
    baseline   least seconds of the baseline, timed in turn with it
    noise      how far the two are to be trusted, relative
    cost       seconds of the run's time that it took
    at, run    Unix time, and which run of `doit tune`
    tools      versions of what made it
    """

    format: int = 1
    candidate: str
    space: str
    space_version: int
    decisions: Any
    outcome: Outcome
    said: str = ""
    seconds: Positive | None = None
    baseline: Positive | None = None
    noise: Amount = 0.0
    certificate: Certificate | None = None
    cost: Amount = 0.0
    at: float = 0.0
    run: str = ""
    tools: dict[str, str] = {}


class FiledTrial(TrialRecord, frozen=True, tag="trial", kw_only=True, gc=False):
    """A trial as a ledger holds it, many thousands at once: its decisions stay the JSON text that was read.

    A trace's text takes a tenth of the memory and of the time that its lists take. msgspec writes it as it is, so that
    who passes decisions on need not know; `msgspec.json.decode` makes lists of it.
    """

    decisions: msgspec.Raw


class RetestRecord(msgspec.Struct, frozen=True, tag="retest", kw_only=True):
    """A candidate timed again, longer, in turn with the baseline: what a winner must have.

    tools  versions of what compiled it; where there are none, those of its trial
    """

    format: int = 1
    candidate: str
    seconds: Positive
    baseline: Positive
    noise: Amount
    certificate: Certificate
    cost: Amount = 0.0
    at: float = 0.0
    run: str = ""
    tools: dict[str, str] = {}


class ExhaustedRecord(msgspec.Struct, frozen=True, tag="exhausted", kw_only=True):
    """A space that proposes nothing more for the workload, and why."""

    format: int = 1
    space: str
    space_version: int
    reason: str
    cost: Amount = 0.0
    at: float = 0.0
    run: str = ""


class CompletedRecord(msgspec.Struct, frozen=True, tag="completed", kw_only=True):
    """A run with a budget of so many seconds for some operators, this one among them, went to its end."""

    format: int = 1
    budget: Positive
    cost: Amount = 0.0
    at: float = 0.0
    run: str = ""


class WithdrawnRecord(msgspec.Struct, frozen=True, tag="withdrawn", kw_only=True):
    """Somebody invalidated what had been found.

    records   digests of the members of the set that count no longer, also where they are merged into it again
    measured  whether what `fastest` measured of the operator counts no longer either
    reason    in words, for people
    at, by    Unix time, and who, as far as the machine tells
    """

    format: int = 2
    records: tuple[str, ...]
    measured: bool = False
    reason: str = ""
    cost: Amount = 0.0
    at: float = 0.0
    by: str = ""

    def __post_init__(self) -> None:
        if not all(map(is_sha256, self.records)):
            raise ValueError("what is withdrawn has no digest")


class PreferredRecord(msgspec.Struct, frozen=True, tag="preferred", kw_only=True):
    """Somebody went back to another candidate than the best.

    candidate  its digest, BEST for whichever is the best, NONE for no tuned one at all
    """

    format: int = 2
    candidate: str
    reason: str = ""
    cost: Amount = 0.0
    at: float = 0.0
    by: str = ""


BEST, NONE = "", "none"

Record = TrialRecord | RetestRecord | ExhaustedRecord | CompletedRecord | WithdrawnRecord | PreferredRecord

_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)
_filer: msgspec.json.Decoder[Record] = msgspec.json.Decoder(
    FiledTrial | RetestRecord | ExhaustedRecord | CompletedRecord | WithdrawnRecord | PreferredRecord
)


def encoded(record: Record) -> bytes:
    """A record as the bytes that its digest is of. Raises ValueError for one that could not be read back, such as one
    whose seconds are no number: JSON would make that null."""
    for name in ("seconds", "baseline", "noise", "cost", "at"):
        value = getattr(record, name, None)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} of a record is {value}")
    data = msgspec.json.encode(record)
    decoded(data)
    return data


def decoded(data: bytes) -> Record:
    """The record that `encoded` wrote. Raises NewerFormatError for one of a newer format, which another version of
    this project reads, and ValueError for anything else."""
    return _decoded(data, _decoder)


def filed(data: bytes) -> Record:
    """The same; a trial as a FiledTrial."""
    return _decoded(data, _filer)


def _decoded(data: bytes, decoder: msgspec.json.Decoder[Record]) -> Record:
    try:
        record = decoder.decode(data)
    except (ValueError, RecursionError) as error:
        _require_known_format(data)
        raise ValueError(f"no tuning record: {error}") from error
    if record.format > FORMAT:
        raise NewerFormatError(record.format)
    return record


class NewerFormatError(ValueError):
    """A record that a newer version of this project wrote."""

    def __init__(self, found: int) -> None:
        super().__init__(f"format {found} is newer than {FORMAT}")


class _Format(msgspec.Struct):
    format: int


def _require_known_format(data: bytes) -> None:
    """A newer format may hold what this one does not even decode."""
    try:
        found = msgspec.json.decode(data, type=_Format).format
    except (ValueError, RecursionError):
        return
    if found > FORMAT:
        raise NewerFormatError(found)


class SetKeys:
    """The keys of the sets of records of one target (all its attributes) and device."""

    def __init__(self, target: Mapping[str, Any], device: str) -> None:
        self._target, self._device = Encoded.of(target), Encoded.of(device)

    def of(self, workload: str) -> str:
        """The key of the set of a workload, by its digest."""
        return key_of({"records": _KEY, "workload": workload, "target": self._target, "device": self._device})


def set_key(workload: str, target: Mapping[str, Any], device: str) -> str:
    """The key of the set of records of a workload (its digest), a target (all its attributes) and a device."""
    return SetKeys(target, device).of(workload)


@dataclass(frozen=True)
class Winner:
    """A candidate that was validated and retested: what `tuned` may apply."""

    trial: TrialRecord
    retest: RetestRecord

    @property
    def gain(self) -> float:
        """How many times as fast as the baseline, the two timed in turn."""
        return self.retest.baseline / self.retest.seconds

    @property
    def tools(self) -> Mapping[str, str]:
        """Versions of what compiled it when it was validated."""
        return self.retest.tools or self.trial.tools


@dataclass(frozen=True)
class Standing:
    """Where an operator stands, computed from its records.

    trials    candidates tried here, in the order of time, each once: its last word
    winners   validated and retested with the tools of today, and faster than the baseline beyond the noise; the best
              first
    unproven  the same, but validated with other tools only and not tried with those of today, the best first: to be
              compared again before one is applied
    tried     digests that no search shall propose again
    spent     seconds, all runs together
    baseline  least seconds of the baseline ever seen; None before the first trial
    failures  of the trials, how many ended otherwise than with a time
    retries   how often a candidate was tried again after a failure that may be the machine's
    claims    candidates that were timed elsewhere and not tried here yet, the fastest first
    retested  candidates that were retested, whatever came of it
    seconded  Unix time of the last retest, 0 where there was none
    budget    the largest budget, in seconds, that was used to its end; 0 where none was
    preferred what somebody decided last, None where nobody did
    withdrawn what was invalidated, in the order of time
    """

    trials: tuple[TrialRecord, ...] = ()
    winners: tuple[Winner, ...] = ()
    tried: frozenset[str] = frozenset()
    spent: float = 0.0
    baseline: float | None = None
    exhausted: frozenset[tuple[str, int]] = frozenset()
    failures: Mapping[Outcome, int] = field(default_factory=dict)
    retries: int = 0
    claims: tuple[TrialRecord, ...] = ()
    retested: frozenset[str] = frozenset()
    seconded: float = 0.0
    budget: float = 0.0
    unproven: tuple[Winner, ...] = ()
    preferred: PreferredRecord | None = None
    withdrawn: tuple[WithdrawnRecord, ...] = ()

    @property
    def best(self) -> Winner | None:
        return self.winners[0] if self.winners else None

    def leaders(self, among: Iterable[TrialRecord] | None = None) -> list[TrialRecord]:
        """What of these trials, by default of all, was timed and not retested yet, the best first."""
        trials = self.trials if among is None else among
        timed = (each for each in trials if each.outcome is Outcome.TIMED and each.candidate not in self.retested)
        return sorted(timed, key=sure_ratio, reverse=True)

    def leads(self, trial: TrialRecord, noise: float) -> bool:
        """Whether a trial seems faster than the best winner, beyond the noise: what a retest is made for."""
        return sure_ratio(trial) > self.gain * (1 + noise)

    def is_owed_a_retest(self, noise: float) -> bool:
        """Whether what leads was timed after the last retest: the run that timed it did not come to that."""
        return any(self.leads(each, noise) and each.at > self.seconded for each in self.leaders()[:1])

    def applied(self) -> tuple[tuple[Winner, ...], bool]:
        """What may be applied, in the order in which it is tried, and whether that was validated with today's tools."""
        if self.preferred is not None and self.preferred.candidate == NONE:
            return (), True
        if self.preferred is not None and self.preferred.candidate != BEST:
            for known in (self.winners, self.unproven):
                if chosen := [each for each in known if each.trial.candidate == self.preferred.candidate]:
                    return (*chosen, *(each for each in known if each not in chosen)), known is self.winners
        return (self.winners, True) if self.winners else (self.unproven, False)

    @property
    def gain(self) -> float:
        """How many times as fast as the baseline the best is; 1 where nothing beats it."""
        return self.best.gain if self.best is not None else 1.0

    @property
    def timed(self) -> int:
        return sum(trial.outcome is Outcome.TIMED for trial in self.trials)

    def curve(self) -> list[float]:
        """After each trial, how many times as fast as the baseline the best trial so far was."""
        best, points = 1.0, []
        for trial in self.trials:
            best = max(best, ratio(trial))
            points.append(best)
        return points


def ratio(trial: TrialRecord) -> float:
    """How many times as fast as the baseline a candidate is, the two timed in turn; 0 where it was not timed here."""
    if trial.outcome is not Outcome.TIMED or not trial.seconds or not trial.baseline:
        return 0.0
    return trial.baseline / trial.seconds


def sure_ratio(trial: TrialRecord) -> float:
    """The ratio of a trial less what may be noise in it: what a retest is worth for."""
    return ratio(trial) * (1 - min(trial.noise, 0.5))


def live(members: Mapping[str, Record]) -> list[Record]:
    """Those of a set's records, by digest, that nobody has withdrawn. What withdraws is never withdrawn itself."""
    gone = {name for each in members.values() if isinstance(each, WithdrawnRecord) for name in each.records}
    if not gone:
        return list(members.values())
    return [each for name, each in members.items() if name not in gone or isinstance(each, WithdrawnRecord)]


def standing(records: Iterable[Record], noise: float, tools: Mapping[str, str] | None = None) -> Standing:
    """What follows from the records of one set, each given once, in any order.

    noise  the least share that is taken for noise
    tools  those of today, by the names in TOOLS: what was validated with others is unproven; None: it does not matter
    """
    listed = list(records)
    said: dict[str, list[TrialRecord]] = {}
    tested: list[RetestRecord] = []
    preferred: list[PreferredRecord] = []
    withdrawn: list[WithdrawnRecord] = []
    exhausted: set[tuple[str, int]] = set()
    budget = 0.0
    for record in listed:
        match record:
            case TrialRecord():
                said.setdefault(record.candidate, []).append(record)
            case RetestRecord():
                tested.append(record)
            case PreferredRecord():
                preferred.append(record)
            case WithdrawnRecord():
                withdrawn.append(record)
            case ExhaustedRecord():
                exhausted.add((record.space, record.space_version))
            case CompletedRecord():
                budget = max(budget, record.budget)
    retests: dict[str, list[RetestRecord]] = {}
    for each in tested:
        if each.certificate.holds:
            retests.setdefault(each.candidate, []).append(each)
    last = [_last_word(each, tools) for each in said.values()]
    trials = [trial for trial in last if trial.outcome is not Outcome.CLAIMED]
    claims = [trial for trial in last if trial.outcome is Outcome.CLAIMED]
    found = {
        each.candidate: [Winner(each, one) for one in retests.get(each.candidate, ())]
        for each in trials
        if each.candidate in retests
    }
    proven = {name: [each for each in won if tools is None or _has(each.tools, tools)] for name, won in found.items()}
    others = [
        won
        for name, won in found.items()
        if not proven[name] and not any(tools is None or _has(trial.tools, tools) for trial in said[name])
    ]
    return Standing(
        trials=tuple(sorted(trials, key=lambda trial: (trial.at, trial.candidate))),
        winners=_winning(proven.values(), noise),
        unproven=_winning(others, noise),
        preferred=max(preferred, key=_moment, default=None),
        withdrawn=tuple(sorted(withdrawn, key=_moment)),
        tried=frozenset(name for name, each in said.items() if not may_be_tried(each)),
        spent=math.fsum(each.cost for each in listed),  # the same in any order
        baseline=min((each.baseline for each in measurements(listed) if each.baseline), default=None),
        exhausted=frozenset(exhausted),
        failures=Counter(trial.outcome for trial in trials if trial.outcome is not Outcome.TIMED),
        retries=sum(map(_retries, said.values())),
        claims=tuple(sorted(claims, key=lambda trial: (trial.seconds or math.inf, trial.candidate))),
        retested=frozenset(name for name, won in proven.items() if won),
        seconded=max((each.at for each in tested), default=0.0),
        budget=budget,
    )


def may_be_tried(trials: Iterable[TrialRecord]) -> bool:
    """Whether a candidate with these records may be tried (again): none is a final word, and few were attempts."""
    attempts = 0
    for trial in trials:
        if trial.outcome is not Outcome.CLAIMED and trial.outcome not in TRANSIENT:
            return False
        attempts += trial.outcome in TRANSIENT
    return attempts < ATTEMPTS


def _retries(trials: Sequence[TrialRecord]) -> int:
    """How often a candidate was tried after it had failed for what may be the machine's fault."""
    if len(trials) == 1:
        return 0
    attempts = [trial.outcome for trial in trials if trial.outcome is not Outcome.CLAIMED]
    return len(attempts) - 1 if not TRANSIENT.isdisjoint(attempts) else 0


def measurements(records: Iterable[Record]) -> list[TrialRecord | RetestRecord]:
    """Those of what was measured here: a claim was elsewhere."""
    return [
        each
        for each in records
        if isinstance(each, RetestRecord) or (isinstance(each, TrialRecord) and each.outcome is not Outcome.CLAIMED)
    ]


# What counts most of what is said of one candidate; the other outcomes weigh 0.
_WEIGHT = {Outcome.CLAIMED: -1, Outcome.TIMED: 1, Outcome.WRONG: 2}


def _last_word(trials: list[TrialRecord], tools: Mapping[str, str] | None) -> TrialRecord:
    """Of several records of one candidate: that it is wrong, else its time, else the latest failure, else a claim.

    But for what is wrong, what came of it with the tools of today counts alone, where it was tried with them.
    """
    if len(trials) == 1:
        return trials[0]
    if tools is not None and not any(trial.outcome is Outcome.WRONG for trial in trials):
        today = [trial for trial in trials if _has(trial.tools, tools) and trial.outcome is not Outcome.CLAIMED]
        trials = today or trials
    return max(trials, key=lambda trial: (_WEIGHT.get(trial.outcome, 0), trial.at, msgspec.json.encode(trial)))


def _winning(retested: Iterable[list[Winner]], noise: float) -> tuple[Winner, ...]:
    """Of candidates with all their retests those that win by their latest, the best first."""
    latest = [max(each, key=lambda winner: _moment(winner.retest)) for each in retested if each]
    winners = [each for each in latest if _wins(each.trial, each.retest, noise)]
    return tuple(sorted(winners, key=lambda winner: (-winner.gain, winner.trial.candidate)))


def _has(known: Mapping[str, str], tools: Mapping[str, str]) -> bool:
    return all(known.get(name) == version for name, version in tools.items())


def _moment(record: RetestRecord | PreferredRecord | WithdrawnRecord) -> tuple[float, bytes]:
    """What orders records in time: always the same way, also where two have the same time."""
    return record.at, msgspec.json.encode(record)


def _wins(trial: TrialRecord, retest: RetestRecord, noise: float) -> bool:
    """Whether a candidate may be applied: timed here, never wrong, and faster beyond the noise when it was retested."""
    margin = min(max(noise, retest.noise), 0.5)
    return trial.outcome is Outcome.TIMED and retest.seconds < retest.baseline * (1 - margin)


@dataclass(frozen=True)
class Reign:
    """From when on a candidate was what a build applied (None: none that is tuned), and what had made it so."""

    at: float
    winner: Winner | None
    by: RetestRecord | PreferredRecord | WithdrawnRecord


def history(members: Mapping[str, Record], noise: float) -> list[Reign]:
    """Which candidates of a set were applied one after the other, whatever the tools were; the latest last."""
    turns = [each for each in members.values() if isinstance(each, RetestRecord | PreferredRecord | WithdrawnRecord)]
    reigns: list[Reign] = []
    for turn in sorted(turns, key=_moment):
        known = live({name: each for name, each in members.items() if each.at <= turn.at})
        applied, _ = standing(known, noise).applied()
        winner = applied[0] if applied else None
        before = reigns[-1].winner if reigns else None
        if (winner and winner.trial.candidate) != (before and before.trial.candidate):
            reigns.append(Reign(turn.at, winner, turn))
    return reigns
