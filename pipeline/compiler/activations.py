"""Functions of one number that networks apply to each element, told from how TVM writes them out.

Owns: the names and formulas of activations, and the recognition of an expression as one of them. TVM and the importers
write the same function in many ways (x * 0.5 * (1 + erf(...)), 0.5 * (x + x * erf(...))), so an expression is not
matched by its form: it is evaluated, and compared with each formula at several hundred places. These cover the range
where the formulas differ, and both sides of every constant that the expression holds, where it may have its kinks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from numpy.typing import NDArray
from tvm import tirx

Values = NDArray[np.float64]
Function = Callable[[Values], Values]


def _erf(x: Values) -> Values:
    return np.array([math.erf(each) for each in np.atleast_1d(x)])


def _sigmoid(x: Values) -> Values:
    return 1 / (1 + np.exp(-x))


# What each name means, with its numbers a and b.
FORMULAS: dict[str, Callable[..., Values]] = {
    "relu": lambda x: np.maximum(x, 0),
    "leaky": lambda x, a: np.where(x > 0, x, a * x),
    "clip": lambda x, a, b: np.clip(x, a, b),
    "linear": lambda x, a, b: a * x + b,
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "swish": lambda x, a: x * _sigmoid(a * x),
    "gelu_erf": lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "hardsigmoid": lambda x, a, b: np.clip(a * x + b, 0, 1),
    "hardswish": lambda x, a, b: x * np.clip(a * x + b, 0, 1),
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
    "softplus": lambda x: np.logaddexp(0, x),
    "elu": lambda x, a: np.where(x > 0, x, a * np.expm1(np.minimum(x, 0))),
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "square": np.square,
}

_FAR, _NEAR = 60.0, 1e-3
_CLOSE = 1e-6


def recognised(expr: Any, variable: Any) -> tuple[str, tuple[float, ...]] | None:
    """The name and the numbers of the activation that an expression of one variable is; None where it is none.

    max(x, 0)  →  ("relu", ())        select(0 < x, x, x * 0.1)  →  ("leaky", (0.1,))
    """
    function = _compiled(expr, variable)
    return None if function is None else _named(function, _places(_constants(expr)))


def composed(steps: Sequence[tuple[str, tuple[float, ...]]]) -> tuple[str, tuple[float, ...]] | None:
    """The activation that several in a row are: linear(1/6, 1/2), clip(0, 1)  →  hardsigmoid(1/6, 1/2)"""

    def function(x: Values) -> Values:
        for name, numbers in steps:
            x = FORMULAS[name](x, *numbers)
        return x

    return _named(function, _places([number for _, numbers in steps for number in numbers]))


def _named(function: Function, places: Values) -> tuple[str, tuple[float, ...]] | None:
    with np.errstate(all="ignore"):
        given = function(places)
        for name, numbers in _guesses(function):
            if _agree(given, FORMULAS[name](places, *numbers)):
                return name, numbers
    return None


def _agree(given: Values, wanted: Values) -> bool:
    """Whether two functions agree wherever both are numbers, and are numbers at the same places, on half of them."""
    finite = np.isfinite(given)
    if not np.array_equal(finite, np.isfinite(wanted)) or finite.sum() * 3 < len(given):
        return False
    difference = np.abs(given[finite] - wanted[finite])
    return bool(np.all(difference <= _CLOSE * np.maximum(1e-2, np.abs(wanted[finite]))))


def _constants(expr: Any) -> list[float]:
    found: list[float] = []
    tvm_ffi.structural_walk(expr, (tirx.FloatImm, lambda node: found.append(float(node.value))), order="post")
    return found


def _places(constants: Sequence[float]) -> Values:
    kinks = [c for c in {*constants, 0.0} if abs(c) < 1e6]
    around = [sign * c + step for c in kinks for sign in (1, -1) for step in (-_NEAR, 0.0, _NEAR)]
    return np.array([*np.linspace(-20, 20, 397), -_FAR, _FAR, *around])


def _guesses(function: Function) -> list[tuple[str, tuple[float, ...]]]:
    """Each activation with the numbers that it would have to have, by what the function is at a few places."""

    def at(x: float) -> float:
        return float(function(np.array([x]))[0])

    zero, one, low, high = at(0.0), at(1.0), at(-1e39), at(1e39)
    slope = (at(_NEAR) - at(-_NEAR)) / (2 * _NEAR)
    bend = (at(_NEAR) + at(-_NEAR)) / (2 * _NEAR * _NEAR)
    guesses: list[tuple[str, tuple[float, ...]]] = [
        ("relu", ()),
        ("linear", (one - zero, zero)),
        ("leaky", (-at(-1.0),)),
    ]
    # One side that never ends is a bound that no float32 reaches.
    bound = float(np.finfo(np.float32).max)
    if low <= high:
        guesses.append(("clip", (max(low, -bound), min(high, bound))))
    guesses += [(name, ()) for name in ("sigmoid", "tanh", "gelu_erf", "gelu_tanh", "mish", "softplus")]
    guesses += [("swish", (_logit(one),)), ("elu", (-at(-_FAR),))]
    guesses += [("hardsigmoid", (slope, zero)), ("hardswish", (bend, slope))]
    guesses += [(name, ()) for name in ("exp", "log", "sqrt", "abs", "square")]
    return [(name, numbers) for name, numbers in guesses if all(math.isfinite(number) for number in numbers)]


def _logit(p: float) -> float:
    return math.log(p / (1 - p)) if 0 < p < 1 else math.nan


_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    tirx.Add: np.add,
    tirx.Sub: np.subtract,
    tirx.Mul: np.multiply,
    tirx.Div: np.divide,
    tirx.Max: np.maximum,
    tirx.Min: np.minimum,
    tirx.LT: np.less,
    tirx.LE: np.less_equal,
    tirx.GT: np.greater,
    tirx.GE: np.greater_equal,
    tirx.EQ: np.equal,
    tirx.NE: np.not_equal,
    tirx.And: np.logical_and,
    tirx.Or: np.logical_or,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "exp": np.exp,
    "log": np.log,
    "log1p": np.log1p,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "erf": _erf,
    "fabs": np.abs,
    "abs": np.abs,
    "pow": np.power,
    "if_then_else": np.where,
}


def _compiled(expr: Any, variable: Any) -> Function | None:
    """An expression as a function of NumPy arrays; None where it holds something else than arithmetic."""
    if expr.same_as(variable):
        return lambda x: x
    if isinstance(expr, tirx.FloatImm | tirx.IntImm):
        number = float(expr.value)
        return lambda x: np.full_like(x, number)
    if isinstance(expr, tirx.Select):
        return _applied(np.where, [expr.condition, expr.true_value, expr.false_value], variable)
    if type(expr) in _BINARY:
        return _applied(_BINARY[type(expr)], [expr.a, expr.b], variable)
    if isinstance(expr, tvm.ir.Call) and isinstance(expr.op, tvm.ir.Op):
        meaning = _CALLS.get(expr.op.name.rpartition(".")[2])
        return None if meaning is None else _applied(meaning, list(expr.args), variable)
    return None


def _applied(meaning: Callable[..., Any], arguments: list[Any], variable: Any) -> Function | None:
    functions = [_compiled(argument, variable) for argument in arguments]
    if any(function is None for function in functions):
        return None
    return lambda x: meaning(*(function(x) for function in functions if function is not None))
