"""The strategy of tuning records: replays the fastest that was made for this very workload and target.

Tuning fills sets of records, this applies what is in one: neither waits for the other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
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

    @functools.cached_property
    def _by_digest(self) -> Mapping[str, Sequence[Group]]:
        found: dict[str, list[Group]] = {}
        for group in self._groups:
            found.setdefault(group.digest(), []).append(group)
        return found

    def apply(self, func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc | None:
        """Raises StageError where records for the target are there and none of them can be replayed."""
        from pipeline.compiler import records
        from pipeline.compiler.prepack import LAYOUT_FREE

        made, refusals = records.replay_best(self._by_digest.get(records.digest_of(func), ()), target)
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
