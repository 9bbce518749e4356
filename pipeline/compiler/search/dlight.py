"""What TVM's rules for GPUs offer, one candidate for each schedule that TVM can generate code for.

Decisions name the rule and which of its schedules: {"rule": "Matmul", "at": 0}.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import last_line

if TYPE_CHECKING:
    import tvm

    from pipeline.compiler.search import Proposal, Tried


_log = logging.getLogger(__name__)


class DlightSpace:
    """See pipeline.compiler.rules.gpu."""

    name = "dlight"
    version = 1

    def propose(
        self,
        func: tvm.tirx.PrimFunc,
        target: tvm.target.Target,
        tried: Sequence[Tried],
        known: Collection[str],
        count: int,
        seed: int,
    ) -> Sequence[Proposal]:
        """The same for any seed, in dlight's own order."""
        from pipeline.compiler.records import digest_of
        from pipeline.compiler.search import Proposal

        found: list[Proposal] = []
        seen = set(known)
        past = [each.decisions for each in tried]
        for decisions, function in _offers(func, target):
            if len(found) == count:
                break
            if decisions not in past and (digest := digest_of(function)) not in seen:
                seen.add(digest)
                found.append(Proposal(decisions, function))
        return found

    def make(self, func: tvm.tirx.PrimFunc, target: tvm.target.Target, decisions: Any) -> tvm.tirx.PrimFunc:
        from pipeline.compiler.rules import gpu

        rule, at = _parted(decisions)
        if target.kind.name not in gpu.KINDS or rule not in (*gpu.RULES, *gpu.SPECIAL):
            raise ValueError(f"dlight has no rule {rule} for {target.kind.name}")
        offered = _asked(rule, func, target)
        if not 0 <= at < len(offered):
            raise ValueError(f"dlight's {rule} offers {len(offered)} schedules, not {at + 1}")
        return offered[at].mod["main"]


def _offers(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> Iterator[tuple[dict[str, Any], tvm.tirx.PrimFunc]]:
    """Every schedule of every rule that code can be generated for, with the decisions that make it again."""
    from pipeline.compiler.rules import gpu

    for rule in (*gpu.RULES, *gpu.SPECIAL) if target.kind.name in gpu.KINDS else ():
        for at, schedule in enumerate(_asked(rule, func, target)):
            function = schedule.mod["main"]
            if gpu.generates(function, target):
                yield {"rule": rule, "at": at}, function


def _asked(rule: str, func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> Sequence[tvm.s_tir.Schedule]:
    """Nothing, where a rule fails: some do on functions that they were not written for."""
    from pipeline.compiler.rules import gpu

    try:
        return gpu.offered(rule, func, target)
    except Exception as error:  # whatever becomes of a rule
        _log.debug("the rule %s of dlight's failed: %s", rule, last_line(error))
        return ()


def _parted(decisions: Any) -> tuple[str, int]:
    """Raises ValueError for what are not decisions."""
    try:
        rule, at = decisions["rule"], decisions["at"]
    except (TypeError, KeyError):
        rule, at = None, None
    if not isinstance(rule, str) or type(at) is not int:
        raise ValueError(f"{decisions!r} does not name a rule and which of its schedules")
    return rule, at
