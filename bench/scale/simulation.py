"""One simulation: its processes are started, marked when the window begins and when it ends, and stopped."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from typing import Any

from bench.scale.cluster import host_process, scheduler_process
from bench.scale.counts import Snapshot
from bench.scale.driver import driver_process
from bench.scale.given import Given
from bench.scale.pipes import GO, MARK, STOP, Process
from bench.scale.row import Marked, Row, row

_LAST = 20.0  # seconds for the batches that are being measured when a simulation ends


def simulate(given: Given, say: Callable[[str], None] = lambda sentence: None) -> Row:
    """One row. Raises RuntimeError where a process dies, or a night ends before its time."""
    with contextlib.ExitStack() as stack:
        cluster = _Cluster(given, stack, say)
        for driver in cluster.drivers:
            driver.tell(GO)
        say("… work")
        time.sleep(given.warm)
        before = cluster.marked()
        time.sleep(given.seconds)
        after = cluster.marked()
        say("… end")
        for driver in cluster.drivers:
            driver.tell(STOP)
        ends = [_ended(driver) for driver in cluster.drivers]
        say(f"… have ended: {ends}")
        return row(given, before, after, cluster.fixed, ends)


class _Cluster:
    """All processes of a simulation, begun and waiting for their work. They end with the stack."""

    def __init__(self, given: Given, stack: contextlib.ExitStack, say: Callable[[str], None]) -> None:
        def start(target: Callable[..., None], *arguments: Any) -> Process:
            process = Process(target, given, *arguments)
            stack.callback(process.end)
            return process

        self.schedulers = [start(scheduler_process) for _ in range(given.schedulers)]
        addresses = [each.told() for each in self.schedulers]
        say(f"{given.workers} workers begin")
        shares = _shared_out(given.workers, max(given.hosts, given.schedulers))
        self.hosts = [start(host_process, addresses[i % len(addresses)], share) for i, share in enumerate(shares)]
        begun = time.monotonic()
        for host in self.hosts:
            host.told()
        say(f"… have begun after {time.monotonic() - begun:.0f} s; drivers begin")
        self.drivers = [start(driver_process, addresses[i % len(addresses)], i) for i in range(given.drivers)]
        memory = [driver.told() for driver in self.drivers]
        self.fixed: dict[str, float] = memory[0]

    def marked(self) -> Marked:
        """What all processes were at one moment, as near as they answer."""
        kinds = (self.drivers, self.schedulers, self.hosts)
        for process in itertools.chain(*kinds):
            process.tell(MARK)
        return Marked(*([_snapshot(process) for process in processes] for processes in kinds))


def _snapshot(process: Process) -> Snapshot:
    said = process.told()
    if not isinstance(said, Snapshot):
        raise RuntimeError(f"the night of a driver was over before its time: {said}")
    return said


def _ended(driver: Process) -> dict[str, Any]:
    """What a driver says in the end; nothing where its last batches take too long."""
    try:
        said: dict[str, Any] = driver.told(_LAST)
    except RuntimeError:
        return {}
    return said


def _shared_out(count: int, among: int) -> list[range]:
    edges = [count * i // among for i in range(among + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges) if b > a]
