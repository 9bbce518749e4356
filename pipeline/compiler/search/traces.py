"""A schedule's trace as plain JSON, and the function that it makes again of the workload that it was found for.

    [[[instruction, inputs, attributes, outputs], …], [[index, decision], …]]     as MetaSchedule's records hold it

What is written is the whole trace, with what MetaSchedule's post-processing did, so that a replay needs no search, no
rule and no target. It names blocks, so it holds for a workload's canonical form and for no other spelling of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import Schedule

from pipeline.compiler import intrinsics
from pipeline.compiler.prepack import LAYOUT_FREE
from pipeline.errors import last_line

_MAIN = "main"  # what traces call the function that they are for
_POSTPROCESSING = "EnterPostproc"


def plain(trace: Any) -> Any:
    """A trace as plain JSON.

    [IntImm(16), FloatImm(0.25), T.bool(False), ["l3"]]  →  [16, 0.25, false, ["l3"]]
    """
    return _plain(trace.as_json())


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, tirx.IntImm):
        return bool(value.value) if str(value.ty.dtype) == "bool" else int(value.value)
    if isinstance(value, tirx.FloatImm):
        return float(value.value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {str(name): _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value]


def searched(decisions: Any) -> Any:
    """The part of a trace that a search may change: all before the post-processing.

    Raises ValueError for what is no trace.
    """
    instructions, chosen = _checked(decisions)
    names = [instruction[0] for instruction in instructions]
    end = names.index(_POSTPROCESSING) if _POSTPROCESSING in names else len(names)
    return [instructions[:end], [[index, decision] for index, decision in chosen if index < end]]


def module_of(func: tirx.PrimFunc) -> tvm.IRModule:
    """A workload as the module that traces are made on and replayed on."""
    return tvm.IRModule({_MAIN: func.with_attr("global_symbol", _MAIN)})


def replayed(mod: tvm.IRModule, target: tvm.target.Target, decisions: Any) -> Schedule:
    """The schedule that a trace makes of a workload. Raises ValueError, in one line, where it does not fit."""
    instructions, chosen = _checked(decisions)
    if any(instruction[0] == "Tensorize" for instruction in instructions):
        intrinsics.register(target)
    schedule = Schedule(mod)
    try:
        tvm.s_tir.schedule.Trace.apply_json_to_schedule([instructions, chosen], schedule)
    except Exception as error:  # a trace that does not fit fails in any of TVM's ways
        raise ValueError(f"the trace does not fit the workload: {last_line(error)}") from error
    return schedule


def made(schedule: Schedule, func: tirx.PrimFunc) -> tirx.PrimFunc:
    """What a schedule made of a workload, under the workload's own attributes.

    {"global_symbol": "main", "layout_free_buffers": [1]}  →  the latter as the workload has it, or not at all
    """
    result = schedule.mod[_MAIN].without_attr("global_symbol").without_attr(LAYOUT_FREE)
    free = (func.attrs or {}).get(LAYOUT_FREE)
    return result if free is None else result.with_attr(LAYOUT_FREE, free)


def make(func: tirx.PrimFunc, target: tvm.target.Target, decisions: Any) -> tirx.PrimFunc:
    """The function that a trace makes of a workload. Raises ValueError, in one line, where it does not fit."""
    return made(replayed(module_of(func), target, decisions), func)


def _checked(decisions: Any) -> tuple[list[Any], list[Any]]:
    """Instructions and decisions: TVM may take anything else for what it is not."""

    def is_instruction(each: Any) -> bool:
        return (
            isinstance(each, list)
            and len(each) == 4
            and isinstance(each[0], str)
            and all(isinstance(part, list) for part in each[1:])
        )

    is_pair = isinstance(decisions, list) and len(decisions) == 2 and all(isinstance(part, list) for part in decisions)
    if not is_pair or not all(is_instruction(each) for each in decisions[0]):
        raise ValueError(f"not a trace: {_beginning(decisions)}")
    for each in decisions[1]:
        if not (
            isinstance(each, list) and len(each) == 2 and type(each[0]) is int and 0 <= each[0] < len(decisions[0])
        ):
            raise ValueError(f"not a decision of a trace: {_beginning(each)}")
    return decisions[0], decisions[1]


def _beginning(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
