"""What `doit cluster` starts and looks at: a worker under a nanny that starts it again when it dies, a scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError, ExecutorError, SetupError
from pipeline.executors.crew import ANNOUNCED, worker_of
from pipeline.executors.dask import closed, connected
from pipeline.executors.extra import NO_DASHBOARD, PRELOAD, load
from pipeline.executors.placing import Worker
from pipeline.executors.working import LABELS, NAME

_LOOK, _PAUSE = 5.0, 2.0  # seconds
_LAST_PORT = 65535

Say = Callable[[str], None]


@dataclass(frozen=True)
class Seen:
    """A worker and what it is at."""

    worker: Worker
    doing: tuple[str, ...]
    done: int


def run_worker(address: str, threads: int, labels: Sequence[str], name: str, say: Say) -> None:
    """Works for a scheduler until this process is told to end, and waits for it while it is gone. Raises ExecutorError
    where none answers to begin with."""
    closed(connected(address))
    while not asyncio.run(_work(address, threads, labels, name, say)):
        say(f"the scheduler at {address} is gone; waiting for it to come back")
        _wait_for(address)


async def _work(address: str, threads: int, labels: Sequence[str], name: str, say: Say) -> bool:
    """Works until the scheduler is gone; whether it was this process that was told to end."""
    nanny = load().Nanny(
        address,
        nthreads=threads,
        name=f"{name}-{os.getpid()}",
        memory_limit=0,
        preload=[PRELOAD],
        env={LABELS: " ".join(labels), NAME: name},
        local_directory=os.path.join(tempfile.gettempdir(), "tvmake-dask"),
        dashboard=False,
        silence_logs=logging.CRITICAL,
    )
    ending = _Ending(nanny)
    with contextlib.suppress(OSError, TimeoutError):  # the scheduler went as the worker came
        async with ending:
            say(f"{name} works for {address} with {threads} thread{'s' * (threads > 1)}; Ctrl-C ends it")
            await nanny.finished()
    return ending.is_told


def _wait_for(address: str) -> None:
    while True:
        try:
            closed(connected(address))
            return
        except ExecutorError:
            time.sleep(_PAUSE)


def run_scheduler(host: str, port: int, say: Say) -> None:
    """A scheduler until this process is told to end. Raises ConfigError for a port that is none, SetupError where it
    cannot be had."""
    if not 0 <= port <= _LAST_PORT:
        raise ConfigError(f"--port is {port}", hint=f"give a number from 0, any that is free, to {_LAST_PORT}")

    async def serve() -> None:
        scheduler = load().Scheduler(host=host or None, port=port, **NO_DASHBOARD)
        try:
            async with _Ending(scheduler):
                say(f"the scheduler is at {scheduler.address}; Ctrl-C ends it")
                say(f"on each machine that is to work: doit cluster worker {scheduler.address}")
                await scheduler.finished()
        except (OSError, RuntimeError) as error:  # dask raises the second from the first
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            raise SetupError(
                f"no scheduler can listen at {host or 'any address'}, port {port}: {cause.strerror or cause}",
                hint="give another: --port 0, and an address of this machine: --host",
            ) from error

    asyncio.run(serve())


class _Ending:
    """Within the block a server of dask's runs, and SIGINT and SIGTERM end it."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._closing: asyncio.Task[Any] | None = None
        self.is_told = False

    async def __aenter__(self) -> None:
        await self._server
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end)

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            await self._server.close()

    def _end(self) -> None:
        self.is_told = True
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._server.close())


def look(address: str) -> list[Seen]:
    """The workers of a scheduler, by name. Raises ExecutorError where it does not answer."""
    client = connected(address)
    try:
        told = client.sync(client.scheduler.identity, n_workers=-1, callback_timeout=_LOOK)
    except Exception as error:
        raise ExecutorError(f"the scheduler at {address} does not answer", hint="start it again") from error
    finally:
        closed(client)
    seen = [_seen(address, each) for address, each in told["workers"].items()]
    return sorted(seen, key=lambda each: (each.worker.name, each.worker.address))


def _seen(address: str, told: Any) -> Seen:
    metrics = (told.get("metrics") or {}).get(ANNOUNCED) or {}
    return Seen(worker_of(address, told), tuple(metrics.get("doing", ())), int(metrics.get("done", 0)))
