"""MetaSchedule's databases and the record sets of a workspace.

    read, take    a database → claims in the sets of those operators that a target's models have
    give          what the sets of a target's operators hold → a database

What a record says only TVM can tell: the stages records, claim and export do, in workers, and the store keeps what they
said. Needs no TVM itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from pipeline import stages
from pipeline.compiler import search
from pipeline.composition import DATABASE
from pipeline.errors import ConfigError, StageError, explain_os_error
from pipeline.hashing import Digest
from pipeline.memoizer import Action, Memoizer
from pipeline.store import Store
from pipeline.store.files import written_atomically
from pipeline.tuning.records import Standing, TrialRecord, ratio
from pipeline.tuning.standings import Operators
from pipeline.types import Workload

SPACE = "post-order-apply"  # whose decisions are MetaSchedule's traces


# A database comes in


@dataclass
class Taken:
    """What became of a database's records: new ones, those that were known, and how many were left out, by why."""

    new: int = 0
    known: int = 0
    left: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Claims:
    """The claims about one operator, and how many records are none, by why."""

    records: list[TrialRecord]
    left: Counter[str]


def read(store: Store, folder: Path) -> dict[str, Digest]:
    """The blobs of a database's two files. Raises ConfigError where they are not there."""
    try:
        return {part: store.put_file(folder / name) for part, name in DATABASE.items()}
    except OSError as error:
        raise ConfigError(
            f"{folder} has no database of MetaSchedule's: {Path(str(error.filename)).name}: {error.strerror}",
            hint=f"name the work_dir of a tuning run, a folder with {' and '.join(DATABASE.values())}",
        ) from error


def take(memoizer: Memoizer, operators: Operators, database: Mapping[str, Digest], name: str) -> Taken:
    """Takes in what a database, which `name` stands for, has of a target's operators."""
    functions = {f"f{each.digest}": each.function for each in operators.workloads.values()}
    outputs = memoizer.run(Action(stages.RECORDS, f"{operators.target}:{name}", {**database, **functions})).outputs
    groups = {output[1:]: digest for output, digest in outputs.items() if output[0] == "g"}
    taken = Taken()
    taken.left["that cannot be read"] = int(memoizer.blob(outputs["unread"]))
    taken.left["of operators that no model has"] = int(memoizer.blob(outputs["foreign"]))
    workloads = [operators.workloads[digest] for digest in groups]
    with ThreadPoolExecutor(memoizer.workers.limit) as threads:
        found = threads.map(lambda *each: _claims(memoizer, operators, *each), workloads, groups.values())
        for workload, claims in zip(workloads, found, strict=True):
            new = _added(memoizer.store, operators, workload, claims.records)
            taken.new += new
            taken.known += len(claims.records) - new
            taken.left += claims.left
    return taken


def _added(store: Store, operators: Operators, workload: Workload, records: Iterable[TrialRecord]) -> int:
    """Writes records down; how many are new."""
    key = operators.key(workload)
    before = store.sets.names(key)
    operators.ledger.add(key, operators.about(workload), records)
    return len(store.sets.names(key) - before)


def _claims(memoizer: Memoizer, operators: Operators, workload: Workload, group: Digest) -> _Claims:
    options = {"target": operators.attributes, "space version": search.by_name(SPACE).version}
    inputs = {"function": workload.function, "group": group}
    try:
        outputs = memoizer.run(Action(stages.CLAIM, f"{operators.target}:{workload.label}", inputs, options)).outputs
    except StageError as error:
        if memoizer.workers.stopped:
            raise
        return _Claims([], Counter([f"operator, {workload.label}: {error.message}"]))
    counts = {name: msgspec.json.decode(memoizer.blob(outputs[name])) for name in ("others", "broken", "failed")}
    left = Counter({"that failed when they were measured": counts["failed"]})
    left.update({f"measured on another target: {target}": count for target, count in counts["others"].items()})
    left.update({f"that do not replay: {reason}": count for reason, count in counts["broken"].items()})
    return _Claims(msgspec.json.decode(memoizer.blob(outputs["claims"]), type=list[TrialRecord]), left)


# A database goes out


@dataclass(frozen=True)
class Given:
    """What was written: records of so many operators. Not among them are candidates of other spaces, and those that
    this TVM cannot read."""

    records: int
    operators: int
    others: int
    broken: int


def require_free(folder: Path) -> None:
    """Raises ConfigError where a folder has a database already."""
    there = [name for name in DATABASE.values() if (folder / name).exists()]
    if there:
        raise ConfigError(f"{folder} has a database already ({there[0]})", hint="name a new folder")


def give(memoizer: Memoizer, operators: Operators, folder: Path) -> Given:
    """Writes a database of what was timed here for a target; nothing where there is nothing to write."""
    inputs: dict[str, Digest] = {}
    records = others = count = 0
    for workload in operators.workloads.values():
        standing = operators.ledger.standing(operators.key(workload))
        others += sum(trial.space != SPACE for trial in standing.trials if trial.seconds)
        candidates = exported(standing)
        if candidates:
            inputs[f"f{count}"] = workload.function
            inputs[f"t{count}"] = memoizer.store.put(msgspec.json.encode(candidates))
            records, count = records + len(candidates), count + 1
    if not records:
        return Given(0, 0, others, 0)
    options = {"target": operators.attributes}
    outputs = memoizer.run(Action(stages.EXPORT, f"{operators.target}:{folder.name}", inputs, options)).outputs
    broken = int(memoizer.blob(outputs["broken"]))
    if broken < records:
        _write(folder, {name: memoizer.blob(outputs[part]) for part, name in DATABASE.items()})
    return Given(records - broken, count, others, broken)


def exported(standing: Standing) -> list[tuple[Any, float]]:
    """Decisions and seconds of the candidates that a database of MetaSchedule's shall hold, the fastest first.

    All seconds are as if measured beside the fastest baseline, so that drift between two nights decides nothing. Who
    reads a database takes the fastest: so what seems faster than the best winner and was never confirmed stays here.
    """
    baseline = standing.baseline or 1.0
    winners = {winner.trial.candidate: winner.gain for winner in standing.winners}
    limit = standing.best.gain if standing.best is not None else float("inf")
    ratios = [(trial, winners.get(trial.candidate, ratio(trial))) for trial in standing.trials if trial.space == SPACE]
    kept = [(trial, gain) for trial, gain in ratios if 0 < gain <= limit]
    kept.sort(key=lambda each: (-each[1], each[0].candidate not in winners, each[0].candidate))
    return [(trial.decisions, baseline / gain) for trial, gain in kept]


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            with written_atomically(folder / name, folder) as stream:
                stream.write(data)
            (folder / name).chmod(0o644)  # whoever loads it may add to it
    except OSError as error:
        raise explain_os_error(error, f"writing {folder}") from error
