"""What is stale is looked at again, and not for ever."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from pipeline.tuning.records import CompletedRecord, ExhaustedRecord
from pipeline.tuning.scheduler import Scheduler, Turn
from pipeline.tuning.states import Operator, Why
from tests.tuning.books import LARGE, SMALL, Book, scheduler, why

STALE = replace(LARGE, is_stale=True)


def worked(made: Scheduler, book: Book, chosen: Operator, ratios: Sequence[float], elapsed: float = 0.0) -> bool:
    """One turn of an operator of which these trials come; whether there was one."""
    turn = made.pick(elapsed)
    if turn is None:
        return False
    made.prepared(turn)
    book.tried(chosen, ratios[: turn.count])
    made.finish(turn, book.standing(chosen.key))
    return True


@pytest.mark.parametrize(
    ("ended", "terms"),
    [
        (Why.FLAT, {"patience": 8}),
        (Why.TRIALS, {"patience": 8, "trials": 16}),
        (Why.BUDGET, {"patience": 17, "budget": 60.0}),
        (Why.EXHAUSTED, {"patience": 17}),
    ],
)
def test_a_stale_operator_goes_on_for_one_patience_more(ended: Why, terms: dict[str, float]) -> None:
    book = Book().tried(LARGE, [2.0] + [1.0] * 15)
    if ended is Why.BUDGET:
        book.add(LARGE.key, {}, [CompletedRecord(budget=60.0)])
    if ended is Why.EXHAUSTED:
        book.add(LARGE.key, {}, [ExhaustedRecord(space=name, space_version=v, reason="") for name, v in LARGE.spaces])
    assert why([LARGE], book, **terms) == {"large": ended}
    made = scheduler([STALE], book, batch=4, **terms)
    patience = int(terms["patience"])
    (forecast,) = made.plan().forecasts
    assert (forecast.to_come, forecast.why) == (patience, "")
    assert made.plan().seconds > 0
    turns = 0
    while worked(made, book, STALE, [1.0] * 4):
        turns += 1
    assert len(book.standing(STALE.key).trials) == 16 + patience
    assert turns == math.ceil(patience / 4)
    assert made.states[STALE.key].why in (ended, Why.FLAT)
    assert made.pick(0.0) is None


def test_a_stale_operator_gets_its_trials_where_the_budget_is_spent() -> None:
    book = Book().tried(LARGE, [2.0] + [1.0] * 15, cost=10.0)
    assert scheduler([LARGE], book, patience=8, budget=100.0).pick(0.0) is None
    assert scheduler([STALE], book, patience=8, budget=100.0).pick(0.0) == Turn(STALE, 8)


def test_a_gain_while_it_is_looked_at_again_has_it_go_on_as_any_other() -> None:
    book = Book().tried(LARGE, [2.0] + [1.0] * 15)
    made = scheduler([STALE], book, batch=4, patience=8)
    assert worked(made, book, STALE, [1.0, 1.0, 1.0, 4.0])
    for _ in range(2):
        assert worked(made, book, STALE, [1.0] * 4)
    assert not worked(made, book, STALE, [1.0] * 4), "its curve is flat again"
    assert made.states[STALE.key].why is Why.FLAT


def test_a_stale_operator_of_which_nothing_more_is_proposed_ends() -> None:
    book = Book().tried(LARGE, [2.0] + [1.0] * 15)
    book.add(LARGE.key, {}, [ExhaustedRecord(space=name, space_version=v, reason="") for name, v in LARGE.spaces])
    made = scheduler([STALE], book, batch=4, patience=8)
    assert worked(made, book, STALE, [])
    assert made.states[STALE.key].why is Why.EXHAUSTED
    assert made.pick(0.0) is None


def test_what_is_stale_and_has_not_ended_gets_no_more_than_any_other() -> None:
    book = Book().tried(LARGE, [1.0, 2.0])
    made = scheduler([STALE], book, trials=10, batch=16, patience=100)
    assert made.pick(0.0) == Turn(STALE, 8)


def test_a_small_operator_is_left_though_it_is_stale() -> None:
    small = replace(SMALL, seconds=1e-9, is_stale=True)
    book = Book().tried(LARGE, [2.0] + [1.0] * 15).tried(small, [2.0] + [1.0] * 15)
    assert why([LARGE, small], book, patience=8)["small"] is Why.SMALL


def test_a_stale_operator_is_not_taken_for_small_by_its_old_curve() -> None:
    book = Book().tried(LARGE, [2.0] + [1.0] * 60)
    assert why([LARGE], book, patience=100) == {"large": None}
    assert why([LARGE], book, patience=8) == {"large": Why.FLAT}
    assert why([STALE], book, patience=8) == {"large": None}
