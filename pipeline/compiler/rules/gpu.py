"""GPU targets: the rules that TVM ships for them (dlight), in its usual order."""

from __future__ import annotations

import json
import logging

import tvm
from tvm import s_tir, tirx

from pipeline.compiler import objects
from pipeline.errors import last_line

_log = logging.getLogger(__name__)

KINDS = frozenset({"cuda", "rocm", "opencl", "vulkan", "metal", "webgpu"})


def schedule(func: tirx.PrimFunc, target: tvm.target.Target) -> s_tir.Schedule | None:
    """The first schedule that a rule of dlight's offers and that TVM can generate code for: some offer others."""
    from tvm.s_tir.dlight import gpu

    for rule in (gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()):
        with target:
            offered = rule.apply(func, target, False)
        for schedule in [offered] if isinstance(offered, s_tir.Schedule) else offered or []:
            if _generates(schedule.mod["main"], target):
                return schedule
    return None


def _generates(func: tirx.PrimFunc, target: tvm.target.Target) -> bool:
    try:
        objects.compile_function(func, "tried", json.loads(str(target)))
    except Exception as error:  # whatever TVM's lowering makes of it
        _log.debug("a schedule of dlight's generates no code: %s", last_line(error))
        return False
    return True
