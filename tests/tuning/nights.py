"""What tests of the night's loop share: nights of a fake engine on a fake clock, and hooks that disturb them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.tuning.fakes import FakeEngine, Faults, MemoryLedger, Simulated, Told, operator
from pipeline.tuning.night import Night
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.states import Operator, Terms

OPERATORS = tuple(operator(f"op{i}", 1e-3 * 0.7**i) for i in range(6))
TERMS = Terms(budget=120.0, trials=64)
ALL_WRONG = Faults(1.0, 0.0, 0.0, 0.0, 0.0)
ALL_CRASH = Faults(0.0, 0.0, 1.0, 0.0, 0.0)


def night(
    operators: Sequence[Operator] = OPERATORS,
    engine: FakeEngine | None = None,
    ledger: MemoryLedger | None = None,
    terms: Terms = TERMS,
    run: str = "r",
) -> tuple[Night, Told]:
    watcher = Told()
    return Night(operators, engine or FakeEngine(), ledger or MemoryLedger(), terms, watcher, run), watcher


def trials(ledger: MemoryLedger) -> list[TrialRecord]:
    return [each for records in ledger.records.values() for each in records if isinstance(each, TrialRecord)]


def of(told: Told, kind: type) -> list[Any]:
    return [each for each in told.events if isinstance(each, kind)]


class Raising:
    """A hook that raises at a phase of some operators, as often as it is told."""

    def __init__(self, phase: str, error: Callable[[], Exception], names: Sequence[str] = ("op0",)) -> None:
        self.phase, self.error, self.names = phase, error, names

    def __call__(self, phase: str, chosen: Operator) -> None:
        if phase == self.phase and chosen.workload.name in self.names:
            raise self.error()


class StoppingAt:
    """A hook that stops a night at the so-manieth time that a phase begins."""

    def __init__(self, phase: str, time: int, stops: int = 1) -> None:
        self.phase, self.left, self.stops = phase, time, stops
        self.night: Night | None = None
        self.begun: list[tuple[str, str]] = []

    def __call__(self, phase: str, chosen: Operator) -> None:
        self.begun.append((phase, chosen.workload.name))
        if phase == self.phase:
            self.left -= 1
            if self.left == 0:
                assert self.night is not None
                for _ in range(self.stops):
                    self.night.stop()


def most_at_once(spans: Sequence[tuple[str, str, float, float]]) -> int:
    return max(sum(begun <= each[2] < end for *_, begun, end in spans) for each in spans)


# Several posts: their times pass side by side.


def at_posts(
    engine: FakeEngine,
    operators: Sequence[Operator] = OPERATORS,
    ledger: MemoryLedger | None = None,
    terms: Terms = TERMS,
    run: str = "r",
) -> tuple[Night, Told]:
    watcher = Told()
    calls = Simulated(engine.clock)
    return Night(operators, engine, ledger or MemoryLedger(), terms, watcher, run, calls=calls), watcher


def many(count: int) -> list[Operator]:
    return [operator(f"op{i}", 1e-3 * (1 + i % 17) ** -1.2, {f"m{i % 5}": 1 + i % 2}) for i in range(count)]


def crew(posts: int, **given: Any) -> FakeEngine:
    return FakeEngine(posts=posts, workers=2 * posts, **given)
