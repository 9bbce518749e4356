"""A built library, run on this machine: check (is it right?) and profile (where does its time go?)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from pipeline import stages
from pipeline.assembly import Linked
from pipeline.composition import Target
from pipeline.errors import CheckError
from pipeline.hashing import Digest
from pipeline.memoizer import Action, Memoizer
from pipeline.models import Model
from pipeline.processor import device
from pipeline.types import CheckState, ModelSource, Plan, Profile, Reference, TensorSpec


@dataclass(frozen=True)
class Inference:
    """What is linked for one model and one target, and what it takes to call it."""

    model: Model
    target: Target
    plan: Plan
    linked: Linked
    memoizer: Memoizer

    def check(self, source: ModelSource) -> Reference:
        """How far the outputs are from the reference's. Raises CheckError where they are too far."""
        file = self.target.file
        if not file.check.enabled:
            return Reference(CheckState.SKIPPED, "switched off in the target's file")
        if not self._runs_here:
            return Reference(CheckState.SKIPPED, "what is built for the target does not run on this machine")
        inputs = {"skeleton": source.skeleton, **self._runnable()}
        inputs |= {f"w{i}": weight.blob for i, weight in enumerate(source.weights)}
        inputs |= {f"case{i}": case for i, case in enumerate(source.cases)}
        options: dict[str, object] = {
            "kind": self.model.kind,
            **self._signature(),
            "weights": _plain(weight.spec for weight in source.weights),
            "tolerance": file.check.tolerance,
            "seeds": list(file.check.seeds),
            "high": self.model.high,
        }
        entry = self.memoizer.run(Action(stages.CHECK, self._subject, inputs, options, file.timeout))
        outcome = msgspec.json.decode(self.memoizer.blob(entry.outputs["reference"]), type=Reference)
        if outcome.state is CheckState.FAILED:
            raise CheckError(
                outcome.reason,
                stage="check",
                subject=self._subject,
                hint=f"the artifact was not replaced; tolerance in targets/{self.target.name}.toml is "
                f"{outcome.tolerance:g}",
            )
        return outcome

    def profile(self) -> Profile | None:
        """Where the time of an inference goes; None where the code does not run here, or nobody wants to know."""
        file = self.target.file
        if not file.measure.profile or not self._runs_here:
            return None
        options: dict[str, object] = {**self._signature(), "high": self.model.high, "device": device()}
        action = Action(stages.PROFILE, self._subject, self._runnable(), options, file.timeout)
        return msgspec.json.decode(self.memoizer.blob(self.memoizer.run(action).outputs["profile"]), type=Profile)

    @property
    def _subject(self) -> str:
        return f"{self.target.name}:{self.model.name}"

    @property
    def _runs_here(self) -> bool:
        return self.target.is_here and self.linked.library is not None

    def _runnable(self) -> dict[str, Digest]:
        """The library with what it takes to run it, as the inputs of a stage."""
        assert self.linked.library is not None
        inputs = {"library": self.linked.library}
        inputs |= {f"a{i}": weight.blob for i, weight in enumerate(self.linked.weights)}
        return inputs | {f"l{i}": digest for i, digest in enumerate(self.linked.shared.values())}

    def _signature(self) -> dict[str, object]:
        """What the library takes and gives, and which libraries it needs, as the options of a stage."""
        return {
            "inputs": _plain(self.plan.inputs),
            "outputs": _plain(self.plan.outputs),
            "arguments": _plain(weight.spec for weight in self.linked.weights),
            "libraries": list(self.linked.shared),
        }


def _plain(specs: Iterable[TensorSpec]) -> list[list[object]]:
    return [[spec.name, list(spec.shape), spec.dtype] for spec in specs]
