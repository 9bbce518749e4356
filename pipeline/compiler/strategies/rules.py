"""Schedules that rules make from a function's structure, without tuning: see pipeline.compiler.rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tvm


class Rules:
    """func → the schedule of the first rule that takes it."""

    name = "rules"
    version = 1

    def apply(self, func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc | None:
        from pipeline.compiler import rules

        return rules.schedule(func, target)
