"""compile: the functions of several candidates and a target → the object file of each.

For a night on other machines: its candidates are many, and an order for each would be most of the work of whoever
gives them out. What there is to say of a function that cannot be compiled, or that kills the compiler, is told by
`codegen`, of it alone.
"""

from __future__ import annotations

import contextlib
import time
from typing import cast

from pipeline.compiler import ir, objects
from pipeline.stages import Inputs, Options, Outputs


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: f0, f1, … functions. Options: functions, of each [symbol, index of its target]; targets; seconds, after
    which no other function is begun.

    Outputs: o0, o1, … but for functions that failed and those that were not begun.
    """
    targets = cast("list[dict[str, object]]", options["targets"])
    until = time.monotonic() + cast(float, options["seconds"])
    outputs: dict[str, bytes] = {}
    for i, (symbol, which) in enumerate(cast("list[tuple[str, int]]", options["functions"])):
        if time.monotonic() > until:
            break
        with contextlib.suppress(Exception):
            outputs[f"o{i}"] = objects.compile_parts(ir.load(inputs[f"f{i}"]), symbol, targets[which]).code
    return outputs
