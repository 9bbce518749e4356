"""search: a workload and what was tried of it → candidates that nobody has tried, ready to be compiled."""

from __future__ import annotations

import logging
from typing import Any, cast

import msgspec

from pipeline.compiler import ir, records, search, targets
from pipeline.compiler.search import Proposal, Space, Tried
from pipeline.compiler.search.costmodel import CostModel
from pipeline.stages import Inputs, Options, Outputs
from pipeline.stages.apply import parted

_log = logging.getLogger(__name__)


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: function; tried, JSON [[decisions, ratio], …], of this space; known, JSON [digest, …], of all spaces;
    model, where there is one; source, where the space is the workspace's. Options: space, space version, count, seed,
    target; threads, all by default.

    Outputs: proposed, JSON [{"candidate": digest, "packed": [Packed, …]}, …]; and of each candidate: d0, d1, …, its
    decisions; f0, f1, …, the function to compile; p0.0, p0.1, …, what lays out its weights. Where nothing is left:
    reason, in words.
    """
    func = ir.load(inputs["function"])
    tried = [Tried(decisions, ratio) for decisions, ratio in msgspec.json.decode(inputs["tried"])]
    known = frozenset(msgspec.json.decode(inputs["known"], type=list[str]))
    target = targets.load(cast("dict[str, object]", options["target"]))
    space = space_of(inputs, options)
    proposals = space.propose(func, target, tried, known, cast(int, options["count"]), cast(int, options["seed"]))
    if not proposals:
        return {"proposed": b"[]", "reason": _reason(space, tried).encode()}
    outputs: dict[str, bytes] = {}
    proposed = []
    for i, proposal in enumerate(proposals):
        entry, named = _candidate(i, proposal)
        proposed.append(entry)
        outputs |= named
    return {"proposed": msgspec.json.encode(proposed), **outputs}


def _candidate(i: int, proposal: Proposal) -> tuple[dict[str, Any], dict[str, bytes]]:
    function, packed, packings = parted(proposal.function)
    named = {f"d{i}": msgspec.json.encode(proposal.decisions), f"f{i}": function}
    named |= {f"p{i}.{j}": packing for j, packing in enumerate(packings)}
    return {"candidate": records.digest_of(proposal.function), "packed": packed}, named


def _reason(space: Space, tried: list[Tried]) -> str:
    if tried:
        return f"{space.name} has nothing new after {len(tried)} candidates"
    return f"{space.name} has nothing to decide in this operator"


def space_of(inputs: Inputs, options: Options) -> Space:
    """The space that the options name, with the model of the inputs where it asks one."""
    space = search.of(cast(str, options["space"]), inputs.get("source"))
    if not isinstance(space, search.Guided):
        return space
    return space.guided(model_of(inputs), cast("int | None", options.get("threads")))


def model_of(inputs: Inputs) -> CostModel:
    """The cost model of the inputs; an empty one where there is none, or it cannot be read."""
    data = inputs.get("model")
    try:
        return CostModel() if data is None else CostModel.from_bytes(data)
    except ValueError as error:
        _log.warning("begun with an empty one: %s", error)
        return CostModel()
