"""Operators are claimed side by side, each as often as there are batches of it, and given back with the last."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

from pipeline.errors import StoreError
from pipeline.tuning.claims import Claims


class Others:
    """Who else there is: `taken` are theirs, to ask for `broken` fails. Knows what is held."""

    def __init__(self, taken: frozenset[str] = frozenset(), broken: str = "", side_by_side: int = 1) -> None:
        self.taken, self.broken = taken, broken
        self.held: list[str] = []
        self.asked: list[str] = []
        self._together = threading.Barrier(side_by_side)

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        self.asked.append(key)
        self._together.wait(10)  # as long as others are asked for at the same time
        if key == self.broken:
            raise StoreError("no space is left")
        if key in self.taken:
            yield False
            return
        self.held.append(key)
        yield True
        self.held.remove(key)


def test_those_of_several_batches_are_asked_for_side_by_side_and_told_in_order() -> None:
    others = Others(frozenset({"b"}), side_by_side=4)
    claims = Claims(others.claim)
    assert claims.take_all(["a", "b", "c", "d"]) == [True, False, True, True]
    assert sorted(others.held) == ["a", "c", "d"]
    claims.release_all()
    assert others.held == []


def test_what_is_held_is_not_asked_for_again_and_is_given_back_with_its_last_batch() -> None:
    others = Others()
    claims = Claims(others.claim)
    assert claims.take("a")
    assert claims.take_all(["a"]) == [True]
    assert others.asked == ["a"]
    claims.release("a")
    assert others.held == ["a"]
    claims.release("a")
    assert others.held == []


def test_one_of_another_run_may_be_asked_for_again() -> None:
    others = Others(frozenset({"a"}))
    claims = Claims(others.claim)
    assert not claims.take("a")
    others.taken = frozenset()
    assert claims.take("a")


def test_where_one_fails_the_others_are_given_back_and_what_was_held_before_stays() -> None:
    others = Others(broken="b")
    claims = Claims(others.claim)
    assert claims.take("old")
    others._together = threading.Barrier(3)
    with pytest.raises(StoreError, match="no space"):
        claims.take_all(["a", "old", "b", "c"])
    assert others.held == ["old"]
    claims.release("old")
    assert others.held == []
