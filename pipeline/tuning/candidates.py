"""Candidates of an operator, on their way to be measured.

asked for again   winners of another compiler, what others claim to be fast, what failed by the machine's fault
search            new ones, from each search space in turn
apply             one made again from its record
codegen           the objects of each, side by side
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from pipeline import stages
from pipeline.errors import ConfigError, StageError, WorkerDiedError, first_line
from pipeline.hashing import Digest
from pipeline.tuning.lessons import Lessons
from pipeline.tuning.records import TRANSIENT, ExhaustedRecord, Outcome, Standing, TrialRecord, encoded, ratio
from pipeline.tuning.states import Operator
from pipeline.tuning.workshop import Workshop
from pipeline.types import TUNED, Packed, symbol_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A candidate on its way: compiled in the end, or `outcome` says why it is not."""

    candidate: str
    space: str
    version: int
    decisions: Any
    objects: Mapping[str, Digest] = field(default_factory=dict)
    packed: tuple[Packed, ...] = ()
    outcome: Outcome | None = None
    said: str = ""

    @property
    def symbol(self) -> str:
        return f"tuned_{self.candidate[:32]}"


@dataclass(frozen=True)
class _Code:
    """A function to compile. `hasty`: unoptimised, for what is run once and never timed."""

    function: Digest
    symbol: str
    hasty: bool = False


Proposal = tuple[Prepared, Mapping[str, Digest]]  # with its function, by name; none where it has an outcome


class Candidates:
    """Makes them, compiling `at_once`. Every method may be called from any thread."""

    def __init__(self, workshop: Workshop, lessons: Lessons, at_once: int) -> None:
        self._workshop = workshop
        self._lessons = lessons
        self._at_once = at_once
        self._compiling = ThreadPoolExecutor(at_once, "compiling")
        self._session = secrets.token_hex(8)  # other searches than any other run's
        self._begun = time.time()
        self._failing: set[tuple[str, str]] = set()  # operators by key, and spaces that failed for them
        self._preparing, self._counted = 0, threading.Lock()

    def close(self) -> None:
        self._compiling.shutdown(wait=False, cancel_futures=True)

    def prepared(
        self, operator: Operator, standing: Standing, count: int
    ) -> tuple[list[Prepared], list[ExhaustedRecord]]:
        """Up to `count` that were not tried, compiled or with what came in between; and what became of search spaces
        that have no more. Raises StageError where no space can make any."""
        with self._counted:
            self._preparing += 1
        try:
            proposed, exhausted = self._from_all(operator, standing, count)
            return self.compiled(operator, proposed), exhausted
        finally:
            with self._counted:
                self._preparing -= 1

    def made_again(self, operator: Operator, trial: TrialRecord) -> Proposal:
        """A candidate from its record."""
        workshop = self._workshop
        prepared = Prepared(trial.candidate, trial.space, trial.space_version, trial.decisions)
        inputs = {"function": operator.workload.function, "winner0": workshop.store.put(encoded(trial))}
        options: dict[str, object] = {"strategy": TUNED, "target": workshop.target(operator).attributes}
        try:
            source = workshop.source(operator, trial.space)
            inputs |= {f"space.{trial.space}": digest for digest in source.values()}
            entry = workshop.run(stages.APPLY, operator, inputs, options)
        except (StageError, ConfigError, ValueError) as error:
            return self._not_built(prepared, error), {}
        if "function" not in entry.outputs:
            return replace(prepared, outcome=Outcome.NOT_BUILT, said="it does not apply"), {}
        packed = msgspec.json.decode(workshop.blob(entry.outputs["packed"]), type=tuple[Packed, ...])
        return replace(prepared, packed=packed), {"function": entry.outputs["function"]}

    def compiled(self, operator: Operator, proposed: Sequence[Proposal]) -> list[Prepared]:
        """Each with its objects, or why it has none; compiled in parallel, on other machines some at a time, and those
        that this brings no object of one by one."""
        codes = [_codes(*proposal) for proposal in proposed]
        made = self._together(operator, {name: code for each in codes for name, code in each.items()})

        def one(prepared: Prepared, codes: Mapping[str, _Code]) -> Prepared:
            if prepared.outcome is not None:
                return prepared
            try:
                objects = {name: made.get(name) or self._alone(operator, code) for name, code in codes.items()}
            except StageError as error:
                return self._not_built(prepared, error)
            return replace(prepared, objects=objects)

        return list(self._compiling.map(one, (prepared for prepared, _ in proposed), codes))

    # where they come from

    def _from_all(
        self, operator: Operator, standing: Standing, count: int
    ) -> tuple[list[Proposal], list[ExhaustedRecord]]:
        found = self._asked_for_again(operator, standing, count)
        exhausted: list[ExhaustedRecord] = []
        failed: list[StageError] = []
        for name in self._workshop.spaces(operator):
            version = self._workshop.space(operator, name).version
            if len(found) >= count or (name, version) in standing.exhausted:
                continue
            try:
                proposed, reason = self._searched(operator, standing, name, count - len(found))
            except StageError as error:
                failed.append(self._fallen(operator, name, error))
                continue
            found += proposed
            if not proposed:
                exhausted.append(ExhaustedRecord(space=name, space_version=version, reason=reason))
        if failed and not found and not exhausted:
            raise failed[0]
        return found, exhausted

    def _asked_for_again(self, operator: Operator, standing: Standing, count: int) -> list[Proposal]:
        """Winners of another compiler, what others claim, and what failed in an earlier run by the machine's fault, as
        may be."""
        failed = [each for each in standing.trials if each.outcome in TRANSIENT and each.at < self._begun]
        due = (each for each in (*standing.claims, *failed) if each.candidate not in standing.tried)
        proven_elsewhere = (winner.trial for winner in standing.unproven)
        here = [each for each in (*proven_elsewhere, *due) if self._workshop.has_space(operator, each.space)]
        return [self.made_again(operator, trial) for trial in here[:count]]

    def _searched(self, operator: Operator, standing: Standing, space: str, count: int) -> tuple[list[Proposal], str]:
        """Proposals of a space, or why there are none."""
        workshop = self._workshop
        tried = [[each.decisions, ratio(each)] for each in standing.trials if each.space == space]
        # What failed and may be tried again is asked for by itself: no space shall propose it at once.
        known = standing.tried.union(each.candidate for each in (*standing.trials, *standing.claims))
        inputs = {
            "function": operator.workload.function,
            "tried": workshop.store.put(msgspec.json.encode(tried)),
            "known": workshop.store.put(msgspec.json.encode(sorted(known))),
        }
        if (model := self._lessons.model(operator, space)) is not None:
            inputs["model"] = model
        inputs |= workshop.source(operator, space)
        version = workshop.space(operator, space).version
        options: dict[str, object] = {
            "space": space,
            "space version": version,
            "count": count,
            "seed": _seed(self._session, operator.key, len(standing.tried)),
            "target": workshop.target(operator).attributes,
            "threads": max(1, self._at_once // max(1, self._preparing)),
        }
        outputs = workshop.run(stages.SEARCH, operator, inputs, options).outputs
        found: list[Proposal] = []
        for i, each in enumerate(json.loads(workshop.blob(outputs["proposed"]))):
            packed = msgspec.convert(each["packed"], tuple[Packed, ...])
            decisions = json.loads(workshop.blob(outputs[f"d{i}"]))
            prepared = Prepared(each["candidate"], space, version, decisions, packed=packed)
            found.append((prepared, {"function": outputs[f"f{i}"]}))
        return found, workshop.blob(outputs["reason"]).decode() if "reason" in outputs else ""

    # what goes wrong

    def _fallen(self, operator: Operator, space: str, error: StageError) -> StageError:
        """What is said of a space that fails for an operator: once, as others may go on. Raises it where the night is
        being stopped."""
        if self._workshop.workers.stopped:
            raise error
        if (operator.key, space) not in self._failing:
            self._failing.add((operator.key, space))
            _log.warning("the search space %s fails for %s: %s", space, operator.name, first_line(error))
        return error

    def _not_built(self, prepared: Prepared, error: Exception) -> Prepared:
        """A candidate that there is no code of, and why. Raises the error where the night is being stopped."""
        if self._workshop.workers.stopped:
            raise error
        if isinstance(error, WorkerDiedError):
            outcome = Outcome.BUILD_TIMEOUT if error.timed_out else Outcome.CRASHED
            return replace(prepared, outcome=outcome, said=f"build: {first_line(error)}")
        return replace(prepared, outcome=Outcome.NOT_BUILT, said=first_line(error))

    # code

    def _together(self, operator: Operator, codes: Mapping[str, _Code]) -> dict[str, Digest]:
        """The objects of many functions, by file: so many orders that all who compile have one, and no more.

        None on this machine, where an order costs little, and what is timed waits for the longest that is under way.
        """
        names = list(codes)
        size = together(len(names), self._at_once, self._preparing)
        if size < 2 or self._workshop.runs_here(stages.COMPILE, operator):
            return {}
        some = [{name: codes[name] for name in names[i : i + size]} for i in range(0, len(names), size)]
        made: dict[str, Digest] = {}
        for each in self._compiling.map(lambda codes: self._some(operator, codes), some):
            made |= each
        return made

    def _some(self, operator: Operator, codes: Mapping[str, _Code]) -> dict[str, Digest]:
        """The objects of some functions; none of those that fail, and none at all where one takes the others along.

        What may be compiled alone may be so here: none is begun in the second half of the time that one may take.
        """
        limit = self._workshop.target(operator).file.tune.timeout
        inputs = {f"f{i}": code.function for i, code in enumerate(codes.values())}
        options: dict[str, object] = {
            "functions": [[code.symbol, int(code.hasty)] for code in codes.values()],
            "targets": [self._attributes(operator), self._attributes(operator, hasty=True)],
            "seconds": limit / 2,
        }
        try:
            outputs = self._workshop.run(stages.COMPILE, operator, inputs, options, limit * 1.5).outputs
        except StageError:
            if self._workshop.workers.stopped:
                raise
            return {}
        return {name: outputs[f"o{i}"] for i, name in enumerate(codes) if f"o{i}" in outputs}

    def _alone(self, operator: Operator, code: _Code) -> Digest:
        options: dict[str, object] = {"symbol": code.symbol, "target": self._attributes(operator, code.hasty)}
        limit = self._workshop.target(operator).file.tune.timeout
        inputs = {"function": code.function}
        return self._workshop.run(stages.CODEGEN, operator, inputs, options, limit).outputs["object"]

    def _attributes(self, operator: Operator, hasty: bool = False) -> dict[str, object]:
        """The target, as code for it is made."""
        attributes = self._workshop.target(operator).attributes
        return {**attributes, "opt-level": 0} if hasty and attributes["kind"] == "llvm" else attributes


def together(count: int, at_once: int, preparing: int) -> int:
    """Of `count` functions those that one order compiles, where `at_once` orders may be under way for so many operators
    that are being prepared."""
    return -(-count // max(1, at_once // max(1, preparing)))


def _codes(prepared: Prepared, functions: Mapping[str, Digest]) -> dict[str, _Code]:
    """What has to be compiled of a candidate, by the name of its object file."""
    if prepared.outcome is not None:
        return {}
    packed = [_Code(each.function, symbol_of(each.function.hash), hasty=True) for each in prepared.packed]
    return {f"{code.symbol}.o": code for code in (_Code(functions["function"], prepared.symbol), *packed)}


def _seed(*parts: object) -> int:
    """From 1 to 2³¹-2: what TVM's random numbers may start from."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") % (2**31 - 2) + 1
