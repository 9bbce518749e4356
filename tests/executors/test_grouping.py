"""Orders that wait go out together: each gets its own answer, none waits where there is room, none is forgotten."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.executors.grouping import Groups
from pipeline.executors.orders import Answer, Order, Way
from pipeline.memoizer import Action
from pipeline.stages import CODEGEN


def order(number: int, size: int = 0) -> Order:
    return Order(Action(CODEGEN, str(number)), str(number), {}, Way(run="r"), {}, (b"x" * size,))


class Workers:
    """What performs groups: notes them, and answers each order with its key."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.groups: list[list[str]] = []
        self.seconds = seconds
        self.running = self.most = 0
        self._lock = threading.Lock()

    def __call__(self, orders: Sequence[Order]) -> Sequence[Answer | None]:
        with self._lock:
            self.groups.append([each.key for each in orders])
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(self.seconds * len(orders))
        with self._lock:
            self.running -= 1
        return [Answer(None, worker=each.key) for each in orders]


def asked(groups: Groups, orders: Sequence[Order]) -> list[str]:
    with ThreadPoolExecutor(len(orders)) as threads:
        answers = list(threads.map(groups.ask, orders))
    return [each.worker for each in answers if each is not None]


def test_where_there_is_room_each_goes_alone() -> None:
    workers = Workers(0.05)
    assert asked(Groups(workers, lambda: 8), [order(i) for i in range(8)]) == [str(i) for i in range(8)]
    assert all(len(each) == 1 for each in workers.groups)


def test_what_waits_goes_together_and_everyone_gets_the_own_answer() -> None:
    workers = Workers(0.005)
    numbers = list(range(200))
    assert asked(Groups(workers, lambda: 2), [order(i) for i in numbers]) == [str(i) for i in numbers]
    assert workers.most == 2
    assert sorted(int(key) for each in workers.groups for key in each) == numbers
    assert max(map(len, workers.groups)) > 8
    assert max(map(len, workers.groups)) <= 16


def test_a_group_is_not_larger_than_a_message_should_be() -> None:
    workers = Workers(0.02)
    asked(Groups(workers, lambda: 1), [order(i, 900_000) for i in range(12)])
    assert max(map(len, workers.groups)) <= 2


def test_an_error_reaches_all_of_its_group_and_no_other() -> None:
    failing = Workers()

    def give(orders: Sequence[Order]) -> Sequence[Answer | None]:
        answers = failing(orders)
        time.sleep(0.01)
        if any(each.key == "7" for each in orders):
            raise OSError("gone")
        return answers

    groups, errors = Groups(give, lambda: 1), []

    def ask(number: int) -> None:
        try:
            groups.ask(order(number))
        except OSError:
            errors.append(str(number))

    with ThreadPoolExecutor(40) as threads:
        list(threads.map(ask, range(40)))
    (group,) = (each for each in failing.groups if "7" in each)
    assert sorted(errors) == sorted(group)
    assert groups.ask(order(99)) is not None, "it goes on"


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_forgotten_while_workers_come_and_go(seed: int) -> None:
    draw, workers = random.Random(seed), Workers(0.0005)
    groups = Groups(workers, lambda: draw.randint(1, 6))
    assert asked(groups, [order(i) for i in range(150)]) == [str(i) for i in range(150)]
    assert groups._running == 0
    assert not groups._waiting
