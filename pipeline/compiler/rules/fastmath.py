"""exp, sigmoid, tanh, erf and some powers of float32 as arithmetic that LLVM vectorises, not a call for each element.

    exp(x)  →  2^n * (1 + r + r² P(r)),  n = round(x / ln 2), r = x - n ln 2

Results differ from the exact ones by less than 1e-6 of their value, the range where they are denormal aside. Infinities
and NaN give what they should. The coefficients are minimax fits, in relative error, over the range named beside each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import ir, tirx

from pipeline.compiler.rules import terms

# (e^r - 1 - r) / r², |r| <= ln(2) / 2
_EXP = (0.500000001, 0.166666665, 0.0416664574, 0.00833336183, 0.00139344969, 0.000198581313)
# (tanh(x) / x - 1) / x² in x², |x| <= 0.6
_TANH = (-0.333333303, 0.133329156, -0.0538739818, 0.021111104, -0.00626931948)
# erf(x) / x in x², |x| <= 1
_ERF = (1.12837917, -0.376126258, 0.112835851, -0.026853812, 0.00518832771, -0.000801019369, 7.85386115e-05)
# log(1 - erf(x)), 0.95 <= x <= 4
_LOG_ERFC = (
    *(0.000183442838, -1.12955682, -0.633262626, -0.108372463),
    *(0.0251789577, -0.00419360712, 0.000439105526, -2.14960378e-05),
)
_ROOTS = frozenset({0.25, 0.5, 0.75})
# ln 2 in two parts, the first exact in few bits, so that n * first is exact.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4


def vectorizable(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Replaces every such call in a function."""
    return func.with_body(terms.rewrite(func.body, ir.Call, _replaced))


def _replaced(call: Any) -> Any:
    name = terms.function_name(call)
    if terms.dtype(call) != "float32":
        return call
    if name == "pow" and isinstance(call.args[1], tirx.FloatImm) and float(call.args[1].value) in _ROOTS:
        return _pow(call.args[0], float(call.args[1].value))
    make = _FUNCTIONS.get(name)
    return make(call.args[0]) if make else call


def _let(value: Any, body: Callable[[Any], Any]) -> Any:
    """Works a value out once, for an expression that uses it often."""
    var = tirx.Var("part", terms.dtype(value))
    return tirx.Let(var, value, body(var))


def _f(value: float) -> Any:
    return tirx.const(value, "float32")


def _polynomial(x: Any, coefficients: tuple[float, ...]) -> Any:
    result = _f(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + _f(coefficient)
    return result


def _power_of_two(n: Any) -> Any:
    """2^n of an int32 within a float's range of exponents."""
    return tirx.reinterpret("float32", tirx.shift_left(n + 127, tirx.const(23, "int32")))


def _exp(x: Any) -> Any:
    def scaled(n: Any, value: Any) -> Any:
        # Two factors, since 2^n alone may be out of range where the product is not.
        half = tirx.shift_right(n, tirx.const(1, "int32"))
        return value * _power_of_two(half) * _power_of_two(n - half)

    def of(x: Any) -> Any:
        return _let(tirx.nearbyint(x * _f(1.44269504)), lambda n: reduced(x, n))

    def reduced(x: Any, n: Any) -> Any:
        rest = x - n * _f(_LN2_HIGH) - n * _f(_LN2_LOW)
        value = _let(rest, lambda r: r * r * _polynomial(r, _EXP) + r + _f(1))
        return scaled(tirx.Cast("int32", n), value)

    # A comparison with NaN is false, so that NaN passes.
    def clamped(x: Any) -> Any:
        return tirx.Select(x > _f(89), _f(89), tirx.Select(x < _f(-104), _f(-104), x))

    return _let(x, lambda x: _let(clamped(x), of))


def _sigmoid(x: Any) -> Any:
    return _f(1) / (_f(1) + _exp(-x))


def _tanh(x: Any) -> Any:
    def of(x: Any) -> Any:
        small = _let(x * x, lambda u: x + x * u * _polynomial(u, _TANH))
        large = _f(1) - _f(2) / (_exp(_f(2) * tirx.abs(x)) + _f(1))
        return tirx.Select(tirx.abs(x) < _f(0.6), small, _signed(large, x))

    return _let(x, of)


def _erf(x: Any) -> Any:
    def of(x: Any) -> Any:
        small = x * _let(x * x, lambda u: _polynomial(u, _ERF))
        far = tirx.Select(tirx.abs(x) > _f(4), _f(4), tirx.abs(x))
        large = _f(1) - _let(far, lambda a: _exp(_polynomial(a, _LOG_ERFC)))
        return tirx.Select(tirx.abs(x) < _f(1), small, _signed(large, x))

    return _let(x, of)


def _pow(x: Any, exponent: float) -> Any:
    """x to a quarter, a half or three quarters: roots, which processors have."""

    def of(x: Any) -> Any:
        root = tirx.sqrt(x)
        value = {0.5: root, 0.25: tirx.sqrt(root), 0.75: root * tirx.sqrt(root)}[exponent]
        infinity = _f(float("inf"))  # pow says that a power of minus infinity is infinite, where a root is NaN
        return tirx.Select(x == -infinity, infinity, value)

    return _let(x, of)


def _signed(magnitude: Any, x: Any) -> Any:
    return tirx.Select(x < _f(0), _f(-1), _f(1)) * magnitude


_FUNCTIONS: dict[str, Callable[[Any], Any]] = {"exp": _exp, "sigmoid": _sigmoid, "tanh": _tanh, "erf": _erf}
