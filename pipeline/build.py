"""The graph of a build: which action needs which. Each method runs one stage, after what it depends on.

    resolve ─┐
    read ────┴─ extract ─ apply ─ dispatch ─ codegen ─┐
                   └───────────── pack ───────────────┴─ link ─ check ─ artifact

doit runs these as tasks, in parallel, and tells what is up to date; but each method gets what it needs by itself, so
that any task can be run alone, before the first build and after doit's database was deleted. What was asked for once
is remembered while the build lives. Every method may be called from any thread.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from pipeline import artifact, stages
from pipeline.compiler import strategies
from pipeline.config import TargetFile, load_target
from pipeline.errors import CheckError, ConfigError
from pipeline.hashing import Digest
from pipeline.memoizer import Action, Memoizer
from pipeline.models import Model
from pipeline.store import ActionEntry
from pipeline.types import (
    CheckState,
    Decision,
    ModelKind,
    ModelSource,
    Plan,
    Reference,
    TensorSpec,
    Weight,
    Workload,
)

T = TypeVar("T")
Candidates = tuple[tuple[str, Digest], ...]  # strategies and the functions that they offer, in the order of choice


@dataclass(frozen=True)
class Target:
    """A target as its file describes it and as TVM understands it."""

    name: str
    file: TargetFile
    attributes: dict[str, Any]
    llvm: str


@dataclass(frozen=True)
class Object:
    """A compiled workload: the blob of its object file and how it was chosen."""

    blob: Digest
    decision: Decision


@dataclass(frozen=True)
class Linked:
    """A library and its weights, in the order in which the entry function takes them."""

    library: Digest
    weights: tuple[Weight, ...]


class Build:
    """One run over a workspace: `folder` holds dodo.py, targets/ and artifacts/."""

    def __init__(self, folder: Path, memoizer: Memoizer) -> None:
        self.folder = folder
        self.memoizer = memoizer
        self._asked: dict[tuple[object, ...], Future[Any]] = {}
        self._asking = threading.Lock()

    def target(self, name: str) -> Target:
        """resolve: a target's attributes as TVM understands them."""
        return self._once(("target", name), lambda: self._resolve(name))

    def source(self, model: Model) -> ModelSource:
        """read: the model's skeleton and weights."""
        return self._once(("source", model.name), lambda: self._read(model))

    def files_read(self, model: Model) -> list[Path]:
        """The files that reading the model depended on."""
        self.source(model)
        return self._once(("files", model.name), list)

    def plan(self, target: str, model: Model) -> Plan:
        """extract: what to compile, and how the parts make a library."""
        return self._once(("plan", target, model.name), lambda: self._extract(target, model)[0])

    def is_extracted(self, target: str, model: Model) -> bool:
        """Whether the plan was asked for in this build and is there."""
        return self._is_done(("plan", target, model.name))

    def is_published(self, target: str, model: Model) -> bool:
        """Whether the artifact was asked for in this build and is there."""
        return self._is_done(("artifact", target, model.name))

    def plan_blob(self, target: str, model: Model) -> Digest:
        """The blob that holds the plan."""
        return self._extracted(target, model)["plan"]

    def candidates(self, target: str, workload: Workload) -> Candidates:
        """apply: the functions that the target's strategies offer for a workload, in the order of choice."""
        return self._once(("candidates", target, workload.digest), lambda: self._apply(target, workload))

    def decision(self, target: str, workload: Workload) -> Decision:
        """dispatch: which candidate is compiled."""
        return self._once(("decision", target, workload.digest), lambda: self._dispatch(target, workload))

    def compiled(self, target: str, workload: Workload) -> Object:
        """codegen: the object file of the chosen function."""
        return self._once(("object", target, workload.digest), lambda: self._codegen(target, workload))

    def packed(self, target: str, model: Model) -> tuple[Weight, ...]:
        """pack: the weights as the entry function takes them."""
        return self._once(("packed", target, model.name), lambda: self._pack(target, model))

    def linked(self, target: str, model: Model) -> Linked:
        """link: the library."""
        return self._once(("linked", target, model.name), lambda: self._link(target, model))

    def reference(self, target: str, model: Model) -> Reference:
        """check: how far the outputs are from the reference's. Raises CheckError where they are too far."""
        return self._once(("reference", target, model.name), lambda: self._check(target, model))

    def artifact(self, target: str, model: Model) -> Path:
        """Writes artifacts/<target>/<model>, whole or not at all, and leaves it alone where it is right already."""
        return self._once(("artifact", target, model.name), lambda: self._publish(target, model))

    def dump(self, target: str, model: Model, folder: Path) -> int:
        """Writes the IR after each step, and each operator's function, as files of a folder; returns how many."""
        extract = self.extract_action(target, model)
        inputs = dict(extract.inputs)
        for workload in self.plan(target, model).workloads:
            inputs[f"{workload.label}.{self.decision(target, workload).strategy}"] = self.decision(
                target, workload
            ).function
        entry = self.memoizer.run(Action(stages.DUMP, extract.subject, inputs, extract.options))
        for name, digest in entry.outputs.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.memoizer.blob(digest))
        return len(entry.outputs)

    # the stages, one by one

    def _resolve(self, name: str) -> Target:
        file = load_target(self.folder / "targets" / f"{name}.toml", [s.name for s in strategies.STRATEGIES])
        action = Action(stages.RESOLVE, f"target {name}", options={"target": file.target})
        try:
            entry = self.memoizer.run(action)
        except ConfigError as error:
            raise ConfigError(f"targets/{name}.toml: target: {error.message}", hint=error.hint) from error
        attributes = json.loads(self.memoizer.blob(entry.outputs["target"]))
        if attributes["kind"] != "llvm":
            raise ConfigError(
                f"targets/{name}.toml: target: code for {attributes['kind']} cannot be built yet",
                hint="use a target of kind llvm",
            )
        return Target(name, file, attributes, self.memoizer.blob(entry.outputs["llvm"]).decode())

    def _read(self, model: Model) -> ModelSource:
        options: dict[str, object] = {
            "kind": model.kind,
            "shapes": {name: list(shape) for name, shape in model.shapes.items()},
            "cases": [str(self.folder / case) for case in model.cases],
            # A worker finds the modules that dodo.py finds: those beside it, and where it looked itself.
            "import path": [str(self.folder), *sys.path],
        }
        if isinstance(model.source, Path):
            options["path"] = str(self.folder / model.source)
        else:
            options["function"] = pickled(model.source)
        entry = self.memoizer.run(Action(stages.READ, model.name, options=options))
        specs = msgspec.json.decode(self.memoizer.blob(entry.outputs["weights"]), type=tuple[TensorSpec, ...])
        weights = tuple(Weight(spec, entry.outputs[f"w{i}"]) for i, spec in enumerate(specs))
        cases = tuple(entry.outputs[f"case{i}"] for i in range(sum(name.startswith("case") for name in entry.outputs)))
        files = [Path(name) for name in json.loads(self.memoizer.blob(entry.outputs["files"]))]
        self._once(("files", model.name), lambda: files)
        return ModelSource(ModelKind(model.kind), entry.outputs["skeleton"], weights, cases)

    def extract_action(self, target: str, model: Model) -> Action:
        source = self.source(model)
        options: dict[str, object] = {
            "kind": model.kind,
            "weights": [weight.spec.name for weight in source.weights],
            "target": self.target(target).attributes,
        }
        return Action(stages.EXTRACT, f"{target}:{model.name}", {"skeleton": source.skeleton}, options)

    def _extract(self, target: str, model: Model) -> tuple[Plan, dict[str, Digest]]:
        entry = self.memoizer.run(self.extract_action(target, model))
        outputs = dict(entry.outputs)
        self._once(("extracted", target, model.name), lambda: outputs)
        return msgspec.json.decode(self.memoizer.blob(outputs["plan"]), type=Plan), outputs

    def _extracted(self, target: str, model: Model) -> dict[str, Digest]:
        self.plan(target, model)
        return self._once(("extracted", target, model.name), dict)

    def _apply_action(self, target: str, workload: Workload, strategy: str) -> Action:
        resolved = self.target(target)
        options: dict[str, object] = {
            "strategy": strategy,
            "strategy version": strategies.by_name(strategy).version,
            "target": resolved.attributes,
        }
        subject, inputs = f"{target}:{workload.label}", {"function": workload.function}
        return Action(stages.APPLY, subject, inputs, options, resolved.file.timeout)

    def _dispatch_action(self, target: str, workload: Workload, candidates: Candidates) -> Action:
        listed = [[name, function.hash, function.size] for name, function in candidates]
        options: dict[str, object] = {"candidates": listed, "select": self.target(target).file.select}
        return Action(stages.DISPATCH, f"{target}:{workload.label}", options=options)

    def _codegen_action(self, target: str, workload: Workload, decision: Decision) -> Action:
        resolved = self.target(target)
        options: dict[str, object] = {"symbol": workload.symbol, "target": resolved.attributes}
        subject, inputs = f"{target}:{workload.label}", {"function": decision.function}
        return Action(stages.CODEGEN, subject, inputs, options, resolved.file.timeout)

    def _apply(self, target: str, workload: Workload) -> Candidates:
        order = self.target(target).file.order
        entries = [(name, self.memoizer.run(self._apply_action(target, workload, name))) for name in order]
        return self._applicable(target, workload, entries)

    @staticmethod
    def _applicable(target: str, workload: Workload, entries: Iterable[tuple[str, ActionEntry]]) -> Candidates:
        found = tuple((name, entry.outputs["function"]) for name, entry in entries if "function" in entry.outputs)
        if not found:
            raise ConfigError(
                f"no strategy of targets/{target}.toml applies to {workload.label}", hint='add "default" to its order'
            )
        return found

    def _dispatch(self, target: str, workload: Workload) -> Decision:
        return self._decided(
            self.memoizer.run(self._dispatch_action(target, workload, self.candidates(target, workload)))
        )

    def _decided(self, entry: ActionEntry) -> Decision:
        return msgspec.json.decode(self.memoizer.blob(entry.outputs["decision"]), type=Decision)

    def _codegen(self, target: str, workload: Workload) -> Object:
        decision = self.decision(target, workload)
        entry = self.memoizer.run(self._codegen_action(target, workload, decision))
        return Object(entry.outputs["object"], decision)

    def is_compiled(self, target: str, workload: Workload) -> bool:
        """Whether the store has a workload's object and all that led to it. What it has is remembered as asked for."""
        entries = []
        for strategy in self.target(target).file.order:
            entry = self.memoizer.found(self._apply_action(target, workload, strategy))
            if entry is None:
                return False
            entries.append((strategy, entry))
        candidates = self._applicable(target, workload, entries)
        chosen = self.memoizer.found(self._dispatch_action(target, workload, candidates))
        if chosen is None:
            return False
        decision = self._decided(chosen)
        compiled = self.memoizer.found(self._codegen_action(target, workload, decision))
        if compiled is None:
            return False
        self._once(("candidates", target, workload.digest), lambda: candidates)
        self._once(("decision", target, workload.digest), lambda: decision)
        self._once(("object", target, workload.digest), lambda: Object(compiled.outputs["object"], decision))
        return True

    def objects(self, target: str, workloads: Iterable[Workload]) -> dict[str, Object]:
        """The objects of many workloads, by digest; what is missing is compiled in parallel."""
        wanted = list(workloads)
        with ThreadPoolExecutor(self.memoizer.workers.limit) as threads:
            done = threads.map(lambda workload: self.compiled(target, workload), wanted)
            return {workload.digest: made for workload, made in zip(wanted, done, strict=True)}

    def _pack(self, target: str, model: Model) -> tuple[Weight, ...]:
        plan, source = self.plan(target, model), self.source(model)
        given = {weight.spec.name: weight.blob for weight in (*source.weights, *plan.constants)}
        packed: dict[int, Digest] = {}
        if plan.prepares:
            needed = [workload for workload in plan.workloads if workload.prepares]
            inputs = {"prepare": self._extracted(target, model)["prepare"]}
            inputs |= {f"o{digest}": made.blob for digest, made in self.objects(target, needed).items()}
            inputs |= {f"w{i}": given[name] for i, name in enumerate(plan.packing)}
            specs = {weight.spec.name: weight.spec for weight in (*source.weights, *plan.constants)}
            options: dict[str, object] = {
                "weights": [[list(specs[name].shape), specs[name].dtype] for name in plan.packing],
                "packed": [[list(use.spec.shape), use.spec.dtype] for use in plan.weights if use.packed >= 0],
            }
            entry = self.memoizer.run(Action(stages.PACK, f"{target}:{model.name}", inputs, options))
            packed = {i: entry.outputs[f"p{i}"] for i in range(len(entry.outputs))}
        return tuple(
            Weight(use.spec, packed[use.packed] if use.packed >= 0 else given[use.source]) for use in plan.weights
        )

    def _link(self, target: str, model: Model) -> Linked:
        plan, weights = self.plan(target, model), self.packed(target, model)
        needed = [workload for workload in plan.workloads if workload.calls]
        inputs = {"main": self._extracted(target, model)["main"]}
        inputs |= {f"o{digest}": made.blob for digest, made in self.objects(target, needed).items()}
        if self.target(target).file.weights == "inside":
            inputs["weights"] = artifact.weight_file(self.memoizer.store, weights)
        entry = self.memoizer.run(Action(stages.LINK, f"{target}:{model.name}", inputs))
        return Linked(entry.outputs["library"], weights)

    def _check(self, target: str, model: Model) -> Reference:
        resolved, source, linked = self.target(target), self.source(model), self.linked(target, model)
        if not resolved.file.check.enabled:
            return Reference(CheckState.SKIPPED, "switched off in the target's file")
        plan = self.plan(target, model)
        inputs = {"library": linked.library, "skeleton": source.skeleton}
        inputs |= {f"a{i}": weight.blob for i, weight in enumerate(linked.weights)}
        inputs |= {f"w{i}": weight.blob for i, weight in enumerate(source.weights)}
        inputs |= {f"case{i}": case for i, case in enumerate(source.cases)}
        options: dict[str, object] = {
            "kind": model.kind,
            "inputs": _plain(plan.inputs),
            "outputs": _plain(plan.outputs),
            "arguments": _plain(weight.spec for weight in linked.weights),
            "weights": _plain(weight.spec for weight in source.weights),
            "tolerance": resolved.file.check.tolerance,
            "seeds": list(resolved.file.check.seeds),
            "high": model.high,
        }
        action = Action(stages.CHECK, f"{target}:{model.name}", inputs, options, resolved.file.timeout)
        outcome = msgspec.json.decode(
            self.memoizer.blob(self.memoizer.run(action).outputs["reference"]), type=Reference
        )
        if outcome.state is CheckState.FAILED:
            raise CheckError(
                outcome.reason,
                stage="check",
                subject=f"{target}:{model.name}",
                hint=f"the artifact was not replaced; tolerance in targets/{target}.toml is {outcome.tolerance:g}",
            )
        return outcome

    def _publish(self, target: str, model: Model) -> Path:
        linked, reference, plan = self.linked(target, model), self.reference(target, model), self.plan(target, model)
        resolved = self.target(target)
        used = [workload for workload in plan.workloads if workload.calls]
        objects = self.objects(target, used)
        draft = artifact.Draft(
            model=model.name,
            target=target,
            attributes=resolved.attributes,
            toolchain={"llvm": resolved.llvm, **self.memoizer.toolchain.pick(("tvm", "tvm-ffi", "libtvm", "cc"))},
            plan=plan,
            library=linked.library,
            weights=linked.weights,
            weights_in=resolved.file.weights,
            reference=reference,
            operators=tuple(artifact.operator(w, objects[w.digest].decision, objects[w.digest].blob) for w in used),
        )
        folder = self.folder / "artifacts" / target / model.name
        artifact.publish(self.memoizer.store, draft, folder)
        return folder

    def _is_done(self, question: tuple[object, ...]) -> bool:
        asked = self._asked.get(question)
        return asked is not None and asked.done() and asked.exception() is None

    def _once(self, question: tuple[object, ...], answer: Callable[[], T]) -> T:
        """Answers a question once; who asks meanwhile waits for the same answer. A failure is remembered as well."""
        with self._asking:
            future = self._asked.get(question)
            mine = future is None
            if future is None:
                future = self._asked[question] = Future()
        if mine:
            try:
                future.set_result(answer())
            except BaseException as error:
                future.set_exception(error)
        return cast("T", future.result())


def _plain(specs: Iterable[TensorSpec]) -> list[list[object]]:
    return [[spec.name, list(spec.shape), spec.dtype] for spec in specs]


def pickled(function: Callable[[], Any]) -> bytes:
    """A function of the user's as bytes that a worker can call: what dodo.py defines travels by value."""
    import cloudpickle

    module = sys.modules.get(getattr(function, "__module__", ""))
    by_value = module is not None and getattr(module, "__name__", "") == "dodo"
    if by_value:
        cloudpickle.register_pickle_by_value(module)
    try:
        data: bytes = cloudpickle.dumps(function)
        return data
    except Exception as error:
        raise ConfigError(
            f"the function {getattr(function, '__name__', function)!r} cannot be sent to a worker: {error}",
            hint="do not close over open files, locks or sessions; make them inside the function",
        ) from error
    finally:
        if by_value:
            cloudpickle.unregister_pickle_by_value(module)
