"""Walking and rewriting expressions: the few functions through which rules do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tvm_ffi
from tvm import ir, tirx


def nodes(root: Any, kind: Any = object) -> list[Any]:
    """Every node of a kind below a root, each place where it stands, children first."""
    found: list[Any] = []
    tvm_ffi.structural_walk(root, (kind, found.append))
    return found


def size(root: Any) -> int:
    """How many operations, loads and leaves an expression has."""
    return len(nodes(root, ir.Expr))


def substitute(root: Any, values: Mapping[Any, Any]) -> Any:
    """An expression with variables replaced."""
    return tvm_ffi.structural_map(root, (ir.Var, lambda var: values.get(var, var)))


def rewrite(root: Any, kind: Any, replace: Callable[[Any], Any]) -> Any:
    """Everything below a root with nodes of a kind replaced, children first; `replace` may return what it got."""
    return tvm_ffi.structural_map(root, (kind, replace))


def variables(root: Any) -> list[Any]:
    """The variables of an expression, each once, buffers left out."""
    found: dict[Any, None] = {}
    for var in nodes(root, ir.Var):
        if not isinstance(var.ty, tirx.BufferType):
            found[var] = None
    return list(found)


def function_name(node: Any) -> str:
    """exp, if_then_else, … for a call of an intrinsic; "" for all else. The operators' namespaces are left out."""
    if isinstance(node, ir.Call) and isinstance(node.op, ir.Op):
        return str(node.op.name).rpartition(".")[2]
    return ""


def dtype(expr: Any) -> str:
    return str(expr.ty.dtype)


def integer(value: int, like: Any) -> Any:
    """A constant of an expression's own type."""
    return tirx.IntImm(dtype(like), value)


def conjuncts(condition: Any) -> Iterator[Any]:
    """a and b and c  →  a, b, c; nothing for a constant."""
    if isinstance(condition, tirx.And):
        yield from conjuncts(condition.a)
        yield from conjuncts(condition.b)
    elif not isinstance(condition, tirx.IntImm):
        yield condition
