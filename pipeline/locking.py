"""tuning.lock and what a target offers: the offer that follows from an entry, the entry that follows from a decision.

    offer      entry → the one strategy to ask, `tuned` with the one record that makes the locked candidate
    entry      decision → the line of the lock
    held_back  how much faster the best is that the lock keeps out; of an operator's records alone: `times_as_fast`,
               and `is_decided_otherwise`

Needs no TVM.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.compiler import libraries
from pipeline.composition import Composition, Offer, is_allowed
from pipeline.config import TargetFile
from pipeline.errors import ConfigError, StageError
from pipeline.lock import Entry
from pipeline.tuning.records import Outcome, Standing, TrialRecord, Winner, encoded
from pipeline.types import TUNED, Decision, Workload

if TYPE_CHECKING:
    from pipeline.types import Candidate

    Ask = Callable[[Offer], Candidate | None]

_PLAIN = "default"


# from the lock


def offer(composition: Composition, target: str, workload: Workload, entry: Entry) -> Offer:
    """The one strategy to ask where the lock has an entry for a workload.

    Raises ConfigError that says why where it cannot be asked.
    """
    if not composition.is_asked(entry.use):
        raise ConfigError(f"{entry.use} is not in the order of targets/{target}.toml")
    found = _tuned(composition, workload, entry) if entry.use == TUNED else composition.offer(entry.use, workload)
    if found is None:
        raise ConfigError(f"{entry.use} offers nothing for it here{_why_nothing(entry.use)}")
    if not composition.is_allowed(found, workload):
        raise ConfigError(f"[[operators]] of targets/{target}.toml forbids {entry.use} for it")
    here = composition.describe(found.library).version if found.library else ""
    if entry.version and here != entry.version:
        raise ConfigError(f"{entry.use} {entry.version} is locked, and {here} is what is installed here")
    return found


def _why_nothing(name: str) -> str:
    wanted = [library.install for library in libraries.LIBRARIES if library.name == name]
    return f" (to install it: {wanted[0]})" if wanted else ""


def _tuned(composition: Composition, workload: Workload, entry: Entry) -> Offer | None:
    """The candidate that an entry names, whatever became of its records since, of this device's or of any other's.

    What is not proven on this device, with the tools of today, is compared with the default before it is used.
    """
    if not entry.candidate:
        return composition.offer_of_databases(workload)
    own = composition.records_key(workload)
    standing = composition.ledger.standing(own)
    if any(each.candidate == entry.candidate and each.outcome is Outcome.WRONG for each in standing.trials):
        raise ConfigError(f"the locked candidate {entry.candidate[:12]} was found to be wrong")
    for winner in standing.unproven:
        if winner.trial.candidate == entry.candidate:
            composition.unproven[workload.digest] = winner
    if (trial := _trial(composition, own, entry.candidate)) is not None:
        return composition.offer_of_record(trial, trusted=entry.candidate in standing.retested)
    for key in composition.sets_elsewhere(workload):
        if (trial := _trial(composition, key, entry.candidate)) is not None:
            return composition.offer_of_record(trial, trusted=False)
    raise ConfigError(f"the tuning record {entry.candidate[:12]} is neither here nor on a remote")


def _trial(composition: Composition, key: str, candidate: str) -> TrialRecord | None:
    """A record of a candidate among all of a set, the withdrawn ones as well: always the same one."""
    members = (each for each in composition.ledger.members(key).values() if isinstance(each, TrialRecord))
    return min((each for each in members if each.candidate == candidate), key=encoded, default=None)


def held_back(composition: Composition, file: TargetFile, workload: Workload, entry: Entry) -> float:
    """How many times as fast as a locked function the tuned one is that would be chosen without the lock; 1 where none
    would."""
    return times_as_fast(composition.ledger.standing(composition.records_key(workload)), file, workload, entry)


def times_as_fast(standing: Standing, file: TargetFile, workload: Workload, entry: Entry) -> float:
    """The same, as the standing of an operator's records has it."""
    applied, is_proven = standing.applied()
    if not applied or not is_proven or applied[0].trial.candidate == entry.candidate:
        return 1.0
    if not _may_be_tuned(file, workload, entry):
        return 1.0
    same = [winner.gain for winner in applied if winner.trial.candidate == entry.candidate]
    locked = (entry.gain or 1.0) if entry.use == TUNED else 1.0
    return applied[0].gain / (same[0] if same else locked)


def is_decided_otherwise(standing: Standing, file: TargetFile, workload: Workload, entry: Entry) -> bool:
    """Whether without the lock another tuned function would be applied than the one that is locked, or none."""
    applied, _ = standing.applied()
    if applied and _may_be_tuned(file, workload, entry):
        return applied[0].trial.candidate != entry.candidate
    return entry.use == TUNED and bool(entry.candidate)


def _may_be_tuned(file: TargetFile, workload: Workload, entry: Entry) -> bool:
    """Whether a tuned function can be chosen where the lock has an entry."""
    return is_allowed(file, Offer(TUNED), workload) and _comes_before(TUNED, entry.use, file)


def _comes_before(name: str, other: str, file: TargetFile) -> bool:
    """Whether one strategy may be chosen where another was: it is timed, or does not come later in the order."""
    if name not in file.order:
        return False
    before = file.order[: file.order.index(name)]
    is_later = other in before or (other not in file.order and "library" in before)
    return file.select == "fastest" or not is_later


# to the lock


def entry(composition: Composition, ask: Ask, workload: Workload, decision: Decision, before: Entry | None) -> Entry:
    """The line of the lock for a decision that was made freely.

    ask     what a strategy offers for the workload
    before  the line until now: where the decision is the same, it stays as it is
    """
    chosen = decision.candidate
    winner = _winner(composition, ask, workload, decision) if chosen.strategy == TUNED else None
    seconds, gain = (winner.retest.seconds, winner.gain) if winner is not None else (decision.seconds, _gain(decision))
    candidate = winner.trial.candidate if winner is not None else ""
    version = composition.describe(chosen.library).version if chosen.library else ""
    made = Entry(chosen.strategy, chosen.whole.hash, workload.digest, candidate, seconds, gain, version)
    return before if before is not None and made.same(before) and before.seconds is not None else made


def _winner(composition: Composition, ask: Ask, workload: Workload, decision: Decision) -> Winner | None:
    """The winner that a decision for `tuned` applies; None where it is of the target's databases."""
    applied, _ = composition.ledger.standing(composition.records_key(workload)).applied()
    whole = decision.candidate.whole

    def makes_it(found: Offer | None) -> bool:
        made = ask(found) if found is not None else None
        return made is not None and made.whole == whole

    # Where a function has no weights with a layout of their own both digests are the same: that one is asked first.
    for winner in sorted(applied, key=lambda each: each.trial.candidate != whole.hash):
        with contextlib.suppress(ConfigError):  # its search space is gone
            if makes_it(composition.offer_of_record(winner.trial, trusted=False)):
                return winner
    if makes_it(composition.offer_of_databases(workload)):
        return None
    raise StageError(
        "its tuning records changed while it was locked",
        stage="dispatch",
        subject=workload.label,
        hint="run the same command again",
    )


def _gain(decision: Decision) -> float | None:
    """How many times as fast as the default what was chosen is, where both were timed."""
    plain = next((trial.seconds for trial in decision.trials if trial.strategy == _PLAIN), None)
    if plain is None or decision.seconds is None or decision.strategy == _PLAIN:
        return None
    return plain / decision.seconds
