"""Which operators a run of `doit tune` is about: those of models as they were last built. Needs no TVM."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.compiler import search, strategies
from pipeline.composition import measured_on, space_of
from pipeline.config import Device, TargetFile
from pipeline.devices.contract import MeasuredOn
from pipeline.devices.identity import device_of
from pipeline.platforms import triple_of
from pipeline.store import Store, default_root
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.records import SetKeys
from pipeline.tuning.staleness import Present, is_to_go_on, reasons
from pipeline.tuning.states import Operator
from pipeline.tuning.summaries import Summaries
from pipeline.types import TUNED, Manifest, Plan, Profile, Workload


@dataclass(frozen=True)
class Model:
    """A model as it was last built for a target."""

    name: str
    folder: Path  # of the workspace
    target: str
    attributes: Mapping[str, Any]
    file: TargetFile
    plan: Plan
    manifest: Manifest
    profile: Profile | None

    @cached_property
    def device(self) -> str:
        """What times that are taken for its target hold for: this machine, or the devices that the target names."""
        return device_of(self.file)

    @cached_property
    def sets(self) -> SetKeys:
        """The keys of its operators' sets of records."""
        return SetKeys(self.attributes, self.device)


@dataclass(frozen=True)
class Left:
    """Operators that are left as they are, and why."""

    target: str
    reason: str
    labels: tuple[str, ...]


def chosen(
    models: Iterable[Model],
    patterns: Sequence[str] = (),
    store: Store | None = None,
    ask: Callable[[Device, str], object] = lambda device, triple: None,
) -> tuple[list[Operator], list[Left]]:
    """The operators to tune, those that take longest first, and those that tuning would change nothing for.

    `patterns` are names of operators as `doit list` shows them, with * and ?; all where there are none. Records are
    kept by what a device says of itself: `ask` has one with code for a triple asked, where that was never done, and may
    raise DeviceError.
    """
    models = list(models)
    for model in models:
        if model.file.device is not None and not why_none(model):
            ask(model.file.device, triple_of(model.attributes))
    found: dict[tuple[str, str], Operator] = {}
    left: dict[tuple[str, str], list[str]] = {}
    for model in models:
        used = {each.workload: each.implementation for each in model.manifest.operators}
        why = why_none(model)
        for workload in model.plan.workloads:
            if not workload.calls or (patterns and not any(map(workload.matches, patterns))):
                continue
            reason = why or why_not(model, workload, used.get(workload.digest, ""))
            if reason:
                left.setdefault((model.target, reason), []).append(workload.label)
            else:
                place = (model.target, workload.digest)
                found[place] = _with(found.get(place), model, workload)
    files = {model.target: model.file for model in models}
    told = _with_staleness(found, files, store or Store(default_root()))
    operators = sorted(told, key=lambda each: (-each.seconds * sum(each.calls.values()), each.name))
    return operators, [Left(target, reason, tuple(dict.fromkeys(names))) for (target, reason), names in left.items()]


def _with(known: Operator | None, model: Model, workload: Workload) -> Operator:
    """An operator with the calls of one more model."""
    calls = dict(known.calls) if known is not None else {}
    calls[model.name] = workload.calls
    return Operator(
        target=model.target,
        workload=workload,
        calls=calls,
        seconds=max(_seconds(model, workload), known.seconds if known is not None else 0.0),
        key=model.sets.of(workload.digest),
        spaces=spaces_of(model),
        about=Ledger.about_of(workload, model.attributes, model.device),
    )


def _with_staleness(
    found: Mapping[tuple[str, str], Operator], files: Mapping[str, TargetFile], store: Store
) -> list[Operator]:
    """The operators, by target and workload, each with whether it is stale by its target's rules."""
    told = []
    for target, file in files.items():
        known = Summaries.here(store, file.measure.noise)
        present = Present(time.time(), known.tools, file.tune.patience)
        for (name, _), operator in found.items():
            if name == target:
                told.append(replace(operator, is_stale=_is_stale(operator, known, file, present)))
        known.save()
    return told


def _is_stale(operator: Operator, known: Summaries, file: TargetFile, present: Present) -> bool:
    summary = known.of(operator.key)
    is_exhausted = operator.spaces <= frozenset(summary.exhausted)
    return is_to_go_on(reasons(summary, file.stale, present), is_exhausted)


def _seconds(model: Model, workload: Workload) -> float:
    """Of one call, as the profile of the model told; 0 where there is none."""
    total = model.profile.operators.get(workload.symbol, 0.0) if model.profile is not None else 0.0
    return total / workload.calls


def spaces_of(model: Model) -> frozenset[tuple[str, int]]:
    """Name and version of every search space that there is for a model's target."""
    names = model.file.tune.spaces or search.usual(str(model.attributes["kind"]))
    spaces = [space_of(model.folder, name)[0] for name in names]
    return frozenset((space.name, space.version) for space in spaces)


def why_none(model: Model) -> str:
    """Why tuning would change nothing for any operator of a model; "" where it may."""
    if measured_on(model.attributes, model.file) is MeasuredOn.NOWHERE:
        is_named = model.file.device is not None
        return "code for a GPU is not measured over RPC" if is_named else "the target's device is not here"
    if TUNED not in model.file.order:
        return f'"tuned" is not in the order of targets/{model.target}.toml'
    return ""


def why_not(model: Model, workload: Workload, implementation: str) -> str:
    """Why tuning one operator would change nothing; "" where it may."""
    rules = [rule for rule in model.file.operators if workload.matches(rule.match)]
    if any(TUNED in rule.forbid or (rule.only is not None and TUNED not in rule.only) for rule in rules):
        return f"targets/{model.target}.toml forbids tuned functions for it"
    if model.file.select == "first" and _comes_before(implementation, model.file.order):
        return f'{implementation} comes before tuned in the order (select = "fastest" would compare them)'
    if workload.copies:
        return "it only copies"
    if not workload.written or any("?" in shape for shape in workload.shapes):
        return "its shapes are open"
    return ""


def _comes_before(implementation: str, order: Sequence[str]) -> bool:
    """Whether an implementation precedes tuned functions in an order, in which "library" stands for all libraries."""
    before = order[: order.index(TUNED)]
    is_library = implementation not in order and implementation not in strategies.ORDER
    return implementation in before or (is_library and "library" in before)
