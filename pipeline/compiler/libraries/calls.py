"""Functions that call a shim in place of what a library computes.

Owns: the form of such a function. The statements stand in one root block:

    [what came before the core] · [a block that packs weights] · a block that calls the shim · [what the library left]

Each block is opaque to scheduling: it states what it reads and writes, and its call is an extern C function of the shim
whose result is asserted to be 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from pipeline.compiler.anatomy import SPATIAL
from pipeline.compiler.prepack import PREPROCESS, layout_free


@dataclass(frozen=True)
class Call:
    """A call of a shim's function: its symbol and arguments (strings, buffers, None for a null pointer)."""

    symbol: str
    arguments: tuple[Any, ...]
    reads: tuple[Any, ...]
    writes: Any
    failure: str  # what is said where it does not return 0


def is_free(func: tirx.PrimFunc, buffer: Any) -> bool:
    """Whether a buffer is a parameter whose layout is free: a weight."""
    free = layout_free(func)
    return any(param.same_as(buffer) for i, param in enumerate(func.params) if i in free)


def packed_buffer(size: int, name: str = "packed") -> Any:
    """A flat buffer of that many bytes for packed weights."""
    return tirx.decl_buffer((size // 4,), "float32", name)


def with_call(
    func: tirx.PrimFunc, first: Sequence[Any], call: Any, after: Sequence[Any], packing: Call | None = None
) -> tirx.PrimFunc:
    """The function with a call in place of what stood between the statements `first` and `after`.

        y = conv(x, w); z = y + bias; out = sin(z)   →   packed = pack(w); z = library(x, packed, bias); out = sin(z)

    `call` is a statement: see `once` and `split`.
    """
    blocks = [_block(packing, checked(packing), "pack", {PREPROCESS: True})] if packing is not None else []
    statements = [*blocks, *first, call, *(spread(statement) for statement in after)]
    used = _buffers_of(statements)
    alloc = [buffer for buffer in func.body.block.alloc_buffers if buffer in used]
    if packing is not None:
        alloc.append(packing.writes)
    body = statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)
    root = tvm.s_tir.SBlock([], [], [], "root", body, None, alloc)
    return tirx.PrimFunc(func.params, tvm.s_tir.SBlockRealize([], True, root), func.ret_type, func.attrs)


_SMALL = 1 << 14  # elements that take less time than starting a loop on several threads
_MANY = 8  # so many parts of a loop can be shared out between the threads of most machines


def spread(statement: Any) -> Any:
    """A nest of loops over elements with its first loop of some length in parallel, where it is worth it.

    for n in range(1): for h in range(80): ...   →   for n in range(1): for h in T.parallel(80): ...
    """
    loops, inner = [], statement
    while isinstance(inner, tirx.For):
        loops.append(inner)
        inner = inner.body
    lengths = [int(loop.extent) for loop in loops]
    if math.prod(lengths) < _SMALL or any(int(axis.iter_type) != SPATIAL for axis in inner.block.iter_vars):
        return statement
    chosen = next((i for i, length in enumerate(lengths) if length >= _MANY), None)
    for i, loop in reversed(list(enumerate(loops))):
        kind = tirx.ForKind.PARALLEL if i == chosen else loop.kind
        inner = tirx.For(loop.loop_var, loop.min, loop.extent, kind, inner)
    return inner


def once(call: Call) -> Any:
    """A call that runs on threads of the library's own."""
    return _block(call, checked(call), "call")


def split(call: Call, tasks: int) -> Any:
    """A call for each share of the work, in parallel: the shim is told which one, and of how many."""
    number = tirx.IntImm("int32", tasks)
    if tasks == 1:
        return _block(call, checked(call, tirx.IntImm("int32", 0), number), "call")
    task = tirx.Var("task", "int32")
    body = checked(call, task, number)
    loop = tirx.For(task, tirx.IntImm("int32", 0), number, tirx.ForKind.PARALLEL, body)
    return _block(call, loop, "call")


def checked(call: Call, *more: Any) -> Any:
    """The call as a statement that raises where the result is not 0."""
    arguments = [*(_argument(each) for each in call.arguments), *more]
    made = tirx.call_extern("int32", call.symbol, *arguments)
    # The names of the first two parameters are swapped in TVM's Python class: the condition comes first.
    return tirx.AssertStmt(made == 0, tvm.ir.StringImm("RuntimeError"), [tvm.ir.StringImm(call.failure)])


def _block(call: Call, body: Any, name: str, annotations: dict[str, Any] | None = None) -> Any:
    reads = [_whole(buffer) for buffer in call.reads]
    block = tvm.s_tir.SBlock([], reads, [_whole(call.writes)], name, body, annotations=annotations or {})
    return tvm.s_tir.SBlockRealize([], True, block)


def _argument(value: Any) -> Any:
    if value is None:
        return tirx.reinterpret("handle", tirx.const(0, "uint64"))
    return value.data if isinstance(value, tirx.Var) and isinstance(value.ty, tirx.BufferType) else value


def _whole(buffer: Any) -> Any:
    zero = [tirx.IntImm(str(extent.ty.dtype), 0) for extent in buffer.shape]
    ranges = [tvm.ir.Range.from_min_extent(at, extent) for at, extent in zip(zero, buffer.shape, strict=True)]
    return tirx.BufferRegion(buffer, ranges)


def _buffers_of(statements: Sequence[Any]) -> set[Any]:
    found: set[Any] = set()
    for statement in statements:
        tvm_ffi.structural_walk(statement, (tirx.Var, found.add), order="post")
    return found
