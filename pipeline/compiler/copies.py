"""Functions that copy their input and do nothing else: what no schedule makes faster."""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import sym, tirx


def is_copy(func: tirx.PrimFunc) -> bool:
    """Whether every element goes from a place of the one input to the same place of the one output, in flat order.

    for i, j: y[i, j] = x[0, i * 8 + j, 0]     →  True, where x has 8 columns for each row of y
    for i, j: y[i, j] = x[j, i]                →  False
    """
    found: list[Any] = []

    def visit(block: tvm.s_tir.SBlock) -> None:
        found.append(block)

    tvm_ffi.structural_walk(func.body, (tvm.s_tir.SBlock, visit), order="post")
    (*blocks, _) = found or [None]
    if len(blocks) != 1 or not isinstance(blocks[0].body, tirx.BufferStore):
        return False
    store, analyzer = blocks[0].body, sym.Analyzer()
    if not isinstance(store.value, tvm.ir.TensorLoad):
        return False
    for axis in blocks[0].iter_vars:
        analyzer.bind(axis.var, axis.dom)
    return bool(analyzer.can_prove_equal(_place(store.value, store.value.source), _place(store, store.buffer)))


def _place(access: Any, buffer: Any) -> Any:
    """Where an access lies among the elements of its buffer."""
    flat: Any = tirx.IntImm("int64", 0)
    for index, extent in zip(access.indices, buffer.shape, strict=True):
        flat = flat * extent + index
    return flat
