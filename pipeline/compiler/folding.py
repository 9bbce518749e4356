"""Scales and shifts that depend on weights alone, folded into the weights before them.

    (conv2d(x, w) + b) * s + t   →  conv2d(x, w * s') + (b * s + t)      s' is s, shaped to go along w's output channels
    matmul(x, w) * s             →  matmul(x, w * s)
    ((x * s1) + t1) * s2 + t2    →  x * (s1 * s2) + (t1 * s2 + t2)

What comes to stand on the right depends on weights alone, so lifting moves it out of inference. Folded is only into
what nothing else uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import tvm
from tvm import relax
from tvm.ir.expr import GenericConst

from pipeline.compiler.rewriting import Rewriter, operator, rewrite, shape_of


@tvm.transform.module_pass(opt_level=0, name="FoldScales")
def fold_scales(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Folds scales and shifts as the top of this file says. Parameters from `num_input` on are weights."""
    return rewrite(mod, _Folder)


@dataclass(frozen=True)
class _Affine:
    """base * scale + shift, not written down yet.

    base          a product with weights, or a variable; over new leaves
    shape         what it is; channel is the axis that scale and shift go along
    scale, shift  vectors, of an element for each channel or of one element
    """

    base: relax.Expr
    shape: tuple[int, ...]
    channel: int
    scale: relax.Expr | None = None
    shift: relax.Expr | None = None

    def takes(self, operand: relax.Expr) -> bool:
        """Whether an operand that depends on weights goes along the channels, or is one number."""
        extents = shape_of(operand)
        if extents is None or len(extents) > len(self.shape):
            return False
        return all(
            extent == 1 or (axis == self.channel and extent == self.shape[axis])
            for axis, extent in enumerate(extents, len(self.shape) - len(extents))
        )


def _axis_of(operand: relax.Expr, shape: tuple[int, ...]) -> int | None:
    """The one axis of a tensor that an operand of several elements goes along."""
    extents = shape_of(operand) or ()
    long = [axis for axis, extent in enumerate(extents, len(shape) - len(extents)) if extent != 1]
    return long[0] if len(long) == 1 else None


# Where the output channels lie: in the result, counted from its end for products of matrices, and in the weights.
_PRODUCTS = {"nn.conv1d": (1, 0), "nn.conv2d": (1, 0), "nn.conv2d_transpose": (1, 1), "matmul": (-1, 1)}
_LAYOUTS = {"nn.conv1d": ("NCW", "OIW"), "nn.conv2d": ("NCHW", "OIHW"), "nn.conv2d_transpose": ("NCHW", "IOHW")}


class _Folder(Rewriter):
    def __init__(self, mod: tvm.IRModule, func: relax.Function) -> None:
        super().__init__(mod, func)
        self._pending: dict[relax.Var, _Affine] = {}  # by old variable, each used once

    def leaf(self, expr: relax.Expr) -> relax.Expr:
        if isinstance(expr, relax.Var) and expr in self._pending:
            self._stands[expr] = self._written(self._pending.pop(expr))
        return super().leaf(expr)

    def call(self, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        if not str(getattr(call.ty, "dtype", "")).startswith(("float", "bfloat")):
            return None
        name = operator(call)
        affine = None
        if name in _PRODUCTS:
            affine = self._product(call)
        elif name in ("multiply", "divide", "add", "subtract"):
            affine = self._step(name, call)
        if affine is None:
            return None
        if self.uses[var] == 1:
            self._pending[var] = affine
            return var
        return self._written(affine)

    def _product(self, call: relax.Call) -> _Affine | None:
        name, shape = operator(call), shape_of(call)
        if name in _LAYOUTS:
            attrs = call.attrs
            layouts = (str(attrs.data_layout), str(attrs.kernel_layout))
            if layouts != _LAYOUTS[name] or str(attrs.out_layout or layouts[0]) != layouts[0]:
                return None
        if name == "nn.conv2d_transpose" and int(call.attrs.groups) != 1:
            return None
        weight = self.leaf(call.args[1])
        rank = len(shape_of(weight) or ())
        if shape is None or not self.is_fixed(weight) or (name == "matmul" and (rank != 2 or not shape)):
            return None
        if weight.ty.dtype != call.ty.dtype:
            return None
        base = relax.Call(call.op, [self.leaf(call.args[0]), weight], call.attrs)
        return None if self.is_fixed(base) else _Affine(base, shape, _PRODUCTS[name][0] % len(shape))

    def _step(self, name: str, call: relax.Call) -> _Affine | None:
        """What an operand that depends on weights makes of the other one."""
        x, operand = call.args
        if name in ("multiply", "add") and self._is_weight(x):
            x, operand = operand, x
        if not self._is_weight(operand) or self._is_weight(x) or shape_of(x) != shape_of(call):
            return None
        operand = self.leaf(operand)
        before = self._pending.get(x) if isinstance(x, relax.Var) else None
        if before is not None and before.takes(operand):
            del self._pending[x]
            return self._after(before, name, self._vector(operand))
        # A chain that no product starts is begun by a scale: sums before a scale are better left as they are.
        shape = shape_of(call) or ()
        channel = _axis_of(operand, shape)
        if name != "multiply" or channel is None:
            return None
        return _Affine(self.leaf(x), shape, channel, scale=self._vector(operand))

    def _vector(self, operand: relax.Expr) -> relax.Expr:
        if isinstance(operand, GenericConst):
            array = operand.value.numpy()
            return _constant(array.reshape(-1 if array.size > 1 else ()), operand)
        return self.reshaped(operand, (math.prod(shape_of(operand) or ()),))

    def _is_weight(self, old: relax.Expr) -> bool:
        return not (isinstance(old, relax.Var) and old in self._pending) and self.is_fixed(self.leaf(old))

    def _after(self, before: _Affine, name: str, operand: relax.Expr) -> _Affine:
        if name in ("add", "subtract"):
            return replace(before, shift=self._computed(name, before.shift, operand))
        scale, shift = before.scale, before.shift
        return replace(
            before,
            scale=self._computed(name, scale, operand),
            shift=None if shift is None else self._computed(name, shift, operand),
        )

    def _computed(self, name: str, one: relax.Expr | None, other: relax.Expr) -> relax.Expr:
        """one ∘ other, both of weights; without a first operand, it is 0 for sums and 1 for products."""
        if one is None:
            if name in ("add", "multiply"):
                return other
            one = relax.const(0 if name == "subtract" else 1, other.ty.dtype)
        if isinstance(one, GenericConst) and isinstance(other, GenericConst):
            value = getattr(np, name)(one.value.numpy(), other.value.numpy())
            return _constant(value, one)
        return self.emit(getattr(relax.op, name)(one, other))

    def _written(self, affine: _Affine) -> relax.Expr:
        y, after = affine.base, len(affine.shape) - affine.channel - 1
        if isinstance(y, relax.Call):
            weight = y.args[1] if affine.scale is None else self._scaled(y, affine.scale)
            y = self.emit(relax.Call(y.op, [y.args[0], weight], y.attrs))
        elif affine.scale is not None:
            y = self.emit(relax.op.multiply(y, self._along(affine.scale, after)))
        return y if affine.shift is None else self.emit(relax.op.add(y, self._along(affine.shift, after)))

    def _scaled(self, product: relax.Call, scale: relax.Expr) -> relax.Expr:
        weight, axis = product.args[1], _PRODUCTS[operator(product)][1]
        after = len(shape_of(weight) or ()) - axis - 1
        return self.emit(relax.op.multiply(weight, self._along(scale, after)))

    def _along(self, vector: relax.Expr, after: int) -> relax.Expr:
        """A vector shaped to go along an axis with so many axes after it; as it is where it is one number."""
        extents = shape_of(vector) or ()
        if math.prod(extents) == 1:
            return vector
        shape = (*extents, *(1 for _ in range(after)))
        if isinstance(vector, GenericConst):
            return _constant(vector.value.numpy().reshape(shape), vector)
        return self.reshaped(vector, shape)


def _constant(value: object, like: GenericConst) -> GenericConst:
    dtype = like.value.dtype
    return relax.const(np.asarray(value, like.value.numpy().dtype), dtype)  # without a dtype, doubles become floats
