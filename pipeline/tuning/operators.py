"""Which operators a run of `doit tune` is about: those of models as they were last built. Needs no TVM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.compiler import search, strategies
from pipeline.composition import is_here, space_of
from pipeline.config import TargetFile
from pipeline.processor import device
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.scheduler import Operator
from pipeline.types import Manifest, Plan, Profile, Workload

_TUNED = "tuned"


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


@dataclass(frozen=True)
class Left:
    """Operators that are left as they are, and why."""

    target: str
    reason: str
    labels: tuple[str, ...]


def chosen(models: Iterable[Model], patterns: Sequence[str] = ()) -> tuple[list[Operator], list[Left]]:
    """The operators to tune, those that take longest first, and those that tuning would change nothing for.

    `patterns` are names of operators as `doit list` shows them, with * and ?; all where there are none.
    """
    found: dict[tuple[str, str], Operator] = {}
    left: dict[tuple[str, str], list[str]] = {}
    for model in models:
        used = {each.workload: each.implementation for each in model.manifest.operators}
        why = _why_none(model)
        for workload in model.plan.workloads:
            if not workload.calls or (patterns and not any(map(workload.matches, patterns))):
                continue
            reason = why or _why_not(model, workload, used.get(workload.digest, ""))
            if reason:
                left.setdefault((model.target, reason), []).append(workload.label)
            else:
                place = (model.target, workload.digest)
                found[place] = _with(found.get(place), model, workload)
    operators = sorted(found.values(), key=lambda each: (-each.seconds * sum(each.calls.values()), each.name))
    return operators, [Left(target, reason, tuple(dict.fromkeys(names))) for (target, reason), names in left.items()]


def _with(known: Operator | None, model: Model, workload: Workload) -> Operator:
    """An operator with the calls of one more model."""
    kind = str(model.attributes["kind"])
    spaces = [space_of(model.folder, name)[0] for name in model.file.tune.spaces or search.usual(kind)]
    calls = dict(known.calls) if known is not None else {}
    calls[model.name] = workload.calls
    return Operator(
        target=model.target,
        workload=workload,
        calls=calls,
        seconds=max(_seconds(model, workload), known.seconds if known is not None else 0.0),
        key=Ledger.key_of(workload.digest, model.attributes, device()),
        spaces=frozenset((space.name, space.version) for space in spaces),
    )


def _seconds(model: Model, workload: Workload) -> float:
    """Of one call, as the profile of the model told; 0 where there is none."""
    total = model.profile.operators.get(workload.symbol, 0.0) if model.profile is not None else 0.0
    return total / workload.calls


def _why_none(model: Model) -> str:
    """Why tuning would change nothing for any operator of a model; "" where it may."""
    if not is_here(model.attributes):
        return "the target's device is not here"
    if _TUNED not in model.file.order:
        return f'"tuned" is not in the order of targets/{model.target}.toml'
    return ""


def _why_not(model: Model, workload: Workload, implementation: str) -> str:
    """Why tuning one operator would change nothing; "" where it may."""
    rules = [rule for rule in model.file.operators if workload.matches(rule.match)]
    if any(_TUNED in rule.forbid or (rule.only is not None and _TUNED not in rule.only) for rule in rules):
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
    before = order[: order.index(_TUNED)]
    is_library = implementation not in order and implementation not in strategies.ORDER
    return implementation in before or (is_library and "library" in before)
