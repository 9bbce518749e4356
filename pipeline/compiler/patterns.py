"""Groups of Relax operators that a library would take as one: what a pattern matches becomes one workload.

Owns: which operators are grouped, before any are fused. Must not: choose who computes a group. A group is a function
like any other once it is lowered, for which every strategy competes in the user's order.

A library has patterns where it has a method of that name (see `Patterned`). They are tried in the order of the
libraries, and each library's in its own order; what one has taken is not there for the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import tvm
from tvm import relax
from tvm.relax.expr import _update_type as update_type
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.relax.transform import FuseOpsByPattern, PatternCheckContext

from pipeline.compiler import libraries, passes
from pipeline.compiler.libraries import Library
from pipeline.compiler.rewriting import variables
from pipeline.errors import ConfigError

_COMPOSITE = "Composite"  # TVM's name for the pattern that a function comes from


class Match(NamedTuple):
    """Operators that a pattern has matched: the value of the last one, and each variable's value."""

    result: Any
    bindings: Mapping[Any, Any]


class Pattern(NamedTuple):
    """A pattern of `tvm.relax.dpl`, and which of its matches the library would take: its shapes and dtypes.

    The operators within a match but the last are used nowhere else; that need not be checked.
    """

    name: str
    pattern: Any
    check: Callable[[Match], bool] | None = None


@runtime_checkable
class Patterned(Protocol):
    """A library that has patterns. They are asked for where TVM is loaded."""

    def patterns(self) -> Sequence[Pattern]: ...


def of_libraries(names: Sequence[str]) -> list[Pattern]:
    """The patterns of the libraries that are called so, in order. Raises ConfigError for a name that no library has."""
    known = {library.name: library for library in libraries.LIBRARIES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(
            f"there is no library {unknown[0]}, whose patterns are asked for",
            hint=f"choose from {', '.join(known)}",
        )
    return [pattern for name in names for pattern in _of(known[name])]


def _of(library: Library | Patterned) -> Sequence[Pattern]:
    return library.patterns() if isinstance(library, Patterned) else ()


def group(mod: tvm.IRModule, patterns: Sequence[Pattern]) -> tvm.IRModule:
    """Makes a function of each match; a module in which nothing matches is left as it is.

        s = matmul(q, k); a = softmax(s); y = matmul(a, v); z = relu(y)
        →  def attention(q, k, v): s = matmul(q, k); a = softmax(s); return matmul(a, v)
           y = attention(q, k, v); z = relu(y)

    A function is named by its pattern. Its parameters and bindings are in the order in which its result needs them,
    whatever the order in the model. Scalars stay where they are used, so that legalisation writes them into the code.
    Later passes fuse nothing into a group.
    """
    if not patterns:
        return mod
    # The third is for parts to be named, which checks here go without.
    wanted: list[Any] = [(each.name, each.pattern, {}, _accepted(each.check)) for each in patterns]
    grouped = FuseOpsByPattern(wanted, bind_constants=True, annotate_codegen=False)(mod)
    return _Finisher(grouped).finished() if len(grouped.functions) > len(mod.functions) else mod


def _accepted(check: Callable[[Match], bool] | None) -> Callable[[PatternCheckContext], bool]:
    def accepted(context: PatternCheckContext) -> bool:
        bindings = dict(context.matched_bindings.items())
        return _is_closed(context, bindings) and (check is None or check(Match(context.matched_expr, bindings)))

    return accepted


def _is_closed(context: PatternCheckContext, bindings: Mapping[Any, Any]) -> bool:
    """Whether nothing outside uses what is computed on the way to the result."""
    inner = [var for var, value in bindings.items() if not value.same_as(context.matched_expr)]
    return all(user in bindings for var in inner for user in context.var_usages.get(var, ()))


@dataclass(frozen=True)
class _Group:
    """A group's function as it shall be: its name, and which of the call's arguments each parameter takes."""

    gvar: tvm.ir.GlobalVar
    func: relax.Function
    arguments: tuple[int, ...]


@mutator
class _Finisher(PyExprMutator):
    """Names the groups in a module, and puts their bindings and parameters in order."""

    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self._mod = mod
        self._groups: dict[tvm.ir.GlobalVar, _Group] = {}
        taken = {gvar.name_hint for gvar in mod.get_global_vars()}
        # In the order of their calls: the module's own is that of an unordered map.
        for gvar in dict.fromkeys(call.op for call in passes.all_calls(mod)):
            func = mod.functions.get(gvar) if isinstance(gvar, tvm.ir.GlobalVar) else None
            if isinstance(func, relax.Function) and func.attrs is not None and _COMPOSITE in func.attrs:
                name = _free(str(func.attrs[_COMPOSITE]), taken)
                taken.add(name)
                self._groups[gvar] = _in_order(func, name)

    def finished(self) -> tvm.IRModule:
        functions: dict[tvm.ir.GlobalVar, Any] = {group.gvar: group.func for group in self._groups.values()}
        for gvar, func in self._mod.functions_items():
            if gvar not in self._groups:
                functions[gvar] = self.visit_expr(func) if isinstance(func, relax.Function) else func
        return tvm.IRModule(functions, attrs=self._mod.attrs)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        group = self._groups.get(call.op) if isinstance(call.op, tvm.ir.GlobalVar) else None
        if group is None:
            return super().visit_call_(call)
        arguments = [self.visit_expr(call.args[at]) for at in group.arguments]
        return relax.Call(group.gvar, arguments, call.attrs, call.ty_args)


def _free(name: str, taken: set[str]) -> str:
    """A name that is not taken: attention, attention1, attention2, …"""
    numbered = (f"{name}{i}" for i in itertools.count(1))
    return next(each for each in itertools.chain([name], numbered) if each not in taken)


def _in_order(func: relax.Function, name: str) -> _Group:
    """The function with its bindings as its result needs them, first arguments first, and its parameters likewise."""
    held = {b.var: b for block in func.body.blocks for b in block.bindings}
    bindings, params = [], []
    met: set[Any] = set()

    def need(var: Any) -> None:
        if var in met:
            return
        met.add(var)
        if var not in held:
            params.append(var)
            return
        for read in variables(held[var].value):
            need(read)
        bindings.append(held[var])

    need(func.body.body)
    old = list(func.params)
    params += [param for param in old if param not in met]
    body = relax.SeqExpr([relax.DataflowBlock(bindings)], func.body.body)
    made = relax.Function(params, body, func.ret_ty, func.is_pure, func.attrs).without_attr(_COMPOSITE)
    gvar = tvm.ir.GlobalVar(name)
    update_type(gvar, made.ty)
    return _Group(gvar, made, tuple(next(i for i, each in enumerate(old) if each.same_as(p)) for p in params))
