"""apply: a workload, a strategy and a target → the scheduled function, or the word that the strategy does not apply."""

from __future__ import annotations

from typing import cast

from pipeline.compiler import ir, strategies, targets
from pipeline.stages import Inputs, Options, Outputs


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: function. Options: strategy, its version, target. Outputs: function, absent where it does not apply."""
    strategy = strategies.by_name(cast(str, options["strategy"]))
    target = targets.load(cast("dict[str, object]", options["target"]))
    scheduled = strategy.apply(ir.load(inputs["function"]), target)
    return {} if scheduled is None else {"function": ir.canonical(scheduled)}
