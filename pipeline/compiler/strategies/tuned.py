"""The strategy of tuning records: replays the fastest that was made for this very workload and target.

    winners   tuning records of this project, validated and retested: pipeline.tuning.records
    groups    MetaSchedule's, as users bring them: pipeline.compiler.records

Tuning fills sets of records, this applies what is in one: neither waits for the other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.compiler import search
from pipeline.errors import StageError
from pipeline.tuning.records import TrialRecord, decoded

if TYPE_CHECKING:
    import tvm

    from pipeline.compiler.records import Group
    from pipeline.compiler.search import Space


class Tuned:
    """Applies the first of these winners that can be made again, or else the best record of these groups.

    winners  bytes of trial records, for the workload and the target that it is applied to; the best first
    spaces   search spaces that are not this project's, by name
    passed   after `apply`: what was said of better ones that cannot be made again
    """

    name = "tuned"
    version = 2

    def __init__(
        self, groups: Iterable[Group], winners: Iterable[bytes] = (), spaces: Mapping[str, Space] | None = None
    ) -> None:
        self._groups = tuple(groups)
        self._winners = tuple(winners)
        self._spaces = dict(spaces or {})
        self.passed: list[str] = []

    @functools.cached_property
    def _by_digest(self) -> Mapping[str, Sequence[Group]]:
        found: dict[str, list[Group]] = {}
        for group in self._groups:
            found.setdefault(group.digest(), []).append(group)
        return found

    def apply(self, func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc | None:
        """Raises StageError where records for the target are there and none of them can be replayed."""
        from pipeline.compiler import records

        self.passed = []
        for winner in self._winners:
            try:
                return self._made(winner, func, target)
            except ValueError as error:
                self.passed.append(str(error))
        made, refusals = records.replay_best(self._by_digest.get(records.digest_of(func), ()), target)
        self.passed += refusals
        if made is None and self.passed:
            raise StageError(
                f"none of {len(self.passed)} tuning records can be replayed, the first because: {self.passed[0]}",
                stage="apply",
                subject="tuned",
                hint="tune the operator again",
            )
        return None if made is None else _with_weights_of(func, made)

    def _made(self, winner: bytes, func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc:
        """The candidate of a record. Raises ValueError where it is not the one that was tried."""
        from pipeline.compiler import records

        record = decoded(winner)
        if not isinstance(record, TrialRecord):
            raise ValueError("it is no record of a trial")
        space = self._spaces.get(record.space) or search.by_name(record.space)
        made = space.make(func, target, record.decisions)
        if records.digest_of(made) != record.candidate:
            raise ValueError(f"{record.space} makes another function of it than the one that was tried")
        return _with_weights_of(func, made)


def _with_weights_of(func: tvm.tirx.PrimFunc, made: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """Which weights are free is for this use of the function to say, not for the one that was tuned."""
    from pipeline.compiler.prepack import LAYOUT_FREE

    free = (func.attrs or {}).get(LAYOUT_FREE)
    return made.without_attr(LAYOUT_FREE) if free is None else made.with_attr(LAYOUT_FREE, free)
