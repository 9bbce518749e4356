"""What [policy] of a target asks of the models that are built for it, and which operators fall short.

Owns the rules of `doit check`. Judges standings (pipeline.tuning.status) and reads nothing itself. Needs no TVM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import Policy
from pipeline.lock import FILE
from pipeline.report import UNTUNED, duration
from pipeline.tuning.status import Row, Standing
from pipeline.types import TUNED

_ROUNDING = 1e-9  # 90 % in three parts is 90 %


@dataclass(frozen=True)
class Breach:
    """A rule that a model breaks.

    rule       its key in [policy]
    asked, is_ what it asks for, and what there is, in words
    operators  that are the cause, those that take longest first
    next       what to type
    """

    rule: str
    asked: str
    is_: str
    operators: tuple[str, ...]
    next: str


def breaches(standing: Standing) -> list[Breach]:
    """The rules of its target that a built model breaks, in the order of the file's keys."""
    policy = standing.file.policy
    found: list[Breach] = []
    if policy.tuned is not None and standing.tuned() < policy.tuned - _ROUNDING:
        found.append(_untuned(standing, policy.tuned))
    in_use = _by_time([row for row in standing.rows if row.validated is not None])
    if policy.validated and (rows := [row for row in in_use if not row.validated]):
        found.append(_unvalidated(standing, rows))
    if policy.younger is not None and (rows := [row for row in in_use if row.age is None or row.age > policy.younger]):
        found.append(_old(standing, rows, policy.younger))
    if policy.regression:
        found += _regressions(standing)
    return found


def asks(policy: Policy) -> bool:
    """Whether a policy asks for anything."""
    return policy != Policy()


def _untuned(standing: Standing, least: float) -> Breach:
    rows = _by_time([row for row in standing.rows if row.implementation in UNTUNED])
    return Breach(
        rule="tuned",
        asked=f"{least:.0%} of the operators' time tuned, written by hand or a library's",
        is_=f"{standing.tuned():.1%}",
        operators=_names(rows),
        next=f"doit tune -m {standing.model} -t {standing.target}",
    )


def _unvalidated(standing: Standing, rows: Sequence[Row]) -> Breach:
    return Breach(
        rule="validated",
        asked="tuned functions validated with the tools that are installed",
        is_=f"{_counted(rows)} not",
        operators=_names(rows),
        next=f"doit tune {_meant(standing, rows)}",
    )


def _old(standing: Standing, rows: Sequence[Row], limit: float) -> Breach:
    oldest = max((row.age for row in rows if row.age is not None), default=None)
    return Breach(
        rule="younger",
        asked=f"tuned functions validated within {limit:g} days",
        is_=f"{_counted(rows)} not" + (f", the oldest {oldest:.0f} days ago" if oldest is not None else ""),
        operators=_names(rows),
        next=f"doit invalidate --model {standing.model} -t {standing.target} --older-than {limit:g}d --yes && "
        f"doit tune {_meant(standing, rows)}",
    )


def _regressions(standing: Standing) -> list[Breach]:
    """Operators, and the model, that take longer than the lock says, beyond the noise of the target's measurements."""
    if not standing.locked:
        return [_broken(standing, f"{FILE} has nothing of {standing.target}", [], "doit lock")]
    found: list[Breach] = []
    margin = 1 + standing.file.measure.noise
    both = [
        (row, now, entry.seconds)
        for row in _by_time(standing.rows)
        if (entry := standing.locked.get(row.workload)) is not None
        and entry.seconds is not None
        and (now := _per_call(row)) is not None
    ]
    if slower := [(row, now, then) for row, now, then in both if now > then * margin]:
        rows = [row for row, _, _ in slower]
        worst, now, then = max(slower, key=lambda each: each[1] / each[2])
        said = f"{worst.operator} {now / then:.2f} times as slow, {duration(then)} → {duration(now)}"
        others = f"{_counted(rows)} slower, most of all {said}" if len(rows) > 1 else said
        found.append(_broken(standing, others, rows, f"doit why {worst.operator}"))
    now, then = (sum(row.calls * each[i] for row, *each in both) for i in (0, 1))
    if now > then * margin:
        said = f"the operators of the model together: {duration(then)} → {duration(now)}"
        found.append(_broken(standing, said, [], f"doit status {standing.model}"))
    return found


def _broken(standing: Standing, said: str, rows: Sequence[Row], command: str) -> Breach:
    noise = standing.file.measure.noise
    return Breach(
        "regression", f"nothing slower than in {FILE}, {noise:.0%} of noise aside", said, _names(rows), command
    )


def _per_call(row: Row) -> float | None:
    """Seconds of a call now, measured the way in which the lock's were: alone, or what was not tuned and never was
    timed alone, in the model. None where they cannot be compared."""
    if row.per_call is not None or row.seconds is None or row.implementation == TUNED:
        return row.per_call
    return row.seconds / row.calls


def _by_time(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (-(row.seconds or 0.0), row.operator))


def _names(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(row.operator for row in rows)


_MOST = 3  # operators that a command names; beyond that it is about the model


def _meant(standing: Standing, rows: Sequence[Row]) -> str:
    """What a command is given that is about these operators."""
    few = " ".join(row.operator for row in rows) if len(rows) <= _MOST else f"-m {standing.model}"
    return f"{few} -t {standing.target}"


def _counted(rows: Sequence[Row]) -> str:
    return f"{len(rows)} operator{'' if len(rows) == 1 else 's'}"
