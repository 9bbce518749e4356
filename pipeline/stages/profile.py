"""profile: a library with its weights → where the time of an inference goes, on this machine."""

from __future__ import annotations

import time
from typing import cast

import msgspec

from pipeline.samples import seeded_inputs
from pipeline.stages import Inputs, Options, Outputs
from pipeline.stages.check import loaded
from pipeline.types import Profile

_SECONDS = 1.0  # of running, all together
_RUNS = 100  # at most


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs and options: as check's, less the model. Outputs: profile, JSON.

    The whole is the sum of its parts, each at its least: what else a busy machine does meanwhile disturbs a run, but
    seldom the same part of every run.
    """
    model = loaded(inputs, options)
    given = seeded_inputs(model.inputs, 0, cast(int, options["high"]) or 2)
    begin = time.perf_counter()
    operators = model.profile(given, 1)
    runs = min(_RUNS, int(_SECONDS / (time.perf_counter() - begin)))
    for name, seconds in model.profile(given, runs).items() if runs else ():
        operators[name] = min(seconds, operators[name])
    return {"profile": msgspec.json.encode(Profile(sum(operators.values()), operators))}
