"""One row: what the processes counted between two marks, as figures, as the table's line and in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.scale.counts import Snapshot, summed
from bench.scale.given import Given

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


@dataclass(frozen=True)
class Marked:
    """All processes at one moment, by kind."""

    drivers: Sequence[Snapshot]
    schedulers: Sequence[Snapshot]
    hosts: Sequence[Snapshot]


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
    fixed: dict[str, float]  # memory of the first driver at some points of its beginning
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
        named = {name.removeprefix("cpu "): value for name, value in counts.items() if name.startswith("cpu ")}
        main = named.pop("main", 0.0)
        of_main = sum(named.get(name, 0.0) for name in ("decisions", "asking for posts", "ledger"))
        named["night's loop"] = max(0.0, main - of_main)
        named["other threads"] = max(0.0, self.driver.cpu - sum(named.values()))
        return {name: value / max(self.driver.cpu, 1e-9) for name, value in sorted(named.items(), key=lambda e: -e[1])}


def row(given: Given, before: Marked, after: Marked, fixed: dict[str, float], ends: list[dict[str, Any]]) -> Row:
    """Two marks → what came between them."""
    driver = _between(before.drivers, after.drivers)
    scheduler = _between(before.schedulers, after.schedulers)
    hosts = _between(before.hosts, after.hosts)
    hosts.counts["used in all"] = sum(each.counts["used"] for each in after.hosts)
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


def _between(before: Sequence[Snapshot], after: Sequence[Snapshot]) -> Snapshot:
    return summed([later.since(earlier) for earlier, later in zip(before, after, strict=True)])


def cells(row: Row) -> tuple[object, ...]:
    """The table's line, under HEADS."""
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


def words(row: Row) -> Iterator[str]:
    """What does not fit into the table, by the line."""
    orders, used = max(1.0, row.orders * row.seconds), row.hosts.counts
    parts = (("drivers", row.driver), ("dask", row.scheduler), ("hosts", row.hosts))
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in row.shares().items() if share >= 0.005)
    stages = {name: round(used.get(name, 0)) for name in ("search", "compile", "codegen", "measure", "learn")}
    each = {name: f"{1e3 * part.cpu / orders:.1f}" for name, part in parts}
    grown = {name: f"{1024 * part.counts['grown'] / orders:.1f}" for name, part in parts}
    late, all_used = 1e3 * used["late"] / orders, used["used in all"]
    yield f"{row.given.workers} workers: {dict(zip(HEADS, cells(row), strict=True))}"
    yield f"  driver's CPU: {shares}"
    yield f"  ms of CPU for an order: {each}; KiB of growth: {grown}"
    yield f"  orders: {stages}; each answered {late:.0f} ms late; workers used {all_used:.0f}"
    yield f"  memory of the first driver, MiB: { ({name: round(value) for name, value in row.fixed.items()}) }"
    yield f"  ends: {row.ends}"
