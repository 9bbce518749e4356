"""dask's processes: a scheduler as `doit cluster scheduler` starts one, and hosts whose workers do fake work."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from bench.scale.counts import Wire
from bench.scale.given import DEVICE, Given
from bench.scale.pipes import obey_in_loop
from bench.scale.work import FakeWork

_AT_ONCE = 25  # workers of a process that register at the same time


def loaded(given: Given) -> Any:
    """dask.distributed as tvmake sets it up, but for the messages that it keeps where a number is given."""
    from pipeline.executors.extra import load

    distributed = load()
    if given.log:
        import dask

        dask.config.set({"distributed.admin.low-level-log-length": given.log})
    return distributed


def scheduler_process(pipe: Connection, given: Given) -> None:
    """Says its address when it is ready, and counts what it reads and writes."""
    from pipeline.executors.extra import NO_DASHBOARD

    distributed = loaded(given)
    logging.disable()  # a driver that stops leaves what it waited for
    wire = Wire()
    wire.tap()

    async def serve() -> None:
        scheduler = await distributed.Scheduler(host="127.0.0.1", port=0, **NO_DASHBOARD)
        pipe.send(scheduler.address)
        await obey_in_loop(pipe, lambda: wire)
        await scheduler.close()

    asyncio.run(serve())


def host_process(pipe: Connection, given: Given, address: str, numbers: range) -> None:
    """Workers without nannies in one event loop. Says their numbers when all of them have begun."""
    from pipeline.executors import working

    distributed = loaded(given)
    _leave_workers_alone()
    work = FakeWork(given.speed)
    working.perform = work.perform  # type: ignore[assignment]
    said = _announced()

    async def serve() -> None:
        with tempfile.TemporaryDirectory() as folder:
            workers = [_worker(distributed, address, f"host-{i}", folder, said) for i in numbers]
            for first in range(0, len(workers), _AT_ONCE):
                await asyncio.gather(*workers[first : first + _AT_ONCE])
            pipe.send(numbers)
            await obey_in_loop(pipe, work.counts)
            await asyncio.gather(*(worker.close(timeout=1) for worker in workers), return_exceptions=True)

    asyncio.run(serve())


def _leave_workers_alone() -> None:
    """On a real host these look after one worker each; here they would take all processors for a thousand."""
    import dask

    dask.config.set(
        {
            "distributed.admin.tick.interval": "1h",
            "distributed.admin.system-monitor.interval": "1h",
            "distributed.worker.profile.enabled": False,
        }
    )


def _announced() -> dict[str, Any]:
    """What a worker of `doit cluster worker` says of its machine."""
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
