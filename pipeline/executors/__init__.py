"""Executors: what runs stages that do not run in a thread of the build.

    contract   what an executor is
    "" local   processes of this machine: pipeline.workers
    dask       dask:// tcp:// tls://       a cluster of dask's that runs already
    local      dask-local:4                a cluster of so many workers on this machine, for as long as the build lasts
    jobqueue   slurm:… pbs:… sge:… …       a cluster whose workers are jobs of a queue

What the last three share: `driving` (the driver's side), `crew` (who is there), `carrying` (blobs by way of a remote),
`placing` (who may run what), `orders` (what travels), `working` (the worker's side), `serving` (to start workers and
schedulers by hand). Only these import dask, when they are asked for.

To add one: a file with functions `open_executor(text, job) -> Executor` and `require_meant(text)`, which raises what is
wrong with a name, and a line in `_OPENERS`; tests/executors runs the contract's suite over it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.executors.contract import Executor, Say, warn

if TYPE_CHECKING:
    from pipeline.remotes.cache import RemoteCache
    from pipeline.store import Store
    from pipeline.toolchain import Toolchain

__all__ = ["VARIABLE", "Executor", "Job", "open_executor"]

VARIABLE = "TVMAKE_EXECUTOR"
# By the word before the colon: the module that serves it, imported only when it is used.
_OPENERS: Mapping[str, str] = {
    "dask": "dask",
    "tcp": "dask",
    "tls": "dask",
    "dask-local": "local",
    **dict.fromkeys(("slurm", "pbs", "sge", "lsf", "oar", "moab", "htcondor"), "jobqueue"),
}


@dataclass(frozen=True)
class Job:
    """What an executor works for: a store, the remote behind it, and this machine's own processes beside it.

    jobs       how many processes of this machine
    url        of the remote, as it is told to workers
    temporary  where stages make their temporary files; None: where this process does
    durable    whether the store outlives a power failure; one that does not is for one run of this driver alone
    """

    store: Store
    toolchain: Toolchain
    jobs: int
    remote: RemoteCache | None = None
    url: str = ""
    temporary: Path | None = None
    durable: bool = True
    say: Say = field(default=warn)


def open_executor(text: str, job: Job) -> Executor:
    """The executor that a person named: "", "local", "dask://host:8786", "dask-local:4", "slurm:queue=long,jobs=20".

    Raises ConfigError for a name that cannot be meant, SetupError where a package or a command is missing,
    ExecutorError where nobody answers or no worker can do the work: within seconds.
    """
    if not text or text == "local":
        from pipeline.workers import Workers

        return Workers(job.store.root, job.jobs, job.temporary, durable=job.durable, say=job.say)
    executor: Executor = _module_of(text).open_executor(text, job)
    return executor


def require_meant(text: str) -> None:
    """Raises ConfigError or SetupError where an executor of this name could not be opened, as far as that can be told
    without asking anybody."""
    if text not in ("", "local"):
        _module_of(text).require_meant(text)


def _module_of(text: str) -> Any:
    scheme, colon, _ = text.partition(":")
    if scheme not in _OPENERS or not colon:
        known = "local, dask://HOST:PORT, dask-local:WORKERS, slurm:OPTIONS (or pbs, sge, lsf, oar, moab, htcondor)"
        raise ConfigError(f"there is no executor {text!r}", hint=f"what is known: {known}")
    return importlib.import_module(f"pipeline.executors.{_OPENERS[scheme]}")
