"""pack: weights as the model has them → weights as the entry function takes them: prepared, then laid out."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from pipeline.linker import link
from pipeline.runtime import find_runtime, open_library, preload, started
from pipeline.stages import Inputs, Options, Outputs
from pipeline.tensors import Array, aligned_copy, array_over, fits, flat, tensor_over
from pipeline.types import LIBRARY
from pipeline.weightfile import dtype_of


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: prepare, where something is to be prepared; o…, objects; l0, l1, … shared libraries; w0, w1, ….

    Options: weights, shape and dtype of each; prepared, how many of them `prepare` takes; libraries, their file names;
    arguments, by output: origin (w0, or p0 of what `prepare` gives), symbol of what lays it out or "", shape, dtype.

    Outputs: the arguments' bytes. Weights are mapped, not read, so what is not used costs nothing.
    """
    library = _library(inputs, cast("list[str]", options["libraries"]))
    specs = cast("list[tuple[list[int], str]]", options["weights"])
    tensors = {f"w{i}": tensor_over(mapped(inputs.file(f"w{i}"), *spec)) for i, spec in enumerate(specs)}
    if "prepare" in inputs:
        taken = [tensors[f"w{i}"] for i in range(cast(int, options["prepared"]))]
        tensors |= {f"p{i}": made for i, made in enumerate(flat(started(library)["prepare"](*taken)))}
    outputs = {}
    arguments = cast("dict[str, tuple[str, str, list[int], str]]", options["arguments"])
    for name, (origin, symbol, shape, dtype) in arguments.items():
        made = tensors[origin]
        if symbol:
            room = aligned_copy(np.zeros(shape, dtype_of(dtype)))
            # A library with bytecode is a module that imports the one with the functions.
            library.get_function(symbol, query_imports=True)(made, made := tensor_over(room))
        outputs[name] = _bytes(made)
    return outputs


def _library(inputs: Inputs, libraries: Sequence[str]) -> Any:
    """What prepares and lays out, linked and opened."""
    objects = {f"{name}.o": inputs.file(name) for name in inputs if name == "prepare" or name[0] == "o"}
    beside = {name: inputs.file(f"l{i}") for i, name in enumerate(libraries)}
    with tempfile.TemporaryDirectory(prefix="tvmake-") as name:
        (Path(name) / LIBRARY).write_bytes(link(objects, libraries=beside))
        preload(beside.values())
        return open_library(Path(name), (), find_runtime())[0]


def mapped(path: Path, shape: list[int], dtype: str) -> Array:
    """A blob as an array, mapped where it can be and at an aligned place."""
    kind = dtype_of(dtype)
    if path.stat().st_size == 0:
        return np.empty(shape, kind)
    array = np.memmap(path, np.uint8, "r").view(kind).reshape(shape)
    return array if fits(array) else aligned_copy(array)


def _bytes(result: Any) -> memoryview:
    return np.asarray(array_over(result), order="C").reshape(-1).view(np.uint8).data
