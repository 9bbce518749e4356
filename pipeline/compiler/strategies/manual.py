"""The strategy of hand-written code: each function or schedule in a workspace's manual/*.py, for one workload.

    from tvm.script import tirx as T
    from pipeline.compiler.strategies import manual

    @manual.replaces("4b17c507")          # the workload's digest, or its beginning, as `doit list` shows it
    @T.prim_func(s_tir=True)
    def conv(x: …, w: …, y: …): …         # another function with the same parameters

    @manual.replaces(dense_workload)      # or the workload itself, a PrimFunc: found by structural hash and equality
    def dense(sch): …                     # a schedule: changes the tvm.s_tir.Schedule that it is given

What is written is compared with the default on seeded inputs before it is used. (Write `manual.replaces`, with the dot:
TVMScript cannot read a decorator that is a plain name.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import tvm


@dataclass(frozen=True)
class Replacement:
    """What a workspace puts in the place of one workload: a PrimFunc, or a function that schedules it."""

    workload: Any  # a digest or its beginning, or a PrimFunc
    implementation: Any
    name: str

    def workload_digest(self) -> str:
        """The digest of the workload, or its beginning."""
        if isinstance(self.workload, str):
            return self.workload.lower()
        from pipeline.compiler import ir
        from pipeline.hashing import Digest

        return Digest.of(ir.canonical(self.workload)).hash


def replaces(workload: Any) -> Callable[[Any], Replacement]:
    """Binds what is decorated to a workload: see the module's text."""

    def bind(implementation: Any) -> Replacement:
        attrs = getattr(implementation, "attrs", None) or {}
        name = getattr(implementation, "__name__", "") or str(attrs.get("global_symbol", "")) or "function"
        return Replacement(workload, implementation, name)

    return bind


class Manual:
    """One replacement as a strategy. Applies to its own workload alone."""

    name = "manual"
    version = 1

    def __init__(self, replacement: Replacement) -> None:
        self._replacement = replacement

    def apply(self, func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc | None:
        import tvm

        from pipeline.compiler import ir
        from pipeline.hashing import Digest

        if not Digest.of(ir.canonical(func)).hash.startswith(self._replacement.workload_digest()):
            return None
        written = self._replacement.implementation
        if isinstance(written, tvm.tirx.PrimFunc):
            _require_same_parameters(self._replacement.name, written, func)
            return written
        schedule = tvm.s_tir.Schedule(func)
        with target:
            result = written(schedule)
        made = result if isinstance(result, tvm.s_tir.Schedule) else schedule
        (changed,) = made.mod.functions.values()
        return changed


def _require_same_parameters(name: str, written: tvm.tirx.PrimFunc, func: tvm.tirx.PrimFunc) -> None:
    from pipeline.compiler import ir

    theirs, ours = ir.shapes(written), ir.shapes(func)
    if theirs != ours:
        raise ConfigError(
            f"the manual function {name!r} takes ({', '.join(theirs)}); the workload takes ({', '.join(ours)})",
            hint="give it the workload's parameters, in order",
        )


def replacements(module: Any) -> list[Replacement]:
    """What a module of a workspace binds, in the order of its definitions."""
    return [value for value in vars(module).values() if isinstance(value, Replacement)]
