"""How far quick tuning gets: the space of rules in a tenth of the trials of the full search, class by class.

    python -m bench.spaces [CLASS...] [--trials 160] [--seconds 0.05] [--json FILE]

Each class is one of bench.classes: its operator as lowering makes it. Four functions of it are compared: loops as they
are (default), what the rules make (rules), the best that the space `rules` found in a tenth of the trials (quick), and
the best that `post-order-apply` found in all of them (full), with a cost model that begins empty for each class.

Every candidate is checked against the default and timed in turn with the rules' function, so that a slower second is
one for both. What the table shows was timed once more at the end: the baselines and the best three of each search, all
in turn. A gain is how many times as fast as the default; the share is log(gain of quick) / log(gain of full), the ratio
is time of quick / time of full.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.classes import CLASSES
from bench.cpu import table
from bench.latency import said
from pipeline.measuring import Contender, measure
from pipeline.types import TensorSpec, Terms, Trial

if TYPE_CHECKING:
    import tvm

    from pipeline.compiler.search import Proposal, Space

_FRACTION = 10  # of the full search's trials, one in so many
_BATCHES = {"rules": 4, "post-order-apply": 16}  # candidates at a time: the small space learns from each
_FINALISTS, _FINAL = 3, 0.5  # how many of the best of a search are timed again, and the seconds for each


@dataclass(frozen=True)
class Operator:
    """The operator of a class, its baselines compiled, and where compiled candidates go."""

    name: str
    func: tvm.tirx.PrimFunc
    attributes: Mapping[str, object]
    rules: tvm.tirx.PrimFunc
    folder: Path

    @property
    def target(self) -> tvm.target.Target:
        from pipeline.compiler import targets

        return targets.load(self.attributes)

    @property
    def parameters(self) -> list[TensorSpec]:
        return [_spec(param, place) for place, param in enumerate(self.func.params)]

    def compiled(self, name: str, func: tvm.tirx.PrimFunc) -> Contender:
        """A candidate as an object, with what lays out its weights. Raises RuntimeError where TVM makes no code."""
        from pipeline.compiler import objects, prepack, records

        digest = records.digest_of(func)[:32]
        rest, packings = prepack.split(func)
        parts = {f"op_{digest}": rest} | {f"op_{digest}_{i}": each.function for i, each in enumerate(packings)}
        files = {f"{symbol}.o": self.folder / f"{symbol}.o" for symbol in parts}
        for symbol, part in parts.items():
            files[f"{symbol}.o"].write_bytes(objects.compile_function(part, symbol, self.attributes))
        packed = [
            (each.param, f"op_{digest}_{i}", _spec(each.function.params[-1], each.param))
            for i, each in enumerate(packings)
        ]
        return Contender(name, f"op_{digest}", files, {}, packed)

    def timed(self, functions: Mapping[str, tvm.tirx.PrimFunc], seconds: float) -> dict[str, Trial]:
        """What became of each function, by name; those that do not compile are refused."""
        from pipeline.compiler import ir

        refused, ready = {}, []
        for name, func in functions.items():
            try:
                ready.append(self.compiled(name, func))
            except RuntimeError as error:
                refused[name] = Trial(name, refused=str(error))
        reference = self.compiled("reference", self.func)
        return refused | measure(self.parameters, ir.written(self.func), reference, ready, Terms(seconds=seconds))


def _spec(param: Any, place: int) -> TensorSpec:
    return TensorSpec(f"p{place}", tuple(int(extent) for extent in param.ty.shape), str(param.ty.dtype))


def operator(name: str, folder: Path) -> Operator:
    """The function of a class that does the work: of those that lowering makes, the one with the most operations."""
    from pipeline.compiler import ir, passes, rules, targets
    from pipeline.compiler.frontends import onnx
    from pipeline.compiler.lowering import ENTRY, lower

    attributes = targets.resolve("native")
    read = onnx.read(CLASSES[name]().model, {}, [])
    mod, returned = onnx.load(read.skeleton)
    mod, constants = passes.detach_constants(mod, ENTRY, "constant_")
    lowered = lower(mod, [*(spec.name for spec, _ in read.weights), *constants], returned, attributes)
    called = [each for each in lowered.functions.values() if each.calls and "transpose" not in each.name]
    func = ir.load(max(called, key=lambda each: len(each.canonical)).canonical)
    scheduled = rules.schedule(func, targets.load(attributes))
    return Operator(name, func, attributes, func if scheduled is None else scheduled, folder)


# --- searching --------------------------------------------------------------------------------------------------------


@dataclass
class Search:
    """A search's course: what was tried, and the best of it."""

    space: Space
    limit: int
    seconds: float
    tried: list[Any] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    timed: list[tuple[float, tvm.tirx.PrimFunc]] = field(default_factory=list)
    failed: int = 0

    def run(self, op: Operator) -> None:
        """Until the trials are spent, or the space has nothing more."""
        model = _Model(self.space)
        while len(self.tried) < self.limit:
            count = min(_BATCHES.get(self.space.name, 16), self.limit - len(self.tried))
            space = model.guiding()
            proposals = space.propose(op.func, op.target, self.tried, self.known, count, len(self.tried))
            if not proposals:
                return
            model.learn(op, [(each.function, ratio) for each, ratio in self._batch(op, proposals)])

    def _batch(self, op: Operator, proposals: Sequence[Proposal]) -> list[tuple[Proposal, float]]:
        from pipeline.compiler.records import digest_of
        from pipeline.compiler.search import Tried

        named = {str(i): each.function for i, each in enumerate(proposals)}
        trials = op.timed({"rules": op.rules, **named}, self.seconds)
        baseline = trials["rules"].seconds
        assert baseline is not None
        found = []
        for i, each in enumerate(proposals):
            seconds = trials[str(i)].seconds
            ratio = baseline / seconds if seconds else 0.0
            self.failed += not seconds
            self.tried.append(Tried(each.decisions, ratio))
            self.known.add(digest_of(each.function))
            self.timed += [(ratio, each.function)] if seconds else []
            found.append((each, ratio))
        return found

    def finalists(self) -> list[tvm.tirx.PrimFunc]:
        """The best few: which of them is the best, their trials are too short to tell."""
        return [func for _, func in sorted(self.timed, key=lambda pair: -pair[0])[:_FINALISTS]]


class _Model:
    """The cost model of a space that asks one; nothing for others."""

    def __init__(self, space: Space) -> None:
        from pipeline.compiler.search import Guided

        self._space = space
        self._model: Any = None
        if isinstance(space, Guided):
            from pipeline.compiler.search.costmodel import CostModel

            self._model = CostModel()

    def guiding(self) -> Space:
        return self._space if self._model is None else self._space.guided(self._model, None)  # type: ignore[attr-defined]

    def learn(self, op: Operator, results: Sequence[tuple[Any, float]]) -> None:
        from pipeline.compiler.records import digest_of

        if self._model is not None:
            self._model = self._model.learn(digest_of(op.func), op.target, results)


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """Seconds of one class: loops as they are, the rules, the best after a tenth of the trials and after all."""

    default: float
    rules: float
    quick: float
    full: float
    quick_trials: int
    full_trials: int
    failed: int
    took: float

    @property
    def share(self) -> float | None:
        """None where the full search gains nothing: there is nothing to have a share of."""
        gain = math.log(self.default / self.full)
        return math.log(self.default / self.quick) / gain if gain > 0 else None


def figure(op: Operator, trials: int, seconds: float) -> Figure:
    """Searches twice, then times the baselines and the best of both once more."""
    from pipeline.compiler import search

    begin = time.monotonic()
    quick = Search(search.by_name("rules"), max(1, trials // _FRACTION), seconds)
    full = Search(search.by_name("post-order-apply"), trials, seconds)
    for each in (quick, full):
        each.run(op)
    named = {"default": op.func, "rules": op.rules}
    for name, each in (("quick", quick), ("full", full)):
        named |= {f"{name} {i}": func for i, func in enumerate(each.finalists())}
    found = {name: trial.seconds for name, trial in op.timed(named, _FINAL).items() if trial.seconds}

    def best(search: str) -> float:
        own = [seconds for name, seconds in found.items() if name.startswith(search)]
        return min([*own, found["default"]])

    return Figure(
        default=found["default"],
        rules=found["rules"],
        quick=best("quick"),
        full=best("full"),
        quick_trials=len(quick.tried),
        full_trials=len(full.tried),
        failed=quick.failed + full.failed,
        took=time.monotonic() - begin,
    )


def show(figures: Mapping[str, Figure]) -> None:
    heads = ("class", "default", "rules", "quick (trials)", "full (trials)", "share", "quick / full")
    rows = [
        (
            name,
            f"{1e6 * each.default:.0f}",
            f"{1e6 * each.rules:.0f}",
            f"{1e6 * each.quick:.0f} ({each.quick_trials})",
            f"{1e6 * each.full:.0f} ({each.full_trials})",
            "—" if each.share is None else each.share,
            each.quick / each.full,
        )
        for name, each in figures.items()
    ]
    shares = [each.share for each in figures.values() if each.share is not None]
    ratio = math.exp(sum(math.log(each.quick / each.full) for each in figures.values()) / len(figures))
    rows.append(("mean; of times geometric", "", "", "", "", sum(shares) / len(shares) if shares else "—", ratio))
    table("µs of the operator; share of the full search's gain", heads, rows)


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.spaces", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("classes", nargs="*", default=list(CLASSES), help=f"of {', '.join(CLASSES)} (default: all)")
    parser.add_argument("--trials", type=int, default=160, help="of the full search (default 160)")
    parser.add_argument("--seconds", type=float, default=0.05, help="of timing for each candidate (default 0.05)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    if unknown := [name for name in options.classes if name not in CLASSES]:
        parser.error(f"there is no class {', '.join(unknown)}; there are {', '.join(CLASSES)}")
    figures: dict[str, Figure] = {}
    for name in options.classes:
        with tempfile.TemporaryDirectory(prefix="tvmake-bench-") as folder:
            figures[name] = figure(operator(name, Path(folder)), options.trials, options.seconds)
        said(f"{name}: {figures[name]}")
    show(figures)
    if options.json:
        plain = {name: asdict(each) | {"share": each.share} for name, each in figures.items()}
        options.json.write_text(json.dumps({"trials": options.trials, "classes": plain}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
