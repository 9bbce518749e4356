"""What became of tuned functions after the compiler was changed: made again and validated, or to be tuned again.

A winner that was validated with other tools is made again from its record by the next build and compared with the
default before it is applied, as whatever is not known to be right. `doit tune` then times it again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.report import duration
from pipeline.tuning.records import TOOLS, Winner
from pipeline.types import TUNED, Decision, Workload

if TYPE_CHECKING:
    from pipeline.build import Build
    from pipeline.models import Model



@dataclass(frozen=True)
class Replay:
    """A winner of other tools, and what a build with those of today made of it.

    why      "" where it is applied; else why it is not
    seconds  by which the operator's calls in an inference are slower without it, None where no time is known
    """

    workload: Workload
    winner: Winner
    why: str
    seconds: float | None


@dataclass(frozen=True)
class Upgrade:
    """All of them, of the models of one target."""

    target: str
    changed: str  # what is another now, in words
    replays: tuple[Replay, ...]
    total: float  # seconds of an inference of the models

    @property
    def lost(self) -> list[Replay]:
        return [each for each in self.replays if each.why]

    def lines(self) -> list[str]:
        """What a person is told; nothing where there is nothing to tell."""
        if not self.replays:
            return []
        kept, lost = len(self.replays) - len(self.lost), self.lost
        said = f"{self.target}: {self.changed}: {kept} of {len(self.replays)} tuned functions made again and validated"
        if not lost:
            return [f"{said}\n  → type `doit tune` to time them again"]
        risk = sum(each.seconds or 0.0 for each in lost)
        cost = f"; {duration(risk)} of {duration(self.total)} are at risk" if risk else ""
        first = lost[0]
        return [
            f"{said}, {len(lost)} to be tuned again{cost}\n"
            f"  {first.workload.label}: {first.why}\n"
            f"  → type `doit tune`"
        ]


def upgrade(build: Build, target: str, models: Iterable[Model]) -> Upgrade:
    """What the builds of these models found out. Asks for nothing that was not asked for."""
    composition, listed = build.composition(target), list(models)
    seconds: dict[str, float] = {}
    total = 0.0
    workloads: dict[str, Workload] = {}
    for model in listed:
        workloads |= {each.digest: each for each in build.plan(target, model).workloads if each.calls}
        if (profile := build.profile(target, model)) is not None:
            total += profile.seconds
            for each in workloads.values():
                seconds[each.digest] = seconds.get(each.digest, 0.0) + profile.operators.get(each.symbol, 0.0)
    replays = []
    for digest, winner in composition.unproven.items():
        if (workload := workloads.get(digest)) is None:
            continue
        why = _why_not(build.decision(target, workload), composition.cannot_be_made.get(digest, ()))
        if why is not None:
            slower = seconds[digest] * (1 - 1 / winner.gain) if seconds.get(digest) else None
            replays.append(Replay(workload, winner, why, slower))
    return Upgrade(target, _changed(build, replays), tuple(replays), total)


def _why_not(decision: Decision, passed: Iterable[str]) -> str | None:
    """Why a winner is not applied; "" where it is, None where nobody asked for it."""
    if reasons := list(passed):
        return f"it cannot be made again: {reasons[0]}"
    if decision.strategy == TUNED:
        return ""
    tried = next((trial for trial in decision.trials if trial.strategy == TUNED), None)
    if tried is None:
        return None
    return tried.refused or f"{decision.strategy} is faster"


def _changed(build: Build, replays: Iterable[Replay]) -> str:
    """Which tool is another than that of the winners, from what to what."""
    now = build.memoizer.toolchain.pick(TOOLS)
    for replay in replays:
        for name in TOOLS:
            before = replay.winner.tools.get(name, "unknown")
            if before != now[name]:
                named = {"tvm": "TVM", "tvm-ffi": "TVM's FFI"}.get(name)
                return f"{named} {before} → {now[name]}" if named else "another build of TVM"
    return "another TVM"
