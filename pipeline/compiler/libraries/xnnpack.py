"""XNNPACK: convolutions channels-last and matrix products, with a bias and bounds, split over a parallel loop of ours.

It packs weights when it meets them first, into memory of its own, so that only weights are taken that stay as they are.
Other weights at the same place are told by samples of them, not for certain: where a process replaces the weights of a
model in place, that is not enough, so a target's file must name this library.
"""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.compiler.libraries import wording
from pipeline.compiler.libraries.contract import Installed, Shim
from pipeline.compiler.libraries.locations import prefixes, runs_here, threads_of

if TYPE_CHECKING:
    import tvm

    from pipeline.compiler.anatomy import Cut

_SHARED = ("libXNNPACK.so.0", "libpthreadpool.so.0", "libcpuinfo.so.0")
_SMALL = 1 << 20  # multiplications that take less time than starting a loop on several threads
_BOUNDS = ("relu", "clip")


class XNNPACK:
    """conv(x, w), matmul(x, w), + bias, clip  →  for task in parallel: tvmake_xnnpack_run(..., task)"""

    name = "xnnpack"
    version = 1
    licence = "BSD-3-Clause"
    install = "apt-get install libxnnpack-dev libpthreadpool-dev"
    threads: Literal["openmp", "caller"] = "caller"
    shim = Path(__file__).with_suffix(".cc")
    by_name_only = True

    def find(self) -> Installed | None:
        """XNNPACK_ROOT, or the system's folders."""
        for prefix in prefixes("XNNPACK_ROOT"):
            headers = [prefix / "include" / name for name in ("xnnpack.h", "pthreadpool.h")]
            for folder in ("lib", f"lib/{sysconfig.get_config_var('MULTIARCH') or ''}"):
                shared = {name: prefix / folder / name for name in _SHARED}
                if all(path.is_file() for path in (*headers, *shared.values())):
                    # It has no releases: a build is told by what its file is called and how large it is.
                    real = shared[_SHARED[0]].resolve()
                    return Installed(f"{real.name}, {real.stat().st_size} bytes", (prefix / "include",), shared)
        return None

    def match(self, func: tvm.tirx.PrimFunc, target: tvm.target.Target, shim: Shim) -> tvm.tirx.PrimFunc | None:
        from pipeline.compiler import products
        from pipeline.compiler.anatomy import dissect
        from pipeline.compiler.libraries import calls

        anatomy = dissect(func) if runs_here(target) else None
        if anatomy is None or not calls.is_free(func, anatomy.core.right):
            return None
        convolution = products.convolution(anatomy.core)
        for cut in reversed(anatomy.cuts):
            bias = _bias(cut)
            if not _is_clamp(cut) or (bias is not None and not calls.is_free(func, bias)):
                continue
            if convolution is not None:
                description = wording.described("conv", wording.convolution_words(convolution, cut))
            else:
                words = wording.product_words(anatomy.core, cut)
                description = wording.described("matmul", words) if words is not None else ""
            if description and shim.plan(description) is not None:
                work = math.prod(extent for _, extent, _ in anatomy.core.axes)
                call = _call(anatomy.core, cut.result, bias, description)
                tasks = 1 if work < _SMALL else threads_of(target)
                return calls.with_call(func, anatomy.first, calls.split(call, tasks), cut.after)
        return None


def _is_clamp(cut: Cut) -> bool:
    """Whether the steps are an addition, or bounds, or one after the other."""
    names = [step.name for step in cut.steps]
    rest = names[1:] if names[:1] == ["add"] else names
    return len(rest) <= 1 and all(name in _BOUNDS for name in rest)


def _bias(cut: Cut) -> Any | None:
    operands = [step.operand for step in cut.steps if step.operand is not None]
    return operands[0].buffer if operands else None


def _call(core: Any, result: Any, bias: Any | None, description: str) -> Any:
    from pipeline.compiler.libraries import calls

    return calls.Call(
        "tvmake_xnnpack_run",
        (description, core.left, core.right, result, bias),
        (core.left, core.right, *([bias] if bias is not None else [])),
        result,
        f"XNNPACK refused the call: {description.partition(' ')[0]}",
    )
