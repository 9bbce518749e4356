"""What is known of each operator of a workspace's models, as their record sets say it. Needs no TVM."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.devices.contract import MeasuredOn
from pipeline.errors import ConfigError
from pipeline.processor import device as this_machine
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.records import Outcome

if TYPE_CHECKING:
    from pipeline.models import Model
    from pipeline.types import Plan, Workload
    from pipeline.workspace import Selection, Workspace


@dataclass(frozen=True)
class Row:
    """One operator on one target.

    key       of its set
    trials    candidates tried here; of them `timed` have a time, and the others failed by cause
    claims    candidates that were timed elsewhere and not tried here yet
    unread    records that cannot be read
    baseline  seconds; `best` those of the best winner, which is `gain` times as fast as the baseline beside it
    spent     seconds of tuning
    """

    target: str
    operator: str
    shapes: Sequence[str]
    models: Sequence[str]
    key: str
    trials: int
    timed: int
    failures: Mapping[Outcome, int]
    claims: int
    unread: int
    winners: int
    gain: float
    baseline: float | None
    best: float | None
    spent: float

    @property
    def is_empty(self) -> bool:
        """Whether there are no records."""
        return not (self.trials or self.claims or self.unread)


@dataclass
class Operators:
    """The operators of one target's models, each once, and their record sets.

    is_here    whether anything can be tried for the target: on this machine, or from it on a device
    device     what it is tried on, as records are kept by it
    workloads  by digest
    models     names of those that call it, by the workload's digest
    """

    target: str
    attributes: Mapping[str, Any]
    is_here: bool
    ledger: Ledger
    workloads: dict[str, Workload] = field(default_factory=dict)
    models: dict[str, list[str]] = field(default_factory=dict)
    device: str = field(default_factory=this_machine)

    def key(self, workload: Workload) -> str:
        return self.ledger.key_of(workload.digest, self.attributes, self.device)

    def about(self, workload: Workload) -> dict[str, object]:
        """What a set says of itself."""
        return self.ledger.about_of(workload, self.attributes, self.device)

    def others(self, workload: Workload) -> Iterator[tuple[str, str]]:
        """The sets of a workload for the same target on other devices: key and device."""
        yield from self._elsewhere.get(workload.digest, ())

    @functools.cached_property
    def _elsewhere(self) -> Mapping[str, Sequence[tuple[str, str]]]:
        found: dict[str, list[tuple[str, str]]] = {}
        for key in self.ledger.all_keys():
            about = self.ledger.about(key)
            named = str(about.get("device", ""))
            if about.get("target") == dict(self.attributes) and named != self.device:
                found.setdefault(str(about.get("workload", "")), []).append((key, named))
        return found

    def rows(self) -> Iterator[Row]:
        for workload in self.workloads.values():
            key = self.key(workload)
            standing = self.ledger.standing(key)
            yield Row(
                target=self.target,
                operator=workload.label,
                shapes=workload.shapes,
                models=self.models[workload.digest],
                key=key,
                trials=len(standing.trials),
                timed=standing.timed,
                failures=dict(standing.failures),
                claims=len(standing.claims),
                unread=self.ledger.unread(key),
                winners=len(standing.winners),
                gain=standing.gain,
                baseline=standing.baseline,
                best=standing.best.retest.seconds if standing.best is not None else None,
                spent=standing.spent,
            )


def operators(workspace: Workspace, selection: Selection, plan: Callable[[str, Model], Plan]) -> list[Operators]:
    """The operators that are called by the models of a selection, by target; `plan` gives a model's plan for a target.

    Raises ConfigError where there is no model.
    """
    found: dict[str, Operators] = {}
    for target, model in workspace.pairs(selection):
        if target not in found:
            resolved = workspace.build.target(target)
            ledger = Ledger.here(workspace.store, resolved.file.measure.noise)
            can_try = resolved.measured_on is not MeasuredOn.NOWHERE
            found[target] = Operators(target, resolved.attributes, can_try, ledger, device=resolved.device)
        for workload in plan(target, model).workloads:
            if workload.calls:
                found[target].workloads[workload.digest] = workload
                found[target].models.setdefault(workload.digest, []).append(model.name)
    if not found:
        raise ConfigError("there is no model to look at", hint="write: Workspace(Model.onnx('name', 'model.onnx'))")
    return list(found.values())
