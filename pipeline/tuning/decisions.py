"""What people decide about operators: to throw away what was found for them, and to go back to what was before.

    losses       what of an operator's records a choice would throw away, and what that costs
    throw_away   does it: a WithdrawnRecord, which names them
    go_back      another candidate than the best: a PreferredRecord

Both are facts among the records that they are about, so that they travel with them and come to everybody who has them.
Nothing is removed: whoever brings the same records again brings nothing back. Needs no TVM.
"""

from __future__ import annotations

import fnmatch
import getpass
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.records import (
    BEST,
    NONE,
    PreferredRecord,
    Record,
    Reign,
    RetestRecord,
    Standing,
    TrialRecord,
    WithdrawnRecord,
)
from pipeline.tuning.standings import Operators
from pipeline.types import Operator, Workload


@dataclass(frozen=True)
class Choice:
    """Which operators somebody means, and which of their records; all where nothing is given.

    patterns         names of operators with * and ?, or the first digits of a workload digest
    implementations  what operators run on now: "tuned", "onednn"
    gain_below       operators whose best tuned function is not this many times as fast as the baseline
    older_than       records that are older, in seconds
    toolchains       records made with a tool whose version matches: "0.26*", "tvm 0.26*"
    devices          records of other devices than this one, whose name matches
    """

    patterns: tuple[str, ...] = ()
    implementations: tuple[str, ...] = ()
    gain_below: float | None = None
    older_than: float | None = None
    toolchains: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()

    @property
    def is_of_records(self) -> bool:
        """Whether some records of an operator may be meant and others not."""
        return self.older_than is not None or bool(self.toolchains)

    def strays(self, workloads: Iterable[Workload]) -> list[str]:
        """The patterns that name none of these operators."""
        known = list(workloads)
        return [pattern for pattern in self.patterns if not any(_is_named(each, pattern) for each in known)]

    def means(self, workload: Workload, implementation: str, standing: Standing) -> bool:
        named = not self.patterns or any(_is_named(workload, pattern) for pattern in self.patterns)
        used = not self.implementations or any(fnmatch.fnmatchcase(implementation, one) for one in self.implementations)
        slow = self.gain_below is None or (standing.best is not None and standing.gain < self.gain_below)
        return named and used and slow

    def takes(self, record: Record, now: float) -> bool:
        """Whether a record of such an operator is meant."""
        if self.older_than is not None and record.at > now - self.older_than:
            return False
        return not self.toolchains or any(_is_made_with(record, each) for each in self.toolchains)


def _is_named(workload: Workload, pattern: str) -> bool:
    is_digits = len(pattern) >= 6 and set(pattern) <= set("0123456789abcdef")
    return workload.matches(pattern) or (is_digits and workload.digest.startswith(pattern))


def _is_made_with(record: Record, wanted: str) -> bool:
    tools = record.tools if isinstance(record, TrialRecord | RetestRecord) else {}
    return any(
        fnmatch.fnmatchcase(version, wanted) or fnmatch.fnmatchcase(f"{name} {version}", wanted)
        for name, version in tools.items()
    )


@dataclass(frozen=True)
class Loss:
    """What would be thrown away of one operator.

    device   whose records they are
    key      of their set
    records  digests of the members
    measured whether what `fastest` measured goes as well
    gain     how many times as fast as the baseline the operator's function is that would go; 1 where none does
    seconds  of its calls in an inference of all models that would be slower by that; None where no time is known
    spent    seconds of tuning that the records cost
    """

    target: str
    workload: Workload
    implementation: str
    device: str
    key: str
    records: tuple[str, ...]
    measured: bool
    gain: float
    seconds: float | None
    spent: float

    @property
    def is_empty(self) -> bool:
        return not self.records and not self.measured


def losses(
    operators: Operators, choice: Choice, used: Mapping[str, Operator], seconds: Mapping[str, float], now: float
) -> Iterator[Loss]:
    """What a choice comes to for the operators of a target, those that it does not mean left out.

    used     what each operator runs on in the models that are built, by workload
    seconds  of its calls in an inference of all of them, as far as known, by workload
    """
    for workload in operators.workloads.values():
        built = used.get(workload.digest)
        implementation = built.implementation if built is not None else ""
        for key, device in _sets(operators, workload, choice):
            standing = operators.ledger.standing(key)
            if not choice.means(workload, implementation, standing):
                continue
            gone = _gone(operators.ledger.members(key), choice, now)
            best = standing.best or next(iter(standing.unproven), None)
            loses = best is not None and not _survives(operators.ledger, key, gone, best.trial.candidate)
            was_measured = built is not None and any(trial.seconds is not None for trial in built.candidates)
            yield Loss(
                target=operators.target,
                workload=workload,
                implementation=implementation,
                device=device,
                key=key,
                records=tuple(sorted(gone)),
                measured=was_measured and not choice.is_of_records and not choice.devices,
                gain=best.gain if best is not None and loses else 1.0,
                seconds=_slower(seconds.get(workload.digest), best.gain) if best is not None and loses else None,
                spent=sum(record.cost for record in gone.values()),
            )


def _slower(seconds: float | None, gain: float) -> float | None:
    return seconds * (gain - 1) if seconds is not None else None


def _sets(operators: Operators, workload: Workload, choice: Choice) -> Iterator[tuple[str, str]]:
    """The sets of an operator that a choice may mean, by key, and of which device each is."""
    own = operators.about(workload)
    if not choice.devices:
        yield operators.key(workload), str(own["device"])
        return
    for key, about in operators.others(workload):
        if any(fnmatch.fnmatchcase(about, pattern) for pattern in choice.devices):
            yield key, about


def _gone(members: Mapping[str, Record], choice: Choice, now: float) -> dict[str, Record]:
    """The records that a choice means and that still count."""
    withdrawn = {name for each in members.values() if isinstance(each, WithdrawnRecord) for name in each.records}
    found: dict[str, Record] = {
        name: record
        for name, record in members.items()
        if name not in withdrawn and not isinstance(record, WithdrawnRecord) and choice.takes(record, now)
    }
    return found if any(isinstance(record, TrialRecord | RetestRecord) for record in found.values()) else {}


def _survives(ledger: Ledger, key: str, gone: Mapping[str, Record], candidate: str) -> bool:
    """Whether a winner would still have what makes it one."""
    left = [record for name, record in ledger.members(key).items() if name not in gone]
    tried = any(isinstance(each, TrialRecord) and each.candidate == candidate for each in left)
    return tried and any(isinstance(each, RetestRecord) and each.candidate == candidate for each in left)


def throw_away(operators: Operators, loss: Loss, reason: str) -> None:
    """Records that they count no longer. When it returns that is on the disk."""
    about = operators.about(loss.workload) | {"device": loss.device}
    record = WithdrawnRecord(records=loss.records, measured=loss.measured, reason=reason, at=time.time(), by=somebody())
    operators.ledger.add(loss.key, about, [record])


# going back


def candidate_of(standing: Standing, reigns: Iterable[Reign], wanted: str) -> str:
    """The candidate that somebody means by "previous", "best", "none" or the first digits of a digest.

    Raises ConfigError where there is none.
    """
    applied, _ = standing.applied()
    known = {winner.trial.candidate for winner in (*standing.winners, *standing.unproven)}
    if wanted in ("best", NONE):
        return BEST if wanted == "best" else NONE
    now = applied[0].trial.candidate if applied else NONE
    if wanted == "previous":
        for reign in reversed(list(reigns)):
            before = reign.winner.trial.candidate if reign.winner is not None else NONE
            if before != now and before in known | {NONE}:
                return before
        if now != NONE:
            return NONE  # before the first winner there was none
        raise ConfigError("there is nothing to go back to: nothing was ever tuned for it", hint="type `doit tune`")
    found = [name for name in known if name.startswith(wanted)]
    if len(found) != 1:
        said = "several candidates begin" if found else "no validated candidate begins"
        raise ConfigError(f"{said} with {wanted!r}", hint="type `doit rollback OPERATOR --list`")
    return found[0]


def go_back(operators: Operators, workload: Workload, candidate: str, reason: str) -> None:
    """Records which candidate is to be applied from now on. When it returns that is on the disk."""
    record = PreferredRecord(candidate=candidate, reason=reason, at=time.time(), by=somebody())
    operators.ledger.add(operators.key(workload), operators.about(workload), [record])


def somebody() -> str:
    """Who decides: the user's name on this machine."""
    try:
        return f"{getpass.getuser()}@{platform.node()}"
    except (KeyError, OSError):  # a user without a name
        return platform.node()
