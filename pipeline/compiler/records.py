"""MetaSchedule's tuning records as this project keeps them: grouped by workload digest, each group self-contained.

A database of MetaSchedule's is two files of JSON lines:

    database_workload.json        [structural hash, module]
    database_tuning_record.json   [index of the workload's line, [trace, seconds, target, arguments]]

A trace names blocks, so a record can be replayed on the module that it was made for and on no other: a group holds that
module beside its records. A line that cannot be read is counted and left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.s_tir import meta_schedule

from pipeline.compiler import intrinsics, ir
from pipeline.compiler.prepack import LAYOUT_FREE
from pipeline.errors import StoreError, last_line
from pipeline.hashing import Digest
from pipeline.platforms import architecture


@dataclass(frozen=True)
class Group:
    """The records of one workload: its module in MetaSchedule's JSON, and each record in MetaSchedule's JSON."""

    workload: Any
    records: tuple[Any, ...]

    def to_bytes(self) -> bytes:
        return json.dumps([self.workload, list(self.records)], separators=(",", ":")).encode()

    def digest(self) -> str:
        return digest_of(function_of(meta_schedule.database.Workload.from_json(self.workload)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Group:
        try:
            workload, records = json.loads(data)
            return cls(workload, tuple(records))
        except (ValueError, TypeError) as error:
            raise StoreError(f"a set of tuning records cannot be read: {last_line(error)}") from error


def read_database(workloads: bytes, records: bytes) -> tuple[dict[str, Group], int]:
    """The groups of a database by `digest_of` their function, and how many lines could not be read."""
    modules: dict[int, tuple[str, Any]] = {}
    bad = 0
    for i, line in enumerate(workloads.splitlines()):
        try:
            written = json.loads(line)
            modules[i] = digest_of(function_of(meta_schedule.database.Workload.from_json(written))), written
        except Exception:  # whatever TVM's reader makes of a line that is torn or of another version
            bad += 1
    found: dict[str, tuple[Any, list[Any]]] = {}
    for each in _parsed(records):
        is_pair = isinstance(each, list) and len(each) == 2 and isinstance(each[0], int)
        if not is_pair or each[0] not in modules or not _is_record(each[1]):
            bad += 1
            continue
        digest, module = modules[each[0]]
        found.setdefault(digest, (module, []))[1].append(each[1])
    return {digest: Group(module, tuple(listed)) for digest, (module, listed) in found.items()}, bad


def _parsed(lines: bytes) -> Iterator[Any]:
    for line in lines.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            yield None


def _is_record(written: Any) -> bool:
    """Whether something is trace, seconds of runs or null, target or null, and arguments."""
    if not isinstance(written, list) or len(written) != 4:
        return False
    trace, runs, target, _ = written
    are_seconds = runs is None or (isinstance(runs, list) and all(isinstance(run, int | float) for run in runs))
    return isinstance(trace, list) and are_seconds and (target is None or isinstance(target, dict | str))


def digest_of(func: tvm.tirx.PrimFunc) -> str:
    """The digest under which a function's records are found: its workload digest, whichever parameters are weights."""
    return Digest.of(ir.canonical(func.without_attr(LAYOUT_FREE))).hash


def function_of(workload: meta_schedule.database.Workload) -> tvm.tirx.PrimFunc:
    (func,) = workload.mod.functions.values()
    return func


def seconds_of(record: Any) -> float:
    """The least of a record's runs; infinite for one that failed, which MetaSchedule writes as 1e10."""
    return min((float(run) for run in record[1] or () if 0 < float(run) < 1e9), default=float("inf"))


def is_for(record: Any, target: tvm.target.Target) -> bool:
    """Whether a record was measured on a target like this: of one kind, processor, set of features and architecture.

    MetaSchedule's targets often say no more than kind and processor; a triple counts where both have one.
    """
    try:
        recorded = tvm.target.Target(record[2])
    except Exception:  # one that this TVM does not know is not this one
        return False
    theirs, ours = _triple(recorded), _triple(target)
    return (
        recorded.kind.name == target.kind.name
        and all(_attribute(recorded, name) == _attribute(target, name) for name in ("mcpu", "mattr", "arch"))
        and not (theirs and ours and architecture(theirs) != architecture(ours))
    )


def _attribute(target: tvm.target.Target, name: str) -> str | list[str]:
    value = target.attrs.get(name) or ""
    return str(value) if isinstance(value, str) else sorted(map(str, value))


def _triple(target: tvm.target.Target) -> str:
    return str(target.attrs.get("mtriple") or "")


def replay_best(groups: Iterable[Group], target: tvm.target.Target) -> tuple[tvm.tirx.PrimFunc | None, Sequence[str]]:
    """The function that the fastest record gives which was made for this target and can be replayed.

    Returns it, or None; and what was said of faster ones that could not be.
    """
    listed = [(group, record) for group in groups for record in group.records]
    refusals: list[str] = []
    for group, record in sorted(listed, key=lambda each: seconds_of(each[1])):
        if seconds_of(record) == float("inf"):
            continue
        try:
            if is_for(record, target):
                return _replayed(group, record, target), refusals
        except Exception as error:  # a trace that does not fit fails in any of TVM's ways
            refusals.append(last_line(error))
    return None, refusals


def _replayed(group: Group, record: Any, target: tvm.target.Target) -> tvm.tirx.PrimFunc:
    if '"Tensorize"' in json.dumps(record[0]):
        intrinsics.register(target)
    workload = meta_schedule.database.Workload.from_json(group.workload)
    schedule = tvm.s_tir.Schedule(workload.mod)
    trace = meta_schedule.database.TuningRecord.from_json(record, workload).trace
    trace.apply_to_schedule(schedule, remove_postproc=False)
    (made,) = schedule.mod.functions.values()
    return made
