"""profile: a library with its weights → where the time of an inference goes, on this machine."""

from __future__ import annotations

from typing import cast

import msgspec

from pipeline.samples import seeded_inputs
from pipeline.stages import Inputs, Options, Outputs
from pipeline.stages.check import loaded
from pipeline.types import Profile

_SECONDS = 1.0  # of running, all together
_RUNS = (2, 50)


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs and options: as check's, less the model. Outputs: profile, JSON.

    The whole is timed without watching its parts, since to watch costs some microseconds for each.
    """
    model = loaded(inputs, options)
    given = seeded_inputs(model.inputs, 0, cast(int, options["high"]) or 2)
    (once,) = model.time(given, 1)
    runs = max(_RUNS[0], min(_RUNS[1], int(_SECONDS / 2 / max(once, 1e-6))))
    seconds = min(model.time(given, runs))
    _, operators = model.profile(given, runs)
    return {"profile": msgspec.json.encode(Profile(seconds, operators))}
