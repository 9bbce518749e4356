"""slurm:queue=long,jobs=20,… and others: a cluster whose workers are jobs of a queue, through dask-jobqueue.

    slurm:jobs=20,cores=8,memory=16GB,queue=long,walltime=08:00:00
    pbs: sge: lsf: oar: moab: htcondor:     the same options

The queue's own settings (~/.config/dask/jobqueue.yaml) hold for what is not said here. Blobs go through the remote, as
between any machines. The jobs end with the build.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, ExecutorError, SetupError
from pipeline.executors.carrying import require_remote
from pipeline.executors.dask import closed
from pipeline.executors.driving import Cluster, DaskExecutor
from pipeline.executors.extra import NO_DASHBOARD, PRELOAD, load

if TYPE_CHECKING:
    from pipeline.executors import Job
    from pipeline.executors.contract import Executor

# By scheme: dask-jobqueue's class, and the command by which it hands in a job.
_QUEUES = {
    "slurm": ("SLURMCluster", "sbatch"),
    "pbs": ("PBSCluster", "qsub"),
    "sge": ("SGECluster", "qsub"),
    "lsf": ("LSFCluster", "bsub"),
    "oar": ("OARCluster", "oarsub"),
    "moab": ("MoabCluster", "msub"),
    "htcondor": ("HTCondorCluster", "condor_submit"),
}
_OPTIONS = ("jobs", "cores", "memory", "queue", "walltime", "account", "project", "interface")
_USUAL: dict[str, Any] = {"jobs": "1", "cores": "4", "memory": "8GB"}
_CLOSE = 10.0  # seconds


def open_executor(text: str, job: Job) -> Executor:
    """Raises ConfigError for an option that there is not, SetupError where the queue's commands are not here."""
    options = options_of(text)
    scheme = text.partition(":")[0]
    load()
    made = _class_of(scheme)
    require_remote(job.remote, text)
    cluster = _started(made, scheme, options)
    client = load().Client(cluster, set_as_default=False, name="tvmake")

    def close() -> None:
        closed(client)
        with contextlib.suppress(Exception):
            cluster.close(timeout=_CLOSE)

    job.say(f"waiting for a job of {scheme} to start: {options['jobs']} asked for")
    threads = int(options["jobs"]) * int(options["cores"])
    return DaskExecutor(job, Cluster(scheme, client, close, patience=math.inf, threads=threads))


def require_meant(text: str) -> None:
    options_of(text)
    _class_of(text.partition(":")[0])


def options_of(text: str) -> dict[str, str]:
    """slurm:jobs=20,queue=long  →  {"jobs": "20", "queue": "long", …}"""
    options = dict(_USUAL)
    for word in filter(None, text.partition(":")[2].split(",")):
        name, equals, value = word.partition("=")
        if name not in _OPTIONS or not equals or not value:
            raise ConfigError(f"{text!r}: {word!r} is no option", hint=f"options: {', '.join(_OPTIONS)}; as NAME=VALUE")
        options[name] = value
    for name in ("jobs", "cores"):
        if not options[name].isdigit() or int(options[name]) < 1:
            raise ConfigError(f"{text!r}: {name} is {options[name]!r}", hint="give a number of 1 or more")
    return options


def _class_of(scheme: str) -> Any:
    name, command = _QUEUES[scheme]
    try:
        import dask_jobqueue
    except ImportError as error:
        raise SetupError(
            f"jobs of a queue go through dask-jobqueue, which is not installed here ({error})",
            hint="pip install 'tvmake[cluster]'",
        ) from error
    if shutil.which(command) is None:
        raise SetupError(
            f"this machine hands in no jobs to {scheme}: there is no command {command!r}",
            hint=f"type it on a machine where {command} is on the PATH, or name another executor",
        )
    return getattr(dask_jobqueue, name)


def _started(made: Any, scheme: str, options: dict[str, str]) -> Any:
    given = {name: value for name, value in options.items() if name not in ("jobs", "cores")}
    try:
        cluster = made(
            cores=int(options["cores"]),
            processes=1,
            python=sys.executable,
            worker_extra_args=["--preload", PRELOAD, "--preload-nanny", PRELOAD, "--no-dashboard"],
            scheduler_options=NO_DASHBOARD,
            **given,
        )
        cluster.scale(jobs=int(options["jobs"]))
    except Exception as error:
        raise ExecutorError(
            f"no jobs can be handed in to {scheme}: {error}", hint="see the queue's settings"
        ) from error
    return cluster
