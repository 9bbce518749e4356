"""The one place where dask is imported, and where its settings are put right for this use.

    no variables for workers   dask sets OMP_NUM_THREADS=1 in the processes that it starts: that would be another device
    a worker that is frozen    is given up after twenty to forty seconds, not five to ten minutes
    a worker that is lost      its work goes to another three times; then it is called the work's fault
    a connection               remembers ten messages, not a thousand: orders and answers are in them
    a look at itself           is had once a second or more seldom: by itself each process wakes up a hundred times a
                               second and more, for pages that nobody opens here
    words                      dask's own log is left to errors of its own: what happens is told by who asked

Driver, workers and schedulers that tvmake starts all come by here.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from pipeline.errors import SetupError

ALLOWED_FAILURES = 3
PRELOAD = "pipeline.executors.working"
NO_DASHBOARD = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}  # of a scheduler; it listens all the same
_SETTINGS = {
    "distributed.nanny.pre-spawn-environ": {},
    "distributed.scheduler.worker-ttl": "20s",
    "distributed.scheduler.allowed-failures": ALLOWED_FAILURES,
    "distributed.admin.low-level-log-length": 1,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.admin.system-monitor.disk": False,
    "distributed.worker.profile.enabled": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
}


@functools.cache
def load() -> Any:
    """dask.distributed, set up. Raises SetupError where it is not installed."""
    try:
        import dask
        import distributed
    except ImportError as error:
        raise SetupError(
            f"work on other machines goes through dask.distributed, which is not installed here ({error})",
            hint="pip install 'tvmake[cluster]'",
        ) from error
    dask.config.set(_SETTINGS)
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    return distributed
