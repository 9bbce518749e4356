"""dispatch: the candidates of a workload → the one to compile, and why."""

from __future__ import annotations

from typing import cast

import msgspec

from pipeline.hashing import Digest
from pipeline.stages import Inputs, Options, Outputs
from pipeline.types import Decision


def run(inputs: Inputs, options: Options) -> Outputs:
    """Options: candidates, [strategy, hash, size] in the user's order; select. Outputs: decision, JSON."""
    candidates = cast("list[tuple[str, str, int]]", options["candidates"])
    strategy, hash_, size = candidates[0]
    reason = "first that applies" if len(candidates) > 1 else "the only one that applies"
    names = tuple(name for name, _, _ in candidates)
    return {"decision": msgspec.json.encode(Decision(strategy, reason, Digest(hash_, size), names))}
