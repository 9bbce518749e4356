"""What a process of the simulation counts of itself: seconds of processors, memory, and what passes on TCP.

Counts only grow. What a window came to is the difference of two snapshots, which is taken where they arrive.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psutil

T = TypeVar("T")

MEGA = 2.0**20


@dataclass
class Snapshot:
    """A process at a moment, or what it did between two: seconds, and MiB that it holds."""

    at: float
    cpu: float
    rss: float
    counts: dict[str, float] = field(default_factory=dict)

    def since(self, before: Snapshot) -> Snapshot:
        """What came between, memory as it is now; by how much that has grown is a count."""
        counts = {name: value - before.counts.get(name, 0.0) for name, value in self.counts.items()}
        counts["grown"] = self.rss - before.rss
        return Snapshot(self.at - before.at, self.cpu - before.cpu, self.rss, counts)


def snapshot(counts: Mapping[str, float]) -> Snapshot:
    """This process now, with what else it has counted."""
    used = psutil.Process().cpu_times()
    return Snapshot(time.monotonic(), used.user + used.system, resident(), dict(counts))


def resident() -> float:
    """MiB that this process holds."""
    held: int = psutil.Process().memory_info().rss
    return held / MEGA


def summed(parts: Sequence[Snapshot]) -> Snapshot:
    """Several processes in the same window as if they were one."""
    counts: dict[str, float] = defaultdict(float)
    for part in parts:
        for name, value in part.counts.items():
            counts[name] += value
    seconds = sum(part.at for part in parts) / len(parts)
    return Snapshot(seconds, sum(part.cpu for part in parts), sum(part.rss for part in parts), dict(counts))


class Wire(dict[str, float]):
    """Messages and bytes that this process reads and writes on dask's TCP connections."""

    def tap(self) -> None:
        from distributed.comm import tcp
        from distributed.comm.utils import nbytes  # type: ignore[attr-defined]

        def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            async def through(given: Any, *rest: Any, **named: Any) -> Any:
                done = await call(given, *rest, **named)
                size: float = sum(map(nbytes, given if name == "read" else done))
                self[name] = self.get(name, 0) + 1
                self[f"bytes {name}"] = self.get(f"bytes {name}", 0) + size
                return done

            return through

        tcp.from_frames = counted("read", tcp.from_frames)  # type: ignore[attr-defined]
        tcp.to_frames = counted("written", tcp.to_frames)  # type: ignore[attr-defined]


class Meter:
    """Processor seconds of calls by name, without those of named calls within them. For several threads."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._own = threading.local()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        outer: list[float] | None = getattr(self._own, "inner", None)
        self._own.inner = inner = [0.0]
        begun = time.thread_time()
        try:
            yield
        finally:
            took = time.thread_time() - begun
            self._own.inner = outer
            if outer is not None:
                outer[0] += took
            with self._lock:
                self.seconds[name] += took - inner[0]

    def metered(self, name: str, call: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(call)
        def through(*arguments: Any, **named: Any) -> T:
            with self.of(name):
                return call(*arguments, **named)

        return through

    def wrap(self, owner: Any, name: str, *attributes: str) -> None:
        """Has calls of an object's, or of a class's, metered under one name."""
        for attribute in attributes:
            setattr(owner, attribute, self.metered(name, getattr(owner, attribute)))
