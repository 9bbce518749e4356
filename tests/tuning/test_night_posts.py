"""A night at several posts: their times pass side by side, on a fake clock but where real waiting is meant."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from pipeline.errors import StoreError
from pipeline.tuning.calls import post
from pipeline.tuning.events import End, Ended, Measured, OperatorEnded
from pipeline.tuning.fakes import NO_FAULTS, FakeClock, FakeEngine, MemoryLedger, WaitingEngine
from pipeline.tuning.night import Batch
from pipeline.tuning.records import Record, Standing, TrialRecord
from pipeline.tuning.scheduler import Scheduler
from pipeline.tuning.states import Operator, Terms
from tests.tuning.nights import OPERATORS, StoppingAt, at_posts, crew, many, most_at_once, night, of

BUDGET = 3200.0


@pytest.fixture(scope="module")
def alone() -> Ended:
    """What a night at one post comes to."""
    return at_posts(crew(1), many(60), terms=Terms(budget=BUDGET))[0].run()


@pytest.mark.parametrize("posts", [2, 4, 16])
def test_several_posts_make_as_many_times_the_trials_in_the_same_order_of_worth(alone: Ended, posts: int) -> None:
    all_ = at_posts(crew(posts), many(60), terms=Terms(budget=BUDGET / posts))[0].run()
    assert all_.trials / all_.elapsed > 0.95 * posts * alone.trials / alone.elapsed
    assert all_.elapsed == pytest.approx(BUDGET / posts, abs=20)
    assert all_.spent == pytest.approx(alone.spent, rel=0.05)
    reached = [sum(now for *_, now in each.models.values()) for each in (alone, all_)]
    untuned = sum(untuned for untuned, *_ in alone.models.values())
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


@pytest.mark.parametrize("posts", [1, 2, 4])
def test_posts_that_really_wait_work_side_by_side(posts: int) -> None:
    """As many batches as there are posts are measured at one time: none ends before all have begun."""
    together, numbers = threading.Barrier(posts), itertools.count()

    class Meeting(WaitingEngine):
        def measure(self, operator: Operator, batch: Batch) -> list[Record]:
            if next(numbers) < posts:
                together.wait(60)  # raises where another does not come
            return super().measure(operator, batch)

    engine = Meeting(posts=posts, workers=2 * posts, pace=0.001, faults=NO_FAULTS)
    ended = night(many(8), engine, terms=Terms(budget=60.0, trials=1000))[0].run()
    assert ended.end is End.DONE, ended.said
    assert not together.broken
