"""From the compiled workloads of one model to what an artifact is made of: weights laid out, and everything linked.

    prepare, objects, weights  ─ pack ─→  the weights that inference takes
    main, device code          ─ embed ─→ the object that carries both
    main, objects, libraries   ─ link ─→  the library; or the parts as they are, where nothing here links for the target

Weights are prepared on this machine whatever the target: what prepares them is compiled for this machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from pipeline import artifact, stages
from pipeline.composition import Composition, Target
from pipeline.dispatch import Compiled, Dispatcher
from pipeline.hashing import Digest
from pipeline.linker import no_linker
from pipeline.memoizer import Action, Memoizer
from pipeline.platforms import has_device_code, is_source, triple_of
from pipeline.toolchain import driver_for, driver_identity
from pipeline.types import Decision, Packed, Plan, Weight, Workload, symbol_of


@dataclass(frozen=True)
class Object:
    """A compiled workload, and how its function was chosen."""

    compiled: Compiled
    decision: Decision

    @property
    def blob(self) -> Digest:
        return self.compiled.object


@dataclass(frozen=True)
class Linked:
    """A library and its weights, in the order in which the entry function takes them.

    library  None where nothing here links for the target; `unlinked` says why, and what to install
    shared   shared libraries that must lie beside it, by file name
    parts    what else is shipped, by file name: device code and C sources to look at, or everything to be linked
    """

    library: Digest | None
    weights: tuple[Weight, ...]
    shared: Mapping[str, Digest] = field(default_factory=dict)
    parts: Mapping[str, Digest] = field(default_factory=dict)
    unlinked: str = ""


@dataclass(frozen=True)
class Assembly:
    """What is assembled: a plan with the blobs that extraction made, and the objects of its workloads by digest."""

    subject: str
    target: Target
    composition: Composition
    dispatcher: Dispatcher
    memoizer: Memoizer
    plan: Plan
    extracted: Mapping[str, Digest]
    given: Mapping[str, Weight]  # the model's weights and the plan's constants, by name
    objects: Mapping[str, Object]

    def pack(self) -> tuple[Weight, ...]:
        """The weights that inference takes: as the model has them, as `prepare` makes them, and then, where a chosen
        function takes one in a layout of its own, laid out."""
        layouts = {i: layout for i, _ in enumerate(self.plan.weights) if (layout := self._layout(i)) is not None}
        if not self.plan.prepares and not layouts:
            return tuple(Weight(use.spec, self.given[use.source].blob) for use in self.plan.weights)
        outputs = self.memoizer.run(self._pack_action(layouts)).outputs
        weights = []
        for i, use in enumerate(self.plan.weights):
            if i in layouts:
                spec = msgspec.structs.replace(layouts[i][1].spec, name=use.spec.name)
                weights.append(Weight(spec, outputs[f"a{i}"]))
            else:
                weights.append(Weight(use.spec, outputs[f"a{i}"] if use.packed >= 0 else self.given[use.source].blob))
        return tuple(weights)

    def link(self, weights: tuple[Weight, ...], inside: bool) -> Linked:
        """The library, with the weights inside where that is asked for."""
        used = {w.digest: self.objects[w.digest] for w in self.plan.workloads if w.calls}
        main = self._main(used)
        kernels = {
            f"kernels/{w.label}{suffix}": digest
            for w in self.plan.workloads
            if w.digest in used
            for suffix, digest in used[w.digest].compiled.shown.items()
        }
        triple = triple_of(self.target.attributes)
        if driver_for(triple) is None:
            parts = {f"objects/{w.label}.o": used[w.digest].blob for w in self.plan.workloads if w.digest in used}
            said = str(no_linker(triple))
            return Linked(None, weights, {}, {**kernels, **parts, "objects/main.o": main}, said)
        objects, shared = self._linked_with(each.decision.candidate.library for each in used.values())
        inputs = {
            "main": main,
            **{f"o{digest}": each.blob for digest, each in used.items()},
            **objects,
            **_beside(shared),
        }
        if inside:
            inputs["weights"] = artifact.weight_file(self.memoizer.store, weights)
        options: dict[str, object] = {"libraries": list(shared)}
        if triple:
            options |= {"target": self.target.attributes, "driver": driver_identity(triple)}
        entry = self.memoizer.run(Action(stages.LINK, self.subject, inputs, options, self.target.file.timeout))
        return Linked(entry.outputs["library"], weights, shared, kernels)

    def _layout(self, index: int) -> tuple[Workload, Packed] | None:
        """What lays out a weight for its one user; None where that takes it as it is."""
        use = self.plan.weights[index]
        if not use.user:
            return None
        user = next(workload for workload in self.plan.workloads if workload.digest == use.user)
        packed = self.objects[use.user].decision.candidate.packed
        return next(((user, each) for each in packed if each.param == use.param), None)

    def _pack_action(self, layouts: Mapping[int, tuple[Workload, Packed]]) -> Action:
        plan = self.plan
        plain = {plan.weights[i].source for i in layouts if plan.weights[i].packed < 0}
        taken = list(dict.fromkeys([*plan.packing, *sorted(plain)]))
        inputs = {f"w{i}": self.given[name].blob for i, name in enumerate(taken)}
        libraries = [self.objects[user.digest].decision.candidate.library for user, _ in layouts.values()]
        if plan.prepares:
            inputs["prepare"] = self.extracted["prepare"]
            for workload in (each for each in plan.workloads if each.prepares):
                compiled, library = self.dispatcher.preparing(workload, self.objects.get(workload.digest))
                inputs[f"o{workload.digest}"] = compiled
                libraries.append(library)
        for user, packed in layouts.values():
            made = self.memoizer.run(self.dispatcher.packing(user, packed))
            inputs[f"o{packed.function.hash}"] = made.outputs["object"]
        arguments: dict[str, object] = {}
        for i, use in enumerate(plan.weights):
            layout = layouts.get(i)
            if use.packed < 0 and layout is None:
                continue
            symbol, spec = (symbol_of(layout[1].function.hash), layout[1].spec) if layout else ("", use.spec)
            origin = f"p{use.packed}" if use.packed >= 0 else f"w{taken.index(use.source)}"
            arguments[f"a{i}"] = [origin, symbol, list(spec.shape), spec.dtype]
        objects, shared = self._linked_with(libraries)
        options: dict[str, object] = {
            "weights": [[list(self.given[name].spec.shape), self.given[name].spec.dtype] for name in taken],
            "prepared": len(plan.packing) if plan.prepares else 0,
            "arguments": arguments,
            "libraries": list(shared),
        }
        return Action(stages.PACK, self.subject, {**inputs, **objects, **_beside(shared)}, options)

    def _linked_with(self, libraries: Iterable[str]) -> tuple[dict[str, Digest], dict[str, Digest]]:
        objects, shared = self.composition.linked_with(libraries)
        return {f"o-{file.removesuffix('.o')}": digest for file, digest in objects.items()}, shared

    def _main(self, used: Mapping[str, Object]) -> Digest:
        """The bytecode's object: with the device code of all functions, and compiled, where the target wants that."""
        attributes, main = self.target.attributes, self.extracted["main"]
        if has_device_code(attributes):
            devices = {f"d{digest}": each.compiled.device for digest, each in used.items() if each.compiled.device}
            action = Action(stages.EMBED, self.subject, {"main": main, **devices}, {"target": attributes})
            return self.memoizer.run(action).outputs["object"]
        if is_source(attributes):
            return self.memoizer.run(self.dispatcher.cc(self.subject, main)).outputs["object"]
        return main


def _beside(shared: Mapping[str, Digest]) -> dict[str, Digest]:
    return {f"l{i}": digest for i, digest in enumerate(shared.values())}
