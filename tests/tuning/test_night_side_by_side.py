"""Several batches at once and several nights at once: the work is shared, and nothing is measured twice."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.store import Store
from pipeline.tuning.events import End, Ended, Measured
from pipeline.tuning.fakes import NO_FAULTS, FakeEngine, MemoryLedger, Told, WaitingEngine, operator
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.night import Batch, Night
from pipeline.tuning.records import Record, Standing
from pipeline.tuning.states import Operator, Terms
from tests.tuning.nights import OPERATORS, TERMS, most_at_once, night, of, trials


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
