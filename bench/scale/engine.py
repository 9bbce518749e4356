"""A driver's engine: gives a real executor the orders that the night's real engine gives, and waits for the answers.

    prepare   one SEARCH for the batch, then COMPILE for some of its candidates each, side by side
    measure   one MEASURE, at a post, of all its objects beside the reference and the baseline
    retest    one MEASURE of the leader and the best
    learn     one LEARN whenever an operator has so many new trials

What the answers mean for tuning (times, crashes, what is best) is made up by pipeline.tuning.fakes; their bytes are
those of work.py.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from bench.scale.counts import Meter
from bench.scale.given import DEVICE, Given
from pipeline import stages
from pipeline.hashing import Digest
from pipeline.memoizer import Action, Memoizer
from pipeline.store import ActionEntry
from pipeline.tuning import calls
from pipeline.tuning.candidates import together
from pipeline.tuning.fakes import FakeEngine
from pipeline.tuning.night import Batch
from pipeline.tuning.records import Record, Standing, TrialRecord
from pipeline.tuning.states import Operator

_LESSON = 40  # trials of an operator that are learnt from together, as the real engine does
_RETESTED = 3 * 8  # candidate, best and baseline, each timed eight times as long


class OrderingEngine(FakeEngine):
    """For one night of one driver. Its methods are called from several threads, as the real engine's are."""

    def __init__(self, given: Given, memoizer: Memoizer, meter: Meter) -> None:
        super().__init__(given.seed, workers=given.at_once or memoizer.workers.limit)
        self._given = given
        self._memoizer = memoizer
        self._meter = meter
        self._compiling = ThreadPoolExecutor(self.workers)
        self._numbers = itertools.count()
        self._grounds: dict[str, tuple[Digest, ...]] = {}  # function, reference and baseline of each operator
        self._compiled: dict[str, dict[str, Digest]] = {}  # objects of the batches that are under way
        self._unlearnt: Counter[str] = Counter()
        self._preparing = 0
        self._counting = threading.Lock()

    @property  # type: ignore[override]
    def posts(self) -> int:
        return len(self.post_names)

    @posts.setter
    def posts(self, count: int) -> None:
        """The dataclass sets what the executor says."""

    @property  # type: ignore[override]
    def post_names(self) -> Sequence[str]:
        with self._meter.of("asking for posts"):
            return self._memoizer.workers.posts(DEVICE)

    @post_names.setter
    def post_names(self, names: Sequence[str]) -> None:
        """The dataclass sets what the executor says."""

    def now(self) -> float:
        return time.time()

    def close(self) -> None:
        super().close()
        self._memoizer.workers.stop()
        self._compiling.shutdown(wait=False, cancel_futures=True)

    def prepare(self, operator: Operator, standing: Standing, count: int) -> Batch:
        objects = self._built(operator, standing, count)
        with self._meter.of("the fake engine"):
            batch = super().prepare(operator, standing, count)
        named = {each: objects[i % len(objects)] for i, each in enumerate(batch.candidates)}
        with self._counting:
            self._compiled.setdefault(operator.key, {}).update(named)
        return batch

    def _built(self, operator: Operator, standing: Standing, count: int) -> list[Digest]:
        with self._counting:
            self._preparing += 1
        try:
            functions = self._searched(operator, standing, count)
            size = self._given.together or together(count, self.workers, self._preparing)
            some = [functions[first : first + size] for first in range(0, count, size)]
            made = self._compiling.map(functools.partial(self._compile, operator), some)
            return [digest for each in made for digest in each]
        finally:
            with self._counting:
                self._preparing -= 1

    def _searched(self, operator: Operator, standing: Standing, count: int) -> list[Digest]:
        put = self._memoizer.store.put
        inputs = {
            "function": self._ground(operator)[0],
            "tried": put(b" " * 100 * len(standing.tried)),
            "known": put(json.dumps(sorted(standing.tried)).encode()),
        }
        sizes = {f"f{i}": self._given.function for i in range(count)} | {f"d{i}": 300 for i in range(count)}
        sizes["proposed"] = 200 * count
        found = self._order(stages.SEARCH, operator, inputs, self._given.search * count, sizes)
        return [found.outputs[f"f{i}"] for i in range(count)]

    def _compile(self, operator: Operator, functions: Sequence[Digest]) -> list[Digest]:
        stage = stages.COMPILE if len(functions) > 1 else stages.CODEGEN
        inputs = {f"f{i}": each for i, each in enumerate(functions)}
        sizes = {f"o{i}" if stage is stages.COMPILE else "object": self._given.object for i in range(len(functions))}
        made = self._order(stage, operator, inputs, self._given.codegen * len(functions), sizes)
        return [made.outputs[name] for name in sizes]

    def measure(self, operator: Operator, batch: Batch) -> list[Record]:
        with self._counting:
            objects = {each: self._compiled[operator.key].pop(each) for each in batch.candidates}
        self._timed(operator, objects, self._given.measure * (len(objects) + 1))
        with self._meter.of("the fake engine"):
            return super().measure(operator, batch)

    def retest(self, operator: Operator, standing: Standing, leader: TrialRecord) -> list[Record]:
        ground = self._ground(operator)
        self._timed(operator, {"leader": ground[1], "best": ground[2]}, self._given.measure * _RETESTED)
        with self._meter.of("the fake engine"):
            return super().retest(operator, standing, leader)

    def learn(self, operator: Operator, records: Sequence[Record]) -> None:
        with self._counting:
            self._unlearnt[operator.key] += sum(isinstance(each, TrialRecord) for each in records)
            lesson = self._unlearnt[operator.key] >= _LESSON
            if lesson:
                del self._unlearnt[operator.key]
        if lesson:
            inputs = {"function": self._ground(operator)[0], "results": self._memoizer.store.put(b" " * 100 * _LESSON)}
            self._order(stages.LEARN, operator, inputs, self._given.learn, {"model": 20_000})

    def _timed(self, operator: Operator, objects: Mapping[str, Digest], seconds: float) -> None:
        _, reference, baseline = self._ground(operator)
        inputs = {"reference.o": reference, "baseline.o": baseline, **{f"{name}.o": o for name, o in objects.items()}}
        self._order(stages.MEASURE, operator, inputs, seconds, {"trials": 130 * len(inputs)}, calls.post())

    def _ground(self, operator: Operator) -> tuple[Digest, ...]:
        if operator.key not in self._grounds:
            put = self._memoizer.store.put
            sizes = (self._given.function, self._given.object, self._given.object)
            self._grounds[operator.key] = tuple(put(random.randbytes(size)) for size in sizes)
        return self._grounds[operator.key]

    def _order(
        self,
        stage: stages.Stage,
        operator: Operator,
        inputs: Mapping[str, Digest],
        seconds: float,
        answer: Mapping[str, int],
        post: str = "",
    ) -> ActionEntry:
        """One order for `work.FakeWork`. Its number keeps it from being found in the store: no order is given twice."""
        wanted = {"seconds": seconds, "answer": dict(answer), "number": next(self._numbers), "of": os.getpid()}
        options: dict[str, object] = {"target": {"kind": "llvm", "mcpu": DEVICE}, "simulated": wanted}
        if post:
            options["device"] = DEVICE
        return self._memoizer.run(Action(stage, operator.name, inputs, options, post=post))
