"""MetaSchedule's databases and this project's tuning records: what is taken from one, and what is given to one.

    taken    records of a database → claims: candidates that are timed here before they count (pipeline.tuning.records)
    given    candidates that were timed here → a database that MetaSchedule loads and finds them in

A trace names blocks. A database's are those of whoever tuned, this project's those of the canonical function: what is
taken is told anew in the canonical names. Nothing is taken that was measured on another target.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.s_tir import meta_schedule

from pipeline.compiler import search
from pipeline.compiler.prepack import PREPROCESS
from pipeline.compiler.records import Group, digest_of, function_of, is_for, seconds_of
from pipeline.errors import last_line
from pipeline.tuning.records import Outcome, TrialRecord

SPACE = "post-order-apply"  # whose decisions are traces


@dataclass(frozen=True)
class Taken:
    """What was taken of a group, and how many records were not, by why.

    claims  one for each candidate, with the least of the seconds that are claimed for it
    others  by target, those that were measured on another
    failed  those without a time
    broken  by reason, those that do not replay
    """

    claims: tuple[TrialRecord, ...]
    others: Mapping[str, int] = field(default_factory=dict)
    failed: int = 0
    broken: Mapping[str, int] = field(default_factory=dict)


def taken(group: Group, func: tirx.PrimFunc, target: tvm.target.Target) -> Taken:
    """The records of a group that were measured on a target like this, as claims about a workload.

    `func` is the workload; the group's module is the same function with names of its own.
    """
    space = search.by_name(SPACE)
    names = _names(function_of(meta_schedule.database.Workload.from_json(group.workload)), func)
    claims: dict[str, TrialRecord] = {}
    others: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    failed = 0
    for record in group.records:
        seconds = seconds_of(record)
        if not is_for(record, target):
            others[_shown(record[2])] += 1
        elif seconds == float("inf"):
            failed += 1
        else:
            decisions = renamed(record[0], *names)
            try:
                candidate = digest_of(space.make(func, target, decisions))
            except ValueError as error:
                broken[last_line(error)] += 1
                continue
            known = claims.get(candidate)
            if known is None or (known.seconds or seconds) > seconds:
                claims[candidate] = TrialRecord(
                    candidate=candidate,
                    space=space.name,
                    space_version=space.version,
                    decisions=decisions,
                    outcome=Outcome.CLAIMED,
                    said="from a database of MetaSchedule's",
                    seconds=seconds,
                )
    return Taken(tuple(claims.values()), dict(others), failed, dict(broken))


def renamed(trace: Any, blocks: Mapping[str, str], buffers: Mapping[str, str]) -> Any:
    """A trace as this project writes it, with other names of blocks.

    What is made of a block is named after it, and what copies a buffer after that:

    {"conv2d": "block1"}, {"conv2d": "b3"}:
           GetSBlock("conv2d"), GetSBlock("conv2d_update"), GetSBlock("conv2d_global")
    →      GetSBlock("block1"), GetSBlock("block1_update"), GetSBlock("b3_global")
    """
    match trace:
        case [[*instructions], decisions]:
            return [[_with_names(each, blocks, buffers) for each in instructions], decisions]
    return trace  # no trace: whoever replays it says so


def _with_names(instruction: Any, blocks: Mapping[str, str], buffers: Mapping[str, str]) -> Any:
    match instruction:
        case ["GetSBlock", inputs, [str(name), *rest], outputs]:
            return ["GetSBlock", inputs, [_renamed(name, blocks, buffers), *rest], outputs]
        case ["Annotate", [block, 1], [name], outputs] if name == PREPROCESS:
            # MetaSchedule's search says `true`, and its JSON a number: the same candidate under two digests.
            return ["Annotate", [block, True], [name], outputs]
    return instruction


# What TVM puts after the name of a block for those that it makes of it: decomposed, factored, blockized.
_OF_BLOCKS = frozenset({"init", "update", "rf", "o"})


def _renamed(name: str, blocks: Mapping[str, str], buffers: Mapping[str, str]) -> str:
    if name in blocks:
        return blocks[name]
    of_block, of_buffer = _stem(name, blocks), _stem(name, buffers)
    suffixes = re.split("[_.]", name.removeprefix(of_block))[1:]
    if of_block and (not of_buffer or _OF_BLOCKS.issuperset(suffixes)):
        return blocks[of_block] + name.removeprefix(of_block)
    return buffers[of_buffer] + name.removeprefix(of_buffer) if of_buffer else name


def _stem(name: str, names: Iterable[str]) -> str:
    """The longest name that another begins with, before a suffix; "" where there is none."""
    return max((each for each in names if name.startswith((f"{each}_", f"{each}."))), key=len, default="")


def _names(theirs: tirx.PrimFunc, ours: tirx.PrimFunc) -> tuple[dict[str, str], dict[str, str]]:
    """The names of blocks, and of buffers, of one function → those of another that is structurally the same."""
    blocks, buffers = (zip(of(theirs), of(ours), strict=True) for of in (_blocks, _buffers))
    return dict(reversed([*blocks])), dict(reversed([*buffers]))  # of two with one name the first counts


def _blocks(func: tirx.PrimFunc) -> list[str]:
    return [str(block.name_hint) for block in _visited(func)]


def _buffers(func: tirx.PrimFunc) -> list[str]:
    alloc = [buffer for block in _visited(func) for buffer in block.alloc_buffers]
    return [str(buffer.name) for buffer in (*func.params, *alloc)]


def _visited(func: tirx.PrimFunc) -> list[Any]:
    found: list[Any] = []

    def visit(block: tvm.s_tir.SBlock) -> None:
        found.append(block)

    tvm_ffi.structural_walk(func.body, (tvm.s_tir.SBlock, visit), order="pre")
    return found


def _shown(target: Any) -> str:
    """A record's target as a person tells it from another."""
    if isinstance(target, Mapping):
        told = [f"-{name}={target[name]}" for name in ("mcpu", "arch", "mtriple") if target.get(name)]
        return " ".join([str(target.get("kind", "no kind")), *told])
    return str(target) if target else "no target"


@dataclass(frozen=True)
class Given:
    """A database of MetaSchedule's, as the lines of its two files, and how many candidates are not in it."""

    workloads: bytes
    records: bytes
    broken: int


def given(workloads: Iterable[tuple[tirx.PrimFunc, Iterable[tuple[Any, float]]]], target: tvm.target.Target) -> Given:
    """The database of candidates (decisions, seconds) of workloads. A trace that this TVM cannot read is left out: one
    of them, and MetaSchedule would load nothing."""
    modules: list[str] = []
    lines: list[str] = []
    broken = 0
    for func, candidates in workloads:
        workload = meta_schedule.database.Workload(_module(func))
        arguments = meta_schedule.arg_info.ArgInfo.from_prim_func(func)
        written = []
        for decisions, seconds in candidates:
            record = [decisions, [seconds], json.loads(str(target)), [each.as_json() for each in arguments]]
            try:
                meta_schedule.database.TuningRecord.from_json(record, workload)
                written.append(json.dumps([len(modules), record], separators=(",", ":")))
            except Exception:  # whatever TVM's reader makes of it
                broken += 1
        if written:
            modules.append(json.dumps(workload.as_json(), separators=(",", ":")))
            lines += written
    return Given(_text(modules), _text(lines), broken)


def _module(func: tirx.PrimFunc) -> tvm.IRModule:
    """A workload as MetaSchedule's tasks have it."""
    return tvm.IRModule({"main": func.with_attr("global_symbol", "main").with_attr("tirx.noalias", True)})


def _text(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
