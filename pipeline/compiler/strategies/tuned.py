"""The strategy of tuning records: replays the fastest that was made for this very workload and target.

Tuning fills sets of records, this applies what is in one: neither waits for the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pipeline.errors import StageError

if TYPE_CHECKING:
    import tvm

    from pipeline.compiler.records import Group


class Tuned:
    """Applies the best record of these groups: see pipeline.compiler.records."""

    name = "tuned"
    version = 1

    def __init__(self, groups: Iterable[Group]) -> None:
        self._groups = tuple(groups)

    def apply(self, func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc | None:
        """Raises StageError where records for the target are there and none of them can be replayed."""
        from pipeline.compiler import records
        from pipeline.compiler.prepack import LAYOUT_FREE

        digest = records.digest_of(func)
        mine = [group for group in self._groups if group.digest() == digest]
        made, refusals = records.replay_best(mine, target)
        if made is None and refusals:
            raise StageError(
                f"none of {len(refusals)} tuning records can be replayed, the first because: {refusals[0]}",
                stage="apply",
                subject="tuned",
                hint="tune the operator again",
            )
        if made is None:
            return None
        # Which weights are free is for this use of the function to say, not for the one that was tuned.
        free = (func.attrs or {}).get(LAYOUT_FREE)
        return made.without_attr(LAYOUT_FREE) if free is None else made.with_attr(LAYOUT_FREE, free)
