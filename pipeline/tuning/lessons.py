"""The cost models of a night: one for each target and guided search space, begun with what the last run left.

What was measured of an operator is learnt from by a few dozen at a time, beside the night's own work. What was learnt
is kept in the user's store, for the next run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from pipeline import stages
from pipeline.compiler import search
from pipeline.hashing import Digest, key_of
from pipeline.store import ActionEntry
from pipeline.tuning.records import Record, TrialRecord, ratio
from pipeline.tuning.states import Operator
from pipeline.tuning.workshop import Workshop

_LESSON = 40  # candidates of an operator that are learnt from together


class Lessons:
    """Every method may be called from any thread; `take` from one at a time."""

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop
        self._models: dict[str, Digest] = {}  # in the workshop's store
        self._changing = threading.Lock()
        self._learner = ThreadPoolExecutor(1)
        self._unlearnt: dict[tuple[str, str], list[TrialRecord]] = {}  # by operator and space

    @property
    def models(self) -> tuple[Digest, ...]:
        with self._changing:
            return tuple(self._models.values())

    def close(self) -> None:
        """To be called once stages are performed no more: waits for the lesson that is being learnt."""
        self._learner.shutdown(wait=True, cancel_futures=True)

    def model(self, operator: Operator, space: str) -> Digest | None:
        """The cost model for an operator's target, None where there is none yet."""
        if not self._guides(operator, space):
            return None
        key = self._key(operator, space)
        with self._changing:
            if key not in self._models:
                kept = self._workshop.build.memoizer.store.lookup(key)
                if kept is None:
                    return None
                self._workshop.take([kept.outputs["model"]])
                self._models[key] = kept.outputs["model"]
            return self._models[key]

    def take(self, operator: Operator, records: Iterable[Record]) -> None:
        """Learns from what was measured of an operator, once there is enough of it."""
        for record in records:
            if isinstance(record, TrialRecord) and self._guides(operator, record.space):
                self._unlearnt.setdefault((operator.key, record.space), []).append(record)
        for (key, space), measured in list(self._unlearnt.items()):
            if key == operator.key and len(measured) >= _LESSON:
                self._learner.submit(self._learn, operator, space, self._unlearnt.pop((key, space)))

    def _guides(self, operator: Operator, space: str) -> bool:
        return isinstance(self._workshop.space(operator, space), search.Guided)

    def _key(self, operator: Operator, space: str) -> str:
        target = self._workshop.target(operator)
        return key_of({"cost model": space, "target": target.attributes, "device": target.device})

    def _learn(self, operator: Operator, space: str, measured: Sequence[TrialRecord]) -> None:
        workshop = self._workshop
        results = [[each.decisions, ratio(each)] for each in measured]
        inputs = {
            "function": operator.workload.function,
            "results": workshop.store.put(msgspec.json.encode(results)),
            **workshop.source(operator, space),
        }
        if (model := self.model(operator, space)) is not None:
            inputs["model"] = model
        options: dict[str, object] = {"space": space, "target": workshop.target(operator).attributes}
        learnt = workshop.run(stages.LEARN, operator, inputs, options).outputs["model"]
        key = self._key(operator, space)
        with self._changing:
            self._models[key] = learnt
        store = workshop.build.memoizer.store
        outputs = {"model": store.put(workshop.blob(learnt))}
        store.commit(key, ActionEntry(stages.LEARN.name, {"cost model": space}, outputs, 0.0))
