"""Which operator is next, and when one has ended."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pipeline.tuning import scheduler as scheduling
from pipeline.tuning.fakes import SPACE, MemoryLedger, operator
from pipeline.tuning.records import ExhaustedRecord, Outcome
from pipeline.tuning.scheduler import Scheduler, Turn
from pipeline.tuning.states import Terms, Why
from tests.tuning.books import LARGE, MIDDLE, OPERATORS, SMALL, Book, order_of, scheduler, why


def test_the_largest_is_first() -> None:
    assert order_of(scheduler([SMALL, LARGE, MIDDLE]), 3) == ["large", "middle", "small"]


def test_calls_of_all_models_count() -> None:
    often = operator("often", 1e-3, {"a": 4, "b": 4})
    assert order_of(scheduler([LARGE, often]), 1) == ["often"]


def test_an_operator_that_nobody_has_timed_is_taken_for_a_usual_one() -> None:
    unknown = operator("unknown", 0.0)
    assert order_of(scheduler([SMALL, LARGE, MIDDLE, unknown]), 4) == ["large", "middle", "unknown", "small"]
    assert order_of(scheduler([unknown]), 1) == ["unknown"]


def test_operators_that_share_their_records_are_one() -> None:
    again = replace(MIDDLE, target="same", calls={"net": 1, "other": 9})
    made = scheduler([SMALL, MIDDLE, again, LARGE])
    assert made.now == pytest.approx({"net": 6.1e-3, "other": 9e-3})
    assert order_of(made, 4) == ["middle", "large", "small"]
    assert [each.operator.target for each in made.plan().forecasts] == ["native"] * 3


def test_the_first_batch_is_small() -> None:
    made = scheduler([LARGE, MIDDLE], Book().tried(MIDDLE, [1.0, 1.2]), batch=16, first=8)
    counts = {turn.operator.workload.name: turn.count for turn in (made.pick(0.0), made.pick(0.0)) if turn}
    assert counts == {"large": 8, "middle": 16}


def test_no_batch_goes_beyond_the_trials() -> None:
    made = scheduler([LARGE], Book().tried(LARGE, [1.0, 1.5] * 5), trials=12, batch=8)
    assert made.pick(0.0) == Turn(LARGE, 2)


def test_a_steep_curve_comes_before_a_flat_one_of_the_same_share() -> None:
    steep, level = operator("steep", 1e-3), operator("level", 1e-3)
    book = Book().tried(steep, [1 + i / 16 for i in range(16)]).tried(level, [1.9] + [1.0] * 15)
    assert order_of(scheduler([level, steep], book), 2) == ["steep", "level"]


def test_trials_that_are_dear_count_against_an_operator() -> None:
    quick, slow = operator("quick", 1e-3), operator("slow", 1.2e-3)
    book = Book().tried(quick, [1.0] * 8, cost=0.1).tried(slow, [1.0] * 8, cost=2.0)
    assert order_of(scheduler([slow, quick], book), 2) == ["quick", "slow"]


def test_what_was_gained_makes_an_operator_less_urgent() -> None:
    one, other = operator("one", 1e-3), operator("other", 1e-3)
    book = Book().tried(one, [1.0] * 7 + [4.0], won=4.0).tried(other, [1.0] * 7 + [4.0])
    assert order_of(scheduler([one, other], book), 1) == ["other"], "what did not win saves nothing yet"


def test_an_operator_in_preparation_is_not_picked_again_before_it_is_measured() -> None:
    book = Book().tried(LARGE, [1.0, 1.5]).tried(SMALL, [1.0] * 8)
    made = scheduler([LARGE, SMALL], book)
    turn = made.pick(0.0)
    assert turn is not None
    assert turn.operator is LARGE
    assert made.pick(0.0) == Turn(SMALL, 16)
    assert made.pick(0.0) is None
    made.prepared(turn)
    again = made.pick(0.0)
    assert again is not None
    assert again.operator is LARGE, "it is worth half, and still the most"
    made.put_back(again)
    assert made.states[LARGE.key].flying == turn.count


def test_what_is_prepared_ahead_counts_half() -> None:
    one, other = operator("one", 1e-3), operator("other", 0.35e-3)
    made = scheduler([one, other], Book().tried(one, [1.0] * 8).tried(other, [1.0] * 8))
    turn = made.pick(0.0)
    assert turn is not None
    assert turn.operator is one
    made.prepared(turn)
    assert order_of(made, 1) == ["other"]


def test_put_back_gives_the_same_turn_again() -> None:
    made = scheduler([LARGE, SMALL])
    turn = made.pick(0.0)
    assert turn is not None
    made.put_back(turn)
    assert made.pick(0.0) == turn


# When an operator has ended.


def test_ends() -> None:
    flat, risen, hopeless, full = (operator(name, 1e-3) for name in ("flat", "risen", "hopeless", "full"))
    book = Book()
    book.tried(flat, [1.5] + [1.51] * 64)
    book.tried(risen, [1.5] * 60 + [1.6])
    book.tried(hopeless, [None] * 24)
    book.tried(full, [1 + i / 10 for i in range(100)])
    found = why([flat, risen, hopeless, full], book, trials=100, patience=64)
    assert found == {"flat": Why.FLAT, "risen": None, "hopeless": Why.UNMEASURABLE, "full": Why.TRIALS}


def test_what_may_have_been_the_machines_fault_is_tried_again_by_the_next_run() -> None:
    chosen = replace(LARGE, spaces=frozenset({("fake", 1)}))
    book = Book().tried(chosen, [None] * 30, outcome=Outcome.CRASHED)
    made = scheduler([chosen], book)
    turn = made.pick(0.0)
    assert turn is not None
    assert turn.count == 16
    made.prepared(turn)
    assert made.plan().forecasts[0].to_come == 14
    book.add(LARGE.key, {}, [*book.records[LARGE.key]])  # the same failures again
    state = made.finish(turn, book.standing(LARGE.key))
    assert state.why is Why.UNMEASURABLE
    assert scheduler([chosen], book).pick(0.0) is None


def test_claims_are_tried_where_a_curve_is_flat() -> None:
    book = Book().tried(LARGE, [1.5] + [1.51] * 64)
    assert scheduler([LARGE], book).pick(0.0) is None
    book.tried(LARGE, [None] * 3, outcome=Outcome.CLAIMED)
    made = scheduler([LARGE], book)
    turn = made.pick(0.0)
    assert turn is not None
    assert turn.count == 3


def test_one_that_was_timed_once_may_be_measured() -> None:
    assert why([LARGE], Book().tried(LARGE, [None] * 30 + [1.0]))["large"] is None


def test_small_gains_add_up_to_one_beyond_the_noise() -> None:
    creeping = [1.01**i for i in range(100)]
    assert why([LARGE], Book().tried(LARGE, creeping), patience=10, noise=0.02)["large"] is None
    assert why([LARGE], Book().tried(LARGE, creeping), patience=10, noise=0.2)["large"] is Why.FLAT


def test_exhausted_is_an_operator_all_of_whose_spaces_are() -> None:
    book = Book()
    assert LARGE.spaces == {SPACE}
    book.add(LARGE.key, {}, [ExhaustedRecord(space="other", space_version=1, reason="")])
    book.add(LARGE.key, {}, [ExhaustedRecord(space="fake", space_version=2, reason="")])
    assert why([LARGE], book)["large"] is None
    book.add(LARGE.key, {}, [ExhaustedRecord(space="fake", space_version=1, reason="")])
    assert why([LARGE], book)["large"] is Why.EXHAUSTED


def test_an_operator_goes_on_while_one_of_its_spaces_does() -> None:
    two = replace(LARGE, spaces=frozenset({SPACE, ("other", 1)}))
    book = Book()
    book.add(two.key, {}, [ExhaustedRecord(space="fake", space_version=1, reason="")])
    assert why([two], book)["large"] is None
    book.add(two.key, {}, [ExhaustedRecord(space="other", space_version=1, reason="")])
    assert why([two], book)["large"] is Why.EXHAUSTED


def test_a_share_too_small_to_matter() -> None:
    speck = operator("speck", 5e-3 * scheduling.MATTERS)
    assert why([LARGE, speck], MemoryLedger())["speck"] is Why.SMALL
    assert why([speck], MemoryLedger())["speck"] is None, "it is all that there is"
    of_its_own = operator("speck", 5e-3 * scheduling.MATTERS, {"tiny": 1})
    assert why([LARGE, of_its_own], MemoryLedger())["speck"] is None, "in its own model it is all"


def test_what_was_too_small_stays_so_when_the_models_get_faster() -> None:
    speck = operator("speck", 5e-3 * scheduling.MATTERS)
    book = Book().tried(LARGE, [100.0], won=100.0)
    assert why([LARGE, speck], book)["speck"] is Why.SMALL


def test_what_is_put_aside_stays_so() -> None:
    made = scheduler([LARGE])
    turn = made.pick(0.0)
    assert turn is not None
    made.end(LARGE, Why.PUT_ASIDE, "the builder died")
    made.update(LARGE, Book().tried(LARGE, [1.0, 2.0]).standing(LARGE.key))
    assert made.pick(0.0) is None
    assert made.plan().forecasts[0].why == "put aside: the builder died"


# What it says.


def test_a_plan_says_what_is_there_and_what_is_to_come() -> None:
    done, going, new = (operator(name, 1e-3) for name in ("done", "going", "new"))
    book = Book().tried(done, [2.0] + [1.0] * 64).tried(going, [1.0, 1.0, 1.5, 2.0], cost=0.5, won=2.0)
    plan = scheduler([done, going, new], book, trials=100).plan()
    found = {each.operator.workload.name: each for each in plan.forecasts}
    assert [found[name].to_come for name in ("done", "going", "new")] == [0, 96, 100]
    assert found["done"].why == "its curve is flat"
    assert found["going"].seconds == pytest.approx(96 * 0.5)
    assert (found["going"].gain, found["going"].trials) == (2.0, 4)
    assert plan.spent == pytest.approx(65 * 0.4 + 2.0)
    assert plan.seconds == pytest.approx(found["going"].seconds + found["new"].seconds)
    assert sum(each.share for each in plan.forecasts) == pytest.approx(1.0)
    assert plan.forecasts[-1] is found["going"], "those that take longest first"
    assert scheduler([done, going, new], book, trials=100, budget=60.0).plan().seconds == pytest.approx(60 - plan.spent)


def test_before_any_trial_one_is_taken_to_cost_less_than_half_a_second() -> None:
    assert scheduler([LARGE], trials=10).plan().seconds == pytest.approx(4.0)


def test_times_of_models() -> None:
    shared = operator("shared", 2e-3, {"a": 1, "b": 3})
    made = scheduler([shared], Book().tried(shared, [2.0], won=2.0))
    assert made.before == pytest.approx({"a": 2e-3, "b": 6e-3})
    assert made.now == pytest.approx({"a": 1e-3, "b": 3e-3})
    assert made.now.total() > made.expected(0.0) > 0


def test_nothing_is_expected_where_everything_has_ended() -> None:
    made = scheduler([LARGE], Book().tried(LARGE, [2.0] + [1.0] * 64, won=1.0))
    assert made.expected(0.0) == pytest.approx(made.now.total())


# How long a decision takes, and what is kept.


def test_heaps_do_not_grow_with_the_decisions() -> None:
    made = scheduler(OPERATORS)
    book = Book()
    for i in range(300):
        turn = made.pick(0.0)
        if turn is None:
            break
        made.prepared(turn)
        made.finish(turn, book.tried(turn.operator, [1 + math.log1p(i)]).standing(turn.operator.key))
    heaps = [value for value in vars(made).values() if isinstance(value, list)]
    assert len(heaps) == 3
    assert all(len(heap) <= 2 * len(OPERATORS) + 9 for heap in heaps)


def test_a_decision_looks_at_few_operators() -> None:
    looked = 0

    class Counting(Scheduler):
        def _value(self, state: scheduling.State) -> float:
            nonlocal looked
            looked += 1
            return super()._value(state)

    many = [operator(f"op{i}", 1e-3) for i in range(2000)]
    book = MemoryLedger()
    made = Counting(many, book.standing, Terms())
    looked = 0
    for _ in range(100):
        turn = made.pick(0.0)
        assert turn is not None
        made.prepared(turn)
        made.finish(turn, Book().tried(turn.operator, [1.0, 1.2]).standing(turn.operator.key))
    assert looked < 100 * 5
