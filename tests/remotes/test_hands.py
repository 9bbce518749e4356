"""Threads that carry what goes over."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from pipeline.remotes.hands import CancelledError, Hands


def test_answers_come_in_order_and_at_once() -> None:
    hands = Hands(8, "test")
    together = threading.Barrier(8)

    def call(item: int) -> int:
        together.wait(10)
        time.sleep(0.01 * (8 - item % 8))
        return item * item

    assert list(hands.map(call, range(16))) == [item * item for item in range(16)]
    hands.close()


def test_no_more_than_are_allowed_work_at_once() -> None:
    hands, lock, now, most = Hands(3, "test"), threading.Lock(), [0], [0]

    def call(_: int) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.005)
        with lock:
            now[0] -= 1

    callers = [threading.Thread(target=lambda: list(hands.map(call, range(10)))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert most[0] == 3


def test_what_a_call_raises_comes_out_and_the_rest_is_left() -> None:
    hands, done = Hands(1, "test"), []

    def call(item: int) -> None:
        time.sleep(0.01)
        if item == 1:
            raise ValueError("one")
        done.append(item)

    with pytest.raises(ValueError, match="one"):
        list(hands.map(call, range(50)))
    assert list(hands.map(lambda item: item, [7])) == [7], "they go on with other work"
    assert len(done) < 40


def test_who_waits_when_they_are_closed_does_not_wait_for_ever() -> None:
    hands, begun, go = Hands(1, "test"), threading.Event(), threading.Event()

    def call(_: int) -> None:
        begun.set()
        go.wait(10)

    answers = hands.map(call, range(5))
    begun.wait(10)
    hands.close()
    go.set()
    with pytest.raises(CancelledError):
        list(answers)
    with pytest.raises(CancelledError):
        list(hands.map(call, [1]))


def test_a_process_ends_though_they_wait() -> None:
    said = """
import threading, time
from pipeline.remotes.hands import Hands
answers = Hands(2, "test").map(lambda _: time.sleep(60), [1, 2, 3])
"""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", said], check=True, timeout=30)
    assert time.monotonic() - begun < 20
