"""measure: the compiled candidates of one workload → what became of each: its time, or why it is put aside."""

from __future__ import annotations

from typing import cast

import msgspec

from pipeline.measuring import Contender, measure
from pipeline.stages import Inputs, Options, Outputs
from pipeline.types import TensorSpec, Terms


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: the objects and shared libraries that the contenders name.

    Options: contenders, each [name, symbol, {file: input}, {shared library: input}, [[parameter, symbol, shape,
    dtype]]], the first being what the others are compared with; parameters, [shape, dtype] each; written; seeds,
    seconds and patience, as in pipeline.types.Terms. Outputs: trials, JSON by name.
    """
    named = cast(
        "list[tuple[str, str, dict[str, str], dict[str, str], list[tuple[int, str, list[int], str]]]]",
        options["contenders"],
    )
    contenders = [
        Contender(
            name,
            symbol,
            {file: inputs.file(each) for file, each in objects.items()},
            {file: inputs.file(each) for file, each in shared.items()},
            [(i, symbol, TensorSpec("", tuple(shape), dtype)) for i, symbol, shape, dtype in packed],
        )
        for name, symbol, objects, shared, packed in named
    ]
    parameters = cast("list[tuple[list[int], str]]", options["parameters"])
    trials = measure(
        [TensorSpec(f"p{i}", tuple(shape), dtype) for i, (shape, dtype) in enumerate(parameters)],
        cast("list[int]", options["written"]),
        contenders[0],
        contenders[1:],
        Terms(
            tuple(cast("list[int]", options["seeds"])),
            cast(float, options["seconds"]),
            cast(float, options["patience"]),
        ),
    )
    return {"trials": msgspec.json.encode(trials)}
