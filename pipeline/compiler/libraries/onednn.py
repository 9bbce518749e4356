"""oneDNN: convolutions and matrix products with what follows them, on OpenMP's threads.

Takes what oneDNN has a fast implementation for, which it is asked: none of its reference ones. Weights that are free
are packed into the format that it likes best; which one depends on the processor and the number of threads.
"""

from __future__ import annotations

import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.compiler.libraries import wording
from pipeline.compiler.libraries.contract import Installed, Shim
from pipeline.compiler.libraries.locations import package_version, prefixes, runs_here, threads_of
from pipeline.compiler.libraries.wording import Words

if TYPE_CHECKING:
    import tvm

    from pipeline.compiler.anatomy import Anatomy, Cut

_OPERANDS = 4  # as many pointers as the shim takes beside the three tensors


class OneDNN:
    """conv(x, w), matmul(x, w), and their steps  →  tvmake_onednn_run"""

    name = "onednn"
    version = 2
    licence = "Apache-2.0"
    install = "pip install onednn-cpu-gomp onednn-devel-cpu-gomp"
    threads: Literal["openmp", "caller"] = "openmp"
    shim = Path(__file__).with_suffix(".cc")

    def find(self) -> Installed | None:
        """DNNLROOT, the Python environment (the packages named in `install`), or the system's folders."""
        for prefix in prefixes("DNNLROOT"):
            header = prefix / "include" / "oneapi" / "dnnl" / "dnnl.hpp"
            for folder in ("lib", "lib64", f"lib/{sysconfig.get_config_var('MULTIARCH') or ''}"):
                library = prefix / folder / "libdnnl.so.3"
                if header.is_file() and library.is_file():
                    version = package_version("onednn-cpu-gomp") or str(os.path.realpath(library)).rpartition(".so.")[2]
                    return Installed(version, (prefix / "include",), {"libdnnl.so.3": library}, ("-fopenmp",))
        return None

    def match(self, func: tvm.tirx.PrimFunc, target: tvm.target.Target, shim: Shim) -> tvm.tirx.PrimFunc | None:
        from pipeline.compiler.anatomy import dissect

        if not runs_here(target):
            return None
        anatomy = dissect(func)
        if anatomy is None:
            return _mapping(func, shim, threads_of(target))
        for cut in reversed(anatomy.cuts):
            problem = _problem(anatomy, cut)
            plan = shim.plan(problem.description(free=True), threads_of(target)) if problem is not None else None
            if problem is not None and plan is not None and not _is_slow(plan["implementation"]):
                return _call(func, anatomy, cut, problem, plan, shim, threads_of(target))
        return None


def _is_slow(implementation: str) -> bool:
    """Whether an implementation is one of those that are there to be right, not to be fast."""
    return implementation.startswith("ref") or ":ref" in implementation


@dataclass(frozen=True)
class _Problem:
    """One way to put a core to oneDNN: the description without the format of weights, and the tensors."""

    kind: str
    words: Words
    source: Any
    weight: Any
    result: Any
    operands: tuple[Any, ...]

    def description(self, *, free: bool = False, plan: dict[str, str] | None = None) -> str:
        extra: list[tuple[str, object]] = [("weights", "free")] if free else []
        if plan is not None:
            extra = [("packed", plan["packed"]), ("threads", plan["threads"])]
        return wording.described(self.kind, (*self.words, *extra))


def _problem(anatomy: Anatomy, cut: Cut) -> _Problem | None:
    """The core and the steps up to a cut as oneDNN is asked for them; None where they are nothing for it."""
    from pipeline.compiler import products

    core = anatomy.core
    operands = tuple(step.operand.buffer for step in cut.steps if step.operand is not None)
    if len(operands) > _OPERANDS:
        return None
    convolution = products.convolution(core)
    kind = "matmul" if convolution is None else "conv"
    if convolution is None:
        words = wording.product_words(core, cut)
    else:
        words = wording.convolution_words(products.wide(convolution), cut)
    return None if words is None else _Problem(kind, words, core.left, core.right, cut.result, operands)


def _mapping(func: Any, shim: Shim, threads: int) -> Any:
    """pool(x), softmax(x)  →  tvmake_onednn_map"""
    from pipeline.compiler import windows
    from pipeline.compiler.libraries import calls

    # In this order: the first nest of a softmax alone is a pooling.
    found: windows.Softmax | windows.Pooling | None = windows.softmax(func) or windows.pooling(func)
    if found is None:
        return None
    if isinstance(found, windows.Pooling):
        description = wording.described("pool", wording.pooling_words(found))
    else:
        description = wording.described("softmax", wording.softmax_words(found))
    plan = shim.plan(description, threads)
    if plan is None or _is_slow(plan["implementation"]):
        return None
    arguments = (description, found.source, found.result)
    failure = f"oneDNN refused the call: {description.partition(' ')[0]}"
    call = calls.Call("tvmake_onednn_map", arguments, (found.source,), found.result, failure)
    return calls.with_call(func, (), calls.once(call), found.after)


def _call(
    func: Any, anatomy: Anatomy, cut: Cut, problem: _Problem, plan: dict[str, str], shim: Shim, threads: int
) -> Any:
    from pipeline.compiler.libraries import calls

    failure = f"oneDNN refused the call: {problem.kind}"
    weight, packing, description = problem.weight, None, problem.description()
    if calls.is_free(func, problem.weight):
        description = problem.description(plan=plan)
        weight = calls.packed_buffer(int(plan["bytes"]))
        packing = calls.Call(
            "tvmake_onednn_pack",
            (description, problem.weight, weight),
            (problem.weight,),
            weight,
            f"oneDNN refused to pack the weights: {problem.kind}",
        )
    else:
        plain = shim.plan(description, threads)
        if plain is None or _is_slow(plain["implementation"]):
            return None
    pointers = (*problem.operands, *[None] * (_OPERANDS - len(problem.operands)))
    call = calls.Call(
        "tvmake_onednn_run",
        (description, problem.source, weight, problem.result, *pointers),
        (problem.source, weight, *problem.operands),
        problem.result,
        failure,
    )
    return calls.with_call(func, anatomy.first, calls.once(call), cut.after, packing)
