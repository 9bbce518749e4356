"""apply: a workload, a strategy and a target → the scheduled function, or the word that the strategy does not apply."""

from __future__ import annotations

from typing import Any, cast

import msgspec

from pipeline.compiler import ir, libraries, prepack, search, strategies, targets
from pipeline.compiler.libraries import Library, Shim
from pipeline.compiler.records import Group
from pipeline.compiler.strategies import Strategy
from pipeline.compiler.strategies.library import Dispatch
from pipeline.compiler.strategies.manual import Manual, replacements
from pipeline.compiler.strategies.tuned import Tuned
from pipeline.hashing import Digest
from pipeline.sources import module_of, object_of
from pipeline.stages import Inputs, Options, Outputs
from pipeline.stages.shim import driver, installed_of, library_of
from pipeline.types import Packed, TensorSpec


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: function; what else the strategy needs (`strategy_of`). Options: strategy, its version, target.

    Outputs, none where it does not apply: whole; function, which is whole less what lays out weights; packed, JSON; and
    p0, p1, …, what lays them out. Where better records were passed over: passed, JSON, what was said of each.
    """
    attributes = cast("dict[str, object]", options["target"])
    func = ir.load(inputs["function"])
    if "library" in options and not targets.is_this_processor(attributes):
        # A library packs weights for the processor that it finds, and the artifact may run on an older one.
        func = func.without_attr(prepack.LAYOUT_FREE)
    strategy = strategy_of(inputs, options)
    scheduled = strategy.apply(func, targets.load(attributes))
    passed = getattr(strategy, "passed", ())
    said = {"passed": msgspec.json.encode(passed)} if passed else {}
    if scheduled is None:
        return said
    rest, packed, packings = parted(scheduled)
    named = {f"p{i}": function for i, function in enumerate(packings)}
    whole = ir.canonical(scheduled)
    return {"whole": whole, "function": rest, **named, "packed": msgspec.json.encode(packed), **said}


def parted(scheduled: Any) -> tuple[bytes, list[Packed], list[bytes]]:
    """A scheduled function in its parts: what is compiled, what it takes in another layout, and what lays that out."""
    rest, packings = prepack.split(scheduled)
    functions = [ir.canonical(packing.function) for packing in packings]
    packed = [
        Packed(packing.param, Digest.of(function), _spec(f"p{packing.param}", packing.function))
        for packing, function in zip(packings, functions, strict=True)
    ]
    return ir.canonical(rest), packed, functions


def _spec(name: str, packing: object) -> TensorSpec:
    """What a packing function fills: its last parameter."""
    ty = packing.params[-1].ty  # type: ignore[attr-defined]
    return TensorSpec(name, tuple(int(extent) for extent in ty.shape), str(ty.dtype))


_SPACE = "space."

_shims: dict[tuple[str, bytes], Shim] = {}  # a worker asks one library many times


def _loaded(library: Library, compiled: bytes) -> Shim:
    known = (library.name, compiled)
    if known not in _shims:
        _shims[known] = libraries.load_shim(library, compiled, installed_of(library), driver())
    return _shims[known]


def strategy_of(inputs: Inputs, options: Options) -> Strategy:
    """The strategy that the options name, made of what the inputs hold for it.

        default, rules      nothing more
        manual              source, a file of the workspace's manual/; option function
        tuned               winner0, winner1, …, tuning records, the best first; records0, …, MetaSchedule's;
                            space.<name>, files of the workspace's spaces/
        a library           shim, compiled; source, where the workspace has it; option library
        any other           source, a file of the workspace's strategies/

    Raises ConfigError for a file of the workspace that cannot be used, and for a library that is not installed.
    """
    name = cast(str, options["strategy"])
    source = inputs.get("source")
    if "library" in options:
        library = library_of(name, source)
        return Dispatch(library, _loaded(library, inputs["shim"]))
    if name == "tuned":
        groups = (Group.from_bytes(inputs[each]) for each in _numbered(inputs, "records"))
        named = [each.removeprefix(_SPACE) for each in inputs if each.startswith(_SPACE)]
        spaces = {each: search.of(each, inputs[_SPACE + each]) for each in named}
        return Tuned(groups, [inputs[each] for each in _numbered(inputs, "winner")], spaces)
    if source is None:
        return strategies.by_name(name)
    if name == "manual":
        bound = replacements(module_of(source, "manual"))
        return Manual(next(each for each in bound if each.name == options["function"]))
    return cast("Strategy", object_of(source, f"strategies/{name}.py", "strategy"))


def _numbered(inputs: Inputs, prefix: str) -> list[str]:
    """The names of the inputs <prefix>0, <prefix>1, …, in that order."""
    numbers = [int(name.removeprefix(prefix)) for name in inputs if name.startswith(prefix)]
    return [f"{prefix}{number}" for number in sorted(numbers)]
