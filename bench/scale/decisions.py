"""Our scheduler alone: what it takes to build it for so many operators, and to decide what comes next."""

from __future__ import annotations

import gc
import time

import psutil

from bench.night import Timed, operators
from pipeline.tuning.fakes import FakeEngine, MemoryLedger, Told
from pipeline.tuning.night import Night
from pipeline.tuning.states import Terms

HEADS = ("operators", "built in, s", "bytes each", "decisions", "µs each", "decisions/s")


def decisions(count: int, batches: int, seed: int) -> tuple[object, ...]:
    """A line: picks and what came of them, as bench.night times them, in a night of about so many batches."""
    chosen = operators(count, max(10, count // 100), seed)
    engine, ledger = FakeEngine(seed=seed), MemoryLedger()
    terms = Terms(budget=batches * 5.0)
    gc.collect()
    bare, begun = psutil.Process().memory_info().rss, time.perf_counter()
    scheduler = Timed(chosen, ledger.standing, terms)
    built, grown = time.perf_counter() - begun, psutil.Process().memory_info().rss - bare
    Night(chosen, engine, ledger, terms, Told(), "scale", scheduler).run()
    took = scheduler.took
    return count, built, grown / count, len(took), sum(took) / len(took) * 1e6, len(took) / sum(took)
