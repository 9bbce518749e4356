"""Functions that prepare weights, made for any extents.

    multiply(w[64,32,3,3], s[64,1,1,1])   ┐
    multiply(w[96,64,1,1], s[96,1,1,1])   ┘ →  one function multiply(w[a,b,c,d], s[a,1,1,1])

A network of a hundred convolutions prepares a hundred weights of fifty shapes. Code for each shape would be faster by
nothing that matters, as it runs once, and would be compiled fifty times.
"""

from __future__ import annotations

import operator as arithmetic
from collections.abc import Callable

import tvm
from tvm import relax, te
from tvm.ir.expr import GenericConst

from pipeline.compiler.rewriting import Rewriter, operator, shape_of

_CALL_TIR = tvm.ir.Op.get("relax.call_tir")
_ARITHMETIC: dict[str, Callable[..., tvm.tirx.PrimExpr]] = {
    "add": arithmetic.add,
    "divide": arithmetic.truediv,
    "multiply": arithmetic.mul,
    "subtract": arithmetic.sub,
}
# Operators whose result has the extents of their arguments, so that those tell all that a function must know.
_SHARED = frozenset(
    (
        *("abs", "add", "divide", "exp", "log", "maximum", "minimum", "multiply", "negative", "permute_dims", "power"),
        *("rsqrt", "sqrt", "square", "subtract"),
    )
)


@tvm.transform.module_pass(opt_level=0, name="ShareExtents")
def share_extents(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Has calls of operators that differ in extents alone call one function. For modules that prepare weights."""
    builder = relax.BlockBuilder(mod)
    for gvar, func in mod.functions_items():
        if isinstance(func, relax.Function):
            builder.update_func(gvar, _Sharer(mod, func, builder).result())
    return builder.get()


Extents = tuple[int, ...]  # of an argument: 1, or the complement of the axis of the result that it goes along


class _Sharer(Rewriter):
    def __init__(self, mod: tvm.IRModule, func: relax.Function, builder: relax.BlockBuilder) -> None:
        super().__init__(mod, func)
        self._into = builder
        self._made: dict[tuple[object, ...], tvm.ir.GlobalVar | None] = {}

    def call(self, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        name, shapes = operator(call), [shape_of(arg) for arg in call.args]
        if name not in _SHARED or None in shapes or not all(map(_is_operand, call.args)):
            return None
        kinds = extents_of([shape for shape in shapes if shape is not None])
        operands = [self.leaf(arg) for arg in call.args]
        if name in _ARITHMETIC:
            for i, kind in enumerate(kinds):
                operands[i], kinds[i] = self._unshaped(operands[i], kind)
        dtypes = tuple(str(arg.ty.dtype if isinstance(arg, relax.Var) else arg) for arg in operands)
        axes = tuple(int(axis) for axis in call.attrs.axes) if name == "permute_dims" and call.attrs.axes else None
        key = (name, dtypes, axes, *kinds)
        if key not in self._made:
            self._made[key] = self._function(call, operands, kinds)
        callee = self._made[key]
        if callee is None:
            return None
        arguments = relax.Tuple([arg for arg in operands if isinstance(arg, relax.Var)])
        return self.emit(relax.Call(_CALL_TIR, [callee, arguments], None, [call.ty]))

    def _unshaped(self, operand: relax.Expr, kinds: Extents) -> tuple[relax.Expr, Extents]:
        """What an operand was reshaped from, where that added axes of extent 1 alone: s[64,1,1,1] → s[64]."""
        value, shape = self.value(operand), shape_of(operand) or ()
        source = shape_of(value.args[0]) if operator(value) == "reshape" else None
        if source is None or source != tuple(extent for extent in shape if extent != 1):
            return operand, kinds
        return value.args[0], tuple(kind for kind, extent in zip(kinds, shape, strict=True) if extent != 1)

    def _function(self, call: relax.Call, operands: list[relax.Expr], kinds: list[Extents]) -> tvm.ir.GlobalVar | None:
        """The operator's function over open extents; None where TVM's legalisation needs to know them."""
        extents = {kind: tvm.tirx.Var(f"n{~kind}", "int64") for each in kinds for kind in each if kind < 0}
        parameters = [
            relax.Var(f"w{i}", relax.TensorType([extents.get(kind, kind) for kind in each], arg.ty.dtype))
            if isinstance(arg, relax.Var)
            else arg
            for i, (each, arg) in enumerate(zip(kinds, operands, strict=True))
        ]
        variables = [each for each in parameters if isinstance(each, relax.Var)]
        name = operator(call)
        if name in _ARITHMETIC:
            shape = [extents.get(~axis, tvm.tirx.IntImm("int64", 1)) for axis in range(call.ty.ndim)]
            numbers = [None if isinstance(each, relax.Var) else _number(each) for each in parameters]

            def combined(*tensors: te.Tensor) -> te.Tensor:
                given = iter(tensors)
                held = [next(given) if number is None else number for number in numbers]
                return _combined(_ARITHMETIC[name], shape, held, kinds)

            return self._into.call_te(combined, *variables, primfunc_name_hint=name).args[0]
        rule: Callable[..., relax.Expr] | None = call.op.get_attr("FLegalize")
        if rule is None:
            return None
        made = rule(self._into, self._into.normalize(relax.Call(call.op, parameters, call.attrs)))
        plain = isinstance(made, relax.Call) and made.op.same_as(_CALL_TIR) and len(made.args) == 2
        return made.args[0] if plain and _are(made.args[1], variables) else None


def _combined(
    combine: Callable[..., tvm.tirx.PrimExpr],
    shape: list[tvm.tirx.PrimExpr],
    operands: list[te.Tensor | tvm.tirx.PrimExpr],
    kinds: list[Extents],
) -> te.Tensor:
    """Two operands combined, element by element, each along the axes of the result that its extents name."""

    def element(*at: tvm.tirx.Var) -> tvm.tirx.PrimExpr:
        return combine(
            *(
                operand[tuple(at[~kind] if kind < 0 else 0 for kind in each)]
                if isinstance(operand, te.Tensor)
                else operand
                for operand, each in zip(operands, kinds, strict=True)
            )
        )

    return te.compute(shape, element)


def _is_operand(arg: relax.Expr) -> bool:
    """A variable, or a number that becomes part of the code."""
    return isinstance(arg, relax.Var) or (isinstance(arg, GenericConst) and shape_of(arg) == ())


def _number(scalar: GenericConst) -> tvm.tirx.PrimExpr:
    return tvm.tirx.const(scalar.value.numpy()[()], scalar.value.dtype)


def extents_of(shapes: list[Extents]) -> list[Extents]:
    """Which extents of arguments that broadcast are one and the same, and which are 1.

    (64, 32, 1, 1), (64, 1, 1, 1)  →  (~0, ~1, ~2, ~3), (~0, 1, 1, 1)
    """
    rank = max(map(len, shapes))
    whole = tuple(
        max((s[axis - rank + len(s)] for s in shapes if axis >= rank - len(s)), default=1) for axis in range(rank)
    )
    found = []
    for shape in shapes:
        axes = range(rank - len(shape), rank)
        full = shape == whole
        found.append(tuple(~axis if full or extent != 1 else 1 for axis, extent in zip(axes, shape, strict=True)))
    return found


def _are(given: relax.Expr, wanted: list[relax.Var]) -> bool:
    return (
        isinstance(given, relax.Tuple)
        and len(given.fields) == len(wanted)
        and all(field.same_as(var) for field, var in zip(given.fields, wanted, strict=True))
    )
