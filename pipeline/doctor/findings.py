"""What a check is, and what it found."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace

from pipeline.errors import TvmakeError

REINSTALL = "pip install --force-reinstall tvmake"
AGAIN = "mend the fault above, then run `doit doctor` again"


class State(enum.StrEnum):
    OK = "ok"
    WARNING = "warning"  # works, but slowly, or not for long, or not everything
    FAULT = "fault"  # something that tvmake needs does not work


@dataclass(frozen=True)
class Finding:
    """What one check found: a state, a sentence about it, and, where there is something to do, what to type."""

    name: str
    state: State
    said: str
    hint: str = ""


class Place(enum.Enum):
    HERE = "here"
    CHILD = "child"  # loads TVM and may die


@dataclass(frozen=True)
class Check:
    """One thing to look at. `hint` is for when `run` raises an error without one, or dies."""

    run: Callable[[], Finding]
    place: Place = Place.HERE
    hint: str = REINSTALL
    name: str = ""

    @property
    def title(self) -> str:
        return self.name or getattr(self.run, "__name__", "check").replace("_", " ")

    def finding(self) -> Finding:
        """What it finds; an error that it raises is a fault."""
        try:
            finding = self.run()
        except TvmakeError as error:
            finding = Finding("", State.FAULT, error.message, error.hint or self.hint)
        except Exception as error:
            said = next(iter(str(error).strip().splitlines()), "")
            finding = Finding("", State.FAULT, f"{type(error).__name__}: {said}".removesuffix(": "), self.hint)
        return replace(finding, name=self.title)


def ok(said: str, hint: str = "") -> Finding:
    return Finding("", State.OK, said, hint)


def warning(said: str, hint: str) -> Finding:
    return Finding("", State.WARNING, said, hint)


def fault(said: str, hint: str) -> Finding:
    return Finding("", State.FAULT, said, hint)


def by_limits(amount: int, low: int, none: int, said: str, hint: str) -> Finding:
    """The state of an amount in bytes: a fault below `none`, a warning below `low`."""
    if amount < none:
        return fault(said, hint)
    return warning(said, hint) if amount < low else ok(said)


def gigabytes(amount: int) -> str:
    return f"{amount / 1e9:.1f} GB"
