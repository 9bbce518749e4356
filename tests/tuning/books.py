"""What tests of the scheduler share: records written by hand, and a scheduler over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.tuning.fakes import MemoryLedger, operator
from pipeline.tuning.records import Certificate, Outcome, Record, RetestRecord, TrialRecord
from pipeline.tuning.scheduler import Scheduler
from pipeline.tuning.states import Operator, Terms, Why

NOISE = 0.02


class Book(MemoryLedger):
    """Records written by hand: ratios of trials, None for one that failed."""

    def tried(
        self,
        chosen: Operator,
        ratios: Sequence[float | None],
        cost: float = 0.4,
        won: float | None = None,
        outcome: Outcome = Outcome.FAILED,
    ) -> Book:
        known = len(self.records.get(chosen.key, ()))
        trials: list[Record] = [
            TrialRecord(
                candidate=f"{chosen.key[:8]}-{known + i}",
                space="fake",
                space_version=1,
                decisions=i,
                outcome=outcome if ratio is None else Outcome.TIMED,
                seconds=None if ratio is None else chosen.seconds / ratio,
                baseline=None if ratio is None else chosen.seconds,
                cost=cost,
                at=float(known + i),
            )
            for i, ratio in enumerate(ratios)
        ]
        if won is not None:
            proof = Certificate("default", (0,), 1e-4, 0.0)
            name = trials[-1].candidate  # type: ignore[union-attr]
            seconds = chosen.seconds / won
            trials.append(
                RetestRecord(candidate=name, seconds=seconds, baseline=chosen.seconds, noise=0.0, certificate=proof)
            )
        self.add(chosen.key, {}, trials)
        return self


def order_of(made: Scheduler, count: int, elapsed: float = 0.0) -> list[str]:
    """The operators of the next turns, where nothing comes of any."""
    turns = [made.pick(elapsed) for _ in range(count)]
    return [turn.operator.workload.name for turn in turns if turn is not None]


def scheduler(operators: Sequence[Operator], book: MemoryLedger | None = None, **terms: object) -> Scheduler:
    ledger = book or MemoryLedger()
    return Scheduler(operators, ledger.standing, Terms(**terms))  # type: ignore[arg-type]


def why(operators: Sequence[Operator], book: MemoryLedger, **terms: object) -> Mapping[str, Why | None]:
    made = scheduler(operators, book, **terms)
    return {state.operator.workload.name: state.why for state in made.states.values()}


SMALL, MIDDLE, LARGE = operator("small", 1e-4), operator("middle", 1e-3), operator("large", 5e-3)
OPERATORS = tuple(operator(f"op{i}", 1e-3 * 0.8**i) for i in range(10))
