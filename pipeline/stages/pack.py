"""pack: the preparation's bytecode and objects, and the weights → the weights that it computes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np

from pipeline.linker import link
from pipeline.runtime import find_runtime, open_library, started
from pipeline.stages import Inputs, Options, Outputs
from pipeline.tensors import Array, aligned_copy, array_over, fits, flat, tensor_over
from pipeline.types import LIBRARY
from pipeline.weightfile import dtype_of


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: prepare; o<digest>; w0, w1, …. Options: shape and dtype of each weight and of each result.

    Outputs: p0, p1, …, the results' bytes. Weights are mapped, not read, so what is not used costs nothing.
    """
    objects = {f"{name}.o": inputs.file(name) for name in inputs if name[0] in "po"}
    weights = [
        mapped(inputs.file(f"w{i}"), shape, dtype)
        for i, (shape, dtype) in enumerate(cast("list[tuple[list[int], str]]", options["weights"]))
    ]
    with tempfile.TemporaryDirectory(prefix="tvmake-") as name:
        (Path(name) / LIBRARY).write_bytes(link(objects))
        library, _ = open_library(Path(name), (), find_runtime())
    results = flat(started(library)["prepare"](*(tensor_over(weight) for weight in weights)))
    return {f"p{i}": _bytes(result) for i, result in enumerate(results)}


def mapped(path: Path, shape: list[int], dtype: str) -> Array:
    """A blob as an array, mapped where it can be and at an aligned place."""
    kind = dtype_of(dtype)
    if path.stat().st_size == 0:
        return np.empty(shape, kind)
    array = np.memmap(path, np.uint8, "r").view(kind).reshape(shape)
    return array if fits(array) else aligned_copy(array)


def _bytes(result: Any) -> memoryview:
    return np.asarray(array_over(result), order="C").reshape(-1).view(np.uint8).data
