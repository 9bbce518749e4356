"""measure: the compiled candidates of one workload → what became of each: its time, or why it is put aside."""

from __future__ import annotations

from typing import cast

import msgspec

from pipeline.config import Device
from pipeline.measuring import Contender, measure
from pipeline.stages import Inputs, Options, Outputs
from pipeline.types import TensorSpec, Terms


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: the objects and shared libraries that the contenders name.

    Options: contenders, each [name, symbol, {file: input}, {shared library: input}, [[parameter, symbol, shape,
    dtype]]], the first being what the others are compared with; parameters, [shape, dtype] each; written; seeds,
    seconds and patience, as in pipeline.types.Terms; device, what the times hold for. Where they are taken on a device
    behind a tracker, also `rpc`, the target's [device], and `triple`, what the code is for: neither is in the key.
    Outputs: trials, JSON by name; `lost`, what is to be said of a device that was away meanwhile.
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
    shapes = cast("list[tuple[list[int], str]]", options["parameters"])
    parameters = [TensorSpec(f"p{i}", tuple(shape), dtype) for i, (shape, dtype) in enumerate(shapes)]
    written = cast("list[int]", options["written"])
    terms = Terms(
        tuple(cast("list[int]", options["seeds"])),
        cast(float, options["seconds"]),
        cast(float, options["patience"]),
    )
    if "rpc" in options:
        return _elsewhere(options, parameters, written, contenders, terms)
    trials = measure(parameters, written, contenders[0], contenders[1:], terms)
    return {"trials": msgspec.json.encode(trials)}


def _elsewhere(
    options: Options, parameters: list[TensorSpec], written: list[int], contenders: list[Contender], terms: Terms
) -> Outputs:
    from pipeline.devices import rpc

    device = msgspec.convert(options["rpc"], Device)
    known, triple = cast(str, options["device"]), cast(str, options["triple"])
    trials, lost = rpc.measure(device, known, triple, parameters, written, contenders, terms)
    return {"trials": msgspec.json.encode(trials), **({"lost": lost.encode()} if lost else {})}
