"""Seeded inputs for a model: the same arrays on every machine, for checks, timings and first tries."""

from __future__ import annotations

from collections.abc import Iterable

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pipeline.hashing import key_of
from pipeline.types import TensorSpec
from pipeline.weightfile import dtype_of


def seeded_inputs(specs: Iterable[TensorSpec], seed: int, high: int = 2) -> dict[str, NDArray[np.generic]]:
    """Random arrays by name: floats standard normal, integers uniform in [0, high), booleans fair.

    Each depends on the seed, its name, shape and dtype only, not on the other specs. `high` is lowered to what a
    narrow integer can hold.
    """
    return {spec.name: _sample(spec, seed, high) for spec in specs}


def _sample(spec: TensorSpec, seed: int, high: int) -> NDArray[np.generic]:
    random = np.random.default_rng(int(key_of({"seed": seed, "name": spec.name}), 16))
    dtype = dtype_of(spec.dtype)
    if dtype.kind == "b":
        return np.asarray(random.integers(0, 2, spec.shape, dtype=np.uint8)).astype(dtype)
    if dtype.kind in "iu" or "int" in dtype.name:
        limit = min(high, int(ml_dtypes.iinfo(dtype).max) + 1)
        return np.asarray(random.integers(0, limit, spec.shape, dtype=np.uint64)).astype(dtype)
    return np.asarray(random.standard_normal(spec.shape)).astype(dtype)
