"""OpenBLAS: matrix products with simple steps after them, split over a parallel loop of ours.

1x1 convolutions that are matrix products are taken as such.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.compiler.libraries import wording
from pipeline.compiler.libraries.contract import Installed, Shim
from pipeline.compiler.libraries.locations import package_version, prefixes, runs_here, threads_of

if TYPE_CHECKING:
    import tvm

    from pipeline.compiler.anatomy import Anatomy, Cut

_OPERANDS = 4  # as many pointers as the shim takes beside the three matrices
_STEPS = frozenset(
    {"relu", "leaky", "clip", "linear", "hardsigmoid", "hardswish", "add", "sub", "mul", "div", "max", "min"}
)
_SMALL = 1 << 21  # multiplications that take less time than starting a loop on several threads


class OpenBLAS:
    """matmul(x, w) and its steps  →  for task in parallel: tvmake_openblas_run(..., task)"""

    name = "openblas"
    version = 1
    licence = "BSD-3-Clause"
    install = "pip install scipy-openblas32"
    threads: Literal["openmp", "caller"] = "caller"
    shim = Path(__file__).with_suffix(".cc")

    def find(self) -> Installed | None:
        """OPENBLAS_ROOT, the package named in `install`, or the system's folders."""
        import os

        package = importlib.util.find_spec("scipy_openblas32") if "OPENBLAS_ROOT" not in os.environ else None
        if package is not None and package.origin is not None:
            root = Path(package.origin).parent
            name = "libscipy_openblas.so"
            version = package_version("scipy-openblas32") or ""
            shared = {name: root / "lib" / name}
            return Installed(version, (root / "include",), shared, ("-DBLAS_SYMBOL_PREFIX=scipy_",))
        for prefix in prefixes("OPENBLAS_ROOT"):
            library = prefix / "lib" / "libopenblas.so.0"
            if (prefix / "include" / "cblas.h").is_file() and library.is_file():
                return Installed(library.resolve().name, (prefix / "include",), {"libopenblas.so.0": library})
        return None

    def match(self, func: tvm.tirx.PrimFunc, target: tvm.target.Target, shim: Shim) -> tvm.tirx.PrimFunc | None:
        from pipeline.compiler.anatomy import dissect

        anatomy = dissect(func) if runs_here(target) else None
        if anatomy is None:
            return None
        for cut in reversed(anatomy.cuts):
            operands = [step.operand for step in cut.steps if step.operand is not None]
            if len(operands) > _OPERANDS or not {step.name for step in cut.steps} <= _STEPS:
                continue
            words = wording.product_words(anatomy.core, cut)
            if words is None:
                continue
            description = wording.described("matmul", words)
            if shim.plan(description) is not None:
                return _call(func, anatomy, cut, description, threads_of(target))
        return None


def _call(func: Any, anatomy: Anatomy, cut: Cut, description: str, threads: int) -> Any:
    from pipeline.compiler.libraries import calls

    core = anatomy.core
    operands = tuple(step.operand.buffer for step in cut.steps if step.operand is not None)
    pointers = (*operands, *[None] * (_OPERANDS - len(operands)))
    work = 1
    for _, extent, _ in core.axes:
        work *= extent
    call = calls.Call(
        "tvmake_openblas_run",
        (description, core.left, core.right, cut.result, *pointers),
        (core.left, core.right, *operands),
        cut.result,
        "OpenBLAS refused the call: matmul",
    )
    return calls.with_call(func, anatomy.first, calls.split(call, 1 if work < _SMALL else threads), cut.after)
