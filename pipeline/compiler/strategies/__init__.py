"""K0 passes: each offers a scheduled function for a workload, or says that it does not apply.

    manual    functions and schedules that users keep in their workspace, each for one workload
    library   a function of a library: pipeline.compiler.libraries
    tuned     the best record of a set of tuning records
    rules     schedule rules by shape and target: pipeline.compiler.rules
    default   loops in their natural order; always applies

To add one, write a file with a class that has a strategy's members and name it in STRATEGIES, whose order is the order
of choice where a target's file gives none. In a workspace, write strategies/<name>.py with an object `strategy`. The
version enters the key: raise it when the same workload would get another function. Import TVM inside `apply`: names and
versions are read where TVM is not loaded.

Each is an ordinary pass of TVM's as well, IRModule → IRModule, and they compose:

    with target:
        mod = tvm.transform.Sequential([as_pass(Rules()), as_pass(Default())])(mod)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from pipeline.compiler.strategies.default import Default
from pipeline.compiler.strategies.rules import Rules

if TYPE_CHECKING:
    import tvm


class Strategy(Protocol):
    """One way to schedule a function."""

    name: str
    version: int

    def apply(self, func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc | None:
        """The function scheduled, with the same parameters and the same meaning; None where it does not apply.

        What lays out weights may be left to the build: see pipeline.compiler.prepack.
        """
        ...


# Those that need nothing but the function. The others are made of what they are given.
STRATEGIES: tuple[Strategy, ...] = (Rules(), Default())

# Every name that an order may hold, in the default order.
ORDER = ("manual", "library", "tuned", "rules", "default")

_DONE = "tirx.is_scheduled"
_MODULES_OWN = ("global_symbol", "target")  # attributes that say nothing of what a function computes


def by_name(name: str) -> Strategy:
    return next(strategy for strategy in STRATEGIES if strategy.name == name)


def as_pass(strategy: Strategy) -> Any:
    """A strategy as a pass of TVM's: schedules every PrimFunc to which it applies and that no pass before it took.

    Runs within a target's scope, where a function names no target of its own.
    """
    import tvm

    @tvm.transform.module_pass(opt_level=0, name=f"Schedule[{strategy.name}]")
    def schedule(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        changed = {gvar: _scheduled(strategy, func) for gvar, func in mod.functions_items()}
        return tvm.IRModule(changed, attrs=mod.attrs)

    return schedule


def _scheduled(strategy: Strategy, func: tvm.ir.BaseFunc) -> tvm.ir.BaseFunc:
    """Name and target are the module's business: a strategy is asked about the function alone, and they are put back.

    @T.prim_func                                        @T.prim_func
    def f(x, y):                                        def f(x, y):
        T.func_attr({"target": t})                  →       T.func_attr({"target": t, "tirx.is_scheduled": True})
        …                                                   … scheduled for t
    """
    import tvm

    if not isinstance(func, tvm.tirx.PrimFunc) or (func.attrs or {}).get(_DONE):
        return func
    kept = {name: value for name in _MODULES_OWN if (value := (func.attrs or {}).get(name)) is not None}
    target = kept.get("target") or tvm.target.Target.current(allow_none=False)
    made = strategy.apply(_without(func, _MODULES_OWN), target)
    if made is None:
        return func
    return _without(made, _MODULES_OWN).with_attr({**kept, _DONE: True})


def _without(func: tvm.tirx.PrimFunc, names: tuple[str, ...]) -> tvm.tirx.PrimFunc:
    for name in names:
        func = func.without_attr(name)
    return func
