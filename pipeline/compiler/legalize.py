"""LegalizeOps, with each distinct call worked out once.

TVM works out the function of every call anew: a network of a hundred layers creates a thousand functions, of which a
hundred differ. Here a call with the same operator, attributes and argument types as an earlier one calls the same
function. What comes out is what LegalizeOps gives, with fewer duplicates for the passes after it to carry.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import relax

from pipeline.errors import ModelError

_CALL_TIR = tvm.ir.Op.get("relax.call_tir")
_RULE = "FLegalize"

Rule = Callable[[relax.BlockBuilder, relax.Call], relax.Expr]


def legalize(mod: tvm.IRModule, operators: set[str]) -> tvm.IRModule:
    """Legalises a module in which these operators occur. Runs within the target's scope.

    Raises ModelError that names the operator which TVM's rule could not take.
    """
    once = _Once()
    rules = {}
    for name in operators:
        rule = tvm.ir.Op.get(name).get_attr(_RULE)
        if rule is not None:
            rules[name] = once.wrapped(rule)
    try:
        return relax.transform.LegalizeOps(rules)(mod)
    except Exception as error:
        if not once.working_on:
            raise
        said = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
        raise ModelError(
            f"TVM cannot lower the operator {once.working_on}: {said}",
            hint="replace it in the model by operators that TVM lowers",
        ) from error


@dataclass(frozen=True)
class _Known:
    """A call that was worked out: where each argument of its function stands among the call's, and its result type."""

    call: relax.Call
    function: tvm.ir.GlobalVar
    positions: tuple[tuple[int, ...], ...]
    result: Any


class _Once:
    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], list[_Known]] = defaultdict(list)
        self.working_on = ""

    def wrapped(self, rule: Rule) -> Rule:
        def apply(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
            key = _bucket(call)
            if key is None:
                return self._worked_out(rule, builder, call)
            for known in self._known[key]:
                if _same(known.call, call):
                    arguments = [_at(call, position) for position in known.positions]
                    return relax.Call(_CALL_TIR, [known.function, relax.Tuple(arguments)], None, [known.result])
            made = self._worked_out(rule, builder, call)
            if (known_now := _remembered(call, made)) is not None:
                self._known[key].append(known_now)
            return made

        return apply

    def _worked_out(self, rule: Rule, builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        self.working_on = str(call.op.name)
        made = rule(builder, call)
        self.working_on = ""
        return made


def _bucket(call: relax.Call) -> tuple[Any, ...] | None:
    """What calls that may share a function have in common, cheap to hash; None for calls that are always worked out."""
    parts: list[Any] = [call.op.name]
    for leaf in _leaves(call):
        if isinstance(leaf, relax.Var):
            ty = leaf.ty
            if not isinstance(ty, relax.TensorType) or ty.shape is None or not isinstance(ty.shape, relax.ShapeExpr):
                return None
            if ty.vdevice is not None or not all(isinstance(extent, tvm.tirx.IntImm) for extent in ty.shape.values):
                return None
            parts.append((tuple(int(extent) for extent in ty.shape.values), str(ty.dtype)))
        else:
            parts.append(tvm_ffi.structural_hash(leaf))
    return tuple(parts)


def _same(one: relax.Call, other: relax.Call) -> bool:
    """Whether two calls of one bucket differ in nothing but which variables they are given."""
    if not tvm_ffi.structural_equal(one.attrs, other.attrs):
        return False
    # Which arguments are one and the same variable may matter to a rule.
    mine, theirs = list(_leaves(one)), list(_leaves(other))
    if len(mine) != len(theirs) or _repeats(mine) != _repeats(theirs):
        return False
    return all(
        isinstance(a, relax.Var) == isinstance(b, relax.Var)
        and (isinstance(a, relax.Var) or tvm_ffi.structural_equal(a, b))
        for a, b in zip(mine, theirs, strict=True)
    )


def _remembered(call: relax.Call, made: relax.Expr) -> _Known | None:
    """The call as known, if what the rule made is one plain call of a function with variables of the call's."""
    if not isinstance(made, relax.Call) or not made.op.same_as(_CALL_TIR) or len(made.args) != 2:
        return None
    places: dict[relax.Var, tuple[int, ...]] = {}
    for i, argument in enumerate(call.args):
        if isinstance(argument, relax.Tuple):
            for j, field in enumerate(argument.fields):
                places.setdefault(field, (i, j))
        else:
            places.setdefault(argument, (i,))
    given = made.args[1]
    if not isinstance(given, relax.Tuple) or not all(
        isinstance(field, relax.Var) and field in places for field in given.fields
    ):
        return None
    return _Known(call, made.args[0], tuple(places[field] for field in given.fields), made.ty_args[0])


def _leaves(call: relax.Call) -> Iterator[relax.Expr]:
    for argument in call.args:
        if isinstance(argument, relax.Tuple):
            yield from argument.fields
        else:
            yield argument


def _repeats(leaves: list[relax.Expr]) -> list[int]:
    seen: dict[relax.Expr, int] = {}
    return [seen.setdefault(leaf, i) for i, leaf in enumerate(leaves)]


def _at(call: relax.Call, position: tuple[int, ...]) -> relax.Expr:
    argument = call.args[position[0]]
    return argument.fields[position[1]] if len(position) == 2 else argument
