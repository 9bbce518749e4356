"""The night's loop: what is written when, what ends it, and who gets which operator."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.errors import StageError, StoreError
from pipeline.store import Store
from pipeline.tuning.calls import post
from pipeline.tuning.events import Begun, End, Ended, Measured, OperatorEnded, Phase, PostChanged, Retested
from pipeline.tuning.fakes import (
    NO_FAULTS,
    Curve,
    FakeClock,
    FakeEngine,
    Faults,
    MemoryLedger,
    Simulated,
    Told,
    WaitingEngine,
    candidate,
    operator,
)
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.night import Batch, Night, PostLostError
from pipeline.tuning.records import ExhaustedRecord, Outcome, Record, RetestRecord, Standing, TrialRecord
from pipeline.tuning.scheduler import Scheduler
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


# What a night comes to.


def test_a_night_finds_faster_candidates_and_writes_everything() -> None:
    ledger, engine = MemoryLedger(), FakeEngine()
    made, told = night(engine=engine, ledger=ledger)
    ended = made.run()
    assert ended.end is End.DONE
    assert ended.trials == len(trials(ledger)) > 100
    assert ended.timed == sum(each.outcome is Outcome.TIMED for each in trials(ledger))
    ((untuned, was, now),) = ended.models.values()
    assert untuned == pytest.approx(was)
    assert now < 0.8 * was
    assert sum(ended.gained.values()) == pytest.approx(was - now)
    assert all(each.gain <= engine.limit(one) * 1.01 for each, one in zip(ended.operators, OPERATORS, strict=True))
    assert engine.closed
    assert isinstance(told.events[0], Begun)
    assert told.events[-1] is ended


def test_a_profile_that_was_wrong_is_no_gain() -> None:
    class Quicker(FakeEngine):
        def _baseline(self, operator: Operator) -> float:
            return operator.seconds / 3

    curves = {one.key: Curve(1.0, 10.0) for one in OPERATORS[1:]}
    ended = night(engine=Quicker(curves=curves))[0].run()
    assert set(ended.gained) == {OPERATORS[0].name}
    ((untuned, was, now),) = ended.models.values()
    assert untuned == pytest.approx(was)
    assert was - now == pytest.approx(ended.gained[OPERATORS[0].name])


def test_the_same_night_twice_is_the_same() -> None:
    ledgers = [MemoryLedger(), MemoryLedger()]
    for ledger in ledgers:
        night(ledger=ledger)[0].run()
    assert ledgers[0].records == ledgers[1].records
    other = MemoryLedger()
    night(engine=FakeEngine(seed=1), ledger=other)[0].run()
    assert other.records != ledgers[0].records


def test_what_a_night_took_is_what_its_records_cost() -> None:
    ledger = MemoryLedger()
    ended = night(ledger=ledger)[0].run()
    costs = sum(record.cost for records in ledger.records.values() for record in records)
    assert costs == pytest.approx(ended.elapsed)
    assert ended.spent == pytest.approx(ended.elapsed)
    assert TERMS.budget is not None
    assert TERMS.budget - 1 < ended.elapsed < TERMS.budget + 15, "a batch and its retests more at most"


def test_records_say_when_and_by_which_run() -> None:
    ledger = MemoryLedger()
    night(ledger=ledger, run="monday")[0].run()
    written = [record for records in ledger.records.values() for record in records]
    assert {record.run for record in written} == {"monday"}
    begin = FakeClock().now()
    assert all(begin < record.at <= begin + 140 for record in written)
    for records in ledger.records.values():
        times = [record.at for record in records]
        assert times == sorted(times)


def test_no_candidate_is_measured_twice_but_after_a_crash() -> None:
    engine, ledger = FakeEngine(), MemoryLedger()
    for budget in (60.0, 120.0, 180.0):
        night(engine=engine, ledger=ledger, terms=Terms(budget=budget))[0].run()
    outcomes: dict[str, list[Outcome]] = {}
    for each in trials(ledger):
        outcomes.setdefault(each.candidate, []).append(each.outcome)
    again = {name: each for name, each in outcomes.items() if len(each) > 1}
    assert again, "some crash, and are tried once more"
    for each in again.values():
        assert len(each) == 2
        assert each[0] in (Outcome.CRASHED, Outcome.TIMED_OUT)


# Budgets.


def test_a_repeated_night_does_nothing_and_a_larger_one_goes_on() -> None:
    ledger = MemoryLedger()
    first = night(ledger=ledger, terms=Terms(budget=120.0))[0].run()
    repeated, told = night(ledger=ledger, terms=Terms(budget=120.0))
    ended = repeated.run()
    assert (ended.trials, ended.end) == (0, End.DONE)
    assert not of(told, Phase)
    larger = night(ledger=ledger, terms=Terms(budget=240.0))[0].run()
    assert larger.trials > 50
    assert larger.elapsed == pytest.approx(240.0 - first.elapsed, abs=15)


def test_without_a_budget_it_ends_when_every_operator_has() -> None:
    ledger = MemoryLedger()
    made, told = night(ledger=ledger, terms=Terms(trials=64))
    made.run()
    ends = {each.operator.operator: each.why for each in of(told, OperatorEnded)}
    assert set(ends) == {one.name for one in OPERATORS}
    assert night(ledger=ledger, terms=Terms(trials=64))[0].run().trials == 0


def test_a_new_operator_alone_gets_its_share_when_the_budget_is_spent() -> None:
    ledger = MemoryLedger()
    terms = Terms(budget=200.0)
    night(ledger=ledger, terms=terms)[0].run()
    before = {key: list(records) for key, records in ledger.records.items()}
    new = operator("new", 2e-4)
    ended = night([*OPERATORS, new], ledger=ledger, terms=terms)[0].run()
    assert ended.trials >= 8
    assert {key for key in ledger.records if ledger.records[key] != before.get(key)} == {new.key}
    assert 200 / 7 <= ledger.standing(new.key).spent < 200 / 7 + 15
    assert night([*OPERATORS, new], ledger=ledger, terms=terms)[0].run().trials == 0


def test_what_a_changed_operator_had_been_given_is_given_again() -> None:
    ledger = MemoryLedger()
    terms = Terms(budget=200.0)
    night(ledger=ledger, terms=terms)[0].run()
    had = ledger.standing(OPERATORS[0].key).spent
    changed = [operator("changed", 1e-3), *OPERATORS[1:]]
    ended = night(changed, ledger=ledger, terms=terms)[0].run()
    assert ended.elapsed == pytest.approx(had, abs=15)
    assert ledger.standing(changed[0].key).spent >= 200 / 6
    assert night(changed, ledger=ledger, terms=terms)[0].run().trials == 0


def test_when_all_have_ended_a_changed_operator_alone_is_tuned() -> None:
    ledger, terms = MemoryLedger(), Terms(trials=48)
    night(ledger=ledger, terms=terms)[0].run()
    before = set(ledger.records)
    counts = {key: len(records) for key, records in ledger.records.items()}
    changed = operator("changed", 3e-4)
    assert night([*OPERATORS[:3], changed, *OPERATORS[4:]], ledger=ledger, terms=terms)[0].run().trials > 0
    assert set(ledger.records) - before == {changed.key}
    assert {key: len(ledger.records[key]) for key in before} == counts


def test_the_same_operator_in_another_model_is_not_tuned_again() -> None:
    ledger = MemoryLedger()
    night(ledger=ledger, terms=Terms(trials=32))[0].run()
    elsewhere = [operator(f"op{i}", 1e-3 * 0.7**i, {"other": 2}) for i in range(6)]
    assert night(elsewhere, ledger=ledger, terms=Terms(trials=32))[0].run().trials == 0


# Ends.


def test_a_space_that_is_exhausted_ends_its_operator_for_good() -> None:
    ledger, small = MemoryLedger(), Curve(2.0, 5.0, size=10)
    engine = FakeEngine(curves={OPERATORS[0].key: small}, faults=NO_FAULTS)
    made, told = night(OPERATORS[:1], engine, ledger)
    ended = made.run()
    assert ended.trials == 10
    (end,) = of(told, OperatorEnded)
    assert end.why == "every search space is exhausted"
    assert any(isinstance(each, ExhaustedRecord) for each in ledger.records[OPERATORS[0].key])
    again = FakeEngine(hook=Raising("prepare", AssertionError))
    assert night(OPERATORS[:1], again, ledger)[0].run().end is End.DONE


def test_an_engine_that_proposes_nothing_new_ends_the_operator() -> None:
    class Same(FakeEngine):
        def prepare(self, operator: Operator, standing: Standing, count: int) -> Batch:
            return super().prepare(operator, Standing(), count)

    made, told = night(OPERATORS[:1], Same(faults=NO_FAULTS))
    ended = made.run()
    assert ended.trials == 16, "the first batches, and never again"
    assert [each.said for each in of(told, OperatorEnded)] == ["nothing new was proposed"]


def test_nothing_measured() -> None:
    ended = night(engine=FakeEngine(faults=ALL_CRASH))[0].run()
    assert ended.end is End.NOTHING_MEASURED
    assert ended.timed == 0
    failure = ended.failures["crashed"]
    assert (failure.count, failure.said) == (ended.trials, "crashed with SIGSEGV")
    assert {each.why for each in ended.operators} == {"nothing could be measured"}


def test_validation_failed_names_an_operator_whose_every_candidate_was_wrong() -> None:
    class OneWrong(FakeEngine):
        def prepare(self, operator: Operator, standing: Standing, count: int) -> Batch:
            self.faults = ALL_WRONG if operator is OPERATORS[2] else NO_FAULTS
            return super().prepare(operator, standing, count)

    ended = night(engine=OneWrong())[0].run()
    assert ended.end is End.VALIDATION_FAILED
    assert ended.failures["wrong"].operator == OPERATORS[2].name
    figures = ended.operators[2]
    assert (figures.winners, figures.failed) == (0, {"wrong": figures.trials})


def test_faults_end_no_night_and_never_win() -> None:
    ledger = MemoryLedger()
    faults = Faults(0.1, 0.1, 0.1, 0.1, 0.1)
    ended = night(engine=FakeEngine(faults=faults), ledger=ledger, terms=Terms(budget=600.0))[0].run()
    assert ended.end is End.DONE
    assert set(ended.failures) == {"wrong", "crashed", "timed out", "not built"}
    for one in OPERATORS:
        for winner in ledger.standing(one.key).winners:
            assert winner.trial.outcome is Outcome.TIMED
            assert winner.trial.seconds is not None


def test_a_leader_that_is_not_confirmed_does_not_win() -> None:
    class Fluke(FakeEngine):
        def retest(self, operator: Operator, standing: Standing, leader: TrialRecord) -> list[Record]:
            (record,) = super().retest(operator, standing, leader)
            assert isinstance(record, RetestRecord)
            slower = RetestRecord(
                candidate=record.candidate,
                seconds=record.baseline,
                baseline=record.baseline,
                noise=0.0,
                certificate=record.certificate,
            )
            return [slower]

    made, told = night(engine=Fluke())
    ended = made.run()
    retests = of(told, Retested)
    assert retests
    assert not any(each.won for each in retests)
    assert all(each.winners == 0 and each.gain == 1.0 for each in ended.operators)
    assert not ended.gained


def test_a_retest_is_only_for_what_beats_the_best_beyond_the_noise() -> None:
    made, told = night(terms=Terms(budget=300.0, noise=0.05))
    made.run()
    best: dict[str, float] = {}
    retests = of(told, Retested)
    assert len(retests) > 5
    for each in retests:
        assert each.claimed > best.get(each.operator.operator, 1.0) * 1.05
        best[each.operator.operator] = each.operator.gain
    assert max(Counter(each.candidate for each in retests).values()) == 1


def test_what_a_killed_run_did_not_retest_is_retested_by_the_next() -> None:
    ledger = MemoryLedger()
    one = OPERATORS[0]
    engine = FakeEngine(faults=NO_FAULTS, curves={one.key: Curve(3.0, 1.0)})
    batch = engine.prepare(one, Standing(), 8)
    ledger.add(one.key, {}, engine.measure(one, batch))
    assert ledger.standing(one.key).best is None
    engine.curves = {one.key: Curve(1.0, 1.0)}  # nothing more to be found
    before = set(batch.candidates)

    class Kept(FakeEngine):
        def _ratio(self, operator: Operator, index: int) -> float:
            return 2.0 if candidate(operator, index) in before else 0.9

    made, told = night([one], Kept(faults=NO_FAULTS), ledger)
    made.run()
    assert of(told, Retested)[0].candidate in before


# What goes wrong.


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


# Stop and go.


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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("phase", ["prepare", "measure", "retest", "learn"])
def test_stopped_at_a_phase_nothing_that_was_measured_is_lost(phase: str, workers: int) -> None:
    ledger = MemoryLedger()
    hook = StoppingAt(phase, 5)
    engine = FakeEngine(workers=workers, hook=hook)
    made, _ = night(engine=engine, ledger=ledger)
    hook.night = made
    ended = made.run()
    assert ended.end is End.STOPPED
    measured = [each for each in trials(ledger) if each.outcome is not Outcome.NOT_BUILT]
    assert len(measured) == sum(engine.made.values()) > 0
    stopped = [i for i, (begun, _) in enumerate(hook.begun) if begun == phase][4]
    after = [begun for begun, _ in hook.begun[stopped + 1 :]]
    assert after.count("measure") <= (1 if workers and phase == "prepare" else 0), "what had been begun at most"
    assert "prepare" not in after or workers
    goes_on = night(engine=FakeEngine(), ledger=ledger)[0].run()
    assert goes_on.end is End.DONE
    assert goes_on.trials > 50


def test_a_batch_that_is_being_measured_ends_first() -> None:
    ledger = MemoryLedger()
    hook = StoppingAt("measure", 1)
    made, _ = night(engine=FakeEngine(workers=2, hook=hook, faults=NO_FAULTS), ledger=ledger)
    hook.night = made
    assert made.run().trials == 8
    assert len(trials(ledger)) == 8


def test_what_was_built_when_it_is_stopped_is_known_as_far_as_it_failed() -> None:
    ledger, prepared = MemoryLedger(), threading.Semaphore(0)

    class Slow(FakeEngine):
        def prepare(self, operator: Operator, standing: Standing, count: int) -> Batch:
            try:
                return super().prepare(operator, standing, count)
            finally:
                prepared.release()

        def measure(self, operator: Operator, batch: Batch) -> list[Record]:
            assert all(prepared.acquire(timeout=10) for _ in range(2)), "the next one is built meanwhile"
            time.sleep(0.05)
            made.stop()
            return super().measure(operator, batch)

    made, _ = night(OPERATORS[:2], Slow(workers=1, faults=Faults(0, 0, 0, 0, not_built=0.5)), ledger)
    assert made.run().end is End.STOPPED
    dropped = [each for each in ledger.records[OPERATORS[1].key] if isinstance(each, TrialRecord)]
    assert dropped
    assert {each.outcome for each in dropped} == {Outcome.NOT_BUILT}


def test_a_second_stop_gives_up_at_once() -> None:
    ledger, waiting = MemoryLedger(), threading.Event()
    began = threading.Event()

    def hook(phase: str, chosen: Operator) -> None:
        if phase == "measure":
            began.set()
            waiting.wait(20)

    made, _ = night(engine=FakeEngine(workers=1, hook=hook), ledger=ledger)
    ended: list[Ended] = []
    thread = threading.Thread(target=lambda: ended.append(made.run()))
    thread.start()
    assert began.wait(10)
    made.stop()
    thread.join(0.4)
    assert thread.is_alive(), "the batch is waited for"
    made.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert ended[0].end is End.STOPPED
    assert not [each for each in trials(ledger) if each.outcome is not Outcome.NOT_BUILT]
    waiting.set()


def test_a_preparation_that_hangs_does_not_hold_up_a_stop() -> None:
    waiting, began = threading.Event(), threading.Event()

    def hook(phase: str, chosen: Operator) -> None:
        if phase == "prepare":
            began.set()
            waiting.wait(20)

    made, _ = night(engine=FakeEngine(workers=2, hook=hook))
    thread = threading.Thread(target=made.run)
    thread.start()
    assert began.wait(10)
    made.stop()
    thread.join(5)
    assert not thread.is_alive()
    waiting.set()


def test_a_night_stopped_before_it_begins_measures_nothing() -> None:
    made, _ = night()
    made.stop()
    ended = made.run()
    assert (ended.end, ended.trials) == (End.STOPPED, 0)


# Several batches at once, several nights at once.


class Overlapping(FakeEngine):
    """Takes some real time, and notes when it prepared and measured."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.spans: list[tuple[str, str, float, float]] = []
        self.proposed: list[str] = []

    def prepare(self, operator: Operator, standing: Standing, count: int) -> Batch:
        begun = time.monotonic()
        time.sleep(0.02)
        batch = super().prepare(operator, standing, count)
        self.proposed += batch.candidates
        self.spans.append(("prepare", operator.key, begun, time.monotonic()))
        return batch

    def measure(self, operator: Operator, batch: Batch) -> list[Record]:
        begun = time.monotonic()
        time.sleep(0.01)
        records = super().measure(operator, batch)
        self.spans.append(("measure", operator.key, begun, time.monotonic()))
        return records


def most_at_once(spans: Sequence[tuple[str, str, float, float]]) -> int:
    return max(sum(begun <= each[2] < end for *_, begun, end in spans) for each in spans)


def test_batches_are_prepared_side_by_side_and_measured_one_at_a_time() -> None:
    engine, ledger = Overlapping(workers=3), MemoryLedger()
    made, told = night(engine=engine, ledger=ledger, terms=Terms(budget=90.0))
    made.run()
    prepared = [each for each in engine.spans if each[0] == "prepare"]
    measured = [each for each in engine.spans if each[0] == "measure"]
    assert 2 <= most_at_once(prepared) <= 3
    assert most_at_once(measured) == 1
    assert any(p[2] < m[3] and m[2] < p[3] for p in prepared for m in measured), "both at the same time"
    assert max(engine.made.values()) <= 2
    begun = [each.elapsed - each.seconds for each in of(told, Measured)]
    assert max(begun) < 90.0, "what is ready when the budget is spent is not measured"


def test_one_operator_alone_is_prepared_ahead_and_nothing_of_it_is_measured_twice() -> None:
    engine, ledger = Overlapping(workers=2, faults=NO_FAULTS), MemoryLedger()
    night(OPERATORS[:1], engine, ledger, Terms(trials=100, patience=200))[0].run()
    prepared = [each for each in engine.spans if each[0] == "prepare"]
    measured = [each for each in engine.spans if each[0] == "measure"]
    assert any(p[2] < m[3] and m[2] < p[3] for p in prepared for m in measured)
    assert len(trials(ledger)) == 100
    assert set(engine.made.values()) == {1}
    assert max(Counter(engine.proposed).values()) == 1, "nor proposed, while the batch before is measured"


def test_candidates_that_another_wrote_in_the_meantime_are_not_measured() -> None:
    ledger = MemoryLedger()
    other = FakeEngine(faults=NO_FAULTS)

    class Overtaken(FakeEngine):
        def prepare(self, operator: Operator, standing: Standing, count: int) -> Batch:
            batch = super().prepare(operator, standing, count)
            if not standing.trials:  # someone shares the records and knows of no claims
                ledger.add(operator.key, {}, other.measure(operator, other.prepare(operator, standing, 5)))
            return batch

    engine = Overtaken(faults=NO_FAULTS)
    night(OPERATORS[:2], engine, ledger, Terms(budget=60.0))[0].run()
    assert sum(other.made.values()) == 10
    assert not set(engine.made) & set(other.made)
    assert len({each.candidate for each in trials(ledger)}) == len(trials(ledger))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_nights_share_the_work_and_repeat_nothing(workers: int) -> None:
    ledger = MemoryLedger()
    operators = [operator(f"op{i}", 1e-3) for i in range(8)]
    engines = [FakeEngine(workers=workers, faults=NO_FAULTS, hook=lambda *_: time.sleep(0.002)) for _ in range(2)]
    nights = [
        night(operators, each, ledger, Terms(trials=40, patience=100), f"run{i}") for i, each in enumerate(engines)
    ]
    ends: list[Ended] = []
    threads = [threading.Thread(target=lambda made=made: ends.append(made.run())) for made, _ in nights]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [each.end for each in ends] == [End.DONE, End.DONE]
    assert not set(engines[0].made) & set(engines[1].made)
    assert all(ledger.standing(one.key).best or len(ledger.standing(one.key).trials) == 40 for one in operators)
    shares = [sum(each.made.values()) for each in engines]
    assert sum(shares) == len(trials(ledger))
    assert min(shares) > 0.2 * sum(shares), shares


def test_an_operator_that_another_run_keeps_is_waited_for_and_can_be_stopped() -> None:
    ledger = MemoryLedger()
    made, told = night(OPERATORS[:2], ledger=ledger, terms=Terms(trials=16))
    with ledger.claim(OPERATORS[0].key):
        thread = threading.Thread(target=made.run)
        thread.start()
        time.sleep(0.3)
        assert thread.is_alive()
        assert {each.operator.operator for each in of(told, Measured)} == {OPERATORS[1].name}
        made.stop()
        thread.join(5)
        assert not thread.is_alive()


def test_records_in_a_store_serve_as_well_as_those_in_memory(tmp_path: Path) -> None:
    memory = MemoryLedger()
    night(ledger=memory)[0].run()
    for runs in (1, 0):
        stored = Ledger(Store(tmp_path / "store"), 0.02)
        made = Night(OPERATORS, FakeEngine(), stored, TERMS, Told(), "r")
        assert bool(made.run().trials) == bool(runs)
        for one in OPERATORS:
            assert len(stored.standing(one.key).trials) == len(memory.standing(one.key).trials)
            assert stored.standing(one.key).gain == pytest.approx(memory.standing(one.key).gain)


# Several posts: their times pass side by side, on a fake clock but where real waiting is meant.


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


@pytest.mark.parametrize("posts", [2, 4, 16])
def test_several_posts_make_as_many_times_the_trials_in_the_same_order_of_worth(posts: int) -> None:
    operators, budget = many(60), 3200.0
    one = at_posts(crew(1), operators, terms=Terms(budget=budget))[0].run()
    all_ = at_posts(crew(posts), operators, terms=Terms(budget=budget / posts))[0].run()
    assert all_.trials / all_.elapsed > 0.95 * posts * one.trials / one.elapsed
    assert all_.elapsed == pytest.approx(budget / posts, abs=20)
    assert all_.spent == pytest.approx(one.spent, rel=0.05)
    reached = [sum(now for *_, now in each.models.values()) for each in (one, all_)]
    untuned = sum(untuned for untuned, *_ in one.models.values())
    assert reached[0] < 0.75 * untuned
    assert reached[1] == pytest.approx(reached[0], rel=0.03)


class Noting(FakeEngine):
    """Notes which post was at which operator, and when."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.spans: list[tuple[str, str, float, float]] = []

    def measure(self, operator: Operator, batch: Batch) -> list[Record]:
        begun = self.now()
        records = super().measure(operator, batch)
        self.spans.append((post(), operator.key, begun, self.now()))
        return records

    def retest(self, operator: Operator, standing: Standing, leader: TrialRecord) -> list[Record]:
        begun = self.now()
        records = super().retest(operator, standing, leader)
        self.spans.append((post(), operator.key, begun, self.now()))
        return records


@pytest.mark.parametrize("count", [3, 12])
def test_no_operator_is_at_two_posts_and_no_post_at_two_operators(count: int) -> None:
    engine, ledger = Noting(posts=4, workers=8, post_names=("a", "b", "c", "d"), faults=NO_FAULTS), MemoryLedger()
    at_posts(engine, many(count), ledger, Terms(trials=100))[0].run()
    assert most_at_once(engine.spans) == min(4, count)
    for which in (0, 1):
        for name in {each[which] for each in engine.spans}:
            assert most_at_once([each for each in engine.spans if each[which] == name]) == 1
    assert {each[0] for each in engine.spans} == {"a", "b", "c", "d"} if count > 3 else {"a", "b", "c"}
    assert max(engine.made.values()) == 1


def test_each_batch_costs_what_its_post_took_and_idle_posts_cost_nothing() -> None:
    ledger = MemoryLedger()
    ended = at_posts(crew(4), many(12), ledger, Terms(budget=120.0))[0].run()
    costs = sum(record.cost for records in ledger.records.values() for record in records)
    assert ended.spent == pytest.approx(costs)
    assert 4 * ended.elapsed - 40 < costs <= 4 * ended.elapsed
    alone = [at_posts(crew(k), OPERATORS[:1], terms=Terms(trials=100))[0].run() for k in (1, 4)]
    assert alone[1].spent == pytest.approx(alone[0].spent, rel=0.1)
    assert alone[1].spent <= alone[1].elapsed
    assert alone[1].trials == alone[0].trials


def test_a_post_that_had_nothing_to_do_charges_its_next_batch_nothing_of_that() -> None:
    ledger, taken = MemoryLedger(), contextlib.ExitStack()
    taken.enter_context(ledger.claim(OPERATORS[1].key))  # another run is at the second of two operators
    engine = crew(2, faults=NO_FAULTS)

    def hook(phase: str, chosen: Operator) -> None:
        if phase == "measure" and engine.clock.now() > FakeClock().now() + 30:
            taken.close()

    engine.hook = hook
    made, told = at_posts(engine, OPERATORS[:2], ledger, Terms(trials=150, patience=300))
    made.run()
    assert {each.post for each in of(told, Measured)} == {"1", "2"}
    assert of(told, Measured)[-1].operator.operator == OPERATORS[1].name
    assert max(each.seconds for each in of(told, Measured)) < 7


def test_a_budget_is_a_night_of_so_many_hours_however_many_posts_there_are() -> None:
    ledger, operators = MemoryLedger(), many(40)
    first = at_posts(crew(4), operators, ledger, Terms(budget=300.0))[0].run()
    assert first.elapsed == pytest.approx(300.0, abs=15)
    assert first.spent == pytest.approx(1200.0, rel=0.05)
    for posts in (1, 4, 8):
        assert at_posts(crew(posts), operators, ledger, Terms(budget=300.0))[0].run().trials == 0, "it is used"
    larger = at_posts(crew(4), operators, ledger, Terms(budget=400.0))[0].run()
    assert larger.elapsed == pytest.approx(100.0, abs=15)


def test_what_one_post_spent_before_counts_as_its_part_of_a_night_with_four() -> None:
    ledger, operators, terms = MemoryLedger(), many(16), Terms(budget=150.0)
    engine = crew(1)
    engine.hook = stopping = StoppingAt("measure", 30)
    stopping.night, _ = at_posts(engine, operators, ledger, terms)
    before = stopping.night.run()
    assert 80 < before.elapsed < 140
    after = at_posts(crew(4), operators, ledger, terms)[0].run()
    assert after.elapsed == pytest.approx((4 * 150 - before.elapsed) / 4, abs=12)


def test_a_plan_is_as_much_shorter_as_there_are_posts() -> None:
    plans = [
        Scheduler(many(10), lambda key: Standing(), Terms(budget=budget, trials=64, posts=posts)).plan()
        for budget, posts in ((None, 1), (None, 4), (50.0, 4))
    ]
    assert plans[1].seconds == pytest.approx(plans[0].seconds / 4)
    assert plans[2].seconds == pytest.approx(50.0)
    assert len({sum(each.to_come for each in plan.forecasts) for plan in plans}) == 1


def test_without_a_budget_all_operators_are_tuned_to_their_ends_with_several_posts() -> None:
    made, told = at_posts(crew(4), many(10), terms=Terms(trials=64))
    made.run()
    assert {each.operator.operator for each in of(told, OperatorEnded)} == {one.name for one in many(10)}


def test_stopped_once_the_batches_end_that_are_being_measured_with_one_retest_each() -> None:
    class Fluke(FakeEngine):
        def retest(self, operator: Operator, standing: Standing, leader: TrialRecord) -> list[Record]:
            (record,) = super().retest(operator, standing, leader)
            assert isinstance(record, RetestRecord)
            return [msgspec.structs.replace(record, seconds=record.baseline)]  # so that the next one is looked at

    hook = StoppingAt("measure", 11)
    engine, ledger = Fluke(posts=4, workers=8, hook=hook), MemoryLedger()
    made, _ = at_posts(engine, many(12), ledger)
    hook.night = made
    assert made.run().end is End.STOPPED
    stopped = [i for i, (begun, _) in enumerate(hook.begun) if begun == "measure"][10]
    after = Counter(name for begun, name in hook.begun[stopped + 1 :] if begun == "retest")
    assert not [begun for begun, _ in hook.begun[stopped + 1 :] if begun in ("measure", "learn")]
    assert after
    assert max(after.values()) == 1
    assert [begun for begun, _ in hook.begun].count("retest") > 2 * len(after), "two of a batch where it is not stopped"
    measured = [each for each in trials(ledger) if each.outcome is not Outcome.NOT_BUILT]
    assert len(measured) == sum(engine.made.values())


def test_stopped_twice_several_batches_are_given_up_and_what_could_not_be_built_is_known() -> None:
    held, began = threading.Event(), threading.Semaphore(0)
    measured: list[str] = []

    def hook(phase: str, chosen: Operator) -> None:
        if phase == "measure":
            measured.append(chosen.key)
            began.release()
            held.wait(20)

    ledger = MemoryLedger()
    engine = FakeEngine(posts=2, workers=4, hook=hook, faults=Faults(0, 0, 0, 0, not_built=0.5))
    made, _ = night(engine=engine, ledger=ledger)
    ended: list[Ended] = []
    thread = threading.Thread(target=lambda: ended.append(made.run()))
    thread.start()
    assert all(began.acquire(timeout=10) for _ in range(2)), "both posts are at work"
    made.stop()
    thread.join(0.3)
    assert thread.is_alive()
    made.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert ended[0].end is End.STOPPED
    assert {each.outcome for each in trials(ledger)} == {Outcome.NOT_BUILT}
    assert set(measured) <= set(ledger.records)
    assert not ledger._claimed
    held.set()


def test_the_stores_error_at_one_post_ends_the_others_too() -> None:
    class Full(MemoryLedger):
        def add(self, key: str, about: Mapping[str, Any], records: Sequence[Record]) -> None:
            if key == OPERATORS[2].key:
                raise StoreError("no space")
            super().add(key, about, records)

    ledger = Full()
    made, told = at_posts(engine := crew(3, faults=NO_FAULTS), ledger=ledger)
    with pytest.raises(StoreError, match="no space"):
        made.run()
    assert engine.closed
    assert told.events[-1].said == "no space"  # type: ignore[union-attr]
    assert not ledger._claimed


def test_posts_that_really_wait_work_side_by_side() -> None:
    operators, terms = many(40), Terms(budget=60.0, trials=1000)
    rates: dict[int, float] = {}
    for _ in range(3):  # other programs may keep the processors busy for a moment
        for posts in (1, 2, 4):
            engine = WaitingEngine(posts=posts, workers=2 * posts, pace=0.02, faults=NO_FAULTS)
            ended = night(operators, engine, terms=terms)[0].run()
            assert ended.end is End.DONE
            rates[posts] = max(rates.get(posts, 0.0), ended.trials / ended.elapsed)
        if all(rates[posts] >= 0.9 * posts * rates[1] for posts in (2, 4)):
            break
    assert rates[2] >= 0.9 * 2 * rates[1], rates
    assert rates[4] >= 0.9 * 4 * rates[1], rates


def test_two_nights_with_two_posts_each_share_the_work_and_repeat_nothing() -> None:
    ledger, operators = MemoryLedger(), [operator(f"op{i}", 1e-3) for i in range(8)]
    engines = [WaitingEngine(posts=2, workers=4, pace=0.001, faults=NO_FAULTS) for _ in range(2)]
    ends: list[Ended] = []
    threads = []
    for i, engine in enumerate(engines):
        made, _ = night(operators, engine, ledger, Terms(trials=40, patience=100), f"run{i}")
        threads.append(threading.Thread(target=lambda made=made: ends.append(made.run())))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
    assert [each.end for each in ends] == [End.DONE, End.DONE]
    assert not set(engines[0].made) & set(engines[1].made)
    assert sum(len(each.made) for each in engines) == len(trials(ledger)) == 8 * 40


# Posts that are lost.


class Losing:
    """A hook that loses a post at some of the times that a phase begins; `back` times later the engine has it again.

    Of `names` alone, where there are any. With `stays` the engine has it all the time: it is restarted at once.
    """

    def __init__(self, phase: str, times: Sequence[int], back: int = 0, stays: bool = False, names: str = "") -> None:
        self.phase, self.times, self.back, self.stays, self.names = phase, list(times), back, stays, names
        self.engine = FakeEngine()
        self.count = 0
        self.gone: list[tuple[int, str]] = []
        self.hit: list[str] = []

    def of(self, engine: FakeEngine) -> FakeEngine:
        self.engine, engine.hook = engine, self
        return engine

    def __call__(self, phase: str, chosen: Operator) -> None:
        if phase != self.phase or (self.names and chosen.workload.name not in self.names):
            return
        self.count += 1
        for due, name in [each for each in self.gone if self.back and each[0] <= self.count]:
            self.gone.remove((due, name))
            self._have(len(self.engine.post_names) + 1, (*self.engine.post_names, name))
        if self.count in self.times:
            self.hit.append(chosen.key)
            if not self.stays:
                self.gone.append((self.count + self.back, post()))
                self._have(self.engine.posts - 1, [each for each in self.engine.post_names if each != post()])
            raise PostLostError(f"post {post()} does not answer")

    def _have(self, count: int, names: Sequence[str]) -> None:
        self.engine.posts, self.engine.post_names = count, tuple(names)


NAMES = ("east", "west", "north")


def changes(told: Told) -> list[tuple[str, str, int]]:
    return [(each.post, each.change, each.posts) for each in of(told, PostChanged)]


@pytest.mark.parametrize("names", [(), NAMES])
def test_a_lost_posts_batch_is_measured_elsewhere_and_the_others_go_on(names: tuple[str, ...]) -> None:
    ledger, losing = MemoryLedger(), Losing("measure", [5])
    engine = losing.of(crew(3, post_names=names, faults=NO_FAULTS))
    made, told = at_posts(engine, many(12), ledger, Terms(trials=40))
    ended = made.run()
    assert ended.end is End.DONE
    ((name, change, left),) = changes(told)
    assert (change, left) == ("lost", 2)
    assert name in (names or "123")
    (event,) = of(told, PostChanged)
    assert event.said == f"post {name} does not answer"
    assert ended.failures["post lost"].count == 1
    assert {each.outcome for each in trials(ledger)} == {Outcome.TIMED}, "nothing is known of what was lost"
    assert not [each for each in ended.operators if each.why == "put aside"]
    assert set(engine.made.values()) == {1}
    (hit,) = losing.hit
    assert len(ledger.standing(hit).trials) == 40
    lost_at = told.events.index(event)
    assert name not in {each.post for each in told.events[lost_at:] if isinstance(each, Measured)}
    assert len({each.post for each in of(told, Measured)}) == 3


def test_a_post_that_is_back_gets_batches_again() -> None:
    losing = Losing("measure", [5], back=6)
    made, told = at_posts(losing.of(crew(3, post_names=NAMES)), many(12), terms=Terms(trials=40))
    made.run()
    (lost, *_), (back, *_) = changes(told)
    assert [each[1:] for each in changes(told)] == [("lost", 2), ("back", 3)]
    assert lost == back
    event = of(told, PostChanged)[1]
    assert lost in {each.post for each in told.events[told.events.index(event) :] if isinstance(each, Measured)}


@pytest.mark.parametrize("posts", [1, 3])
def test_a_post_that_is_restarted_at_once_is_told_as_that(posts: int) -> None:
    losing = Losing("measure", [2, 9], stays=True)
    made, told = at_posts(losing.of(crew(posts)), many(12), terms=Terms(trials=40))
    assert made.run().end is End.DONE
    assert [each[1] for each in changes(told)] == ["lost", "back", "lost", "back"]


def test_an_operator_that_loses_three_posts_in_a_row_is_put_aside_by_name() -> None:
    ledger, losing = MemoryLedger(), Losing("measure", [1, 2, 3, 4, 5], stays=True, names="op0")
    made, told = at_posts(losing.of(crew(3)), ledger=ledger)
    ended = made.run()
    assert ended.end is End.DONE
    (aside,) = [each for each in of(told, OperatorEnded) if each.why == "put aside"]
    assert aside.operator.operator == OPERATORS[0].name
    assert "lost 3 times in a row" in aside.said
    assert losing.count == 3
    assert ended.failures["post lost"].count == 3
    assert not [each for each in ledger.records.get(OPERATORS[0].key, ()) if isinstance(each, TrialRecord)] or {
        each.outcome for each in ledger.records[OPERATORS[0].key] if isinstance(each, TrialRecord)
    } == {Outcome.NOT_BUILT}
    assert all(each.trials > 8 for each in ended.operators[1:])


def test_losses_with_something_measured_between_them_are_no_row() -> None:
    losing = Losing("measure", [1, 2, 4, 5, 7], stays=True, names="op0")
    made, told = at_posts(losing.of(crew(2)), terms=Terms(trials=100))
    made.run()
    assert losing.count > 7
    assert not [each for each in of(told, OperatorEnded) if each.why == "put aside"]


@pytest.mark.parametrize("times", [[1], [1, 2]])
@pytest.mark.parametrize("count", [8, 40])
def test_a_retest_whose_post_is_lost_is_made_again_also_where_the_operator_has_ended(
    count: int, times: list[int]
) -> None:
    ledger, losing = MemoryLedger(), Losing("retest", times, stays=True)
    engine = losing.of(crew(2, faults=NO_FAULTS, curves={OPERATORS[0].key: Curve(3.0, 1.0)}))
    made, told = at_posts(engine, OPERATORS[:1], ledger, Terms(trials=count))
    ended = made.run()
    assert [each[1] for each in changes(told)] == ["lost", "back"] * len(times)
    first = max(trials(ledger)[:8], key=lambda each: (each.baseline or 0) / (each.seconds or 1))
    assert of(told, Retested)[0].candidate == first.candidate
    assert len(trials(ledger)) == count, "what had been measured stands"
    assert ended.operators[0].winners
    assert not ledger._claimed


def test_an_operator_whose_retests_lose_three_posts_is_put_aside() -> None:
    made, told = at_posts(Losing("retest", range(1, 9), stays=True, names="op0").of(crew(2)))
    assert made.run().end is End.DONE
    (aside,) = [each for each in of(told, OperatorEnded) if each.why == "put aside"]
    assert aside.operator.operator == OPERATORS[0].name
    assert len(changes(told)) == 6


def test_a_stale_operator_whose_post_is_lost_is_still_looked_at_again() -> None:
    ledger, terms = MemoryLedger(), Terms(trials=32)
    at_posts(crew(1), OPERATORS[:1], ledger, terms)[0].run()
    stale = [replace(OPERATORS[0], is_stale=True)]
    assert at_posts(Losing("measure", [1], stays=True).of(crew(1)), stale, ledger, terms)[0].run().trials > 16


@pytest.mark.parametrize("measured", [True, False])
def test_without_a_post_a_night_ends_and_the_next_one_goes_on(measured: bool) -> None:
    ledger, losing = MemoryLedger(), Losing("measure", [9, 10, 11] if measured else [1, 2, 3])
    made, told = at_posts(losing.of(crew(3, post_names=NAMES)), many(12), ledger)
    ended = made.run()
    assert ended.end is End.DESERTED
    assert ended.end == "no post left"
    assert "no post to measure at" in ended.said
    assert "does not answer" in ended.said
    assert bool(ended.timed) == measured
    assert sorted(left for *_, left in changes(told)) == [0, 1, 2]
    assert at_posts(crew(3), many(12), ledger)[0].run().trials > 50


def test_an_engine_without_a_post_ends_its_night_at_once() -> None:
    ended = night(engine=FakeEngine(posts=0))[0].run()
    assert (ended.end, ended.trials, ended.said) == (End.DESERTED, 0, "there is no post to measure at")


def test_posts_that_come_in_the_night_are_put_to_work_and_the_budget_stays_its_hours() -> None:
    engine = crew(1, post_names=("a",))

    def hook(phase: str, chosen: Operator) -> None:
        if phase == "measure" and engine.clock.now() > FakeClock().now() + 100:
            engine.posts, engine.post_names = 3, ("a", "b", "c")

    engine.hook = hook
    made, told = at_posts(engine, many(40), terms=Terms(budget=300.0))
    ended = made.run()
    assert [each[:2] for each in changes(told)] == [("b", "new"), ("c", "new")]
    assert ended.elapsed == pytest.approx(300.0, abs=15)
    assert ended.spent == pytest.approx(100 + 3 * 200, abs=40)


def test_posts_are_named_in_what_is_told() -> None:
    made, told = at_posts(crew(3, post_names=NAMES), many(12))
    made.run()
    assert of(told, Begun)[0].posts == NAMES
    assert {each.post for each in of(told, Measured)} == set(NAMES)
    assert {each.post for each in of(told, Retested)} == set(NAMES)
    assert {each.post for each in of(told, Phase) if each.phase in ("measuring", "retesting")} == set(NAMES)
    assert {each.post for each in of(told, Phase) if each.phase == "preparing"} == {""}


# What is told.


def test_batches_are_told_as_they_were() -> None:
    ledger = MemoryLedger()
    made, told = night(ledger=ledger)
    ended = made.run()
    batches = of(told, Measured)
    assert sum(each.timed for each in batches) == ended.timed
    assert sum(sum(each.failed.values()) for each in batches) == ended.trials - ended.timed
    assert [each.elapsed for each in batches] == sorted(each.elapsed for each in batches)
    assert all(each.left == pytest.approx(max(0.0, 120 - each.elapsed)) for each in batches)
    times = [each.models.now for each in batches]
    assert times == sorted(times, reverse=True)
    assert all(each.models.expected <= each.models.now <= each.models.before * 1.001 for each in batches)
    phases = [(each.phase, each.operator) for each in of(told, Phase)]
    assert [phase for phase, _ in phases[:3]] == ["preparing", "measuring", ""] or phases[2][0] == "retesting"


def test_a_thousand_operators_and_eight_hours_take_seconds() -> None:
    operators = [operator(f"op{i}", 1e-3 * (1 + i % 97) ** -1.2, {f"m{i % 9}": 1}) for i in range(1000)]
    begun = time.perf_counter()
    ended = night(operators, terms=Terms(budget=8 * 3600.0))[0].run()
    assert time.perf_counter() - begun < 60
    assert ended.elapsed >= 8 * 3600 - 1
    assert ended.trials > 20_000
