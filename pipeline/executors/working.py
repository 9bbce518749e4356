"""A worker's side: what it says of itself, and how it performs an order.

    check    the tools that the driver's key names are this machine's
    look     a result that is here already, or on the remote, is the answer
    fetch    inputs that are not here, from the remote
    perform  in a process of this worker's own, which may die without it
    publish  to the remote, before the answer: what is finished outlives the driver and the scheduler

What is made for one run of a driver is neither looked for nor published: blobs come with the order, go with the answer,
and lie meanwhile in a store that this worker throws away.

dask loads this module into each worker (`dask_setup`) and calls `perform`. An action that nobody wants any more is
killed: dask alone would let it run to its end.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import signal
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ExecutorError, StageError, TvmakeError
from pipeline.executors.crew import ANNOUNCED
from pipeline.executors.orders import Answer, Order, Way
from pipeline.executors.placing import MEASURE, Needs, Worker, identities, label_of, needs, unfit
from pipeline.memoizer import Action, Floor, Memoizer, is_of
from pipeline.processor import THREAD_VARIABLES, device
from pipeline.store import ActionEntry, Store, default_root
from pipeline.store.scratch import Scratch
from pipeline.toolchain import Toolchain, detect
from pipeline.workers import Workers

if TYPE_CHECKING:
    from pipeline.remotes.cache import RemoteCache

LABELS = "TVMAKE_LABELS"  # words, in the environment of a worker
NAME = "TVMAKE_WORKER_NAME"
_WATCH = 0.25  # seconds
_OLD = 3600.0  # seconds after which a blob of a run is no action's any more; it comes again where it is wanted
_SILENT_RUN = 3600.0  # seconds after which a run is over, when another begins: longer than any action takes
_WANTED = ("executing", "long-running")  # states of a task that somebody waits for


def perform(packed: bytes) -> bytes:
    """What the scheduler has a worker call: an order in, its answer out."""
    from distributed import get_worker

    worker = get_worker()
    order: Order = pickle.loads(packed)
    return post().answer(order, worker, str(worker.get_current_task())).packed(order)


@functools.cache
def post() -> Post:
    """The one of this process."""
    return Post()


def _blobs(entry: ActionEntry, store: Store) -> tuple[bytes, ...]:
    """The outputs of an action."""
    return tuple(data for each in set(entry.outputs.values()) if (data := store.get(each)) is not None)


def _wrong(order: Order, here: Worker) -> str:
    """Why this machine must not run an action, for all that it can tell itself."""
    asked = needs(order.action, order.wanted)
    return unfit(here, Needs(order.wanted, asked.device))


class Post:
    """The processes of one worker, and what they are at. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Lock()
        self._floor = Floor()
        self._idle: dict[Way, list[Workers]] = defaultdict(list)
        self._stores: dict[Way, Store] = {}
        self._remotes: dict[Way, RemoteCache] = {}
        self._runs: dict[str, _Run] = {}  # of drivers, whose blobs come and go with orders and answers
        self._busy: dict[str, tuple[Workers, Action]] = {}  # by dask's key
        self._dropped: set[str] = set()
        self._watches = False
        self.done = 0

    @functools.cached_property
    def toolchain(self) -> Toolchain:
        return detect()

    def doing(self) -> dict[str, Any]:
        """What this worker is at, for who looks."""
        with self._changed:
            named = [f"{action.stage.name} of {action.subject}" for _, action in self._busy.values()]
        return {"doing": named, "done": self.done}

    def answer(self, order: Order, worker: Any, task: str) -> Answer:
        """Never raises what can be told in an answer."""
        address = str(worker.address)
        here = Worker(address, name_of(), identities=identities(self.toolchain), device=device())
        if wrong := _wrong(order, here):
            return Answer(None, unfit=f"{here.name} {wrong}", worker=address)
        try:
            return replace(self._answer(order, worker, task), worker=address)
        except Exception as error:
            return Answer(error, worker=address)

    def _answer(self, order: Order, worker: Any, task: str) -> Answer:
        store, remote = self._store(order.way), self._remote(order.way)
        with store.in_use():
            return self._done(order, worker, task, store, remote)

    def _done(self, order: Order, worker: Any, task: str, store: Store, remote: RemoteCache | None) -> Answer:
        for data in order.blobs:
            store.put(data)
        if remote is not None:
            if not order.way.run and (entry := self._known(order, store, remote)) is not None:
                return Answer(entry)
            if not remote.blobs(order.action.inputs.values()):
                return Answer(None, lacks=tuple(d.hash for d in order.action.inputs.values() if not store.has(d)))
        before = store.counts.corrupt + store.counts.torn
        with self._process(order, worker, task) as process:
            try:
                with self._place(order, store):
                    action = replace(order.action, needs=())  # whose labels it wants, it has
                    entry = process.perform(action, order.key, order.components)
            except BaseException:
                if task in self._dropped:  # nobody waits for it, or somebody does again
                    return Answer(None)
                raise
            finally:
                corrupt = process.corrupt
                process.corrupt = 0
        self.done += 1
        if remote is not None and not order.way.run:
            self._published(order, entry, remote)
        corrupt += store.counts.corrupt + store.counts.torn - before
        return Answer(entry, corrupt, blobs=_blobs(entry, store) if order.way.run else ())

    def _known(self, order: Order, store: Store, remote: RemoteCache) -> ActionEntry | None:
        """A result that somebody has made already, now on the remote."""
        entry = store.lookup(order.key)
        if entry is not None and is_of(order.action.stage, entry):
            self._published(order, entry, remote)
            return entry
        entry = remote.find(order.key)
        return entry if entry is not None and is_of(order.action.stage, entry) else None

    def _published(self, order: Order, entry: ActionEntry, remote: RemoteCache) -> None:
        if not remote.send(order.key, entry):
            raise ExecutorError(
                f"worker {name_of()} made {order.action.stage.name} of {order.action.subject} and cannot send it to "
                f"{remote.remote.name}",
                hint="see whether the remote runs and takes what that machine writes",
            )

    @contextlib.contextmanager
    def _place(self, order: Order, store: Store) -> Iterator[None]:
        """What is timed has this machine to itself. Where the driver is on it, it has seen to that."""
        if order.way.folder:
            yield
        else:
            machine = self._store(Way()) if order.way.run else store  # others of this machine know of the same
            with self._floor.alone(machine) if order.action.stage.alone else self._floor.shared():
                yield

    @contextlib.contextmanager
    def _process(self, order: Order, worker: Any, task: str) -> Iterator[Workers]:
        """Processes of which nobody else makes use, so that they can be killed with what they do."""
        way = order.way
        with self._changed:
            process = self._idle[way].pop() if self._idle[way] else self._made(way)
            self._busy[task] = process, order.action
            self._dropped.discard(task)
            if not self._watches:
                self._watches = True
                threading.Thread(target=self._watch, args=(worker,), name="dropped-tasks", daemon=True).start()
        try:
            yield process
        finally:
            with self._changed:
                self._busy.pop(task, None)
                if not process.stopped:
                    self._idle[way].append(process)

    def _made(self, way: Way) -> Workers:
        temporary = self._runs[way.run].scratch.temporary if way.run else _path(way.temporary)
        return Workers(self._root(way), 1, durable=way.durable, temporary=temporary)

    def _watch(self, worker: Any) -> None:
        """Kills what nobody waits for any more."""
        pause = threading.Event()
        while not pause.wait(_WATCH):
            with self._changed:
                busy = list(self._busy.items())
            for task, (process, _) in busy:
                state = worker.state.tasks.get(task)
                if state is None or state.state not in _WANTED:
                    self._dropped.add(task)
                    process.stop()

    def _root(self, way: Way) -> Path:
        if way.run:
            return self._runs[way.run].scratch.folder
        return _path(way.folder) or default_root()

    def _store(self, way: Way) -> Store:
        with self._changed:
            if way.run:
                self._note_run(way.run)
            if way not in self._stores:
                self._stores[way] = Store(self._root(way), durable=way.durable)
            return self._stores[way]

    def _remote(self, way: Way) -> RemoteCache | None:
        """The driver's remote, with what this machine's own settings say of trust, keys and tokens."""
        if not way.remote:
            return None
        from pipeline.remotes.cache import opened
        from pipeline.remotes.settings import Policy, load

        store = self._store(way)
        with self._changed:
            if way not in self._remotes:
                settings = replace(load(None), url=way.remote, policy=Policy.READ_WRITE)
                self._remotes[way] = opened(store, settings)
            return self._remotes[way]

    def _note_run(self, run: str) -> None:
        """Has a folder for what a run of a driver passes along. What is old in it is thrown away, and so are runs of
        which nothing was heard for long, with their processes."""
        now = time.time()
        if run not in self._runs:
            for old in [name for name, each in self._runs.items() if now - each.heard > _SILENT_RUN]:
                self._end_run(old)
            self._runs[run] = _Run(Scratch())
        noted = self._runs[run]
        noted.heard = now
        if now - noted.scratch.tidied > _OLD:
            noted.scratch.remove_old((), _OLD)

    def _end_run(self, run: str) -> None:
        for way in {each for each in (*self._idle, *self._stores) if each.run == run}:
            for process in self._idle.pop(way, []):
                process.stop()
            self._stores.pop(way, None)
            self._remotes.pop(way, None)
        self._runs.pop(run).scratch.close()


@dataclass
class _Run:
    """What this worker has of a run of a driver."""

    scratch: Scratch
    heard: float = 0.0  # Unix time


def _path(name: str) -> Path | None:
    return Path(name) if name else None


# what a worker says of itself


def name_of() -> str:
    return os.environ.get(NAME) or socket.gethostname()


def announce(threads: int) -> tuple[dict[str, Any], dict[str, float]]:
    """What a worker says of itself, and its labels with how many it has of each."""
    try:
        own = detect()
    except TvmakeError as error:
        return {"name": name_of(), "why": error.message}, {}
    labels: dict[str, float] = {MEASURE: 1}
    named = {label for target in (_native(own),) if target for label in (str(target["kind"]), label_of(target))}
    labels |= dict.fromkeys({*named, *os.environ.get(LABELS, "").split()}, float(threads))
    return {"name": name_of(), "identities": identities(own), "device": device()}, labels


def _native(toolchain: Toolchain) -> dict[str, Any]:
    """What this machine is as a target: the store knows it after the first time."""
    import json

    from pipeline import stages

    store = Store(default_root())
    workers = Workers(store.root, 1)
    try:
        memoizer = Memoizer(store, workers, toolchain)
        entry = memoizer.run(Action(stages.RESOLVE, "target native", options={"target": "native"}))
        found: dict[str, Any] = json.loads(memoizer.blob(entry.outputs["target"]))
        return found
    except (TvmakeError, StageError):
        return {}
    finally:
        workers.stop()


async def dask_setup(server: Any) -> None:
    """Called by dask in a worker that starts, before the scheduler knows it; and in the nanny before that."""
    if type(server).__name__ == "Nanny":
        _leave_environment(server)
    else:
        _introduce(server)


def _leave_environment(nanny: Any) -> None:
    """Takes back what dask would set in a worker's environment, OMP_NUM_THREADS=1: that would be another device."""
    for variables in (nanny.pre_spawn_env, nanny.env):
        for name in [name for name in THREAD_VARIABLES if name not in os.environ]:
            variables.pop(name, None)


def _introduce(worker: Any) -> None:
    with contextlib.suppress(ValueError):  # whoever interrupts, what started this worker decides what becomes of it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if isinstance(worker.name, int):  # of a cluster on one machine
        os.environ[NAME] = f"{name_of()}-{worker.name}"
    said, labels = announce(worker.state.nthreads)
    worker.startup_information[ANNOUNCED] = lambda _: said
    worker.metrics[ANNOUNCED] = lambda _: post().doing()
    worker.state.total_resources.update(labels)
    worker.state.available_resources.update(labels)
