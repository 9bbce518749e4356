"""Calls of an engine: each told once when it has ended, with what it returned or raised."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from pipeline.tuning.calls import Calls, InTurn, Threads, post
from pipeline.tuning.fakes import FakeClock, Simulated

ALL: dict[str, Callable[[], Calls]] = {
    "threads": Threads,
    "in turn": InTurn,
    "simulated": lambda: Simulated(FakeClock()),
}


def refuse() -> None:
    raise KeyError("no")


@pytest.fixture(params=ALL)
def calls(request: pytest.FixtureRequest) -> Calls:
    return ALL[request.param]()


def all_ended(calls: Calls, count: int) -> list[Future[Any]]:
    found = [calls.ended(10.0) for _ in range(count)]
    return [each for each in found if each is not None]


def test_every_call_is_told_once(calls: Calls) -> None:
    begun = [calls.begin(pow, i, 2) for i in range(5)]
    ended = all_ended(calls, 5)
    assert set(ended) == set(begun)
    assert [each.result() for each in begun] == [0, 1, 4, 9, 16]
    assert calls.ended(0.0) is None
    assert calls.ended(0.01) is None


def test_what_a_call_raises_is_its_futures(calls: Calls) -> None:
    refused = calls.begin(refuse)
    (ended,) = all_ended(calls, 1)
    assert ended is refused
    with pytest.raises(KeyError, match="no"):
        ended.result()


def test_a_call_knows_the_post_that_it_is_for_and_others_do_not(calls: Calls) -> None:
    begun = [calls.begin(post, post=name) for name in ("east", "", "west")]
    all_ended(calls, 3)
    assert [each.result() for each in begun] == ["east", "", "west"]
    assert post() == ""


def test_threads_work_side_by_side_and_are_told_in_the_order_of_their_ends() -> None:
    calls, first = Threads(), threading.Event()
    slow = calls.begin(first.wait, 10.0)
    quick = calls.begin(first.set)
    assert all_ended(calls, 2) in ([quick, slow], [slow, quick])
    assert slow.result() is True


def test_waiting_for_threads_ends() -> None:
    calls, held = Threads(), threading.Event()
    calls.begin(held.wait, 10.0)
    begun = time.monotonic()
    assert calls.ended(0.0) is None
    assert calls.ended(0.05) is None
    assert time.monotonic() - begun < 5
    held.set()
    assert len(all_ended(calls, 1)) == 1


def test_simulated_calls_pass_side_by_side_on_a_clock_that_jumps() -> None:
    clock = FakeClock(0.0)
    calls = Simulated(clock)
    long, short, none = (calls.begin(clock.advance, seconds) for seconds in (5.0, 2.0, 0.0))
    assert clock.now() == 0.0
    assert calls.ended(0.0) is none
    assert calls.ended(0.0) is None
    assert not short.done()
    assert (calls.ended(0.1), clock.now()) == (short, 2.0)
    late = calls.begin(clock.advance, 2.5)
    assert [calls.ended(0.1), calls.ended(0.1)] == [late, long]
    assert clock.now() == 5.0
