"""The simulated cluster of bench.scale, small: a real scheduler of dask's, four workers, real orders, fake work."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("distributed")

from bench.scale import claims, paper
from bench.scale.counts import Meter, Snapshot, summed
from bench.scale.given import Given
from bench.scale.row import HEADS, Row, cells
from bench.scale.simulation import simulate

SMALL = Given(workers=4, operators=50, seconds=3.0, warm=1.0, speed=20.0, hosts=1)


@pytest.fixture(scope="module")
def row() -> Row:
    return simulate(SMALL)


def test_each_measurement_is_recorded_once(row: Row) -> None:
    (end,) = row.ends
    assert end["measured"] > 50
    assert end["agree"]
    assert end["records"] >= end["measured"]  # some candidates could not be built
    assert end["ended"] == "stopped"


def test_all_workers_work_and_measure_where_they_are_told(row: Row) -> None:
    assert row.hosts.counts["used in all"] == SMALL.workers
    assert row.hosts.counts["misplaced"] == 0
    assert 0.0 < row.busy <= 1.05
    for stage in ("search", "compile", "measure"):
        assert row.hosts.counts[stage] > 0


def test_the_table_has_its_figures(row: Row) -> None:
    figures = dict(zip(HEADS, cells(row), strict=True))
    assert figures["workers"] == SMALL.workers
    assert all(isinstance(figure, int | float) and figure > 0 for figure in figures.values())
    # What cannot be less: a batch is built before it is measured, and a function and an object pass twice for each.
    assert figures["orders/s"] > 2.5 * figures["trials/s"] / SMALL.batch
    assert figures["kB/trial"] > (2 * SMALL.function + 2 * SMALL.object) / 1000
    assert sum(row.shares().values()) == pytest.approx(1.0, abs=0.2)


def test_on_paper_a_batch_is_its_orders_and_its_blobs() -> None:
    given = Given(batch=4, search=1.0, codegen=2.0, measure=0.5, function=10, object=100)
    figures = dict(zip(paper.HEADS, paper.paper(given, 29), strict=True))
    assert figures["core s/batch"] == 4 * (1.0 + 2.0 + 0.5) + 0.5
    assert figures["orders/batch"] == 3
    assert figures["kB/batch"] == pytest.approx((9 * 10 + 10 * 100) / 1000)
    assert figures["batches/s"] == pytest.approx(2.0)
    alone = dict(zip(paper.HEADS, paper.paper(replace(given, together=1), 29), strict=True))
    assert alone["orders/batch"] == 1 + 4 + 1


def test_a_claim_asks_the_remote_for_its_lease_and_its_lanes() -> None:
    (alone, shared) = claims.claims([5], [0, 1], times=2)
    figures = dict(zip(claims.HEADS, alone, strict=True))
    assert figures["writes"] >= 2  # the lease is written, and given back
    assert figures["begin, ms"] > 0
    assert shared[2] >= alone[2]  # other lanes are read as well


def test_a_window_is_what_came_between_its_marks_of_all_processes() -> None:
    one = Snapshot(20.0, 5.0, 110.0, {"orders": 7.0}).since(Snapshot(10.0, 3.0, 100.0, {"orders": 4.0}))
    assert (one.at, one.cpu, one.rss) == (10.0, 2.0, 110.0)
    assert one.counts == {"orders": 3.0, "grown": 10.0}
    both = summed([one, Snapshot(12.0, 1.0, 50.0, {"orders": 1.0, "late": 0.5})])
    assert (both.at, both.cpu, both.rss) == (11.0, 3.0, 160.0)
    assert both.counts == {"orders": 4.0, "grown": 10.0, "late": 0.5}


def test_a_call_within_a_call_is_metered_once() -> None:
    meter = Meter()
    inner = meter.metered("inner", lambda: _works(0.05))
    begun = time.thread_time()
    with meter.of("outer"):
        inner()
    took = time.thread_time() - begun
    assert meter.seconds["inner"] >= 0.05
    assert meter.seconds["outer"] == pytest.approx(took - meter.seconds["inner"], abs=0.01)


def _works(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_a_night_that_ends_before_its_window_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="over before its time"):
        simulate(replace(SMALL, operators=0))


@pytest.mark.parametrize(("said", "code"), [("--paper", 0), ("--no-such-option", 2)])
def test_the_command_says_by_its_exit_code_whether_it_was_understood(said: str, code: int) -> None:
    root = Path(__file__).resolve().parents[2]
    ran = subprocess.run(
        [sys.executable, "-m", "bench.scale", said, "--workers", "100"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == code
    assert ("│ 100 " in ran.stdout) == (code == 0)
