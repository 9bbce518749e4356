"""dask-local:4: a cluster of so many workers on this machine, which lives as long as the build.

Its workers have the build's own store as a folder, so nothing has to be carried.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, ExecutorError
from pipeline.executors.dask import closed
from pipeline.executors.driving import Cluster, DaskExecutor
from pipeline.executors.extra import NO_DASHBOARD, PRELOAD, load
from pipeline.store import default_root

if TYPE_CHECKING:
    from pipeline.executors import Job
    from pipeline.executors.contract import Executor

_START, _CLOSE = 60.0, 2.0  # seconds
_MOST = 512


def open_executor(text: str, job: Job) -> Executor:
    count = count_of(text)
    cluster = _started(count, job)
    client = load().Client(cluster, set_as_default=False, name="tvmake")

    def close() -> None:
        closed(client)
        with contextlib.suppress(Exception):
            cluster.close(timeout=_CLOSE)

    try:
        client.wait_for_workers(count, timeout=_START)
    except Exception as error:
        close()
        raise ExecutorError(f"{text} did not start: {error}", hint="see: doit doctor") from error
    return DaskExecutor(job, Cluster(text, client, close, is_here=True))


def require_meant(text: str) -> None:
    count_of(text)
    load()


def count_of(text: str) -> int:
    """dask-local:4  →  4"""
    said = text.partition(":")[2]
    if not said.isdigit() or not 1 <= int(said) <= _MOST:
        raise ConfigError(f"{text!r} does not say how many workers", hint="write: dask-local:4")
    return int(said)


def _started(count: int, job: Job) -> Any:
    distributed = load()
    try:
        return distributed.LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            scheduler_kwargs=NO_DASHBOARD,
            memory_limit=0,
            silence_logs=logging.CRITICAL,
            preload=[PRELOAD],
            env={"TVMAKE_CACHE": str(job.store.root if job.durable else default_root())},
            local_directory=os.path.join(job.temporary or tempfile.gettempdir(), "tvmake-dask"),
        )
    except Exception as error:
        raise ExecutorError(f"dask's workers cannot be started: {error}", hint="see: doit doctor") from error
