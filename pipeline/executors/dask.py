"""dask://host:port, tcp://…, tls://…: a cluster of dask's that runs already, on whatever machines."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, ExecutorError
from pipeline.executors.carrying import require_remote
from pipeline.executors.driving import Cluster, DaskExecutor
from pipeline.executors.extra import load

if TYPE_CHECKING:
    from pipeline.executors import Job
    from pipeline.executors.contract import Executor

_CONNECT = 3.0  # seconds


def open_executor(text: str, job: Job) -> Executor:
    """Raises ConfigError for an address that is none, ExecutorError where no scheduler answers there."""
    load()
    address = address_of(text)
    require_remote(job.remote, text)
    client = connected(address)
    return DaskExecutor(job, Cluster(address, client, lambda: closed(client)))


def require_meant(text: str) -> None:
    load()
    address_of(text)


def address_of(text: str) -> str:
    """dask://host:8786  →  tcp://host:8786"""
    scheme, _, rest = text.partition("://")
    if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:/@]+):\d{1,5}/?", rest):
        raise ConfigError(f"{text!r} is no address of a scheduler", hint="write: dask://HOST:8786")
    return f"{'tls' if scheme == 'tls' else 'tcp'}://{rest.rstrip('/')}"


def connected(address: str) -> Any:
    """A client of the scheduler at an address. Raises ExecutorError where none answers."""
    distributed = load()
    try:
        return distributed.Client(address, timeout=_CONNECT, set_as_default=False, name="tvmake")
    except Exception as error:
        raise ExecutorError(
            f"no scheduler answers at {address}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="start one there: doit cluster scheduler; or correct the address",
        ) from error


def closed(client: Any) -> None:
    with contextlib.suppress(Exception):
        client.close(timeout=2)
