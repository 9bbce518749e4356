"""Threads that carry what goes over, as many at once as are allowed.

Those of concurrent.futures are waited for when the process ends, whatever they wait for themselves: who types Ctrl-C
while a server hangs would wait for it as well. These are not. What they write, they write whole or not at all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Hands:
    """At most `count` threads, started as there is work. Every method may be called from any thread but these."""

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._lock = threading.Lock()
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = self._busy = 0  # busy: given and not done
        self._is_closed = False

    def map(self, call: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """What a call says to each item, in order. All are under way when it returns.

        The iterator raises what a call raised, with what was not begun left undone, and CancelledError once it is all
        closed.
        """
        return _results([self._give(partial(call, item)) for item in items])

    def close(self) -> None:
        """Has nothing more begun. Nobody waits for what was begun."""
        with self._lock:
            self._is_closed = True
            threads = self._threads
        for _ in range(threads):
            self._work.put(None)

    def _give(self, call: Callable[[], R]) -> Future[R]:
        future: Future[R] = Future()
        with self._lock:
            if self._is_closed:
                future.cancel()
                return future
            self._busy += 1
            self._work.put((future, call))
            if self._threads < min(self._busy, self._count):
                self._threads += 1
                threading.Thread(target=self._carry, name=f"{self._name}-{self._threads}", daemon=True).start()
        return future

    def _carry(self) -> None:
        while (given := self._work.get()) is not None:
            future, call = given
            if self._is_closed:
                future.cancel()
            elif future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            with self._lock:
                self._busy -= 1


def _results(futures: Sequence[Future[R]]) -> Iterator[R]:
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


__all__ = ["CancelledError", "Hands"]
