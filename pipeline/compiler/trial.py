"""What `doit doctor` tries this machine's TVM on: a small function, and what LLVM assumes of a processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tvm
import tvm_ffi
from tvm import te, tirx
from tvm.target import codegen

from pipeline.compiler import targets

_EXTENT = 1000  # long enough for LLVM to use the widest vectors, and no multiple of them


def addition() -> tirx.PrimFunc:
    """y[i] = x[i] + 1"""
    x = te.placeholder((_EXTENT,), "float32", name="x")
    y = te.compute((_EXTENT,), lambda i: x[i] + tirx.const(1, "float32"), name="y")
    return te.create_prim_func([x, y])


def adds(library: Path, symbol: str) -> bool:
    """Whether the function compiled from `addition` adds."""
    # TVM's own tensors, because its code takes for granted that they are aligned, and NumPy's often are not.
    given = np.arange(_EXTENT, dtype=np.float32)
    result = tvm.runtime.tensor(np.zeros_like(given))
    tvm_ffi.load_module(str(library))[symbol](tvm.runtime.tensor(given), result)
    return np.array_equal(result.numpy(), given + 1)


def assumed_features(attributes: Mapping[str, object]) -> frozenset[str]:
    """The features, in LLVM's names, that LLVM takes for granted of a resolved target's processor."""
    return frozenset(map(str, codegen.llvm_get_cpu_features(targets.load(attributes))))
