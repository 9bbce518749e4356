"""How an operator's gains are followed, and what they promise."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.tuning.records import Standing, TrialRecord
from pipeline.tuning.states import Curve, Terms
from tests.tuning.books import LARGE, NOISE, Book


def trials_of(*ratios: float) -> Sequence[TrialRecord]:
    book = Book().tried(LARGE, ratios)
    return book.standing(LARGE.key).trials


def test_a_curve_followed_in_parts_is_the_same() -> None:
    ratios = [0.5, 1.2, 0.9, 1.2, 1.8, 1.7, 2.5, 0.1]
    at_once, in_parts = Curve(), Curve()
    at_once.follow(trials_of(*ratios))
    for count in (0, 1, 4, 5, 8):
        in_parts.follow(trials_of(*ratios)[:count])
    expected = Standing(trials=tuple(trials_of(*ratios))).curve()
    for curve in (at_once, in_parts):
        assert [curve.best(i + 1) for i in range(8)] == expected
        assert curve.idle(NOISE) == 1
        assert curve.slope(Terms()) == at_once.slope(Terms())


def test_a_curve_begins_anew_where_other_trials_came_between() -> None:
    curve = Curve()
    first, second, third = trials_of(3.0, 1.0, 2.0)
    curve.follow([first, second])
    curve.follow([second, third])
    assert curve.best(2) == 2.0


def test_hope_fades_with_what_was_tried_in_vain() -> None:
    slopes = []
    for count in (8, 16, 32, 64):
        curve = Curve()
        curve.follow(trials_of(*[1.0] * count))
        slopes.append(curve.slope(Terms()))
    assert slopes == sorted(slopes, reverse=True)
    assert slopes[0] > 3 * slopes[-1] > 0


def test_a_gain_long_ago_promises_less_than_one_just_now() -> None:
    early, late = Curve(), Curve()
    early.follow(trials_of(*[1.0] * 33, 2.0, *[1.0] * 30))
    late.follow(trials_of(*[1.0] * 63, 2.0))
    assert (early.idle(NOISE), late.idle(NOISE)) == (30, 0)
    assert early.slope(Terms()) < 0.6 * late.slope(Terms())
