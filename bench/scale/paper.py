"""On paper: what it takes to keep so many workers busy, by arithmetic from what is given."""

from __future__ import annotations

from bench.scale.given import Given

HEADS = (
    "workers",
    "core s/batch",
    "orders/batch",
    "kB/batch",
    "batches/s",
    "trials/s",
    "orders/s",
    "MB/s at dask",
)


def paper(given: Given, workers: int) -> tuple[float, ...]:
    """A line: as many operators under way as there are workers; batches without retests and lessons, and blobs alone,
    which pass dask's scheduler on their way in and on their way out."""
    size = given.batch
    seconds = size * (given.search + given.codegen + given.measure) + given.measure
    orders = 1 + -(-size // (given.together or size)) + 1
    passed = given.function * (1 + 2 * size) + given.object * (2 * size + 2)
    batches = workers / seconds
    rates = (batches, batches * size, batches * orders, 2e-6 * batches * passed)
    return workers, seconds, orders, passed / 1000, *rates
