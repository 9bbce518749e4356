"""A night that is stopped: once, and what is being measured ends first; twice, and it is given up at once."""

from __future__ import annotations

import threading
import time
from collections import Counter

import msgspec
import pytest

from pipeline.tuning.events import End, Ended
from pipeline.tuning.fakes import NO_FAULTS, FakeEngine, Faults, MemoryLedger
from pipeline.tuning.night import Batch
from pipeline.tuning.records import Certificate, Outcome, Record, RetestRecord, Standing, TrialRecord, standing
from pipeline.tuning.states import Operator, Terms
from tests.tuning.nights import OPERATORS, StoppingAt, at_posts, many, night, trials

CERTIFICATE = Certificate("default", (0, 1), 1e-4, 0.0)


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


def test_what_was_timed_and_not_retested_is_retested_by_the_next_run_though_all_has_ended() -> None:
    """A run that is killed between the two leaves records of trials alone."""
    terms = Terms(trials=16)
    ledger = MemoryLedger()
    assert night(engine=FakeEngine(faults=NO_FAULTS), ledger=ledger, terms=terms)[0].run().end is End.DONE
    for key, records in ledger.records.items():
        ledger.records[key] = [each for each in records if not isinstance(each, RetestRecord)]
    assert not any(ledger.standing(each.key).winners for each in OPERATORS)

    made, _ = night(engine=FakeEngine(faults=NO_FAULTS), ledger=ledger, terms=terms)
    owed = made.scheduler.owed_retests()
    assert len(owed) >= 2, "the others go on"
    before = {each.key: len(ledger.standing(each.key).trials) for each in owed}
    assert made.run().end is End.DONE
    assert before == {each.key: len(ledger.standing(each.key).trials) for each in owed}
    assert all(ledger.standing(each.key).winners for each in owed)
    assert not night(ledger=ledger, terms=terms)[0].scheduler.owed_retests()


def test_what_fell_behind_in_its_retest_is_owed_none() -> None:
    def trial(name: str, seconds: float, at: float) -> TrialRecord:
        return TrialRecord(
            candidate=name, space="s", space_version=1, decisions=[], outcome=Outcome.TIMED,
            seconds=seconds, baseline=2.0, at=at,
        )  # fmt: skip

    first, second = trial("a", 1.0, 1.0), trial("b", 1.1, 2.0)
    retest = RetestRecord(candidate="a", seconds=2.0, baseline=2.0, noise=0.0, certificate=CERTIFICATE, at=3.0)
    assert standing([first, second], 0.02).is_owed_a_retest(0.02)
    assert not standing([first, second, retest], 0.02).is_owed_a_retest(0.02), "the run had come to that"
    assert not standing([trial("c", 2.0, 1.0)], 0.02).is_owed_a_retest(0.02), "it is no faster"
