"""GPU targets: the rules that TVM ships for them (dlight), in its usual order."""

from __future__ import annotations

import tvm
from tvm import s_tir, tirx

KINDS = frozenset({"cuda", "rocm", "opencl", "vulkan", "metal", "webgpu"})


def schedule(func: tirx.PrimFunc, target: tvm.target.Target) -> s_tir.Schedule | None:
    """The first schedule that a rule of dlight's offers."""
    from tvm.s_tir.dlight import gpu

    with target:
        for rule in (gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()):
            offered = rule.apply(func, target, False)
            if offered is not None:
                return offered if isinstance(offered, s_tir.Schedule) else offered[0]
    return None
