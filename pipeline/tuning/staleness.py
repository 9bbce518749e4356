"""When what was tuned for an operator is stale, by the rules of its target: [stale] in targets/<name>.toml.

Owns what makes an operator stale and how that is said. `doit status` shows it, and `doit tune` tunes an operator again
for which that can help. A build does not ask: it never does anything else because days have passed. Needs no TVM.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from pipeline.config import Stale
from pipeline.tuning.summaries import Summary

DAY = 86400.0


class Kind(enum.StrEnum):
    """What makes an operator stale; each but the last two is a rule of its name."""

    DAYS = "days"
    TOOLCHAIN = "toolchain"
    DEVICE = "device"
    VALIDATOR = "validator"
    FAILURES = "failures"
    CAUGHT_UP = "caught up"  # what had won does so no longer, and little was tried since
    LEVEL = "level"  # what is applied won, and the baseline has become as fast since


@dataclass(frozen=True)
class Reason:
    """Why an operator is stale."""

    kind: Kind
    said: str

    def __str__(self) -> str:
        return self.said


@dataclass(frozen=True)
class Present:
    """What an operator's records are held against.

    now        Unix time
    tools      versions of what compiles candidates, by the names in TOOLS
    patience   candidates that must have been tried after the default has caught up, for that to be settled
    elsewhere  other devices on which the operator was tuned for the same target
    """

    now: float
    tools: Mapping[str, str]
    patience: int
    elsewhere: Collection[str] = ()


def reasons(known: Summary, rules: Stale, present: Present) -> list[Reason]:
    """Why an operator with these records is stale; nothing where it is not."""
    found: list[Reason] = []
    if rules.device and known.is_empty and present.elsewhere:
        found.append(Reason(Kind.DEVICE, f"tuned on another device only: {', '.join(sorted(present.elsewhere)[:2])}"))
    if rules.toolchain and known.candidate and not known.is_proven:
        found.append(Reason(Kind.TOOLCHAIN, _other_tools(known.tools, present.tools)))
    if rules.validator and known.outdated and not known.candidate:
        found.append(Reason(Kind.VALIDATOR, "validated by an older version of the comparison with the default"))
    if rules.caught_up and known.level:
        found.append(Reason(Kind.LEVEL, "without tuning it is as fast by now, within the noise"))
    if rules.caught_up and known.beaten and known.since < present.patience:
        found.append(Reason(Kind.CAUGHT_UP, "the default has caught up with what was tuned"))
    if rules.failures is not None and known.trials and known.failed > rules.failures * known.trials:
        found.append(Reason(Kind.FAILURES, f"{known.failed} of {known.trials} candidates failed"))
    age = days(known.measured, present.now)
    if rules.days is not None and age is not None and age > rules.days:
        found.append(Reason(Kind.DAYS, f"last measured {age:.0f} days ago, the limit is {rules.days:g}"))
    return found


def days(at: float, now: float) -> float | None:
    """Days between a moment and now; None where there is no such moment."""
    return max(0.0, now - at) / DAY if at else None


# Where nothing new can be proposed, these stay until the old records are thrown away.
_BY_NEW_CANDIDATES = frozenset({Kind.DAYS, Kind.FAILURES, Kind.CAUGHT_UP})


def can_be_tuned_away(found: Iterable[Reason], is_exhausted: bool) -> bool:
    """Whether `doit tune` makes an operator with these reasons fresh, or at least can try; otherwise its records must
    be thrown away first.

    What only another comparison let win is compared again, whatever the search spaces have left.
    """
    kinds = {each.kind for each in found} - {Kind.TOOLCHAIN, Kind.DEVICE}  # these are tried again anyway
    return Kind.LEVEL not in kinds and not (is_exhausted and kinds & _BY_NEW_CANDIDATES)


def is_to_go_on(found: Collection[Reason], is_exhausted: bool) -> bool:
    """Whether a night gives an operator more candidates than it would get if it were fresh."""
    kinds = {each.kind for each in found}
    return Kind.VALIDATOR in kinds or (not is_exhausted and bool(kinds & _BY_NEW_CANDIDATES))


# What a person calls the tools, in the order in which they are told of.
_CALLED = {"tvm": "TVM", "tvm-ffi": "TVM's FFI"}


def _other_tools(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    for name, called in _CALLED.items():
        if then.get(name) != now.get(name):
            before, after = then.get(name, "an unknown version"), now.get(name, "absent")
            return f"validated with {called} {before}, this is {after}"
    return "validated with another build of TVM"
