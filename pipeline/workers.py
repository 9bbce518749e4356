"""Processes that run stages, and may die.

Each worker is a child process with a pipe of its own, so that one that is killed at any instant holds nothing that
another waits for: its pipe closes, and the call that was waiting on it raises WorkerDiedError with the subject's name.
(Pools that share one queue among their workers can hang when a worker is killed while it holds the queue's lock.)

A worker that has loaded TVM is used again. Another is started only when callers have waited for half a second all
together: loading TVM costs about a second of CPU, and most rebuilds have only a few functions to compile.

Each worker leads a process group: Ctrl-C in a terminal reaches the parent alone, which decides what becomes of them,
and what a stage started, a compiler say, ends with its worker. A worker whose parent died ends by itself.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pipeline import notices
from pipeline.errors import ExecutorError, SetupError, StageError, WorkerDiedError
from pipeline.executors.contract import HERE, Say, warn
from pipeline.stages import Home
from pipeline.store import ActionEntry

if TYPE_CHECKING:
    from pipeline.executors import Job
    from pipeline.memoizer import Action

_PATIENCE = 0.5  # seconds that callers wait for busy workers, all together, before another is started

_LAST_WORDS = 8  # lines
_FLEETING = "fleeting"


_REUSED = (Home.COMPILER, Home.RUNNER)


class Workers:
    """At most `limit` processes of each home that is used again, and as many that are not, working for the store at
    `root`, durably or not; `temporary` is where they make their temporary files, by default where this process does.

    Every method may be called from any thread.
    """

    def __init__(
        self, root: Path, limit: int, temporary: Path | None = None, *, durable: bool = True, say: Say = warn
    ) -> None:
        self.limit = limit
        self.say = say  # told what a stage tells while it runs: see pipeline.notices
        self._temporary = temporary
        self._durable = durable
        self._root = root
        self._idle: dict[Home, list[_Worker]] = {home: [] for home in _REUSED}
        self._crews: dict[Home, set[_Worker]] = {home: set() for home in _REUSED}  # those that are used again
        self._waited = 0.0  # seconds, all callers together, since one was last started
        self._all: set[_Worker] = set()
        self._changed = threading.Condition()
        self._stopped = False
        self.corrupt = 0  # files of the store, members of sets among them, that workers found damaged and set aside

    def perform(self, action: Action, key: str, components: dict[str, object]) -> ActionEntry:
        """Has a worker run an action and store its results; waits for it.

        Raises what the stage raised; WorkerDiedError when the process died or ran past the time limit; ExecutorError
        for an action that needs a label: that is another machine's.
        """
        if action.needs:
            self.serving(", ".join(action.needs))
        request = pickle.dumps((action, key, components))
        home = action.stage.home
        worker = self._borrow(home)
        try:
            result, corrupt = worker.call(request, action.timeout, lambda said: self.say(f"{action.subject}: {said}"))
        except EOFError:
            self._discard(worker)
            raise self._obituary(worker, action, key) from None
        except BaseException:
            self._discard(worker)
            raise
        with self._changed:
            self.corrupt += corrupt
        if home in _REUSED:
            self._give_back(worker, home)
        else:
            self._discard(worker)
        if isinstance(result, BaseException):
            raise result
        assert isinstance(result, ActionEntry), f"a worker answered with a {type(result).__name__}"
        return result

    def runs_here(self, action: Action) -> bool:
        return True

    def posts(self, device: str, label: str = "") -> tuple[str, ...]:
        return (HERE,)

    def serving(self, label: str) -> str:
        raise ExecutorError(
            f"workers labelled {label} are wanted, and this machine works alone",
            hint="name a cluster that has one: --executor dask://HOST:8786; see: doit help cluster",
        )

    def beside(self, job: Job) -> Workers:
        return Workers(job.store.root, job.jobs, job.temporary, durable=job.durable, say=job.say)

    @property
    def stopped(self) -> bool:
        return self._stopped

    def stop(self) -> None:
        """Kills every worker. What they had finished is in the store."""
        with self._changed:
            self._stopped = True
            idle = [worker for each in self._idle.values() for worker in each]
            self._idle = {home: [] for home in _REUSED}
            busy = self._all.difference(idle)
            self._changed.notify_all()
        for worker in busy:
            worker.kill()  # whoever waits for it closes the pipe
        for worker in idle:
            self._discard(worker)

    def _borrow(self, home: Home) -> _Worker:
        with self._changed:
            while not self._stopped:
                while home in _REUSED and self._idle[home]:
                    worker = self._idle[home].pop()
                    if worker.lives():
                        return worker
                    self._forget(worker)
                may_start, patience = self._may_start(home)
                if may_start:
                    return self._start(home)
                since = time.monotonic()
                self._changed.wait(patience)
                if home in _REUSED:
                    self._waited += time.monotonic() - since
            raise KeyboardInterrupt

    def _may_start(self, home: Home) -> tuple[bool, float | None]:
        """Whether another process may be started now, and how long to wait before asking again (None: for a change)."""
        if home not in _REUSED:
            return len(self._all) - sum(map(len, self._crews.values())) < self.limit, None
        crew = self._crews[home]
        if len(crew) >= self.limit:
            return False, None
        left = _PATIENCE - self._waited
        return left <= 0 or not crew, left

    def _start(self, home: Home) -> _Worker:
        try:
            worker = _Worker(self._root, self._temporary, self._durable)
        except OSError as error:
            hint = "free some memory, and see `ulimit -u` and `ulimit -n`"
            raise SetupError(f"a process cannot be started: {error.strerror}", hint=hint) from error
        self._all.add(worker)
        if home in _REUSED:
            self._crews[home].add(worker)
            self._waited = 0.0
        return worker

    def _give_back(self, worker: _Worker, home: Home) -> None:
        with self._changed:
            if not self._stopped:
                self._idle[home].append(worker)
                self._changed.notify_all()
                return
        self._discard(worker)

    def _discard(self, worker: _Worker) -> None:
        worker.end()
        with self._changed:
            self._forget(worker)

    def _forget(self, worker: _Worker) -> None:
        self._all.discard(worker)
        for crew in self._crews.values():
            crew.discard(worker)
        self._changed.notify_all()

    def _obituary(self, worker: _Worker, action: Action, key: str) -> Exception:
        if self._stopped:
            return StageError("the build was stopped", stage=action.stage.name, subject=action.subject, key=key)
        died = WorkerDiedError(
            f"the process {worker.cause_of_death(action.timeout)}",
            stage=action.stage.name,
            subject=action.subject,
            key=key,
            hint="raise `timeout` in the target's file if the machine is only slow"
            if worker.timed_out
            else "run the same command again; if it dies again, `doit doctor` looks for causes on this machine",
        )
        died.timed_out = worker.timed_out
        return died


class _Worker:
    """One child process and the pipe to it."""

    def __init__(self, root: Path, temporary: Path | None, durable: bool) -> None:
        ours, theirs = Pipe()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        environment = dict(os.environ)
        # One thread each in NumPy: the workers are the parallelism.
        environment.setdefault("OPENBLAS_NUM_THREADS", "1")
        if temporary is not None:
            environment["TMPDIR"] = str(temporary)
        # The child finds this package where the parent found it, installed or not.
        package = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        said = [str(theirs.fileno()), str(root), *([] if durable else [_FLEETING])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.workers", *said],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environment,
            process_group=0,
        )
        theirs.close()
        self._pipe = ours
        self.timed_out = False

    def lives(self) -> bool:
        """Whether an idle worker can be used: it has nothing to say unless its end of the pipe is closed."""
        return self._process.poll() is None and not self._pipe.poll()

    def call(self, request: bytes, timeout: float, say: Say) -> tuple[object, int]:
        """What the stage made or raised, and how many files of the store were found damaged. `say` is told meanwhile
        what the stage tells.

        Raises EOFError where the process died or ran past the limit; how it ended is then known.
        """
        os.lseek(self._log.fileno(), 0, os.SEEK_SET)  # the worker writes where this stands: one offset is shared
        os.ftruncate(self._log.fileno(), 0)
        try:
            self._pipe.send_bytes(request)
            until = time.monotonic() + timeout
            while True:
                self._await_answer(max(0.0, until - time.monotonic()))
                answer: str | tuple[object, int] = pickle.loads(self._pipe.recv_bytes())
                if not isinstance(answer, str):
                    return answer
                say(answer)
        except (OSError, EOFError) as error:
            if not self.timed_out:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=1)
            raise EOFError from error

    def _await_answer(self, timeout: float) -> None:
        # The process itself is watched as well: a process that the stage left behind may hold the pipe open.
        with contextlib.ExitStack() as stack:
            watched: list[Connection | int] = [self._pipe]
            with contextlib.suppress(OSError):  # some sandboxes have no pidfd
                process = os.pidfd_open(self._process.pid)
                stack.callback(os.close, process)
                watched.append(process)
            ready = wait(watched, timeout)
        if self._pipe not in ready and not self._pipe.poll():
            self.timed_out = not ready
            raise EOFError

    def kill(self) -> None:
        """Kills the process and what it started. The pipe stays open, as another thread may be waiting on it."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def end(self) -> None:
        """Kills the process and closes the pipe: for the only thread that still knows of it."""
        self.kill()
        self._pipe.close()

    def cause_of_death(self, timeout: float) -> str:
        if self.timed_out:
            return f"was stopped after {timeout:g} s"
        code = self._process.returncode
        if code < 0:
            cause = f"was killed by {_signal_name(-code)}"
            if -code == signal.SIGKILL:
                cause += " (perhaps for want of memory)"
        else:
            cause = f"ended with exit code {code}"
        return "\n    ".join([cause, *self._last_words()])

    def _last_words(self) -> list[str]:
        """Of a crash its name and innermost frames, otherwise the end of what was printed."""
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        crash = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python error")), len(lines))
        return lines[crash : crash + _LAST_WORDS] or lines[-_LAST_WORDS:]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def serve(pipe: Connection, root: Path, durable: bool) -> None:
    """A worker's life: take an action, perform it, answer, until the other end closes."""
    from pipeline.memoizer import perform
    from pipeline.store import Store

    store = Store(root, durable=durable)
    notices.listen(lambda sentence: pipe.send_bytes(pickle.dumps(sentence)))
    while True:
        try:
            action, key, components = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        before = store.counts.corrupt + store.counts.torn
        try:
            result: object = perform(store, action, key, components)
        except Exception as error:
            result = error
        with contextlib.suppress(OSError):
            corrupt = store.counts.corrupt + store.counts.torn - before
            pipe.send_bytes(_pickled(result, corrupt, action, key))


def _pickled(result: object, corrupt: int, action: Action, key: str) -> bytes:
    try:
        return pickle.dumps((result, corrupt))
    except Exception as error:
        message = f"{result}\n(what it raised cannot be sent from one process to another: {error})"
        error_in_words = StageError(message, stage=action.stage.name, subject=action.subject, key=key)
        return pickle.dumps((error_in_words, corrupt))


def _end_with_parent(pipe: int) -> None:
    """Ends this process and what it started as soon as the parent's end of the pipe is closed, busy or not."""
    watch = select.poll()
    watch.register(pipe, 0)  # a hang-up is always reported
    watch.poll()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    import faulthandler

    faulthandler.enable(all_threads=False)  # the one that crashed
    # Whoever interrupts, the parent decides what becomes of its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_end_with_parent, args=(descriptor,), daemon=True).start()
    serve(Connection(descriptor), Path(sys.argv[2]), durable=_FLEETING not in sys.argv)
