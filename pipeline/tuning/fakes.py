"""Parts for tests and simulations of a night: an engine that compiles nothing, a clock that jumps, records in memory.

Everything follows from the seed and the operators' keys: the same night twice is the same, whatever the machine.

    operators = [fakes.operator("conv", seconds=2e-3), fakes.operator("dense", seconds=1e-3)]
    engine, ledger = fakes.FakeEngine(), fakes.MemoryLedger()
    ended = Night(operators, engine, ledger, Terms(budget=3600.0), watcher).run()

An hour of a fake night takes some milliseconds for each hundred of its trials. With several posts, whose time passes
side by side:

    engine = fakes.FakeEngine(posts=4, workers=8)
    ended = Night(operators, engine, ledger, terms, watcher, calls=fakes.Simulated(engine.clock)).run()
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pipeline.hashing import Digest
from pipeline.tuning.calls import perform
from pipeline.tuning.events import Event
from pipeline.tuning.night import Batch
from pipeline.tuning.records import (
    Certificate,
    ExhaustedRecord,
    Outcome,
    Record,
    RetestRecord,
    Standing,
    TrialRecord,
    standing,
)
from pipeline.tuning.states import Operator
from pipeline.types import Workload

T = TypeVar("T")

SPACE = ("fake", 1)

_BEGIN = 1_700_000_000.0  # Unix time at which a fake clock begins


def operator(
    name: str,
    seconds: float = 1e-3,
    calls: Mapping[str, int] | None = None,
    target: str = "native",
) -> Operator:
    """An operator of its own for each name and target; one call in the model `net` unless calls say otherwise."""
    function = Digest.of(name.encode())
    calls = {"net": 1} if calls is None else calls
    workload = Workload(name, function, "", ("1x8:float32", "1x8:float32"), sum(calls.values()), False, (1,))
    key = hashlib.sha256(f"{target} {name}".encode()).hexdigest()
    return Operator(target, workload, calls, seconds, key, frozenset({SPACE}))


class FakeClock:
    """Seconds that pass only when somebody says so. For several threads."""

    def __init__(self, at: float = _BEGIN) -> None:
        self._at = at
        self._lock = threading.Lock()

    def now(self) -> float:
        return self._at

    def advance(self, seconds: float) -> None:
        with self._lock:
            self._at += seconds

    def advance_to(self, at: float) -> None:
        """Does nothing where it is later already."""
        with self._lock:
            self._at = max(self._at, at)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What passes within the block passes beside everything else: afterwards it is as early as before."""
        begun = self._at
        try:
            yield
        finally:
            self._at = begun


class Simulated:
    """Calls (see pipeline.tuning.calls) that all take place side by side on one fake clock, in one thread.

    A call's work is done when it begins; it has ended when the clock has come to where the work left it, and the clock
    jumps there when nothing else is to do: a simulation by discrete events.
    """

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self._to_end: list[tuple[float, int, Future[Any], Future[Any]]] = []
        self._begun = itertools.count()

    def begin(self, call: Callable[..., T], *arguments: Any, post: str = "") -> Future[T]:
        done: Future[T] = Future()
        with self._clock.aside():
            perform(done, call, *arguments, post=post)
            at = self._clock.now()
        future: Future[T] = Future()
        heapq.heappush(self._to_end, (at, next(self._begun), future, done))
        return future

    def ended(self, seconds: float) -> Future[Any] | None:
        """The next call, however long it takes by the fake clock; only one that is over where nobody waits."""
        if not self._to_end or (seconds <= 0 and self._to_end[0][0] > self._clock.now()):
            return None
        at, _, future, done = heapq.heappop(self._to_end)
        self._clock.advance_to(at)
        error = done.exception()
        if error is None:
            future.set_result(done.result())
        else:
            future.set_exception(error)
        return future


@dataclass(frozen=True)
class Costs:
    """Fake seconds of what an engine does, for each candidate; of a retest and of a batch, as a whole."""

    propose: float = 0.02
    build: float = 0.1
    measure: float = 0.2
    batch: float = 0.5
    retest: float = 1.5
    timeout: float = 5.0  # of a candidate that hangs


@dataclass(frozen=True)
class Faults:
    """Shares of the candidates that go wrong, by how. The shares add up to less than 1."""

    wrong: float = 0.01
    not_a_number: float = 0.01
    crashed: float = 0.02
    timed_out: float = 0.01
    not_built: float = 0.02

    def draw(self, at: float) -> tuple[Outcome, str]:
        """The outcome for a number between 0 and 1, and what is said of it."""
        for share, outcome, said in (
            (self.wrong, Outcome.WRONG, "gives another result than the default: 0.3 off, relative, seed 0"),
            (self.not_a_number, Outcome.WRONG, "gives another result than the default: not a number, seed 0"),
            (self.crashed, Outcome.CRASHED, "crashed with SIGSEGV"),
            (self.timed_out, Outcome.TIMED_OUT, "had not ended after 5 s"),
            (self.not_built, Outcome.NOT_BUILT, "LLVM ERROR: too many registers"),
        ):
            if at < share:
                return outcome, said
            at -= share
        return Outcome.TIMED, ""


NO_FAULTS = Faults(0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Curve:
    """What the search of one operator finds: how many times as fast as the baseline its candidates are.

    limit  of the best that there is
    pace   trials until most of it is found
    size   of the space: candidates that there are
    """

    limit: float
    pace: float
    size: int = 100_000

    def ratio(self, index: int, luck: float) -> float:
        """Of the candidate that is proposed as the index-th; `luck` between 0 and 1 is its own."""
        reached = 1 - 2 ** (-(index + 1) / self.pace)
        return max(0.1, 1 + (self.limit - 1) * reached * (0.4 + 0.6 * luck) - 0.5 * (1 - luck))


Hook = Callable[[str, Operator], None]


@dataclass
class FakeEngine:
    """An engine (see pipeline.tuning.night) whose candidates are numbers.

    posts    that measure at once: their times pass side by side with `Simulated` calls, and with no others
    curves   of operators by key; of the others one drawn from the seed, some of which have nothing to gain
    hook     called at the beginning of "prepare", "measure", "retest" and "learn", where it may raise, wait or stop
    made     how often each candidate was measured, by operator's key and digest
    """

    seed: int = 0
    workers: int = 0
    posts: int = 1
    post_names: Sequence[str] = ()
    clock: FakeClock = field(default_factory=FakeClock)
    costs: Costs = Costs()
    faults: Faults = Faults()
    curves: Mapping[str, Curve] = field(default_factory=dict)
    hook: Hook = lambda phase, operator: None
    made: dict[tuple[str, str], int] = field(default_factory=dict)
    closed: bool = False

    def prepare(self, operator: Operator, standing: Standing, count: int) -> Batch:
        self.hook("prepare", operator)
        begun = self.clock.now()
        curve = self._curve(operator)
        indices = (i for i in range(curve.size) if candidate(operator, i) not in standing.tried)
        wanted = list(itertools.islice(indices, count))
        if not wanted:
            return Batch({}, (ExhaustedRecord(space=SPACE[0], space_version=SPACE[1], reason="all were tried"),))
        ready = begun + count * self.costs.propose + len(wanted) * self.costs.build
        drawn = {i: self.faults.draw(self._random(operator, "fault", i).random()) for i in wanted}
        unbuilt = [i for i, (outcome, _) in drawn.items() if outcome is Outcome.NOT_BUILT]
        records = tuple(self._trial(operator, i, Outcome.NOT_BUILT, drawn[i][1]) for i in unbuilt)
        built = {candidate(operator, i): (i, *drawn[i], ready) for i in wanted if i not in unbuilt}
        return Batch(built, records)

    def measure(self, operator: Operator, batch: Batch) -> list[Record]:
        self.hook("measure", operator)
        self.clock.advance(self.costs.batch)
        records: list[Record] = []
        for digest, (i, outcome, said, ready) in batch.candidates.items():
            self.clock.advance_to(ready)
            self.clock.advance(self.costs.timeout if outcome is Outcome.TIMED_OUT else self.costs.measure)
            self.made[operator.key, digest] = self.made.get((operator.key, digest), 0) + 1
            records.append(self._trial(operator, i, outcome, said))
        return records

    def retest(self, operator: Operator, standing: Standing, leader: TrialRecord) -> list[Record]:
        self.hook("retest", operator)
        self.clock.advance(self.costs.retest)
        base = self._baseline(operator)
        seconds = base / self._ratio(operator, _index(leader.candidate))
        certificate = Certificate("default", (0, 1, 2), 1e-4, 1e-6)
        return [
            RetestRecord(
                candidate=leader.candidate, seconds=seconds, baseline=base, noise=0.005, certificate=certificate
            )
        ]

    def learn(self, operator: Operator, records: Sequence[Record]) -> None:
        self.hook("learn", operator)

    def now(self) -> float:
        return self.clock.now()

    def close(self) -> None:
        self.closed = True

    def limit(self, operator: Operator) -> float:
        """How many times as fast as the baseline the best candidate that there is may be."""
        return self._curve(operator).limit

    def _curve(self, operator: Operator) -> Curve:
        if operator.key in self.curves:
            return self.curves[operator.key]
        draw = self._random(operator, "curve", 0)
        has_gain = draw.random() > 0.15
        return Curve(1 + draw.lognormvariate(0.3, 0.8) if has_gain else 1.0, draw.uniform(6, 60))

    def _trial(self, operator: Operator, index: int, outcome: Outcome, said: str) -> TrialRecord:
        was_timed = outcome is Outcome.TIMED
        base = self._baseline(operator)
        shake = 1 + 0.005 * (2 * self._random(operator, "shake", index).random() - 1)
        return TrialRecord(
            candidate=candidate(operator, index),
            space=SPACE[0],
            space_version=SPACE[1],
            decisions=index,
            outcome=outcome,
            said=said,
            seconds=base / self._ratio(operator, index) * shake if was_timed else None,
            baseline=base if was_timed else None,
            noise=0.005,
        )

    def _ratio(self, operator: Operator, index: int) -> float:
        return self._curve(operator).ratio(index, self._random(operator, "luck", index).random())

    def _baseline(self, operator: Operator) -> float:
        """What a profile told, or where it told nothing, something."""
        return operator.seconds or 1e-3 * self._random(operator, "baseline", 0).lognormvariate(0, 1)

    def _random(self, operator: Operator, what: str, index: int) -> random.Random:
        return random.Random(f"{self.seed} {what} {index} {operator.key}")


@dataclass
class WaitingEngine(FakeEngine):
    """A fake engine whose time is real: it waits, and computes next to nothing. For calls in threads.

    pace  real seconds of one second of its costs
    """

    pace: float = 0.01
    _started: float = field(default_factory=time.monotonic)

    def prepare(self, operator: Operator, standing: Standing, count: int) -> Batch:
        self.wait(self.pace * count * (self.costs.propose + self.costs.build))
        return super().prepare(operator, standing, count)

    def measure(self, operator: Operator, batch: Batch) -> list[Record]:
        self.wait(self.pace * (self.costs.batch + len(batch.candidates) * self.costs.measure))
        return super().measure(operator, batch)

    def retest(self, operator: Operator, standing: Standing, leader: TrialRecord) -> list[Record]:
        self.wait(self.pace * self.costs.retest)
        return super().retest(operator, standing, leader)

    def wait(self, seconds: float) -> None:
        """Waits for so many real seconds. Whoever has others wait overrides this."""
        time.sleep(seconds)

    def now(self) -> float:
        return _BEGIN + (time.monotonic() - self._started) / self.pace


def candidate(operator: Operator, index: int) -> str:
    """What stands for the digest of an operator's candidate."""
    return f"{operator.key[:16]}-{index}"


def _index(candidate: str) -> int:
    return int(candidate.rpartition("-")[2])


class MemoryLedger:
    """A ledger (see pipeline.tuning.night) in memory. For several threads, which stand for several runs."""

    def __init__(self, noise: float = 0.02) -> None:
        self.records: dict[str, list[Record]] = {}
        self.abouts: dict[str, Mapping[str, Any]] = {}
        self._noise = noise
        self._known: dict[str, tuple[int, Standing]] = {}
        self._claimed: set[str] = set()
        self._lock = threading.Lock()

    def standing(self, key: str) -> Standing:
        with self._lock:
            records = self.records.get(key, [])
            count, known = self._known.get(key, (-1, Standing()))
            if count != len(records):
                known = standing(records, self._noise)
                self._known[key] = len(records), known
            return known

    def add(self, key: str, about: Mapping[str, Any], records: Sequence[Record]) -> None:
        with self._lock:
            self.abouts.setdefault(key, about)
            self.records.setdefault(key, []).extend(records)

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        with self._lock:
            is_free = key not in self._claimed
            self._claimed.add(key)
        try:
            yield is_free
        finally:
            if is_free:
                with self._lock:
                    self._claimed.discard(key)


class Told:
    """A watcher that keeps the events it was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def told(self, event: Event) -> None:
        self.events.append(event)
