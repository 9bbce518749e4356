"""bindings: a file of the workspace's manual/ → which workloads its functions are for."""

from __future__ import annotations

import msgspec

from pipeline.compiler.strategies.manual import replacements
from pipeline.sources import module_of
from pipeline.stages import Inputs, Options, Outputs


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: source. Outputs: bindings, JSON: [name of a function, digest of its workload or the beginning of it]."""
    bound = replacements(module_of(inputs["source"], "manual"))
    return {"bindings": msgspec.json.encode([[each.name, each.workload_digest()] for each in bound])}
