"""The simulated cluster of bench.scale, small: a real scheduler of dask's, four workers, real orders, fake work."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("distributed")

from bench.scale import claims, paper
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
    for stage in ("search", "codegen", "measure"):
        assert row.hosts.counts[stage] > 0


def test_the_table_has_its_figures(row: Row) -> None:
    figures = dict(zip(HEADS, cells(row), strict=True))
    assert figures["workers"] == SMALL.workers
    assert all(isinstance(figure, int | float) and figure > 0 for figure in figures.values())
    # What cannot be less: a batch is built before it is measured, and a function and an object pass twice for each.
    assert figures["orders/s"] > figures["trials/s"] / 2
    assert figures["kB/trial"] > (2 * SMALL.function + 2 * SMALL.object) / 1000
    assert sum(row.shares().values()) == pytest.approx(1.0, abs=0.2)


def test_on_paper_a_batch_is_its_orders_and_its_blobs() -> None:
    given = Given(batch=4, search=1.0, codegen=2.0, measure=0.5, function=10, object=100)
    figures = dict(zip(paper.HEADS, paper.paper(given, 29), strict=True))
    assert figures["core s/batch"] == 4 * (1.0 + 2.0 + 0.5) + 0.5
    assert figures["orders/batch"] == 1 + 4 + 1
    assert figures["kB/batch"] == pytest.approx((9 * 10 + 10 * 100) / 1000)
    assert figures["batches/s"] == pytest.approx(2.0)
    together = dict(zip(paper.HEADS, paper.paper(replace(given, together=4), 29), strict=True))
    assert together["orders/batch"] == 3


def test_a_claim_asks_the_remote_for_its_lease_and_its_lanes() -> None:
    (alone, shared) = claims.claims([5], [0, 1], times=2)
    figures = dict(zip(claims.HEADS, alone, strict=True))
    assert figures["writes"] >= 2  # the lease is written, and given back
    assert figures["begin, ms"] > 0
    assert shared[2] >= alone[2]  # other lanes are read as well
