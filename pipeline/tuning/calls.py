"""How calls of an engine are begun, and how the night learns that they have ended: in threads, or each in turn.

Whoever begins calls takes in what came of them as well, in one thread: only the engine's own code runs in others.
Simulations bring calls of their own, on a clock that jumps: pipeline.tuning.fakes.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar, copy_context
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

_POST: ContextVar[str] = ContextVar("post", default="")


def post() -> str:
    """The name of the post that the running call is for. Engines ask this within `measure` and `retest`, where it
    matters to them which of their posts is meant; "" where a post has no name."""
    return _POST.get()


class Calls(Protocol):
    """Calls that are under way. For one thread."""

    def begin(self, call: Callable[..., T], *arguments: Any, post: str = "") -> Future[T]:
        """Begins a call. What it raises is the future's."""
        ...

    def ended(self, seconds: float) -> Future[Any] | None:
        """A call that has ended: each is told once, in the order in which they ended. None where none does within so
        many seconds."""
        ...


class Threads:
    """Every call in a thread that ends with the process, whatever it does."""

    def __init__(self) -> None:
        self._ended: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()

    def begin(self, call: Callable[..., T], *arguments: Any, post: str = "") -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            perform(future, call, *arguments, post=post)
            self._ended.put(future)

        threading.Thread(target=run, daemon=True, name="tuning").start()
        return future

    def ended(self, seconds: float) -> Future[Any] | None:
        try:
            return self._ended.get(seconds > 0, seconds)
        except queue.Empty:
            return None


class InTurn:
    """Every call at once, in the thread that begins it."""

    def __init__(self) -> None:
        self._ended: deque[Future[Any]] = deque()

    def begin(self, call: Callable[..., T], *arguments: Any, post: str = "") -> Future[T]:
        future: Future[T] = Future()
        perform(future, call, *arguments, post=post)
        self._ended.append(future)
        return future

    def ended(self, seconds: float) -> Future[Any] | None:
        return self._ended.popleft() if self._ended else None


def perform(future: Future[T], call: Callable[..., T], *arguments: Any, post: str = "") -> None:
    """Has a future hold what a call returns, or raises."""
    context = copy_context()
    context.run(_POST.set, post)
    try:
        future.set_result(context.run(call, *arguments))
    except BaseException as error:
        future.set_exception(error)
