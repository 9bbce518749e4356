"""GPU targets: the rules that TVM ships for them (dlight), in its usual order."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

import tvm
from tvm import s_tir, tirx

from pipeline.compiler import intrinsics, objects
from pipeline.compiler.rules.choices import Choices
from pipeline.errors import last_line

_log = logging.getLogger(__name__)

KINDS = frozenset({"cuda", "rocm", "opencl", "vulkan", "metal", "webgpu"})
RULES = ("Matmul", "GEMV", "Reduction", "GeneralReduction", "Fallback")  # of tvm.s_tir.dlight.gpu, in order
# Those that are for a few functions each, and that the ones above take as well: only a search asks them.
SPECIAL = ("Transpose", "LowBatchGEMV", "RMSNorm")


def schedule(func: tirx.PrimFunc, target: tvm.target.Target, _choices: Choices) -> s_tir.Schedule | None:
    """The first schedule that a rule of dlight's offers and that TVM can generate code for: some offer others."""
    for rule in RULES:
        for each in offered(rule, func, target):
            if generates(each.mod["main"], target):
                return each
    return None


def offered(rule: str, func: tirx.PrimFunc, target: tvm.target.Target) -> Sequence[s_tir.Schedule]:
    """What a rule of dlight's offers for a function.

    dlight has a flag by which a rule may leave open what is to be tuned. None of these rules of this TVM reads it.
    """
    from tvm.s_tir.dlight import gpu

    # A rule may import intrinsics of its device's: those alone, where the package would take half a minute.
    with intrinsics.standing_in(), target:
        found = getattr(gpu, rule)().apply(func, target, False)
    return [found] if isinstance(found, s_tir.Schedule) else list(found or ())


def generates(func: tirx.PrimFunc, target: tvm.target.Target) -> bool:
    """Whether TVM makes code of a scheduled function."""
    try:
        objects.compile_function(func, "tried", json.loads(str(target)))
    except Exception as error:  # whatever TVM's lowering makes of it
        _log.debug("a schedule of dlight's generates no code: %s", last_line(error))
        return False
    return True
