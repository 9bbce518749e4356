"""A simulated cluster of up to 1,000 hosts that tune 100,000 operators: what each part of it carries, and what breaks.

Real: the night, its scheduler, the memoizer and its store, the DaskExecutor, a scheduler process of dask's, and one
`distributed.Worker` for each host, which talks TCP. Fake: the work. A worker that gets an order waits as long as the
stage would take on one core, and answers with blobs as large as the real ones.

    driver ── orders ──▶ dask's scheduler ── orders ──▶ hosts         each line a process, hosts in a few of them
           ◀─ answers ──                  ◀─ answers ──

    python -m bench.scale                                   rows for 1, 10, 100, 300 and 1,000 workers
    python -m bench.scale --workers 300 --drivers 2         two drivers, each with half of the operators
    python -m bench.scale --workers 300 --schedulers 2      … and each with its own scheduler and half of the workers
    python -m bench.scale --workers 300 --batch 64          larger batches
    python -m bench.scale --workers 300 --together 16       16 candidates compiled by one order
    python -m bench.scale --claims 100 1000 10000           only this: requests to the remote for one claim
    python -m bench.scale --decisions                       only this: our scheduler alone
    python -m bench.scale --paper                           only this: what so many workers take, by arithmetic

All processes share the processors of this machine, so a rate is a lower bound of what the parts can do on machines of
their own. What is counted as a message is one that dask's scheduler reads or writes on TCP; it puts several into one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import psutil

from bench.cpu import table
from bench.night import Timed, operators
from pipeline import stages
from pipeline.hashing import Digest
from pipeline.memoizer import Action, Memoizer
from pipeline.store import ActionEntry, Store
from pipeline.tuning import calls
from pipeline.tuning.events import Event
from pipeline.tuning.fakes import FakeEngine, MemoryLedger, Told
from pipeline.tuning.night import Batch, Night
from pipeline.tuning.records import Outcome, Record, Standing, TrialRecord
from pipeline.tuning.scheduler import Scheduler
from pipeline.tuning.states import Operator, Terms

T = TypeVar("T")

MEGA = 2.0**20
DEVICE = "simulated"
_READY, _MARK, _STOP = "ready", "mark", "stop"
_PATIENCE = 300.0  # seconds until a process that is waited for is taken for dead
_LAST = 20.0  # seconds for the batches that are being measured when a simulation ends
_AT_ONCE = 25  # workers of a process that register at the same time
_LESSON = 40  # trials of an operator that are learnt from together, as the real engine does
_RETESTED = 3 * 8  # candidate, best and baseline, each timed eight times as long


@dataclass(frozen=True)
class Given:
    """What is simulated. Seconds are of one core, by candidate; sizes are bytes of one blob."""

    workers: int = 10
    operators: int = 100_000
    seconds: float = 30.0  # that are looked at, after `warm`
    warm: float = 20.0
    batch: int = 16
    together: int = 1  # candidates that one order compiles
    speed: float = 1.0
    hosts: int = 2  # processes that hold the workers
    drivers: int = 1
    schedulers: int = 1  # of dask's: each has its share of the workers and of the drivers
    at_once: int = 0  # batches in preparation, `-j` of `doit tune`; 0: as many as the executor takes
    direct: bool = False  # answers go from worker to driver without the scheduler
    log: int = 0  # messages of each connection that dask keeps, with what is in them; 0: as it does by itself
    search: float = 0.085
    codegen: float = 0.15
    measure: float = 0.05
    learn: float = 0.5  # a lesson
    function: int = 20_000
    object: int = 20_000
    seed: int = 0


@dataclass
class Snapshot:
    """A process at a moment. `counts` only grow."""

    at: float
    cpu: float
    rss: float
    counts: dict[str, float] = field(default_factory=dict)

    def since(self, before: Snapshot) -> Snapshot:
        """What came between, memory as it is now."""
        counts = {name: value - before.counts.get(name, 0.0) for name, value in self.counts.items()}
        counts["grown"] = self.rss - before.rss
        return Snapshot(self.at - before.at, self.cpu - before.cpu, self.rss, counts)


def snapshot(counts: Mapping[str, float]) -> Snapshot:
    own = psutil.Process()
    used = own.cpu_times()
    return Snapshot(time.monotonic(), used.user + used.system, own.memory_info().rss / MEGA, dict(counts))


# what every process counts


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
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
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
                self.calls[name] += 1

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


def _limit_logs(given: Given) -> None:
    import dask

    if given.log:
        dask.config.set({"distributed.admin.low-level-log-length": given.log})


# dask's scheduler


def scheduler_process(pipe: Connection, given: Given) -> None:
    """A scheduler as `doit cluster scheduler` starts one, which counts what it reads and writes."""
    from pipeline.executors.extra import NO_DASHBOARD, load

    distributed = load()
    _limit_logs(given)
    logging.disable()  # a driver that stops leaves what it waited for
    wire = Wire()
    wire.tap()

    async def serve() -> None:
        scheduler = await distributed.Scheduler(host="127.0.0.1", port=0, **NO_DASHBOARD)
        pipe.send(scheduler.address)
        await _obey(pipe, lambda: wire)
        await scheduler.close()

    asyncio.run(serve())


def _heard(pipe: Connection) -> str:
    """What a process is told; to stop, where nobody is left to tell it anything."""
    try:
        said: str = pipe.recv()
    except (EOFError, OSError):
        return _STOP
    return said


async def _obey(pipe: Connection, counts: Callable[[], Mapping[str, float]]) -> None:
    """Answers every mark with a snapshot, until told to stop."""
    told: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    loop.add_reader(pipe.fileno(), lambda: told.put_nowait(_heard(pipe)))
    while await told.get() == _MARK:
        pipe.send(snapshot(counts()))
    loop.remove_reader(pipe.fileno())


# hosts


def host_process(pipe: Connection, given: Given, address: str, numbers: range) -> None:
    """Workers without nannies in one event loop. They announce themselves as those of `doit cluster worker` do."""
    import dask

    from pipeline.executors import working
    from pipeline.executors.extra import load

    distributed = load()
    _limit_logs(given)
    # On a real host these look after one worker each; here they would take all processors for a thousand.
    dask.config.set(
        {
            "distributed.admin.tick.interval": "1h",
            "distributed.admin.system-monitor.interval": "1h",
            "distributed.worker.profile.enabled": False,
        }
    )
    work = FakeWork(given.speed)
    working.perform = work.perform  # type: ignore[assignment]
    said = _announced()

    async def serve() -> None:
        with tempfile.TemporaryDirectory() as folder:
            workers = [_worker(distributed, address, f"host-{i}", folder, said) for i in numbers]
            for some in _chunks(workers, _AT_ONCE):
                await asyncio.gather(*some)
            pipe.send(_READY)
            await _obey(pipe, work.counts)
            await asyncio.gather(*(worker.close(timeout=1) for worker in workers), return_exceptions=True)

    asyncio.run(serve())


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _announced() -> dict[str, Any]:
    from pipeline.executors.placing import identities
    from pipeline.toolchain import detect

    return {"identities": identities(detect()), "device": DEVICE}


def _worker(distributed: Any, address: str, name: str, folder: str, said: Mapping[str, Any]) -> Any:
    from pipeline.executors.crew import ANNOUNCED
    from pipeline.executors.placing import MEASURE

    labels = {MEASURE: 1.0, "llvm": 1.0, f"llvm-{DEVICE}": 1.0}
    worker = distributed.Worker(
        address,
        nthreads=1,
        name=name,
        memory_limit=0,
        local_directory=folder,
        dashboard=False,
        dashboard_address=None,
        resources=labels,
        validate=False,
    )
    worker.startup_information[ANNOUNCED] = lambda _: {"name": name, **said}
    worker.metrics[ANNOUNCED] = lambda _: {"doing": [], "done": 0}
    return worker


class FakeWork:
    """What stands for `pipeline.executors.working.perform` in the hosts' processes."""

    def __init__(self, speed: float) -> None:
        self._speed = speed
        self._orders: Counter[str] = Counter()
        self._used: set[str] = set()
        self._busy = 0.0  # seconds of workers
        self._late = 0.0  # … that answers took longer than they should, as this process was busy
        self._misplaced = 0

    def counts(self) -> dict[str, float]:
        sums = {"busy": self._busy, "late": self._late, "used": len(self._used), "misplaced": self._misplaced}
        return {**sums, **self._orders, "orders": self._orders.total()}

    async def perform(self, packed: bytes) -> bytes:
        from distributed import get_worker

        from pipeline.executors.orders import Answer, Order

        order: Order = pickle.loads(packed)
        action, worker = order.action, get_worker()
        wanted: Any = action.options["simulated"]
        begun, seconds = time.monotonic(), wanted["seconds"] / self._speed
        await asyncio.sleep(seconds)
        self._late += time.monotonic() - begun - seconds
        self._busy += seconds
        self._orders[action.stage.name] += 1
        self._used.add(worker.name)
        self._misplaced += bool(action.post) and action.post != worker.name
        blobs = {name: random.randbytes(size) for name, size in wanted["answer"].items()}
        outputs = {name: Digest.of(data) for name, data in blobs.items()}
        entry = ActionEntry(action.stage.name, order.components, outputs, seconds)
        return Answer(entry, worker=worker.address, blobs=tuple(blobs.values())).packed(order)


# drivers


class OrderingEngine(FakeEngine):
    """A fake engine whose calls give the orders that the real one gives, to a real executor, and wait for them."""

    def __init__(self, given: Given, memoizer: Memoizer, meter: Meter) -> None:
        super().__init__(given.seed, workers=given.at_once or memoizer.workers.limit)
        self._given = given
        self._memoizer = memoizer
        self._meter = meter
        self._compiling = ThreadPoolExecutor(self.workers)
        self._numbers = itertools.count()
        self._grounds: dict[str, tuple[Digest, ...]] = {}  # function, reference and baseline of each operator
        self._compiled: dict[str, dict[str, Digest]] = {}  # objects of the batches that are under way
        self._unlearnt: Counter[str] = Counter()
        self._counting = threading.Lock()

    @property  # type: ignore[override]
    def posts(self) -> int:
        return len(self.post_names)

    @posts.setter
    def posts(self, count: int) -> None:
        """The dataclass sets what the executor says."""

    @property  # type: ignore[override]
    def post_names(self) -> Sequence[str]:
        with self._meter.of("asking for posts"):
            return self._memoizer.workers.posts(DEVICE)

    @post_names.setter
    def post_names(self, names: Sequence[str]) -> None:
        """The dataclass sets what the executor says."""

    def now(self) -> float:
        return time.time()

    def close(self) -> None:
        super().close()
        self._memoizer.workers.stop()
        self._compiling.shutdown(wait=False, cancel_futures=True)

    def prepare(self, operator: Operator, standing: Standing, count: int) -> Batch:
        function = self._ground(operator)[0]
        sizes = {f"f{i}": self._given.function for i in range(count)} | {f"d{i}": 300 for i in range(count)}
        inputs = {
            "function": function,
            "tried": self._memoizer.store.put(b" " * 100 * len(standing.tried)),
            "known": self._memoizer.store.put(json.dumps(sorted(standing.tried)).encode()),
        }
        listed = {"proposed": 200 * count}
        found = self._order(stages.SEARCH, operator, inputs, self._given.search * count, {**sizes, **listed})
        functions = [found.outputs[f"f{i}"] for i in range(count)]
        some = _chunks(functions, self._given.together)
        made = self._compiling.map(functools.partial(self._codegen, operator), some)
        objects = [digest for each in made for digest in each]
        with self._meter.of("the fake engine"):
            batch = super().prepare(operator, standing, count)
        named = {each: objects[i % len(objects)] for i, each in enumerate(batch.candidates)}
        with self._counting:
            self._compiled.setdefault(operator.key, {}).update(named)
        return batch

    def _codegen(self, operator: Operator, functions: Sequence[Digest]) -> list[Digest]:
        inputs = {"function" if not i else f"function{i}": each for i, each in enumerate(functions)}
        sizes = {"object" if not i else f"object{i}": self._given.object for i in range(len(functions))}
        made = self._order(stages.CODEGEN, operator, inputs, self._given.codegen * len(functions), sizes)
        return [made.outputs[name] for name in sizes]

    def measure(self, operator: Operator, batch: Batch) -> list[Record]:
        with self._counting:
            objects = {each: self._compiled[operator.key].pop(each) for each in batch.candidates}
        self._timed(operator, objects, self._given.measure * (len(objects) + 1))
        with self._meter.of("the fake engine"):
            return super().measure(operator, batch)

    def retest(self, operator: Operator, standing: Standing, leader: TrialRecord) -> list[Record]:
        ground = self._ground(operator)
        self._timed(operator, {"leader": ground[1], "best": ground[2]}, self._given.measure * _RETESTED)
        with self._meter.of("the fake engine"):
            return super().retest(operator, standing, leader)

    def learn(self, operator: Operator, records: Sequence[Record]) -> None:
        with self._counting:
            self._unlearnt[operator.key] += sum(isinstance(each, TrialRecord) for each in records)
            lesson = self._unlearnt[operator.key] >= _LESSON
            if lesson:
                del self._unlearnt[operator.key]
        if lesson:
            inputs = {"function": self._ground(operator)[0], "results": self._memoizer.store.put(b" " * 100 * _LESSON)}
            self._order(stages.LEARN, operator, inputs, self._given.learn, {"model": 20_000})

    def _timed(self, operator: Operator, objects: Mapping[str, Digest], seconds: float) -> None:
        _, reference, baseline = self._ground(operator)
        inputs = {"reference.o": reference, "baseline.o": baseline, **{f"{name}.o": o for name, o in objects.items()}}
        self._order(stages.MEASURE, operator, inputs, seconds, {"trials": 130 * len(inputs)}, calls.post())

    def _ground(self, operator: Operator) -> tuple[Digest, ...]:
        if operator.key not in self._grounds:
            put = self._memoizer.store.put
            sizes = (self._given.function, self._given.object, self._given.object)
            self._grounds[operator.key] = tuple(put(random.randbytes(size)) for size in sizes)
        return self._grounds[operator.key]

    def _order(
        self,
        stage: stages.Stage,
        operator: Operator,
        inputs: Mapping[str, Digest],
        seconds: float,
        answer: Mapping[str, int],
        post: str = "",
    ) -> ActionEntry:
        wanted = {"seconds": seconds, "answer": dict(answer), "number": next(self._numbers), "of": os.getpid()}
        options: dict[str, object] = {"target": {"kind": "llvm", "mcpu": DEVICE}, "simulated": wanted}
        if post:
            options["device"] = DEVICE
        return self._memoizer.run(Action(stage, operator.name, inputs, options, post=post))


class MeteredScheduler(Scheduler):
    """Our scheduler: what it takes to decide is metered."""

    def __init__(self, meter: Meter, *arguments: Any) -> None:
        super().__init__(*arguments)
        for name in ("pick", "may_go_on", "prepared", "finish", "update", "put_back"):
            setattr(self, name, meter.metered("decisions", getattr(self, name)))


class Counting:
    """A watcher that keeps nothing."""

    def told(self, event: Event) -> None:
        """Whoever shows events is not simulated."""


def driver_process(pipe: Connection, given: Given, address: str, number: int) -> None:
    """A night of one driver, with its share of the operators, until it is told to stop."""
    from pipeline.executors.dask import open_executor
    from pipeline.executors.extra import load

    meter = Meter()
    load()
    _limit_logs(given)
    chosen = operators(10 if not given.operators else given.operators, max(10, given.operators // 100), given.seed)
    chosen = chosen[number :: given.drivers]
    with tempfile.TemporaryDirectory() as folder:
        gc.collect()
        bare = psutil.Process().memory_info().rss / MEGA
        executor: Any = open_executor(address.replace("tcp", "dask"), _job(Path(folder), given.at_once or 2))
        _meter_executor(meter, executor, given)
        memoizer = Memoizer(executor._job.store, executor, executor._job.toolchain)
        meter.wrap(memoizer, "memoizer", "run")
        engine, ledger = OrderingEngine(given, memoizer, meter), MemoryLedger()
        meter.wrap(ledger, "ledger", "standing", "add")
        connected = psutil.Process().memory_info().rss / MEGA
        terms = Terms(batch=given.batch, first=given.batch, posts=max(1, engine.posts))
        scheduler = MeteredScheduler(meter, chosen, ledger.standing, terms)
        counts = _Counts(meter, executor, engine, scheduler)
        counts.fixed = {"bare": bare, "connected": connected, "scheduled": psutil.Process().memory_info().rss / MEGA}
        night = Night(chosen, engine, ledger, terms, Counting(), "scale", scheduler)
        pipe.send(_READY)
        assert pipe.recv() == "go"
        threading.Thread(target=_listen, args=(pipe, counts, night), daemon=True).start()
        ended = night.run()
        pipe.send({**_recorded(engine, ledger), "ended": str(ended.end), "said": ended.said})


def _job(folder: Path, jobs: int) -> Any:
    """As `doit tune` has it: a store for this run alone, and a remote for what is large."""
    from pipeline.executors import Job
    from pipeline.remotes.cache import opened
    from pipeline.remotes.settings import Settings
    from pipeline.toolchain import detect

    store = Store(folder / "store", durable=False)
    url = f"file://{folder}/remote"
    (folder / "remote").mkdir()
    return Job(store, detect(), jobs, opened(store, Settings(url=url)), url, durable=False)


def _meter_executor(meter: Meter, executor: Any, given: Given) -> None:
    """Names what a driver's processor time goes to, from the outside."""
    from pipeline.executors import driving
    from pipeline.executors.orders import Order

    client = executor._cluster.client
    client.direct_to_workers = given.direct
    meter.wrap(client, "dask: submit", "submit")
    meter.wrap(Order, "pickling", "packed")
    named: Any = driving
    named.pickle = SimpleNamespace(loads=meter.metered("pickling", pickle.loads), PicklingError=pickle.PicklingError)
    meter.wrap(executor, "dask: release", "_release")
    meter.wrap(executor, "dask: await", "_awaited")
    meter.wrap(executor, "executor", "perform")
    meter.wrap(executor._job.store, "store", "put", "get", "commit", "lookup", "has")
    meter.wrap(executor._crew, "crew", "look")


@dataclass
class _Counts:
    """What a driver has done so far."""

    meter: Meter
    executor: Any
    engine: OrderingEngine
    scheduler: Scheduler
    fixed: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        async def ident() -> int:
            return threading.get_ident()

        self._loop = time.pthread_getcpuclockid(self.executor._cluster.client.sync(ident))
        self._main = time.pthread_getcpuclockid(threading.get_ident())

    def __call__(self) -> dict[str, float]:
        counts: dict[str, float] = {f"cpu {name}": seconds for name, seconds in self.meter.seconds.items()}
        with contextlib.suppress(OSError):  # the night is over, and its threads are gone
            counts |= {"cpu dask: loop": time.clock_gettime(self._loop), "cpu main": time.clock_gettime(self._main)}
        counts |= {f"calls {name}": float(count) for name, count in self.meter.calls.items()}
        counts["trials"] = float(sum(self.engine.made.copy().values()))
        return counts


def _listen(pipe: Connection, counts: _Counts, night: Night) -> None:
    while _heard(pipe) == _MARK:
        made = snapshot(counts())
        pipe.send((made, counts.fixed))
    night.stop()


def _recorded(engine: OrderingEngine, ledger: MemoryLedger) -> dict[str, Any]:
    """How often candidates were measured, and whether each is recorded as often: what crashed is tried twice."""
    times = Counter(
        (key, record.candidate)
        for key, records in ledger.records.items()
        for record in records
        if isinstance(record, TrialRecord)
    )
    built = {made: count for made, count in times.items() if made in engine.made}
    return {"measured": sum(engine.made.values()), "agree": built == engine.made, "records": times.total()}


# one row


@dataclass
class Row:
    """What one simulation came to. Rates are by the second, memory is in MiB, processors in shares of one."""

    given: Given
    seconds: float
    busy: float  # share of the workers' time in which they worked
    trials: float
    orders: float
    driver: Snapshot  # all drivers together
    scheduler: Snapshot  # all of dask's together
    hosts: Snapshot
    fixed: dict[str, float]  # memory of a driver at some points of its beginning
    ends: list[dict[str, Any]]

    @property
    def messages(self) -> float:
        """For a trial."""
        counts = self.scheduler.counts
        return (counts.get("read", 0) + counts.get("written", 0)) / self._count

    @property
    def bytes(self) -> float:
        """For a trial, in kB."""
        counts = self.scheduler.counts
        return (counts.get("bytes read", 0) + counts.get("bytes written", 0)) / self._count / 1000

    @property
    def decisions(self) -> float:
        """That one processor could make in a second."""
        seconds = self.driver.counts.get("cpu decisions", 0.0)
        return self.batches * self.seconds / seconds if seconds else 0.0

    @property
    def batches(self) -> float:
        return self.trials / self.given.batch

    @property
    def _count(self) -> float:
        return max(1.0, self.trials * self.seconds)

    def shares(self) -> dict[str, float]:
        """Where the drivers' processor time went, by name."""
        counts = self.driver.counts
        named = {name[4:]: value for name, value in counts.items() if name.startswith("cpu ")}
        main = named.pop("main", 0.0)
        of_main = sum(named.get(name, 0.0) for name in ("decisions", "asking for posts", "ledger"))
        named["night's loop"] = max(0.0, main - of_main)
        named["other threads"] = max(0.0, self.driver.cpu - sum(named.values()))
        return {name: value / max(self.driver.cpu, 1e-9) for name, value in sorted(named.items(), key=lambda e: -e[1])}


class _Process:
    """A process of the simulation, and the pipe to it."""

    def __init__(self, target: Callable[..., None], given: Given, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, given, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def told(self, patience: float = _PATIENCE) -> Any:
        """What it says next. Raises RuntimeError where it says nothing."""
        if not self.pipe.poll(patience):
            raise RuntimeError(f"process {self._process.pid} of the simulation says nothing")
        try:
            return self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"process {self._process.pid} of the simulation is gone") from None

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(_STOP)
        self._process.join(5)
        self._process.kill()
        self._process.join()


def simulate(given: Given, say: Callable[[str], None] = lambda sentence: None) -> Row:
    """One row."""
    with contextlib.ExitStack() as stack:

        def start(target: Callable[..., None], *arguments: Any) -> _Process:
            process = _Process(target, given, *arguments)
            stack.callback(process.end)
            return process

        schedulers = [start(scheduler_process) for _ in range(given.schedulers)]
        addresses = [each.told() for each in schedulers]
        say(f"{given.workers} workers begin")
        hosts = []
        for i, numbers in enumerate(_shared_out(given.workers, max(given.hosts, given.schedulers))):
            hosts.append(start(host_process, addresses[i % len(addresses)], numbers))
        begun = time.monotonic()
        for host in hosts:
            host.told()
        say(f"… have begun after {time.monotonic() - begun:.0f} s; drivers begin")
        drivers = [start(driver_process, addresses[i % len(addresses)], i) for i in range(given.drivers)]
        for driver in drivers:
            driver.told()
        for driver in drivers:
            driver.pipe.send("go")
        say("… work")
        time.sleep(given.warm)
        before = _marked(drivers, schedulers, hosts)
        time.sleep(given.seconds)
        after = _marked(drivers, schedulers, hosts)
        say("… end")
        for driver in drivers:
            driver.pipe.send(_STOP)
        ends = [_ended(driver) for driver in drivers]
        say(f"… have ended: {ends}")
        return _row(given, before, after, ends)


def _ended(driver: _Process) -> dict[str, Any]:
    """What a driver says in the end; nothing where its last batches take too long."""
    try:
        said: dict[str, Any] = driver.told(_LAST)
    except RuntimeError:
        return {}
    return said


def _shared_out(count: int, among: int) -> list[range]:
    edges = [count * i // among for i in range(among + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges) if b > a]


def _marked(*kinds: Sequence[_Process]) -> list[list[Any]]:
    """What all processes were at one moment, as near as they answer."""
    for process in itertools.chain(*kinds):
        process.pipe.send(_MARK)
    return [[process.told() for process in processes] for processes in kinds]


def _row(given: Given, before: list[list[Any]], after: list[list[Any]], ends: list[dict[str, Any]]) -> Row:
    for said in (*before[0], *after[0]):
        if isinstance(said, dict):
            raise RuntimeError(f"the night of a driver was over before its time: {said}")
    fixed = after[0][0][1]
    before[0], after[0] = ([each[0] for each in marked[0]] for marked in (before, after))
    driver, scheduler, hosts = (
        _summed([b.since(a) for a, b in zip(*each, strict=True)]) for each in zip(before, after, strict=True)
    )
    hosts.counts["used in all"] = sum(each.counts["used"] for each in after[2])
    return Row(
        given=given,
        seconds=driver.at,
        busy=hosts.counts["busy"] / (given.workers * hosts.at),
        trials=driver.counts["trials"] / driver.at,
        orders=hosts.counts["orders"] / hosts.at,
        driver=driver,
        scheduler=scheduler,
        hosts=hosts,
        fixed=fixed,
        ends=ends,
    )


def _summed(parts: Sequence[Snapshot]) -> Snapshot:
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    seconds = sum(part.at for part in parts) / len(parts)
    return Snapshot(seconds, sum(part.cpu for part in parts), sum(part.rss for part in parts), dict(counts))


HEADS = (
    "workers",
    "trials/s",
    "busy, %",
    "orders/s",
    "driver CPU",
    "dask CPU",
    "hosts CPU",
    "driver MiB",
    "dask MiB",
    "messages/trial",
    "kB/trial",
    "decisions/s",
)


def cells(row: Row) -> tuple[object, ...]:
    return (
        row.given.workers,
        row.trials,
        100 * row.busy,
        row.orders,
        row.driver.cpu / row.driver.at,
        row.scheduler.cpu / row.scheduler.at,
        row.hosts.cpu / row.hosts.at,
        round(row.driver.rss),
        round(row.scheduler.rss),
        row.messages,
        row.bytes,
        round(row.decisions),
    )


def told(row: Row) -> None:
    """What does not fit into the table."""
    orders, used = max(1.0, row.orders * row.seconds), row.hosts.counts
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in row.shares().items() if share >= 0.005)
    given = {name: round(used.get(name, 0)) for name in ("search", "codegen", "measure", "learn")}
    each = {name: f"{1e3 * part.cpu / orders:.1f}" for name, part in _parts(row)}
    grown = {name: f"{1024 * part.counts['grown'] / orders:.1f}" for name, part in _parts(row)}
    print(f"{row.given.workers} workers: {dict(zip(HEADS, cells(row), strict=True))}")
    print(f"  driver's CPU: {shares}")
    print(f"  ms of CPU for an order: {each}; KiB of growth: {grown}")
    late, all_used = 1e3 * used["late"] / orders, used["used in all"]
    print(f"  orders: {given}; each answered {late:.0f} ms late; workers used {all_used:.0f}")
    print(f"  memory of the first driver, MiB: { ({name: round(value) for name, value in row.fixed.items()}) }")
    print(f"  ends: {row.ends}", flush=True)


def _parts(row: Row) -> tuple[tuple[str, Snapshot], ...]:
    return ("drivers", row.driver), ("dask", row.scheduler), ("hosts", row.hosts)


# on paper


PAPER_HEADS = (
    "workers",
    "core s/batch",
    "orders/batch",
    "kB/batch",
    "batches/s",
    "trials/s",
    "orders/s",
    "MB/s at dask",
)


def paper(given: Given, workers: int) -> tuple[float, ...]:
    """What it takes to keep workers busy, by arithmetic: batches without retests and lessons. Blobs alone, which pass
    dask's scheduler on their way in and on their way out."""
    size = given.batch
    seconds = size * (given.search + given.codegen + given.measure) + given.measure
    orders = 1 + -(-size // given.together) + 1
    passed = given.function * (1 + 2 * size) + given.object * (2 * size + 2)
    batches = workers / seconds
    rates = (batches, batches * size, batches * orders, 2e-6 * batches * passed)
    return workers, seconds, orders, passed / 1000, *rates


# our scheduler alone


def decisions(counts: Sequence[int], batches: int, seed: int) -> None:
    """Picks and what came of them, as bench.night times them, with so many operators."""
    rows: list[tuple[object, ...]] = []
    for count in counts:
        chosen = operators(count, max(10, count // 100), seed)
        engine, ledger = FakeEngine(seed=seed), MemoryLedger()
        terms = Terms(budget=batches * 5.0)
        gc.collect()
        bare, begun = psutil.Process().memory_info().rss, time.perf_counter()
        scheduler = Timed(chosen, ledger.standing, terms)
        built, grown = time.perf_counter() - begun, psutil.Process().memory_info().rss - bare
        Night(chosen, engine, ledger, terms, Told(), "scale", scheduler).run()
        took = scheduler.took
        rows.append((count, built, grown / count, len(took), sum(took) / len(took) * 1e6, len(took) / sum(took)))
    heads = ("operators", "built in, s", "bytes each", "decisions", "µs each", "decisions/s")
    table("our scheduler alone", heads, rows)


# requests to the remote


class CountedRemote:
    """A remote that counts what is asked of it."""

    def __init__(self, remote: Any) -> None:
        self._remote = remote
        self._lock = threading.Lock()
        self.asked: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._remote, name)
        if not callable(found):
            return found

        def asked(*arguments: Any) -> Any:
            with self._lock:
                self.asked[name] += 1
            return found(*arguments)

        return asked


def claims(counts: Sequence[int], others: Sequence[int], times: int = 10) -> list[tuple[object, ...]]:
    """What claims of operators cost with lanes on a remote that is a folder: requests, and seconds of the driver."""
    rows: list[tuple[object, ...]] = []
    for sets, writers in itertools.product(counts, others):
        with tempfile.TemporaryDirectory() as folder:
            rows.append((sets, writers, *_claimed(Path(folder), sets, writers, times)))
    return rows


CLAIM_HEADS = ("sets", "other writers", "reads", "writes", "blobs read", "blobs written", "begin, ms", "end, ms")


def _claimed(folder: Path, sets: int, writers: int, times: int) -> tuple[float, ...]:
    """Of one claim with a batch of 16 records: requests by kind, milliseconds until it is taken and until it ends."""
    ledger, remote = _ledger(folder / "own", folder / "remote")
    for i in range(writers):
        other, _ = _ledger(folder / f"other{i}", folder / "remote")
        with other.claim(operator_key(f"other{i}")):
            other.add(operator_key(f"other{i}"), {}, _records(1))
    for i in range(sets):
        ledger.add(operator_key(f"op{i}"), {}, _records(1))
    with ledger.claim(operator_key("first")):  # publishes all of them
        ledger.add(operator_key("first"), {}, _records(1))
    remote.asked.clear()
    begin = end = 0.0
    for i in range(times):
        key = operator_key(f"op{i % max(1, sets)}")
        a = time.perf_counter()
        with ledger.claim(key) as is_free:
            assert is_free
            b = time.perf_counter()
            ledger.add(key, {}, _records(16))
            c = time.perf_counter()
        begin, end = begin + b - a, end + time.perf_counter() - c
    asked = {name: count / times for name, count in remote.asked.items()}
    reads, writes = asked.pop("action", 0.0), asked.pop("put_action", 0.0)
    blobs, put = asked.pop("blob", 0.0), asked.pop("put_blob", 0.0)
    print(f"  {sets} sets, {writers} others: beside these {asked}", flush=True)
    return reads, writes, blobs, put, 1e3 * begin / times, 1e3 * end / times


def operator_key(name: str) -> str:
    return Digest.of(name.encode()).hash


def _ledger(folder: Path, shared: Path) -> tuple[Any, CountedRemote]:
    from pipeline.remotes.cache import opened
    from pipeline.remotes.lanes import Lanes
    from pipeline.remotes.settings import Settings
    from pipeline.tuning.ledger import Ledger

    shared.mkdir(exist_ok=True)
    store = Store(folder, durable=False)
    cache = opened(store, Settings(url=f"file://{shared}"))
    cache.remote = CountedRemote(cache.remote)
    return Ledger(store, 0.02, shared=Lanes(cache, store)), cache.remote


def _records(count: int) -> list[TrialRecord]:
    """As large as real ones."""
    draw = {"trace": random.randbytes(200).hex()}
    named = (random.randbytes(32).hex() for _ in range(count))
    made = functools.partial(TrialRecord, space="fake", space_version=1, decisions=draw, outcome=Outcome.TIMED)
    return [made(candidate=name, seconds=1e-3, baseline=2e-3) for name in named]


# the command


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = Given()
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 100, 300, 1000])
    for name in ("operators", "batch", "together", "hosts", "drivers", "schedulers", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(usual, name))
    parser.add_argument("--at-once", type=int, default=0, help="batches in preparation; 0: as the executor says")
    for name in ("seconds", "warm", "speed", "search", "codegen", "measure", "learn"):
        parser.add_argument(f"--{name}", type=float, default=getattr(usual, name))
    parser.add_argument("--log", type=int, default=0, help="messages of each connection that dask keeps; 0: 10")
    parser.add_argument("--direct", action="store_true", help="answers go to the driver without dask's scheduler")
    parser.add_argument("--paper", action="store_true", help="only this: what workers take, by arithmetic")
    parser.add_argument("--decisions", action="store_true", help="only this: our scheduler alone")
    parser.add_argument("--claims", type=int, nargs="+", help="only this: claims in stores of so many sets")
    parser.add_argument("--others", type=int, nargs="+", default=[0, 1], help="… shared with so many other stores")
    return parser.parse_args()


def main() -> None:
    asked = vars(_parsed())
    sizes, sets, others = (asked.pop(name) for name in ("workers", "claims", "others"))
    on_paper, alone = asked.pop("paper"), asked.pop("decisions")
    given = Given(**asked)
    if sets:
        table("one claim with lanes on a folder", CLAIM_HEADS, claims(sets, others))
    elif on_paper:
        table("on paper", PAPER_HEADS, [paper(given, count) for count in sizes])
    elif alone:
        decisions((given.operators,), 1000, given.seed)
    else:
        rows = []
        for count in sizes:
            row = simulate(replace(given, workers=count), lambda sentence: print(sentence, file=sys.stderr, flush=True))
            told(row)
            rows.append(cells(row))
        table(f"{given.operators} operators, batches of {given.batch}, {given.seconds:g} s each", HEADS, rows)


if __name__ == "__main__":
    main()
