"""A Relax function rebuilt binding by binding: what our rewrites of whole operators stand on.

Owns the walk, the substitution of variables, which variables depend on weights alone, how often each is used, and the
removal of what nothing uses any more. Knows no operator. (TVM's mutators visit types and nested expressions as well,
which costs more than all rules together on a network of a thousand bindings.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import tvm
from tvm import relax

# How many of a function's parameters are inputs; the others are weights. TVM's own name for it.
INPUTS = "num_input"


@dataclass(frozen=True, eq=False)
class _Bound:
    """A variable, what it is bound to, and the variables in that."""

    var: relax.Var
    value: relax.Expr
    reads: list[relax.Var]


class Rewriter:
    """One function on its way from old to new. A subclass says what becomes of each call.

    `fixed` holds new variables that depend on weights alone; `uses` counts those of old ones. A value is a leaf (a
    variable or constant), or a call, tuple or field over leaves.
    """

    def __init__(self, mod: tvm.IRModule, func: relax.Function) -> None:
        self.mod = mod
        self.func = func
        inputs = int(func.attrs[INPUTS]) if func.attrs is not None and INPUTS in func.attrs else len(func.params)
        self.fixed: set[relax.Var] = set(func.params[inputs:])
        self._old = [
            _Bound(b.var, b.value, list(variables(b.value))) for block in func.body.blocks for b in block.bindings
        ]
        self.uses: Counter[relax.Var] = Counter(variables(func.body.body))
        for bound in self._old:
            self.uses.update(bound.reads)
        self._stands: dict[relax.Var, relax.Expr] = {}
        self._values: dict[relax.Var, relax.Expr] = {}
        self._new: list[_Bound] = []
        self._builder = relax.BlockBuilder()

    def call(self, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        """What stands for `var` in the new function, or None where the call, over new leaves, is kept.

        The call is the old one: take its arguments by `leaf`.
        """
        raise NotImplementedError

    def leaf(self, expr: relax.Expr) -> relax.Expr:
        """What stands in the new function for an old leaf."""
        return self._stands.get(expr, expr) if isinstance(expr, relax.Var) else expr

    def value(self, expr: relax.Expr) -> relax.Expr:
        """What a new variable is bound to; anything else is itself."""
        return self._values.get(expr, expr) if isinstance(expr, relax.Var) else expr

    def is_fixed(self, expr: relax.Expr) -> bool:
        """Whether a new expression depends on weights and constants alone."""
        return all(var in self.fixed for var in variables(expr))

    def emit(self, value: relax.Expr) -> relax.Expr:
        """A new variable for a value over new leaves."""
        value = self._builder.normalize(value)
        var = relax.DataflowVar(f"lv{len(self._new)}", value.ty)
        self._bind(_Bound(var, value, list(variables(value))))
        return var

    def reshaped(self, source: relax.Expr, shape: tuple[int, ...]) -> relax.Expr:
        """A reshape, of what `source` was itself reshaped from; no reshape where that has the shape."""
        while operator(held := self.value(source)) == "reshape" and shape_of(held.args[0]) is not None:
            source = held.args[0]
        return source if shape_of(source) == shape else self.emit(relax.op.reshape(source, shape))

    def over_new(self, value: relax.Expr) -> relax.Expr:
        """A value with new leaves for old ones."""
        if isinstance(value, relax.Call):
            return relax.Call(value.op, [self.over_new(arg) for arg in value.args], value.attrs, value.ty_args)
        if isinstance(value, relax.Tuple):
            return relax.Tuple([self.over_new(field) for field in value.fields])
        if isinstance(value, relax.TupleGetItem):
            return relax.TupleGetItem(self.leaf(value.tuple_value), value.index)
        return self.leaf(value)

    def field(self, var: relax.Var, item: relax.TupleGetItem) -> relax.Expr | None:
        """What stands for a field of a tuple, or None where it is kept."""
        held = self.value(self.leaf(item.tuple_value))
        return held.fields[item.index] if isinstance(held, relax.Tuple) else None

    def result(self) -> relax.Function:
        """Walks the old function and returns the new one."""
        for bound in self._old:
            self._stands[bound.var] = self._visit(bound)
        returned = self._builder.normalize(self.over_new(self.func.body.body))
        out = relax.Var("out", self.func.ret_ty)
        self._bind(_Bound(out, returned, list(variables(returned))))
        body = relax.SeqExpr([relax.DataflowBlock(self._alive(out))], out)
        func = relax.Function(self.func.params, body, self.func.ret_ty, self.func.is_pure, self.func.attrs)
        return self._builder.normalize(func)

    def _visit(self, bound: _Bound) -> relax.Expr:
        made = None
        if isinstance(bound.value, relax.Call):
            made = self.call(bound.var, bound.value)
        elif isinstance(bound.value, relax.TupleGetItem):
            made = self.field(bound.var, bound.value)
        elif not isinstance(bound.value, relax.Tuple):
            made = self.leaf(bound.value)
        return self._kept(bound) if made is None else made

    def _kept(self, bound: _Bound) -> relax.Expr:
        """The binding as it is where its leaves are, and one like it otherwise."""
        if isinstance(bound.var, relax.DataflowVar) and all(var.same_as(self.leaf(var)) for var in bound.reads):
            self._bind(bound)
            return bound.var
        return self.emit(self.over_new(bound.value))

    def _bind(self, bound: _Bound) -> None:
        self._new.append(bound)
        self._values[bound.var] = bound.value
        if all(var in self.fixed for var in bound.reads):
            self.fixed.add(bound.var)

    def _alive(self, out: relax.Var) -> list[relax.VarBinding]:
        needed = {out}
        alive = []
        for bound in reversed(self._new):
            if bound.var in needed:
                needed.update(bound.reads)
                alive.append(relax.VarBinding(bound.var, bound.value))
        return alive[::-1]


def rewrite(mod: tvm.IRModule, rewriter: Callable[[tvm.IRModule, relax.Function], Rewriter]) -> tvm.IRModule:
    """A module with its Relax functions rebuilt. One with branches, inner functions or effects is left as it is."""
    functions = {
        gvar: rewriter(mod, func).result() if isinstance(func, relax.Function) and _is_plain(func) else func
        for gvar, func in mod.functions_items()
    }
    return tvm.IRModule(functions, attrs=mod.attrs)


def with_inputs(mod: tvm.IRModule, entry: str, count: int) -> tvm.IRModule:
    """The module with it said that the first `count` parameters of its entry function are inputs."""
    functions = dict(mod.functions_items())
    gvar = mod.get_global_var(entry)
    return tvm.IRModule({**functions, gvar: functions[gvar].with_attr(INPUTS, count)}, attrs=mod.attrs)


def operator(call: relax.Expr) -> str:
    """The name of the operator that an expression calls, without "relax."; empty where it calls none."""
    if not isinstance(call, relax.Call) or not isinstance(call.op, tvm.ir.Op):
        return ""
    return str(call.op.name).removeprefix("relax.")


def variables(expr: relax.Expr) -> Iterator[relax.Var]:
    """The variables of a value, once for each place."""
    if isinstance(expr, relax.Var):
        yield expr
    elif isinstance(expr, relax.Call):
        for argument in expr.args:
            yield from variables(argument)
    elif isinstance(expr, relax.Tuple):
        for field in expr.fields:
            yield from variables(field)
    elif isinstance(expr, relax.TupleGetItem):
        yield from variables(expr.tuple_value)


def shape_of(expr: relax.Expr) -> tuple[int, ...] | None:
    """The extents of a tensor; None where they are not all known, or where it is no tensor."""
    ty = expr.ty
    if not isinstance(ty, relax.TensorType) or not isinstance(ty.shape, relax.ShapeExpr):
        return None
    extents = ty.shape.values
    return tuple(int(n) for n in extents) if all(isinstance(n, tvm.tirx.IntImm) for n in extents) else None


def _is_plain(func: relax.Function) -> bool:
    inner = (relax.If, relax.Function, relax.SeqExpr)
    return isinstance(func.body, relax.SeqExpr) and all(
        isinstance(block, relax.DataflowBlock)
        and all(isinstance(b, relax.VarBinding) and not isinstance(b.value, inner) for b in block.bindings)
        for block in func.body.blocks
    )
