"""What the simulation and its processes say to each other, over one pipe each.

simulation                         process
    ◀── what it is: an address, …  once, when it is ready
    ─── GO ──▶                     to drivers alone, when all of them are ready
    ─── MARK ──▶
    ◀── a snapshot                 as often as it is marked
    ─── STOP ──▶                   or the pipe's end: nobody is left to tell it anything
    ◀── what came of its night     drivers alone
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from bench.scale.counts import snapshot
from bench.scale.given import Given

GO, MARK, STOP = "go", "mark", "stop"
_PATIENCE = 300.0  # seconds until a process that is waited for is taken for dead


class Process:
    """The simulation's end: a process of it, and the pipe to it."""

    def __init__(self, target: Callable[..., None], given: Given, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, given, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def tell(self, word: str) -> None:
        """Where it is gone, `told` says so, after the last that it said."""
        with contextlib.suppress(OSError):
            self._pipe.send(word)

    def told(self, patience: float = _PATIENCE) -> Any:
        """What it says next. Raises RuntimeError where it says nothing."""
        if not self._pipe.poll(patience):
            raise RuntimeError(f"process {self._process.pid} of the simulation says nothing")
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"process {self._process.pid} of the simulation is gone") from None

    def end(self) -> None:
        self.tell(STOP)
        self._process.join(5)
        self._process.kill()
        self._process.join()


def heard(pipe: Connection) -> str:
    """The process's end: what it is told; to stop, where nobody is left to tell it anything."""
    try:
        said: str = pipe.recv()
    except (EOFError, OSError):
        return STOP
    return said


def obey(pipe: Connection, counts: Callable[[], Mapping[str, float]]) -> None:
    """Answers every mark with a snapshot, until told to stop. For a thread of its own."""
    while heard(pipe) == MARK:
        pipe.send(snapshot(counts()))


async def obey_in_loop(pipe: Connection, counts: Callable[[], Mapping[str, float]]) -> None:
    """The same in an event loop, which goes on with its other work in between."""
    told: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    loop.add_reader(pipe.fileno(), lambda: told.put_nowait(heard(pipe)))
    while await told.get() == MARK:
        pipe.send(snapshot(counts()))
    loop.remove_reader(pipe.fileno())
