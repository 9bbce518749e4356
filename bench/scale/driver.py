"""A driver's process: a night with its share of the operators, and meters on what its processor time goes to.

All but the engine is what `doit tune --executor dask://…` has. What a part costs is metered from the outside, by calls
of it; `_metered_executor` and `MeteredScheduler` name the parts.
"""

from __future__ import annotations

import contextlib
import gc
import pickle
import tempfile
import threading
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.night import operators
from bench.scale.cluster import loaded
from bench.scale.counts import Meter, resident
from bench.scale.engine import OrderingEngine
from bench.scale.given import Given
from bench.scale.pipes import GO, heard, obey
from pipeline.memoizer import Memoizer
from pipeline.store import Store
from pipeline.tuning.events import Event
from pipeline.tuning.fakes import MemoryLedger
from pipeline.tuning.night import Night
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.scheduler import Scheduler
from pipeline.tuning.states import Terms


def driver_process(pipe: Connection, given: Given, address: str, number: int) -> None:
    """Says what memory it took to begin, waits for GO, works until it is told to stop, and says what came of it."""
    loaded(given)
    meter = Meter()
    chosen = operators(given.operators, max(10, given.operators // 100), given.seed)[number :: given.drivers]
    with tempfile.TemporaryDirectory() as folder:
        gc.collect()
        memory = {"bare": resident()}
        executor = _metered_executor(meter, address, Path(folder), given.at_once or 2)
        memoizer = Memoizer(executor._job.store, executor, executor._job.toolchain)
        meter.wrap(memoizer, "memoizer", "run")
        engine, ledger = OrderingEngine(given, memoizer, meter), MemoryLedger()
        meter.wrap(ledger, "ledger", "standing", "add")
        memory["connected"] = resident()
        terms = Terms(batch=given.batch, first=given.batch, posts=max(1, engine.posts))
        scheduler = MeteredScheduler(meter, chosen, ledger.standing, terms)
        memory["scheduled"] = resident()
        night = Night(chosen, engine, ledger, terms, Unwatched(), "scale", scheduler)
        counts = _Counts(meter, executor, engine)
        pipe.send(memory)
        if heard(pipe) != GO:
            return
        threading.Thread(target=_obey_and_stop, args=(pipe, counts, night), daemon=True).start()
        ended = night.run()
        pipe.send({**_recorded(engine, ledger), "ended": str(ended.end), "said": ended.said})


def _obey_and_stop(pipe: Connection, counts: _Counts, night: Night) -> None:
    obey(pipe, counts)
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


def _metered_executor(meter: Meter, address: str, folder: Path, jobs: int) -> Any:
    """The DaskExecutor of `doit tune`, with names for what a driver's processor time goes to."""
    from pipeline.executors import driving
    from pipeline.executors.dask import open_executor
    from pipeline.executors.orders import Order

    executor: Any = open_executor(address.replace("tcp", "dask"), _job(folder, jobs))
    meter.wrap(executor._cluster.client, "dask: submit", "submit")
    meter.wrap(Order, "pickling", "packed")
    named: Any = driving
    named.pickle = SimpleNamespace(loads=meter.metered("pickling", pickle.loads), PicklingError=pickle.PicklingError)
    meter.wrap(executor, "dask: release", "_release")
    meter.wrap(executor, "dask: await", "_awaited")
    meter.wrap(executor, "executor", "perform")
    meter.wrap(executor._job.store, "store", "put", "get", "commit", "lookup", "has")
    meter.wrap(executor._crew, "crew", "look")
    return executor


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


class MeteredScheduler(Scheduler):
    """Our scheduler: what it takes to decide is metered."""

    def __init__(self, meter: Meter, *arguments: Any) -> None:
        super().__init__(*arguments)
        for name in ("pick", "may_go_on", "prepared", "finish", "update", "put_back"):
            setattr(self, name, meter.metered("decisions", getattr(self, name)))


class Unwatched:
    """A watcher that keeps nothing: whoever shows events is not simulated."""

    def told(self, event: Event) -> None:
        pass


class _Counts:
    """What a driver has done so far: trials, and seconds of its processor by name. Made on the night's own thread."""

    def __init__(self, meter: Meter, executor: Any, engine: OrderingEngine) -> None:
        async def ident() -> int:
            return threading.get_ident()

        self._meter = meter
        self._engine = engine
        self._loop = time.pthread_getcpuclockid(executor._cluster.client.sync(ident))
        self._main = time.pthread_getcpuclockid(threading.get_ident())

    def __call__(self) -> dict[str, float]:
        counts: dict[str, float] = {f"cpu {name}": seconds for name, seconds in self._meter.seconds.copy().items()}
        with contextlib.suppress(OSError):  # the night is over, and its threads are gone
            counts |= {"cpu dask: loop": time.clock_gettime(self._loop), "cpu main": time.clock_gettime(self._main)}
        counts["trials"] = float(sum(self._engine.made.copy().values()))
        return counts
