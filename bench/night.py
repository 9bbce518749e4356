"""Simulated nights: where a budget goes, against taking the operators in turn, and what the decisions cost.

The engine is a fake one (pipeline.tuning.fakes): a night of eight hours takes seconds. Both orders of work get the same
engine, seed and costs; they differ in which operator is next and in when one has had enough.

    python -m bench.night                       1,000 operators, 8 hours
    python -m bench.night --operators 10000
    python -m bench.night --posts 1 2 4 16      the same seconds of work at one post after the other, or side by side
    python -m bench.night --waiting             posts that really wait, in threads: trials a minute with 1, 2 and 4
"""

from __future__ import annotations

import argparse
import gc
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil

from bench.cpu import table
from pipeline.tuning import scheduler as scheduling
from pipeline.tuning.events import Event, Measured
from pipeline.tuning.fakes import NO_FAULTS, FakeEngine, MemoryLedger, Simulated, Told, WaitingEngine, operator
from pipeline.tuning.night import Night
from pipeline.tuning.scheduler import Scheduler, Turn
from pipeline.tuning.states import Operator, State, Terms

HOUR = 3600.0
STEP = HOUR / 2
MEGA = 2.0**20


def operators(count: int, models: int, seed: int) -> list[Operator]:
    """Operators with shares as uneven as those of real networks: some in several models, many that hardly count."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        used_in = draw.sample(range(models), 1 if draw.random() < 0.8 else min(models, draw.randint(2, 3)))
        calls = {f"model{m}": draw.choice((1, 1, 1, 2, 3, 6)) for m in used_in}
        made.append(operator(f"op{i}", draw.lognormvariate(-9, 1.5), calls))
    return made


class RoundRobin(Scheduler):
    """Every operator gets a batch in turn until its trials are used."""

    _turn = 0

    def pick(self, elapsed: float) -> Turn | None:
        if self._is_over(elapsed) or self._is_spent():
            return None
        for step in range(len(self._order)):
            state = self._order[(self._turn + step) % len(self._order)]
            if state.trials < self.terms.trials and not state.preparing:
                self._turn = (self._turn + step + 1) % len(self._order)
                state.preparing = True
                state.flying += (count := min(self.terms.batch, self.terms.trials - state.trials))
                return Turn(state.operator, count)
        return None

    def _push(self, state: State, worth: float = 1.0) -> None:
        """Keeps no heaps."""

    def _is_small(self, state: State) -> bool:
        return False


class Timed(Scheduler):
    """Notes what each decision takes: to pick, and to take in what came of it."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.took: list[float] = []

    def pick(self, elapsed: float) -> Turn | None:
        begun = time.perf_counter()
        turn = super().pick(elapsed)
        if turn is not None:
            self.took.append(time.perf_counter() - begun)
        return turn

    def finish(self, turn: Turn, standing: object) -> State:
        begun = time.perf_counter()
        state = super().finish(turn, standing)  # type: ignore[arg-type]
        self.took[-1] += time.perf_counter() - begun
        return state


@dataclass
class Latencies:
    """A watcher: seconds of all models' operators at each half hour, and memory at a quarter, half and all of it."""

    budget: float
    points: list[float] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)  # of the scheduler, where it is traced
    kinds: Counter[str] = field(default_factory=Counter)
    _last: float = 0.0

    def told(self, event: Event) -> None:
        self.kinds[type(event).__name__] += 1
        if not isinstance(event, Measured):
            return
        self._last = self._last or event.models.before
        while len(self.points) * STEP <= min(event.elapsed, self.budget):
            self.points.append(self._last)
        while event.elapsed >= self.budget * (0.25, 0.5, 0.98, float("inf"))[len(self.resident)]:
            self.resident.append(psutil.Process().memory_info().rss / MEGA)
            self.own.append(_traced())
        self._last = event.models.now

    def at(self, step: int) -> float:
        return self.points[step] if step < len(self.points) else self._last


def _traced() -> float:
    """MiB that the scheduler's own code holds."""
    if not tracemalloc.is_tracing():
        return 0.0
    gc.collect()
    kept = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, scheduling.__file__)])
    return sum(each.size for each in kept.statistics("filename")) / MEGA


def night(
    chosen: Sequence[Operator], order: type[Scheduler], terms: Terms, seed: int
) -> tuple[Latencies, Scheduler, float]:
    """What a night came to: latencies, the scheduler, and the real seconds that it took."""
    engine, ledger = FakeEngine(seed=seed), MemoryLedger(terms.noise)
    watcher = Latencies(terms.budget or 0.0)
    begun = time.perf_counter()
    work = Night(chosen, engine, ledger, terms, watcher, "bench", order(chosen, ledger.standing, terms))
    work.run()
    return watcher, work.scheduler, time.perf_counter() - begun


def side_by_side(chosen: Sequence[Operator], posts: Sequence[int], terms: Terms, seed: int) -> None:
    """The budget as so many seconds of posts' time, with every number of posts: trials a minute, what was reached."""
    rows: list[tuple[object, ...]] = []
    rate = reached = 0.0
    for count in posts:
        engine, ledger = FakeEngine(seed=seed, posts=count, workers=2 * count), MemoryLedger(terms.noise)
        given = Terms(budget=(terms.budget or HOUR) / count, posts=count)
        scheduler = Timed(chosen, ledger.standing, given)
        begun = time.perf_counter()
        calls = Simulated(engine.clock)
        ended = Night(chosen, engine, ledger, given, Told(), "bench", scheduler, calls).run()
        seconds = time.perf_counter() - begun
        this, now = 60 * ended.trials / ended.elapsed, scheduler.now.total()
        rate, reached = rate or this / count, reached or now
        figures = (this / (count * rate), now * 1e3, now / reached, ended.elapsed / HOUR, ended.spent / HOUR)
        rows.append((count, this, *figures, len(scheduler.took) / seconds))
    heads = (
        "posts",
        "trials/min",
        "of so many",
        "latency, ms",
        "ratio",
        "hours",
        "posts' hours",
        "batches/s of the loop",
    )
    table(f"{len(chosen)} operators, {(terms.budget or HOUR) / HOUR:g} hours of posts' time", heads, rows)


def really_waiting(posts: Sequence[int], seconds: float) -> None:
    """Trials a minute of engines that wait in threads, the best of three turns each."""
    best: dict[int, float] = {}
    for _ in range(3):
        for count in posts:
            engine = WaitingEngine(posts=count, workers=2 * count, pace=0.02, faults=NO_FAULTS)
            terms = Terms(budget=seconds / engine.pace, trials=1000)
            ended = Night(operators(60, 5, 0), engine, MemoryLedger(), terms, Told(), "bench").run()
            best[count] = max(best.get(count, 0.0), 60 * ended.trials / (ended.elapsed * engine.pace))
    rows = [(count, rate, rate / (count * best[posts[0]] / posts[0])) for count, rate in best.items()]
    table(f"posts that really wait, {seconds:g} s each", ("posts", "trials/min", "of so many"), rows)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", type=int, default=1000)
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--hours", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--posts", type=int, nargs="+", help="only this: simulated nights with so many posts")
    parser.add_argument("--waiting", action="store_true", help="only this: posts that really wait")
    parser.add_argument("--no-trace", action="store_true", help="leave out the scheduler's own memory (half the time)")
    return parser.parse_args()


def main() -> None:
    given = _parsed()
    terms = Terms(budget=given.hours * HOUR)
    chosen = operators(given.operators, given.models, given.seed)
    if given.waiting:
        really_waiting((1, 2, 4), 3.0)
    elif given.posts:
        side_by_side(chosen, given.posts, terms, given.seed)
    else:
        against_turns(given, chosen, terms)


def against_turns(given: argparse.Namespace, chosen: Sequence[Operator], terms: Terms) -> None:
    """The scheduler against taking the operators in turn: latencies, what decisions cost, memory."""
    ours, scheduler, seconds = night(chosen, Timed, terms, given.seed)
    turns, _, _ = night(chosen, RoundRobin, terms, given.seed)

    rows = [
        (
            f"{step * STEP / HOUR:.1f} h",
            *(each.at(step) * 1e3 for each in (ours, turns)),
            ours.at(step) / turns.at(step),
        )
        for step in range(int(terms.budget / STEP) + 1)
    ]
    title = f"{given.operators} operators of {given.models} models, {given.hours:g} h: all models' latency"
    table(title, ("after", "scheduler, ms", "in turn, ms", "ratio"), rows)

    took = scheduler.took  # type: ignore[attr-defined]
    tenth = max(1, len(took) // 10)
    table(
        f"decisions: {len(took)} in {seconds:.1f} real seconds of the whole night",
        ("of the night", "µs a decision", "decisions a second"),
        [
            (name, sum(part) / len(part) * 1e6, len(part) / sum(part))
            for name, part in (("first tenth", took[:tenth]), ("last tenth", took[-tenth:]), ("all", took))
        ],
    )
    own = [0.0] * 3
    if not given.no_trace:
        tracemalloc.start()
        traced, _, _ = night(chosen, Scheduler, terms, given.seed)
        tracemalloc.stop()
        own = traced.own
    resident = ours.resident
    table(
        "memory, MiB (of the process: with all records of the night)",
        ("at", "scheduler", "process"),
        [(name, *each) for name, *each in zip(("1/4", "1/2", "the end"), own, resident, strict=False)],
    )


if __name__ == "__main__":
    main()
