"""Relax passes of our own: module → module, no side effects, usable as ordinary TVM passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import tvm
from tvm import relax, te
from tvm.ir.expr import GenericConst
from tvm.relax.expr_functor import PyExprMutator, mutator

from pipeline.compiler.legalize import legalize


@tvm.transform.module_pass(opt_level=0, name="FoldBatchNorm")
def fold_batch_norm(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Writes the batch normalisation of inference as one multiplication and one addition.

        R.nn.batch_norm(x, gamma, beta, mean, var, axis=1, epsilon=e)[0]
        →  x * reshape(scale) + reshape(shift),  (scale, shift) = call_tir(fold_batch_norm, gamma, beta, mean, var)
           scale = gamma / sqrt(var + e),  shift = beta - mean * scale, reshaped to broadcast along the axis

    Scale and shift depend on weights alone, so that lifting moves them out of inference, and one preparing function,
    for any number of channels, takes the place of a chain of ten small operators.
    """
    rewriter = _BatchNormFolder(mod)
    for gvar, func in mod.functions_items():
        if isinstance(func, relax.Function):
            rewriter.builder_.update_func(gvar, rewriter.visit_expr(func))
    return rewriter.builder_.get()


@mutator
class _BatchNormFolder(PyExprMutator):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self._op = tvm.ir.Op.get("relax.nn.batch_norm")
        self._made: dict[tuple[object, ...], relax.Call] = {}

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if not call.op.same_as(self._op) or call.attrs.training:
            return call
        x, gamma, beta, mean, var = call.args
        rank, dtype = x.ty.ndim, x.ty.dtype
        if rank < 0 or any(arg.ty.dtype != dtype for arg in (gamma, beta, mean, var)):
            return call
        axis = int(call.attrs.axis) % rank
        center, scaled, epsilon = bool(call.attrs.center), bool(call.attrs.scale), float(call.attrs.epsilon)
        n = tvm.tirx.Var("n", "int64")

        def fold(gamma: te.Tensor, beta: te.Tensor, mean: te.Tensor, var: te.Tensor) -> list[te.Tensor]:
            def scale_at(i: tvm.tirx.Var) -> tvm.tirx.PrimExpr:
                inverse = tvm.tirx.const(1, dtype) / tvm.tirx.sqrt(var[i] + tvm.tirx.const(epsilon, dtype))
                return gamma[i] * inverse if scaled else inverse

            scale = te.compute([n], scale_at, name="scale")
            shift = te.compute(
                [n],
                lambda i: (beta[i] if center else tvm.tirx.const(0, dtype)) - mean[i] * scale(i),
                name="shift",
            )
            return [scale, shift]

        # One function for any number of channels.
        known = (str(dtype), center, scaled, epsilon)
        if known not in self._made:
            stats = [relax.Var(name, relax.TensorType([n], dtype)) for name in ("gamma", "beta", "mean", "var")]
            self._made[known] = self.builder_.call_te(fold, *stats, primfunc_name_hint="fold_batch_norm")
        made = self._made[known]
        result = [relax.TupleType([gamma.ty, gamma.ty])]
        call = relax.Call(made.op, [made.args[0], relax.Tuple([gamma, beta, mean, var])], None, result)
        shape = [gamma.ty.shape.values[0], *(1 for _ in range(axis + 1, rank))]
        folded = self.builder_.emit(call)
        scale, shift = (
            self.builder_.emit(relax.op.reshape(self.builder_.emit(relax.TupleGetItem(folded, i)), shape))
            for i in range(2)
        )
        y = self.builder_.emit(relax.op.add(self.builder_.emit(relax.op.multiply(x, scale)), shift))
        return relax.Tuple([y, mean, var])


def call_by_symbol(mod: tvm.IRModule, symbols: Mapping[tvm.ir.GlobalVar, str]) -> tvm.IRModule:
    """Has a module's Relax functions call its PrimFuncs by linkage name, and drops the PrimFuncs.

    cls.fused_conv2d_add(x, w, y)  →  R.call_packed("tvmake_4b17c507…", x, w, y)
    """
    replacer = _CalleeReplacer(mod, {gvar: relax.ExternFunc(symbol) for gvar, symbol in symbols.items()})
    functions = mod.functions_items()
    return tvm.IRModule(
        {gvar: replacer.visit_expr(func) for gvar, func in functions if isinstance(func, relax.Function)},
        attrs=mod.attrs,
    )


@mutator
class _CalleeReplacer(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, callees: Mapping[tvm.ir.GlobalVar, relax.ExternFunc]) -> None:
        super().__init__(mod)
        self._callees = callees

    def visit_global_var_(self, gvar: tvm.ir.GlobalVar) -> relax.Expr:
        return self._callees.get(gvar, gvar)


def all_calls(mod: tvm.IRModule) -> Iterator[relax.Call]:
    """Every call that a module's Relax functions bind, in order. (A visitor would walk the types as well, and the types
    of a thousand weights are much larger than the code.)"""
    for _, func in sorted(mod.functions_items(), key=lambda item: item[0].name_hint):
        if isinstance(func, relax.Function):
            yield from (b.value for b in _bindings_in(func.body) if isinstance(b.value, relax.Call))


def call_types(mod: tvm.IRModule) -> Iterator[tuple[relax.Call, relax.Type]]:
    """Every call that a module's Relax functions bind, with the type of what it gives."""
    for _, func in mod.functions_items():
        if isinstance(func, relax.Function):
            yield from ((b.value, b.var.ty) for b in _bindings_in(func.body) if isinstance(b.value, relax.Call))


def is_static(ty: relax.Type) -> bool:
    """Whether a type is a tensor of known shape, or a tuple of such."""
    if isinstance(ty, relax.TupleType):
        return all(is_static(field) for field in ty.fields)
    shape = ty.shape if isinstance(ty, relax.TensorType) else None
    return isinstance(shape, relax.ShapeExpr) and all(isinstance(extent, tvm.tirx.IntImm) for extent in shape.values)


def _bindings_in(expr: relax.Expr) -> Iterator[relax.Binding]:
    """The bindings of an expression in order, those of branches and inner functions before the one that holds them."""
    if isinstance(expr, relax.If):
        yield from _bindings_in(expr.true_branch)
        yield from _bindings_in(expr.false_branch)
    elif isinstance(expr, relax.Function):
        yield from _bindings_in(expr.body)
    elif isinstance(expr, relax.SeqExpr):
        for block in expr.blocks:
            for binding in block.bindings:
                yield from _bindings_in(binding.value)
                yield binding


def legalize_once(mod: tvm.IRModule) -> tvm.IRModule:
    """TVM's LegalizeOps, with each distinct call worked out once: see pipeline.compiler.legalize.

    A plain function and no pass object, since an error that a pass of Python's raises comes out of TVM as another one.
    """
    return legalize(mod, {call.op.name for call in all_calls(mod) if isinstance(call.op, tvm.ir.Op)})


# Constants of this many bytes or fewer are part of the code, unless they are floating point: those are trained.
_SMALL = 1024
_FLOATS = ("float", "bfloat")


def detach_constants(mod: tvm.IRModule, entry: str, prefix: str) -> tuple[tvm.IRModule, dict[str, np.ndarray]]:
    """Makes parameters of the entry function of all constants that a retrained model would change.

        R.multiply(x, R.const([...]))  →  def main(x, constant_0): R.multiply(x, constant_0)

    Scalars stay, since legalisation writes them into the code, and so do small constants of integers, since operators
    read shapes and axes from them, and single whole numbers of any type, such as the 3 and the 6 of a hard swish: such
    a number is written, not trained, and code that knows it is better. Equal constants become one parameter. Returns
    the module and the arrays by name.
    """
    func = mod[entry]
    found: dict[bytes, tuple[relax.Var, np.ndarray]] = {}
    constants = list(_trained_constants(func))
    if not constants:
        return mod, {}
    replacer = _ConstantReplacer(mod, {})
    for constant in constants:
        array = constant.value.numpy()
        identity = b"%s %r " % (str(array.dtype).encode(), array.shape) + array.tobytes()
        if identity not in found:
            found[identity] = (relax.Var(f"{prefix}{len(found)}", constant.ty), array)
        replacer.variables[constant] = found[identity][0]
    body = replacer.visit_expr(func.body)
    params = [*func.params, *(var for var, _ in found.values())]
    changed = relax.Function(params, body, func.ret_ty, func.is_pure, func.attrs)
    replacer.builder_.update_func(mod.get_global_var(entry), changed)
    return replacer.builder_.get(), {f"{prefix}{i}": array for i, (_, array) in enumerate(found.values())}


def _is_trained(constant: GenericConst) -> bool:
    shape, dtype = constant.value.shape, str(constant.value.dtype)
    if int(np.prod(shape)) == 1:
        return len(shape) > 0 and not float(constant.value.numpy().reshape(())).is_integer()
    return dtype.startswith(_FLOATS) or int(np.prod(shape)) > _SMALL


def _trained_constants(func: relax.Function) -> Iterator[GenericConst]:
    for binding in _bindings_in(func.body):
        yield from (leaf for leaf in _leaves(binding.value) if isinstance(leaf, GenericConst) and _is_trained(leaf))


def _leaves(expr: relax.Expr) -> Iterator[relax.Expr]:
    """What an expression is made of, through calls and tuples."""
    if isinstance(expr, relax.Call):
        for argument in expr.args:
            yield from _leaves(argument)
    elif isinstance(expr, relax.Tuple):
        for part in expr.fields:
            yield from _leaves(part)
    else:
        yield expr


@mutator
class _ConstantReplacer(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, variables: dict[GenericConst, relax.Var]) -> None:
        super().__init__(mod)
        self.variables = variables

    def visit_generic_const_(self, constant: GenericConst) -> relax.Expr:
        return self.variables.get(constant, constant)
