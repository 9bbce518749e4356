"""resolve: a target as its file writes it → its attributes, complete, and the version of LLVM behind it."""

from __future__ import annotations

import json
from typing import cast

from pipeline.compiler import targets
from pipeline.stages import Inputs, Options, Outputs


def run(inputs: Inputs, options: Options) -> Outputs:
    """Options: target, as written. Outputs: target, JSON of the attributes; llvm, the version."""
    attributes = targets.resolve(cast("str | dict[str, object]", options["target"]))
    return {
        "target": json.dumps(attributes, sort_keys=True).encode(),
        "llvm": targets.llvm_version().encode(),
    }
