"""Executors to test: this machine's processes, a cluster that lives for a test, one of processes started by hand."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import psutil
from stage_doubles import Double

from pipeline.executors import Executor, Job, open_executor
from pipeline.hashing import key_of
from pipeline.memoizer import Action
from pipeline.remotes.cache import opened
from pipeline.remotes.settings import Settings
from pipeline.store import ActionEntry, Store
from pipeline.toolchain import Toolchain, detect

TESTS = Path(__file__).resolve().parent.parent
_NUMBERS = count()


@dataclass
class Place:
    """An executor that is open, and the store that it works for. `processes` are those of its cluster, where it has
    one that was started by hand."""

    text: str
    job: Job
    executor: Executor
    reopen: Callable[[], Executor]
    said: list[str] = field(default_factory=list)

    @property
    def store(self) -> Store:
        return self.job.store

    def perform(self, action: Action, key: str = "") -> ActionEntry:
        return self.executor.perform(action, key or new_key(), {"stage": action.stage.name})

    def later(self, action: Action, key: str = "", executor: Executor | None = None) -> Future[ActionEntry]:
        """In a thread that ends with the tests, whatever becomes of it."""
        future: Future[ActionEntry] = Future()
        by = executor or self.executor

        def work() -> None:
            try:
                future.set_result(by.perform(action, key or new_key(), {"stage": action.stage.name}))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future

    def blob(self, entry: ActionEntry, name: str) -> bytes:
        data = self.store.get(entry.outputs[name])
        assert data is not None
        return data


def new_key() -> str:
    """One that nobody has asked for, in this run of the tests or another."""
    return key_of({"test": os.getpid(), "number": next(_NUMBERS), "at": time.time_ns()})


def action(stage: Double, timeout: float = 30, needs: tuple[str, ...] = (), **options: object) -> Action:
    return Action(stage, "cpu:add", options=options, timeout=timeout, needs=needs)


def begun(path: Path, but: int = 0) -> int:
    """The process that a stage wrote there when it began, other than the one that is known."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            if (found := int(path.read_text())) != but:
                return found
        time.sleep(0.01)
    raise AssertionError("the stage never began")


def ended(process: int, within: float = 3) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


def worker_of(process: int) -> psutil.Process:
    """The worker of dask's that had a process run a stage."""
    parent = psutil.Process(process).parent()
    assert parent is not None
    assert parent.pid != os.getpid(), "it is a process of this one"
    return parent


def job(folder: Path, url: str = "", toolchain: Toolchain | None = None, said: list[str] | None = None) -> Job:
    store = Store(folder)
    remote = opened(store, Settings(url=url)) if url else None
    say = said.append if said is not None else print
    return Job(store, toolchain or detect(), 2, remote, url, say=say)


def opened_place(text: str, folder: Path, url: str = "") -> Place:
    said: list[str] = []
    made = job(folder, url, said=said)
    return Place(text, made, open_executor(text, made), lambda: open_executor(text, made), said)


@dataclass
class Hands:
    """A cluster of processes that `doit cluster` starts."""

    folder: Path
    address: str = ""
    host: str = "127.0.0.1"
    url: str = ""  # of its remote
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def scheduler(self) -> subprocess.Popen[str]:
        return self.started[0]

    def __post_init__(self) -> None:
        self.url = self.url or f"file://{self.folder}/remote"

    def begin(self) -> None:
        found = self._start("scheduler", "--host", self.host, "--port", "0", until=r"scheduler is at (tcp://\S+);")
        self.address = found

    def again(self) -> None:
        """The scheduler once more, after it was killed, where it was: its workers wait for it."""
        killed, self.started[0] = self.scheduler, self.scheduler
        killed.wait()
        port = self.address.rpartition(":")[2]
        self._start("scheduler", "--host", self.host, "--port", port, until=r"(scheduler is at)")
        self.started[0] = self.started.pop()

    def work(self, name: str, *options: str, within: Sequence[str] = (), **environment: str) -> None:
        """`within`: a command that starts another where it is to run."""
        cache = str(self.folder / f"store-{name}")
        options = (self.address, "--name", name, "--threads", "1", *options)
        self._start("worker", *options, until="(works for)", within=within, TVMAKE_CACHE=cache, **environment)

    def _start(self, verb: str, *options: str, until: str, within: Sequence[str] = (), **environment: str) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TVMAKE_")}
        path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(TESTS), str(TESTS.parent)]))
        process = subprocess.Popen(
            [*within, sys.executable, "-m", "doit", "cluster", verb, *options],
            env={**kept, "PYTHONPATH": path, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        lines = []
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if found := re.search(until, line):
                threading.Thread(target=process.stderr.read, daemon=True).start()
                return found[1]
        raise AssertionError(f"doit cluster {verb} ended: {''.join(lines)}")

    def end(self) -> None:
        for process in reversed(self.started):
            process.terminate()
        for process in self.started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def cluster(folder: Path, *names: str, **options: Any) -> Iterator[Hands]:
    """A scheduler with workers of some names, until the block ends."""
    hands = Hands(folder)
    try:
        hands.begin()
        for name in names:
            hands.work(name, **options)
        yield hands
    finally:
        hands.end()
