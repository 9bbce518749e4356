"""What a build notes of an artifact in the workspace's journal: its actions by what they are for, decisions, settings.

    target:label   apply, codegen, cc, measure   →  operators[label].actions["apply:tuned"], …
    target:model   extract, pack, link, check …  →  actions["extract"], …
    model          read                          →  actions["read"]
    library        shim                          →  actions["shim:<library>"], where something was made with it

Nothing is computed for it but digests of small files: the keys and entries are those that the build asked for anyway.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pipeline import __version__, stages
from pipeline.composition import Target
from pipeline.errors import StoreError
from pipeline.freshness import FOLDERS
from pipeline.hashing import Digest
from pipeline.journal import SHORT, Events, Journal, Operator, Origin, State
from pipeline.lock import FILE as LOCK
from pipeline.memoizer import Memoizer
from pipeline.models import Model
from pipeline.store import ActionEntry, Store
from pipeline.types import Decision, ModelSource, Packed, Plan, Workload

# Of a target's file: what the state has as `attributes`, and what makes no difference to a build.
_ELSEWHERE = ("target", "models", "tune", "stale", "policy")
_LARGEST = 1 << 20  # bytes of a file that is noted by its digest; of a larger one its look is noted

Asked = Mapping[str, tuple[str, ActionEntry]]  # by key: subject and entry


@dataclass(frozen=True)
class Made:
    """An artifact as its build knows it when it is published.

    asked      the actions that it asked for
    decisions  by the workload's digest, of those that were decided
    files      what reading the model depended on
    wrong      what was not as it should be in the artifact that was there
    """

    folder: Path
    target: Target
    model: Model
    source: ModelSource
    plan: Plan
    asked: Asked
    decisions: Mapping[str, Decision]
    files: Iterable[Path]
    wrong: Mapping[str, str]


def note(made: Made, memoizer: Memoizer) -> None:
    """Appends a build to the journal."""
    journal = Journal(made.folder, made.target.name, made.model.name)
    before = journal.builds()
    known = before[-1].state if before else State()
    state = _state(made, memoizer, known)
    wrong = {} if not before and made.wrong == {"": "missing"} else dict(made.wrong)
    refused = {key: why for key in state.keys if memoizer.has_run(key) and (why := memoizer.refused(key))}
    journal.append(state, Events(_again(state, known, memoizer), refused, wrong), time.time())


def _state(made: Made, memoizer: Memoizer, before: State) -> State:
    entries: defaultdict[str, dict[str, ActionEntry]] = defaultdict(dict)  # by subject and key
    for key, (subject, entry) in made.asked.items():
        entries[subject][key] = entry
    operators = {
        each.label: _operator(made, each, entries[f"{made.target.name}:{each.label}"], memoizer.store)
        for each in made.plan.workloads
    }
    state = State(
        tvmake=__version__,
        tools=dict(memoizer.toolchain.identities),
        attributes=made.target.attributes,
        settings=_settings(made, memoizer.store),
        sources=dict(_sources(made.folder, memoizer.store)),
        model=_model(made),
        actions=_actions(made),
        operators={label: each for label, each in operators.items() if each.actions},
    )
    origins = {key[:SHORT]: origin for key in state.keys if (origin := _origin(key, memoizer, before)) is not None}
    return msgspec.structs.replace(state, origins=origins)


def _origin(key: str, memoizer: Memoizer, before: State) -> Origin | None:
    """Where an entry came from: in this build, or in an earlier one."""
    if memoizer.has_run(key):
        return Origin()
    came = memoizer.origin(key)
    return Origin(came.remote, came.signer, came.checked) if came is not None else before.origin(key)


def _settings(made: Made, store: Store) -> dict[str, Any]:
    settings: dict[str, Any] = msgspec.to_builtins(made.target.file)
    for name in _ELSEWHERE:
        settings.pop(name, None)
    lock = _put(made.folder / LOCK, store)
    return {**settings, "device": made.target.device, "lock": lock.hash if lock is not None else ""}


def _sources(folder: Path, store: Store) -> Iterator[tuple[str, Digest]]:
    """The workspace's own Python files, which the store keeps so that two versions can be compared."""
    for kind in FOLDERS:
        for path in sorted((folder / kind).glob("*.py")):
            if (digest := _put(path, store)) is not None:
                yield f"{kind}/{path.name}", digest


def _put(path: Path, store: Store) -> Digest | None:
    try:
        return store.put_file(path)
    except (OSError, StoreError):
        return None


def _model(made: Made) -> dict[str, Any]:
    model, source = made.model, made.source
    is_file = isinstance(model.source, Path)
    declared = str(model.source) if is_file else getattr(model.source, "__qualname__", type(model.source).__name__)
    return {
        "declared": {
            "kind": model.kind,
            "source": declared,
            "shapes": {name: list(shape) for name, shape in model.shapes.items()},
            "high": model.high,
        },
        "skeleton": source.skeleton.hash,
        "weights": {weight.spec.name: weight.blob.hash for weight in source.weights},
        "cases": [case.hash for case in source.cases],
        # What a model's file holds stands in the components of reading it.
        "files": {} if is_file else dict(_files(made)),
    }


def _files(made: Made) -> Iterator[tuple[str, str]]:
    """What a function of the user's depended on, by path: beside dodo.py as seen from there."""
    for path in {*made.files, *(made.folder / path for path in made.model.depends)}:
        try:
            stat = path.stat()
            looks = Digest.of_file(path).hash if stat.st_size <= _LARGEST else f"{stat.st_size} {stat.st_mtime_ns}"
        except OSError:
            continue
        yield str(path.relative_to(made.folder)) if path.is_relative_to(made.folder) else str(path), looks


def _actions(made: Made) -> dict[str, str]:
    """The keys of what is no operator's."""
    own = {made.model.name, f"{made.target.name}:{made.model.name}"}
    actions = {entry.stage: key for key, (subject, entry) in made.asked.items() if subject in own}
    used = {value for _, entry in made.asked.values() for value in _inputs(entry).values()}
    for key, (subject, entry) in made.asked.items():
        made_with = any(digest.hash in used for digest in entry.outputs.values())
        if entry.stage == stages.SHIM.name and made_with:
            actions[f"{stages.SHIM.name}:{subject}"] = key
    return actions


def _operator(made: Made, workload: Workload, entries: Mapping[str, ActionEntry], store: Store) -> Operator:
    decision = made.decisions.get(workload.digest)
    return Operator(
        name=workload.name,
        workload=workload.function,
        shapes=workload.shapes,
        calls=workload.calls,
        implementation=decision.strategy if decision is not None else "",
        reason=decision.reason if decision is not None else "",
        candidates=decision.trials if decision is not None else (),
        actions=_by_purpose(workload, dict(_in_order(entries, decision, made.target.attributes)), store),
    )


def _in_order(
    entries: Mapping[str, ActionEntry], decision: Decision | None, attributes: Mapping[str, Any]
) -> list[tuple[str, ActionEntry]]:
    """Of several actions for one purpose first that which the decision rests on, and that which is for the target."""
    chosen = decision.candidate.function if decision is not None else None

    def place(item: tuple[str, ActionEntry]) -> tuple[bool, bool, str]:
        key, entry = item
        options: Any = entry.components.get("options") or {}
        return entry.outputs.get("function") != chosen, options.get("target") != attributes, key

    return sorted(entries.items(), key=place)


def _by_purpose(workload: Workload, entries: Mapping[str, ActionEntry], store: Store) -> dict[str, str]:
    """An operator's keys by what they are for. What tuning asked for in the same process is for nothing here."""
    functions: dict[str, str] = {}  # what is compiled, by hash
    for entry in entries.values():
        if entry.stage == stages.APPLY.name and "function" in entry.outputs:
            functions.setdefault(entry.outputs["function"].hash, _option(entry, "strategy"))
            for packed in _packed(entry, store):
                functions.setdefault(packed.function.hash, f"layout of p{packed.param}")
    functions[workload.digest] = "default"
    sources = {
        entry.outputs["source"].hash: functions.get(_inputs(entry).get("function", ""), "")
        for entry in entries.values()
        if "source" in entry.outputs
    }
    purposes = {
        stages.APPLY.name: lambda entry: _option(entry, "strategy"),
        stages.CODEGEN.name: lambda entry: functions.get(_inputs(entry).get("function", ""), ""),
        stages.CC.name: lambda entry: sources.get(_inputs(entry).get("source", ""), ""),
        stages.MEASURE.name: lambda entry: _measured(entry, {*functions.values(), "default"}),
    }
    actions: dict[str, str] = {}
    for key, entry in entries.items():
        if entry.stage in purposes and (purpose := purposes[entry.stage](entry)):
            slot = f"{entry.stage}:{purpose}"
            if slot not in actions:
                actions[slot] = key
            elif entry.stage == stages.CODEGEN.name:  # for this machine, which lays out weights for another
                actions.setdefault(f"{slot} (for this machine)", key)
    return dict(sorted(actions.items()))


def _measured(entry: ActionEntry, strategies: Iterable[str]) -> str:
    """What a measurement is for: all candidates to be timed, or one to be compared; "" where it is not a build's."""
    options: Any = entry.components.get("options") or {}
    names = [contender[0] for contender in options.get("contenders", ())]
    if not names or not set(names) <= set(strategies):
        return ""
    return "all" if options.get("seconds") else names[-1]


def _packed(entry: ActionEntry, store: Store) -> tuple[Packed, ...]:
    blob = entry.outputs.get("packed")
    if blob is None or blob.size <= len("[]") or (data := store.get(blob)) is None:
        return ()
    return msgspec.json.decode(data, type=tuple[Packed, ...])


def _inputs(entry: ActionEntry) -> Mapping[str, str]:
    inputs: Any = entry.components.get("inputs")
    return inputs if isinstance(inputs, Mapping) else {}


def _option(entry: ActionEntry, name: str) -> str:
    options: Any = entry.components.get("options") or {}
    return str(options.get(name, ""))


def _again(state: State, before: State, memoizer: Memoizer) -> dict[str, str]:
    """What was done again though it had been done before, and why."""
    done = before.keys
    again: dict[str, str] = {}
    for key in state.keys:
        if lost := memoizer.lost(key):
            again[key] = "; ".join(_fate(memoizer.store, name) for name in lost)
        elif key in done and memoizer.has_run(key):
            again[key] = _fate(memoizer.store, key, what="the entry")
    return again


def _fate(store: Store, name: str, what: str = "blob") -> str:
    """What became of a file that the store had: what had other bytes than it should was set aside."""
    is_aside = any((store.root / "quarantine").glob(f"{name}-*"))
    return f"{what} {name[:12]} of the store was {'corrupted' if is_aside else 'removed'}"
