"""The strategy that always applies: the function as lowering made it, loops in their natural order."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tvm


class Default:
    """func → func."""

    name = "default"
    version = 1

    def apply(self, func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc | None:
        return func
