"""What goes wrong in a night costs one operator at most, or ends the night with all that was written kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from pipeline.errors import StageError, StoreError
from pipeline.tuning.events import End, Ended, Measured, OperatorEnded
from pipeline.tuning.fakes import FakeEngine, Faults, MemoryLedger
from pipeline.tuning.records import Outcome, Record, TrialRecord
from pipeline.tuning.states import Terms
from tests.tuning.nights import OPERATORS, Raising, night, of, trials


@pytest.mark.parametrize("phase", ["prepare", "measure", "retest", "learn"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_engine_that_fails_for_one_operator_puts_it_aside(phase: str, workers: int) -> None:
    def error() -> Exception:
        return StageError("the builder died", stage="search", subject="op0")

    ledger = MemoryLedger()
    made, told = night(engine=FakeEngine(workers=workers, hook=Raising(phase, error)), ledger=ledger)
    ended = made.run()
    assert ended.end is End.DONE
    figures = {each.operator: each for each in ended.operators}
    assert figures[OPERATORS[0].name].why == "put aside"
    assert "the builder died" in ended.failures["StageError"].said
    assert sum(each.trials > 8 for each in figures.values()) >= 3, "the night went on"
    (end,) = [each for each in of(told, OperatorEnded) if each.why == "put aside"]
    assert "the builder died" in end.said
    was_measured = bool(ledger.records.get(OPERATORS[0].key))
    assert was_measured == (phase in ("retest", "learn")), "what was measured before is there"


def test_three_failures_of_a_kind_in_a_row_end_the_night() -> None:
    names = [one.workload.name for one in OPERATORS]
    ended = night(engine=FakeEngine(hook=Raising("measure", lambda: OSError(28, "No space left"), names)))[0].run()
    assert ended.end is End.NOTHING_MEASURED
    assert ended.failures["OSError"].count == 3
    assert "No space left" in ended.said

    late = Raising("measure", lambda: OSError(28, "No space left"), ())
    engine = FakeEngine(hook=late)
    made, told = night(engine=engine)
    told_at = told.told

    def told_and_broken(event: Any) -> None:
        told_at(event)
        if len(of(told, Measured)) == 4:
            late.names = names

    told.told = told_and_broken  # type: ignore[method-assign]
    ended = made.run()
    assert ended.end is End.BROKEN
    assert ended.timed > 0


def test_failures_of_other_kinds_or_between_successes_do_not() -> None:
    kinds = iter([ValueError("a"), KeyError("b"), ValueError("c"), KeyError("d")])
    hook = Raising("measure", lambda: next(kinds), [f"op{i}" for i in range(4)])
    assert night(engine=FakeEngine(hook=hook))[0].run().end is End.DONE
    scattered = Raising("measure", lambda: ValueError("x"), ["op0", "op2", "op4"])
    assert night(engine=FakeEngine(hook=scattered), terms=Terms(budget=600.0))[0].run().end is End.DONE


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stores_error_ends_the_night_after_what_is_there_was_written(workers: int) -> None:
    ledger = MemoryLedger()
    hook = Raising("prepare", lambda: StoreError("the disk is gone"), ["op3"])
    made, told = night(engine=(engine := FakeEngine(workers=workers, hook=hook)), ledger=ledger)
    with pytest.raises(StoreError, match="the disk is gone"):
        made.run()
    assert engine.closed
    measured = sum(engine.made.values())
    assert measured > 0
    assert sum(each.outcome is not Outcome.NOT_BUILT for each in trials(ledger)) == measured
    assert isinstance(told.events[-1], Ended)
    assert (told.events[-1].end, told.events[-1].said) == (End.BROKEN, "the disk is gone")
    for one in OPERATORS:
        with ledger.claim(one.key) as is_free:
            assert is_free


def test_records_that_cannot_be_written_end_the_night() -> None:
    class Full(MemoryLedger):
        def add(self, key: str, about: Mapping[str, Any], records: Sequence[Record]) -> None:
            raise StoreError("no space")

    made, _ = night(ledger=Full())
    with pytest.raises(StoreError):
        made.run()


def test_what_could_not_be_built_is_known_even_where_measuring_fails() -> None:
    ledger = MemoryLedger()
    hook = Raising("measure", lambda: OSError("no link"))
    night(engine=FakeEngine(hook=hook, faults=Faults(0, 0, 0, 0, not_built=0.5)), ledger=ledger)[0].run()
    written = ledger.records[OPERATORS[0].key]
    assert {each.outcome for each in written if isinstance(each, TrialRecord)} == {Outcome.NOT_BUILT}
