"""Schedules without tuning: rules that read a function's structure and answer a schedule or None.

The result depends on the function and the target alone. RULES is the order of choice on a CPU; GPUs have TVM's own.
To add a rule, write a file with `schedule(func, target, choices) -> Schedule or None` and name it in RULES. After the
last: tails that do not divide, and functions such as exp that LLVM would call element by element.

What a rule could do in more than one way it asks of `choices`: a search may decide otherwise, see choices.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import tvm
from tvm import s_tir, tirx

from pipeline.compiler.rules import generic, gpu, stages
from pipeline.compiler.rules.choices import Choices
from pipeline.compiler.rules.fastmath import vectorizable
from pipeline.compiler.rules.tails import overlap
from pipeline.errors import last_line

Rule = Callable[[tirx.PrimFunc, tvm.target.Target, Choices], s_tir.Schedule | None]

RULES: tuple[tuple[str, Rule], ...] = (("stages", stages.schedule), ("generic", generic.schedule))
GPU_RULES: tuple[tuple[str, Rule], ...] = (("dlight", gpu.schedule),)

_log = logging.getLogger(__name__)


def schedule(func: tirx.PrimFunc, target: tvm.target.Target, choices: Choices | None = None) -> tirx.PrimFunc | None:
    """The function scheduled by the first rule that takes it; None where none does.

    A rule that TVM's schedules refuse is logged, and the next one is asked; where there are decisions, ValueError.
    """
    choices = choices or Choices()
    if target.kind.name == "c":
        return None  # the C that TVM generates of vectors does not compile
    on_gpu = target.kind.name in gpu.KINDS
    for name, rule in GPU_RULES if on_gpu else RULES:
        try:
            scheduled = rule(func, target, choices)
        except (RuntimeError, ValueError, TypeError) as error:
            if choices.decisions:
                raise ValueError(f"the rule {name} failed: {last_line(error)}") from error
            _log.warning("the rule %s failed: %s", name, last_line(error))
            continue
        if scheduled is not None:
            result = scheduled.mod["main"]
            return result if on_gpu else vectorizable(overlap(result))
    return None
