"""The fake work: what a worker does with an order in place of its stage.

What is wanted travels in the order, as the option `simulated` that engine.py puts there: the seconds that the stage
would take on one core, and the size of each blob of the answer. All else about the order and the answer is real.
"""

from __future__ import annotations

import asyncio
import pickle
import random
import time
from collections import Counter
from typing import Any

from pipeline.hashing import Digest
from pipeline.store import ActionEntry


class FakeWork:
    """What stands for `pipeline.executors.working.perform` in a process of workers, and what all of them did."""

    def __init__(self, speed: float) -> None:
        self._speed = speed
        self._orders: Counter[str] = Counter()  # by stage
        self._used: set[str] = set()
        self._busy = 0.0  # seconds of workers
        self._late = 0.0  # … that answers took longer than they should, as this process was busy
        self._misplaced = 0

    def counts(self) -> dict[str, float]:
        sums = {"busy": self._busy, "late": self._late, "used": len(self._used), "misplaced": self._misplaced}
        return {**sums, **self._orders, "orders": self._orders.total()}

    async def perform(self, packed: bytes) -> bytes:
        from distributed import get_worker

        from pipeline.executors.orders import Answer, Order

        order: Order = pickle.loads(packed)
        action, worker = order.action, get_worker()
        wanted: Any = action.options["simulated"]
        begun, seconds = time.monotonic(), wanted["seconds"] / self._speed
        await asyncio.sleep(seconds)
        self._late += time.monotonic() - begun - seconds
        self._busy += seconds
        self._orders[action.stage.name] += 1
        self._used.add(worker.name)
        self._misplaced += bool(action.post) and action.post != worker.name
        blobs = {name: random.randbytes(size) for name, size in wanted["answer"].items()}
        outputs = {name: Digest.of(data) for name, data in blobs.items()}
        entry = ActionEntry(action.stage.name, order.components, outputs, seconds)
        return Answer(entry, worker=worker.address, blobs=tuple(blobs.values())).packed(order)
