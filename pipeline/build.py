"""The graph of a build: which action needs which. Each method runs one stage, after what it depends on.

    resolve ─┐
    read ────┴─ extract ─ apply ─ dispatch ─ codegen ─┬─ pack ─ link ─ check ─ artifact
                   └──────────────────────────────────┘              └─ profile

doit runs these as tasks, in parallel, and tells what is up to date; but each method gets what it needs by itself, so
that any task can be run alone, before the first build and after doit's database was deleted. What was asked for once
is remembered while the build lives. Every method may be called from any thread.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from pipeline import artifact, closures, notes, stages
from pipeline.assembly import Assembly, Linked, Object
from pipeline.composition import Composition, Target, names
from pipeline.config import load_target
from pipeline.devices.contract import MeasuredOn
from pipeline.dispatch import Dispatcher, Run
from pipeline.errors import CheckError, ConfigError, StageError, StoreError
from pipeline.hashing import Digest, key_of
from pipeline.inference import Inference
from pipeline.lock import FILE, Following, pin_of
from pipeline.memoizer import Action, Memoizer
from pipeline.modelfiles import is_within
from pipeline.models import Model
from pipeline.platforms import is_source
from pipeline.reading import Reader
from pipeline.store import ActionEntry, Pins
from pipeline.types import Decision, ModelSource, Plan, Profile, Reference, Weight, Workload

T = TypeVar("T")
NATIVE = "native"  # in a target's file: this machine
# What is asked for and does not depend on which functions operators get.
_WITHOUT_CHOICE = frozenset({"target", "source", "files", "plan", "extracted", "composition", "host"})


class Build:
    """One run over a workspace: `folder` holds dodo.py, targets/, artifacts/ and tuning.lock, where there is one.

    is_strict  whether what cannot be as tuning.lock says is an error
    """

    def __init__(self, folder: Path, memoizer: Memoizer, is_strict: bool = False) -> None:
        self.folder = folder
        self.memoizer = memoizer
        self.is_strict = is_strict
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

    @property
    def following(self) -> Following:
        """How tuning.lock is followed. Raises ConfigError where it cannot be read."""
        return self._once(("lock",), lambda: Following.of(self.folder, self.is_strict))

    def by(self, following: Following) -> Build:
        """The same build where another lock is followed: what was read and extracted is known already."""
        other = Build(self.folder, self.memoizer, self.is_strict)
        other._once(("lock",), lambda: following)
        with self._asking:
            kept = {question: asked for question, asked in self._asked.items() if question[0] in _WITHOUT_CHOICE}
        other._asked.update(kept)
        return other

    def problems(self, target: str, models: Iterable[Model]) -> list[str]:
        """What of the target's order could not be used for these models, which are all that were built for it."""
        composition = self.composition(target)
        workloads = {w.digest: w for model in models for w in self.plan(target, model).workloads}
        refused: dict[tuple[str, str], list[str]] = {}
        for workload in workloads.values():
            if not self._is_done(("decision", target, workload.digest)):
                continue  # prepares weights for another machine
            for trial in self.decision(target, workload).trials:
                if trial.refused:
                    refused.setdefault((trial.strategy, trial.refused), []).append(workload.label)
        put_aside = [
            f"{strategy} is put aside for {labels[0]}{f' and {len(labels) - 1} more' if labels[1:] else ''}: {reason}"
            for (strategy, reason), labels in refused.items()
        ]
        if self.target(target).file.select == "fastest" and self.target(target).measured_on is MeasuredOn.NOWHERE:
            put_aside.append('select = "fastest" needs the target\'s device: the first that applies was taken')
        unlinked = [linked.unlinked for model in models if (linked := self.linked(target, model)).unlinked][:1]
        told = [*self.following.problems(target, workloads), *composition.problems]
        return [*told, *composition.unused_bindings(workloads), *put_aside, *unlinked]

    def follows_lock(self, target: str, model: Model) -> bool:
        """Whether all of a model that was built is as tuning.lock says."""
        return self.following.is_whole(target, (each.digest for each in self.plan(target, model).workloads))

    def files_composed(self, target: str) -> list[Path]:
        """The files, beside the target's own, that the choice of strategies depended on."""
        return self.composition(target).files()

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

    def composition(self, target: str) -> Composition:
        """The strategies of a target's order, as this workspace has them."""
        return self._once(("composition", target), lambda: Composition(self.folder, self.target(target), self.memoizer))

    def candidates(self, target: str, workload: Workload) -> None:
        """apply: has the target's strategies offer functions for a workload, and compiles those that will be timed."""
        self._once(("candidates", target, workload.digest), lambda: self.dispatcher(target).prepare(workload))

    def decision(self, target: str, workload: Workload) -> Decision:
        """dispatch: which candidate is compiled."""
        return self._once(("decision", target, workload.digest), lambda: self.dispatcher(target).decide(workload))

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

    def profile(self, target: str, model: Model) -> Profile | None:
        """profile: where the time of an inference goes; None where the target's code does not run here."""
        return self._once(("profile", target, model.name), lambda: self._profile(target, model))

    def artifact(self, target: str, model: Model) -> Path:
        """Writes artifacts/<target>/<model>, whole or not at all, and leaves it alone where it is right already."""
        return self._once(("artifact", target, model.name), lambda: self._publish(target, model))

    def dump(self, target: str, model: Model, folder: Path) -> int:
        """Writes the IR after each step, and each operator's function, as files of a folder; returns how many."""
        extract = self.extract_action(target, model)
        inputs = dict(extract.inputs)
        for workload in self.plan(target, model).workloads:
            chosen = self.decision(target, workload).candidate
            inputs[f"{workload.label}.workload"] = workload.function
            inputs[f"{workload.label}.{chosen.strategy}"] = chosen.whole
        entry = self.memoizer.run(Action(stages.DUMP, extract.subject, inputs, extract.options))
        _require_within(entry.outputs, extract.subject)
        for name, digest in entry.outputs.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.memoizer.blob(digest))
        return len(entry.outputs)

    # the stages, one by one

    def _resolve(self, name: str) -> Target:
        file = load_target(self.folder / "targets" / f"{name}.toml", names(self.folder))
        try:
            attributes, llvm = self._resolved(file.target)
        except ConfigError as error:
            raise ConfigError(f"targets/{name}.toml: target: {error.message}", hint=error.hint) from error
        return Target(name, file, attributes, llvm)

    def _resolved(self, written: str | dict[str, Any]) -> tuple[dict[str, Any], str]:
        """A target's attributes, and the version of LLVM behind them."""
        subject = f"target {written}" if isinstance(written, str) else f"target of kind {written.get('kind')}"
        entry = self.memoizer.run(Action(stages.RESOLVE, subject, options={"target": written}))
        attributes: dict[str, Any] = json.loads(self.memoizer.blob(entry.outputs["target"]))
        return attributes, self.memoizer.blob(entry.outputs["llvm"]).decode()

    def _read(self, model: Model) -> ModelSource:
        source, files = Reader(self.folder, self.memoizer).read(model)
        self._once(("files", model.name), lambda: files)
        return source

    def extract_action(self, target: str, model: Model) -> Action:
        source = self.source(model)
        options: dict[str, object] = {
            "kind": model.kind,
            "weights": [weight.spec.name for weight in source.weights],
            "target": self.target(target).attributes,
            "layout": self.target(target).file.layout,
        }
        if patterns := self.composition(target).patterns():
            options["patterns"] = patterns
        host = self._host(self.target(target))
        if host != self.target(target).attributes:
            options["host"] = host
        return Action(stages.EXTRACT, f"{target}:{model.name}", {"skeleton": source.skeleton}, options)

    def _extract(self, target: str, model: Model) -> tuple[Plan, dict[str, Digest]]:
        self._fetch(target, model)
        entry = self.memoizer.run(self.extract_action(target, model))
        outputs = dict(entry.outputs)
        self._once(("extracted", target, model.name), lambda: outputs)
        plan = msgspec.json.decode(self.memoizer.blob(outputs["plan"]), type=Plan)
        self.composition(target).take_records(plan, outputs)
        return plan, outputs

    def _extracted(self, target: str, model: Model) -> dict[str, Digest]:
        self.plan(target, model)
        return self._once(("extracted", target, model.name), dict)

    def dispatcher(self, target: str, run: Run | None = None) -> Dispatcher:
        """What decides for a target's workloads. `run` may be a look-up that raises where the store lacks an action."""
        resolved = self.target(target)
        return Dispatcher(
            resolved,
            self.composition(target),
            self.memoizer,
            run or self.memoizer.run,
            self._host(resolved),
            self.following,
        )

    def _host(self, target: Target) -> dict[str, Any]:
        """The target that this machine is: what prepares weights is compiled for it, whatever they are prepared for."""
        if target.is_here and not is_source(target.attributes):
            return target.attributes
        return self._once(("host",), lambda: self._resolved(NATIVE)[0])

    def _codegen(self, target: str, workload: Workload) -> Object:
        decision = self.decision(target, workload)
        return Object(self.dispatcher(target).compiled(workload, decision.candidate), decision)

    def is_compiled(self, target: str, workload: Workload) -> bool:
        """Whether the store has a workload's object and all that led to it. What it has is remembered as asked for."""
        dispatcher = self.dispatcher(target, self._found)
        try:
            decision = dispatcher.decide(workload)
            compiled = dispatcher.compiled(workload, decision.candidate)
        except (_NotFoundError, StageError, KeyError, msgspec.MsgspecError):
            return False  # what makes no sense is told where it is asked for in earnest
        self._once(("decision", target, workload.digest), lambda: decision)
        self._once(("object", target, workload.digest), lambda: Object(compiled, decision))
        return True

    def _found(self, action: Action) -> ActionEntry:
        entry = self.memoizer.found(action)
        if entry is None:
            raise _NotFoundError
        return entry

    def objects(self, target: str, workloads: Iterable[Workload]) -> dict[str, Object]:
        """The objects of many workloads, by digest; what is missing is compiled in parallel."""
        wanted = list(workloads)
        with ThreadPoolExecutor(self.memoizer.workers.limit) as threads:
            done = threads.map(lambda workload: self.compiled(target, workload), wanted)
            return {workload.digest: made for workload, made in zip(wanted, done, strict=True)}

    def _assembly(self, target: str, model: Model) -> Assembly:
        plan, source = self.plan(target, model), self.source(model)
        return Assembly(
            subject=f"{target}:{model.name}",
            target=self.target(target),
            composition=self.composition(target),
            dispatcher=self.dispatcher(target),
            memoizer=self.memoizer,
            plan=plan,
            extracted=self._extracted(target, model),
            given={weight.spec.name: weight for weight in (*source.weights, *plan.constants)},
            objects=self.objects(target, self.compiled_for_target(target, plan)),
        )

    def compiled_for_target(self, target: str, plan: Plan) -> list[Workload]:
        """The workloads that are compiled as the target's order says: not what prepares weights for another machine."""
        here = self.target(target).is_here
        return [workload for workload in plan.workloads if workload.calls or here]

    def _pack(self, target: str, model: Model) -> tuple[Weight, ...]:
        return self._assembly(target, model).pack()

    def _link(self, target: str, model: Model) -> Linked:
        inside = self.target(target).file.weights == "inside"
        return self._assembly(target, model).link(self.packed(target, model), inside)

    def _check(self, target: str, model: Model) -> Reference:
        return self._inference(target, model).check(self.source(model))

    def _profile(self, target: str, model: Model) -> Profile | None:
        return self._inference(target, model).profile()

    def _inference(self, target: str, model: Model) -> Inference:
        linked = self.linked(target, model)
        return Inference(model, self.target(target), self.plan(target, model), linked, self.memoizer)

    def _publish(self, target: str, model: Model) -> Path:
        linked, reference, plan = self.linked(target, model), self.reference(target, model), self.plan(target, model)
        resolved = self.target(target)
        used = [workload for workload in plan.workloads if workload.calls]
        objects = self.objects(target, used)
        called = {each.decision.candidate.library for each in objects.values()} - {""}
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
            shared=dict(linked.shared),
            parts=dict(linked.parts),
            unlinked=linked.unlinked,
            libraries=tuple(self.composition(target).describe(name) for name in sorted(called)),
        )
        folder = self.folder / "artifacts" / target / model.name
        _require_within((*draft.shared, *draft.parts), f"{target}:{model.name}")
        wrong = artifact.publish(self.memoizer.store, draft, folder)
        self._note(target, model, wrong)
        self._pin(target, model)
        self._share(target, model)
        return folder

    def _note(self, target: str, model: Model, wrong: Mapping[str, str]) -> None:
        """Writes down what the artifact was made of, for `doit why`. `wrong`: of the artifact that was there."""
        plan = self.plan(target, model)
        decided = [each for each in plan.workloads if self._is_done(("decision", target, each.digest))]
        made = notes.Made(
            folder=self.folder,
            target=self.target(target),
            model=model,
            source=self.source(model),
            plan=plan,
            asked=self.closure(target, model),
            decisions={each.digest: self.decision(target, each) for each in decided},
            files=self.files_read(model),
            wrong=wrong,
        )
        notes.note(made, self.memoizer)

    def _pin(self, target: str, model: Model) -> None:
        """Has the store keep what an artifact is made of that follows tuning.lock, for as long as it does."""
        pins, name = Pins(self.memoizer.store.root), pin_of(self.folder, target, model.name)
        if self.following.is_followed:
            pins.add(name, self.closure(target, model), f"{FILE} of {self.folder}: {target}:{model.name}")
        else:
            pins.remove(name)

    # what other machines have done already

    def closure(self, target: str, model: Model) -> dict[str, tuple[str, ActionEntry]]:
        """The actions of an artifact that was asked for, by key: what a person calls each, and its entry."""
        own = {model.name, f"{target}:{model.name}"}
        own |= {f"{target}:{workload.label}" for workload in self.plan(target, model).workloads}
        others = {
            name for kind, name in (question[:2] for question in self._asked if len(question) > 1) if kind == "source"
        }
        # What belongs to no target is a target itself, a library's calls, a file of the workspace; or another model.
        return self.memoizer.asked(lambda subject: subject in own or (":" not in subject and subject not in others))

    def found(self, target: str, model: Model) -> dict[str, tuple[str, ActionEntry]]:
        """The closure of an artifact that was built before, by this machine or another; nothing is run for it but
        functions of the user's that make a model. Raises NotBuiltError where some of it is nowhere."""
        self.memoizer.may_run = False
        try:
            self.profile(target, model)
            with contextlib.suppress(CheckError):
                self.reference(target, model)
            return self.closure(target, model)
        finally:
            self.memoizer.may_run = True

    def closure_keys(self, target: str, model: Model) -> tuple[str, str]:
        """Where a remote has the closure: see pipeline.closures."""
        attributes = self.target(target).attributes
        return closures.keys(self.source(model), attributes, self.memoizer.toolchain, model.name, target)

    def _fetch(self, target: str, model: Model) -> None:
        """Has the store hold what others did for this artifact, where a remote knows it and the store does not."""
        remote, store = self.memoizer.remote, self.memoizer.store
        if remote is None:
            return
        extract = key_of(self.extract_action(target, model).components(self.memoizer.toolchain))
        if store.lookup(extract) is not None:
            return
        content, name = self.closure_keys(target, model)
        if (same := closures.ask(remote, store, content)) is not None:
            remote.expect(same.said, same.bundles)
            remote.fetch(same.said)
        elif (called := closures.ask(remote, store, name)) is not None:
            remote.expect(called.said, called.bundles)

    def _share(self, target: str, model: Model) -> None:
        """Tells others what this artifact was made of, where some of it was made here."""
        remote = self.memoizer.remote
        if remote is None or not remote.policy.writes:
            return
        found = self.closure(target, model)
        if any(map(self.memoizer.has_run, found)):
            self.publish_closure(target, model, found)

    def publish_closure(self, target: str, model: Model, found: Mapping[str, tuple[str, ActionEntry]]) -> None:
        """Has the remote hold the closure of an artifact, as `closure` or `found` gave it, and of what was read for it.

        A machine that asks for the artifact's knows what the model's file holds: that is told of by itself.
        """
        remote, store = self.memoizer.remote, self.memoizer.store
        assert remote is not None
        read = {key: each for key, each in found.items() if each[1].stage == stages.READ_FILE.name}
        for key, each in read.items():
            closures.publish(remote, store, {key: each}, [closures.key_of_one(key)])
        known = {digest for _, entry in read.values() for digest in entry.outputs.values()}
        closures.publish(remote, store, found, self.closure_keys(target, model), known)

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


class _NotFoundError(Exception):
    """The store lacks an action's result."""


def _require_within(names: Iterable[str], subject: str) -> None:
    """Raises StoreError where what is stored would write files anywhere else: names come from plans and entries, which
    another machine may have made."""
    if outside := [name for name in names if not is_within(name)]:
        raise StoreError(f"what is stored of {subject} leads to a file elsewhere: {ascii(outside[0])[:80]}")
