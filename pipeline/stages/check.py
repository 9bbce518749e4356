"""check: a library with its weights, and the model as it was read → how far the outputs are from a reference's.

The inputs are seeded, so that the result is the same every time; cases that came with the model are compared as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import msgspec

from pipeline import references
from pipeline.references import Implementation
from pipeline.runtime import Model, assembled, preload
from pipeline.samples import seeded_inputs
from pipeline.stages import Inputs, Options, Outputs
from pipeline.stages.pack import mapped
from pipeline.tensors import Array
from pipeline.types import MANIFEST_FORMAT, CheckState, Manifest, ModelKind, Reference, TensorSpec
from pipeline.weightfile import dtype_of

# Why a model was not compared, where nothing could be.
NO_REFERENCE = {
    ModelKind.ONNX: "no reference is installed that would be done in a minute: pip install 'tvmake[check]'",
    ModelKind.RELAX: "a model written in Relax has no other implementation to compare with",
    ModelKind.TORCH: "nothing was recorded when the program was read",
}

# Integer inputs are often indices, whose range only the model knows: the largest bound that the reference takes.
_BOUNDS = (256, 16, 2, 1)


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: library; a0, a1, … its weight arguments; l0, l1, … the shared libraries that it needs; skeleton;
    w0, w1, … the model's weights; case0, ….

    Options: kind; specs of inputs, outputs, arguments and weights; libraries; tolerance; seeds; high.
    Outputs: reference, JSON.
    """
    model = loaded(inputs, options)
    kind = ModelKind(cast(str, options["kind"]))
    outcome = _Outcome(model, cast(float, options["tolerance"]), NO_REFERENCE[kind])
    for name in sorted(name for name in inputs if name.startswith("case")):
        origin, given, expected = references.recorded(inputs[name])
        outcome.compare(given, expected, origin)
        outcome.cases += 1
    if kind is ModelKind.ONNX:
        _seeded(inputs, options, outcome)
    return {"reference": msgspec.json.encode(outcome.reference())}


class _Outcome:
    """The largest error of each output so far, and where it was found."""

    def __init__(self, model: Model, tolerance: float, refusal: str) -> None:
        self.model = model
        self.tolerance = tolerance
        self.errors: dict[str, float] = {}
        self.worst = ""
        self.name = ""
        self.seeds: list[int] = []
        self.cases = 0
        self.refusal = refusal

    def compare(self, given: references.Feeds, expected: references.Feeds, origin: str) -> None:
        ours = self.model(**given)
        for position, (name, array) in enumerate(ours.items()):
            theirs = expected[name] if name in expected else list(expected.values())[position]
            error = references.error_of(array, theirs)
            if error > max(self.errors.values(), default=-1.0):
                off = f"is {error:.3g} off, relative" if error < float("inf") else references.difference(array, theirs)
                self.worst = f"output {name!r} {off}, on {origin}"
            self.errors[name] = max(error, self.errors.get(name, 0.0))
        self.name = self.name or origin.partition(",")[0]

    def reference(self) -> Reference:
        if not self.errors:
            return Reference(CheckState.SKIPPED, self.refusal)
        largest = max(self.errors.values())
        failed = not largest <= self.tolerance
        reason = f"compared with {self.name}, {self.worst}" if failed else ""
        return Reference(
            state=CheckState.FAILED if failed else CheckState.PASSED,
            reason=reason,
            reference=self.name,
            seeds=tuple(self.seeds),
            cases=self.cases,
            tolerance=self.tolerance,
            errors={name: min(error, 1e300) for name, error in self.errors.items()},
        )


def loaded(inputs: Inputs, options: Options) -> Model:
    """The model that a library and its weights are, before they are an artifact."""
    arguments = _specs(options, "arguments")
    draft = Manifest(
        format=MANIFEST_FORMAT,
        model="the library",
        target="",
        target_spec={},
        toolchain={},
        inputs=_specs(options, "inputs"),
        outputs=_specs(options, "outputs"),
        weights=arguments,
        weights_in="beside",
        files={},
        reference=Reference(CheckState.SKIPPED),
        operators=(),
    )
    weights = [mapped(inputs.file(f"a{i}"), list(spec.shape), spec.dtype) for i, spec in enumerate(arguments)]
    preload(inputs.file(f"l{i}") for i, _ in enumerate(cast("list[str]", options["libraries"])))
    return assembled(draft, inputs.file("library"), weights)


def _specs(options: Options, name: str) -> tuple[TensorSpec, ...]:
    plain = cast("list[tuple[str, list[int], str]]", options[name])
    return tuple(TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in plain)


def _seeded(inputs: Inputs, options: Options, outcome: _Outcome) -> None:
    specs = _specs(options, "inputs")
    weights = {
        spec.name: mapped(inputs.file(f"w{i}"), list(spec.shape), spec.dtype)
        for i, spec in enumerate(_specs(options, "weights"))
    }
    high = cast(int, options["high"])
    integers = any(dtype_of(spec.dtype).kind in "iu" for spec in specs)
    bounds = (high,) if high else (_BOUNDS if integers else _BOUNDS[:1])
    seeds = cast("list[int]", options["seeds"])
    for make in references.onnx_implementations(inputs["skeleton"], weights):
        found = _accepted(make, specs, seeds[0], bounds, outcome)
        if found is None:
            continue
        implementation, bound = found
        outcome.name = implementation.name
        for seed in seeds:
            given = seeded_inputs(specs, seed, bound)
            outcome.compare(given, implementation.run(given), f"seed {seed}")
            outcome.seeds.append(seed)
        return


def _accepted(
    make: Callable[[], Implementation],
    specs: tuple[TensorSpec, ...],
    seed: int,
    bounds: tuple[int, ...],
    outcome: _Outcome,
) -> tuple[Implementation, int] | None:
    """The implementation and the largest bound of integers with which it runs; None where it refuses the model."""
    try:
        implementation = make()
    except Exception as error:
        outcome.refusal = f"the reference refuses the model: {_first_line(error)}"
        return None
    for bound in bounds:
        given: dict[str, Array] = seeded_inputs(specs, seed, bound)
        try:
            implementation.run(given)
        except Exception as error:
            outcome.refusal = f"the reference {implementation.name} fails: {_first_line(error)}"
        else:
            return implementation, bound
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
