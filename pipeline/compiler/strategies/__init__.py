"""K0 passes: each offers a scheduled function for a workload, or says that it does not apply.

To add one, write a file with a class that has these members and name it in STRATEGIES, whose order is the order of
choice where a target's file gives none. The version enters the key: raise it when the same workload would get another
function. Import TVM inside `apply`: names and versions are read where TVM is not loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pipeline.compiler.strategies.default import Default

if TYPE_CHECKING:
    import tvm


class Strategy(Protocol):
    """One way to schedule a function."""

    name: str
    version: int

    def apply(self, func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc | None:
        """The function scheduled, with the same parameters and the same meaning; None where it does not apply."""
        ...


STRATEGIES: tuple[Strategy, ...] = (Default(),)


def by_name(name: str) -> Strategy:
    return next(strategy for strategy in STRATEGIES if strategy.name == name)
