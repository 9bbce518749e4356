"""What a budget is for: who gets of it, and what is owed where it is spent."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pipeline.tuning.fakes import operator
from pipeline.tuning.records import CompletedRecord
from pipeline.tuning.states import Operator
from tests.tuning.books import OPERATORS, Book, order_of, scheduler

TUNED = [1 + i / 50 for i in range(100)]


def a_tuned_book(each: float, but: Sequence[Operator] = ()) -> Book:
    """Every operator had so many seconds."""
    book = Book()
    for one in OPERATORS:
        if one not in but:
            book.tried(one, TUNED, cost=each / len(TUNED))
    return book


def test_a_budget_that_is_spent_gives_nothing_and_a_larger_one_goes_on() -> None:
    assert scheduler(OPERATORS, a_tuned_book(60), budget=600.0).pick(0.0) is None
    assert scheduler(OPERATORS, a_tuned_book(60), budget=700.0).pick(0.0) is not None
    assert scheduler(OPERATORS, a_tuned_book(60)).pick(0.0) is not None


def test_less_than_a_trial_is_nothing_left() -> None:
    book = a_tuned_book(60)  # 0.6 seconds a trial
    assert scheduler(OPERATORS, book, budget=600.5).pick(0.0) is None
    assert scheduler(OPERATORS, book, budget=600.7).pick(0.0) is not None


def test_the_clock_of_the_run_counts_as_well() -> None:
    made = scheduler(OPERATORS, budget=600.0)
    assert made.pick(600.0) is None
    assert made.pick(10.0) is not None


@pytest.mark.parametrize("index", [0, 9], ids=["the largest", "the smallest"])
def test_a_changed_operator_gets_its_share_where_the_budget_is_spent(index: int) -> None:
    changed = OPERATORS[index]
    book = a_tuned_book(100, but=[changed])
    made = scheduler(OPERATORS, book, budget=600.0)
    turn = made.pick(0.0)
    assert turn is not None
    assert turn.operator is changed
    made.prepared(turn)
    made.finish(turn, book.tried(changed, TUNED, cost=0.3).standing(changed.key))
    again = made.pick(0.0)
    assert again is not None, "30 s of 60 are left"
    made.prepared(again)
    made.finish(again, book.tried(changed, TUNED, cost=0.31).standing(changed.key))
    assert made.pick(0.0) is None
    assert made.plan().seconds == 0


def test_a_share_is_a_batch_at_least() -> None:
    changed = OPERATORS[3]
    made = scheduler(OPERATORS, a_tuned_book(100, but=[changed]), budget=20.0)
    turn = made.pick(0.0)
    assert turn is not None
    assert turn.operator is changed


def completed(book: Book, budget: float, *operators: Operator) -> Book:
    for one in operators:
        book.add(one.key, {}, [CompletedRecord(budget=budget)])
    return book


def test_operators_that_a_finished_budget_never_reached_are_not_owed_anything() -> None:
    book = Book()
    for one in OPERATORS[:6]:
        book.tried(one, TUNED[:8], cost=10 / 8)
    completed(book, 60.0, *OPERATORS)
    assert scheduler(OPERATORS, book, budget=60.0).pick(0.0) is None
    assert scheduler(OPERATORS, book, budget=60.0).plan().seconds == 0
    assert scheduler(OPERATORS, book, budget=120.0).pick(0.0) is not None
    assert scheduler(OPERATORS, book).pick(0.0) is not None


@pytest.mark.parametrize("index", [0, 9], ids=["the largest", "the smallest"])
def test_after_a_finished_budget_only_the_changed_operator_is_tuned(index: int) -> None:
    changed, kept = OPERATORS[index], [*OPERATORS[:index], *OPERATORS[index + 1 :]]
    book = completed(a_tuned_book(50, but=[changed]), 600.0, *kept)  # the one that it replaces had 150 s
    made = scheduler(OPERATORS, book, budget=600.0)
    for _ in range(5):
        turn = made.pick(0.0)
        assert turn is not None
        assert turn.operator is changed
        made.prepared(turn)
        made.finish(turn, book.tried(changed, TUNED[:8], cost=1.0).standing(changed.key))
    assert {each.why for each in made.plan().forecasts if each.operator is not changed} == {"the budget is spent"}


def test_what_half_a_budget_has_not_reached_comes_first() -> None:
    big, tiny = operator("big", 1.0), operator("tiny", 1e-3)
    book = Book().tried(big, [1 + i / 10 for i in range(20)], cost=2.0)
    assert order_of(scheduler([big, tiny], book, budget=1000.0), 1) == ["big"]
    assert order_of(scheduler([big, tiny], book, budget=1000.0), 1, elapsed=501.0) == ["tiny"]


def test_a_turn_that_outlived_the_budget_is_not_wanted() -> None:
    made = scheduler(OPERATORS, budget=100.0)
    turn = made.pick(0.0)
    assert turn is not None
    assert made.may_go_on(turn, 50.0)
    assert not made.may_go_on(turn, 100.0)
    made.update(turn.operator, Book().tried(turn.operator, [2.0] + [1.0] * 64).standing(turn.operator.key))
    assert not made.may_go_on(turn, 50.0), "its curve is flat by now"
