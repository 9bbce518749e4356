"""What importers write at length, written in short: fewer operators, the same values.

    dropout(x)[0]                                →  x
    sum(stack(broadcast_to(x), y), axis=0)       →  x + y                       also mean, max and min: ONNX's Sum, …
    call_tir(maximum, x, where(isnan(c), …))     →  maximum(x, c)               ONNX's Clip with limits as tensors
    minimum(maximum(x, lo), hi)                  →  clip(x, lo, hi)
    expand_dims, squeeze, reshape of a reshape   →  one reshape
    reshape, broadcast_to and strided_slice to the shape that is there  →  nothing
    power(x, 2)                                  →  x * x
    x + const of shape (1,)                      →  x + scalar, which legalisation writes into the code

So that neighbours fuse (a stack does not fuse with what makes its parts), and so that what libraries and schedules see
does not hang on how a model was exported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.ir.expr import GenericConst

from pipeline.compiler.rewriting import Rewriter, operator, rewrite, shape_of


@tvm.transform.module_pass(opt_level=0, name="Simplify")
def simplify(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Applies the rewrites at the top of this file, and drops what nothing uses."""
    return rewrite(mod, _Simplifier)


BINARY = ("add", "subtract", "multiply", "divide", "maximum", "minimum", "power")


class _Simplifier(Rewriter):
    def __init__(self, mod: tvm.IRModule, func: relax.Function) -> None:
        super().__init__(mod, func)
        self._extrema: dict[tvm.ir.GlobalVar, str] = {}
        self._reshapes: dict[
            relax.Var, tuple[relax.Expr, tuple[int, ...]]
        ] = {}  # by old variable: of what, and to what
        self._rules: dict[str, Callable[[relax.Call], relax.Expr | None]] = {
            **dict.fromkeys(BINARY, self._binary),
            **dict.fromkeys(("broadcast_to", "strided_slice"), self._unchanged),
            **dict.fromkeys(_STACKED, self._reduction),
            "isnan": self._isnan,
            "where": self._where,
            "call_tir": self._call_tir,
        }

    def leaf(self, expr: relax.Expr) -> relax.Expr:
        if isinstance(expr, relax.Var) and expr in self._reshapes:
            self._stands[expr] = self.reshaped(*self._reshapes.pop(expr))
        return super().leaf(expr)

    def call(self, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        name = operator(call)
        if name in ("reshape", "expand_dims", "squeeze"):
            return self._reshape(var, call)
        rule = self._rules.get(name)
        return rule(call) if rule is not None else None

    def field(self, var: relax.Var, item: relax.TupleGetItem) -> relax.Expr | None:
        held = self.value(self.leaf(item.tuple_value))
        if operator(held) == "nn.dropout" and item.index == 0:
            return held.args[0]
        return super().field(var, item)

    def _binary(self, call: relax.Call) -> relax.Expr | None:
        name, shape = operator(call), shape_of(call)
        a, b = (self.leaf(arg) for arg in call.args)
        if name == "power" and _number(b) == 2 and shape is not None:
            return self.emit(relax.op.multiply(a, a))
        if name == "minimum" and (clipped := self._clip(call.args[0], b)) is not None:
            return clipped
        short = [_scalar(one) if shape_of(other) == shape else one for one, other in ((a, b), (b, a))]
        if short[0].same_as(a) and short[1].same_as(b):
            return None
        return self.emit(relax.Call(call.op, short))

    def _clip(self, old: relax.Expr, high: relax.Expr) -> relax.Expr | None:
        """minimum(old, high), where nothing else uses `old` and that is maximum(x, low)."""
        inner = self.value(self.leaf(old))
        if operator(inner) != "maximum" or self.uses[old] != 1 or not str(inner.ty.dtype).startswith("float"):
            return None
        low, top = _number(inner.args[1]), _number(high)
        if low is None or top is None or not low <= top or shape_of(inner.args[0]) != shape_of(inner):
            return None
        return self.emit(relax.op.clip(inner.args[0], low, top))

    def _reshape(self, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        """Written down when something asks for it, since the next reshape does not."""
        shape, old = shape_of(call), call.args[0]
        source = self._reshapes[old][0] if old in self._reshapes else self.leaf(old)
        if shape is None or shape_of(source) is None:
            return None
        self._reshapes[var] = (source, shape)
        return var

    def _unchanged(self, call: relax.Call) -> relax.Expr | None:
        shape, source = shape_of(call), self.leaf(call.args[0])
        if shape is None or shape_of(source) != shape:
            return None
        backwards = operator(call) == "strided_slice" and any(int(step) < 0 for step in _steps(call))
        return None if backwards else source

    def _reduction(self, call: relax.Call) -> relax.Expr | None:
        stack = self.value(self.leaf(call.args[0]))
        axes = call.attrs.axis
        if operator(stack) != "stack" or axes is None or [int(axis) for axis in axes] != [0]:
            return None
        if int(stack.attrs.axis) != 0 or call.attrs.keepdims or not isinstance(stack.args[0], relax.Tuple):
            return None
        parts = [self._unbroadcast(part) for part in stack.args[0].fields]
        parts.sort(key=lambda part: shape_of(part) != shape_of(call))
        if shape_of(call) is None or shape_of(parts[0]) != shape_of(call) or len(parts) < 2:
            return None
        name = operator(call)
        if name == "mean" and not str(call.ty.dtype).startswith("float"):
            return None
        total = functools.reduce(lambda one, other: self.emit(_STACKED[name](one, other)), parts)
        if name == "mean":
            total = self.emit(relax.op.divide(total, relax.const(float(len(parts)), call.ty.dtype)))
        return total

    def _unbroadcast(self, part: relax.Expr) -> relax.Expr:
        """The number that a part repeats, where it does."""
        value = self.value(part)
        is_number = operator(value) == "broadcast_to" and _number(value.args[0]) is not None
        return _scalar(value.args[0]) if is_number else part

    def _isnan(self, call: relax.Call) -> relax.Expr | None:
        number = _number(self.leaf(call.args[0]))
        if number is None or shape_of(call) != ():
            return None
        return relax.const(np.bool_(np.isnan(number)))

    def _where(self, call: relax.Call) -> relax.Expr | None:
        condition, yes, no = (self.leaf(arg) for arg in call.args)
        number = _number(condition)
        if number is None:
            return None
        chosen = yes if number else no
        return chosen if shape_of(chosen) == shape_of(call) is not None else None

    def _call_tir(self, call: relax.Call) -> relax.Expr | None:
        """maximum and minimum of a tensor and a number, which importers hand over as functions."""
        arguments = call.args[1]
        if not isinstance(arguments, relax.Tuple) or len(arguments.fields) != 2 or len(call.args) != 2:
            return None
        x, limit = (self.leaf(field) for field in arguments.fields)
        if _number(limit) is None or len(call.ty_args) != 1 or shape_of(x) is None:
            return None
        callee = call.args[0]
        if callee not in self._extrema:
            self._extrema[callee] = extremum(self.mod[callee])
        name = self._extrema[callee]
        if name == "minimum" and (clipped := self._clip(arguments.fields[0], limit)) is not None:
            return clipped
        return self.emit(getattr(relax.op, name)(x, limit)) if name else None


_STACKED: dict[str, Callable[[relax.Expr, relax.Expr], relax.Expr]] = {
    "sum": relax.op.add,
    "mean": relax.op.add,
    "max": relax.op.maximum,
    "min": relax.op.minimum,
}


def extremum(func: tirx.PrimFunc) -> str:
    """ "maximum" or "minimum" where that is what a function does with a tensor and a scalar, or "".

    for i in grid(A.shape): C[i] = max(A[i], B[()])  →  "maximum"
    """
    if not isinstance(func, tirx.PrimFunc) or len(func.params) != 3:
        return ""
    a, b, c = func.params
    if not all(isinstance(param.ty, tirx.BufferType) for param in (a, b, c)) or len(b.ty.shape) != 0:
        return ""
    block = _only_block(func.body)
    if block is None:
        return ""
    store = block.body
    if not isinstance(store, tirx.BufferStore) or not isinstance(store.value, tirx.Max | tirx.Min):
        return ""
    one, other = store.value.a, store.value.b
    if not isinstance(one, tvm.ir.TensorLoad) or not isinstance(other, tvm.ir.TensorLoad):
        return ""
    buffers = (one.source, other.source, store.buffer)
    if not all(buffer.same_as(param) for buffer, param in zip(buffers, (a, b, c), strict=True)):
        return ""
    places = [iteration.var for iteration in block.iter_vars]
    extents = [iteration.dom.extent for iteration in block.iter_vars]
    same = _are(one.indices, places) and _are(store.indices, places)
    whole = _extents(extents) == _extents(a.ty.shape) == _extents(c.ty.shape)
    return ("maximum" if isinstance(store.value, tirx.Max) else "minimum") if same and whole else ""


def _only_block(stmt: tirx.Stmt) -> tvm.s_tir.SBlock | None:
    """The innermost block of nested loops and blocks that hold one statement each."""
    found = None
    while isinstance(stmt, tirx.For | tvm.s_tir.SBlockRealize):
        if isinstance(stmt, tirx.For):
            stmt = stmt.body
        else:
            found = stmt.block
            stmt = found.body
    return found


def _are(indices: list[tirx.PrimExpr], variables: list[tirx.Var]) -> bool:
    return len(indices) == len(variables) and all(i.same_as(v) for i, v in zip(indices, variables, strict=True))


def _extents(extents: list[tirx.PrimExpr]) -> tuple[int, ...]:
    return tuple(int(n) if isinstance(n, tirx.IntImm) else -1 for n in extents)


def _steps(call: relax.Call) -> list[tirx.PrimExpr]:
    return list(call.args[4].fields) if len(call.args) > 4 else []


def _number(expr: relax.Expr) -> float | None:
    """The value of a constant of one element."""
    if not isinstance(expr, GenericConst) or any(int(n) != 1 for n in expr.value.shape):
        return None
    return float(expr.value.numpy().reshape(())[()])


def _scalar(expr: relax.Expr) -> relax.Expr:
    """A constant of one element as a scalar; anything else is itself."""
    if _number(expr) is None or len(expr.value.shape) == 0:
        return expr
    return relax.const(expr.value.numpy().reshape(()), expr.value.dtype)  # without a dtype, doubles become floats
