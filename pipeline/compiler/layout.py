"""Convolution networks computed channels-last.

Every tensor of a function has a logical form, the one that the model wrote, and may have physical ones, each a
permutation p of its axes: physical = permute_dims(logical, p). Convolutions and pooling ask for their input
channels-last and give their output so; what goes element by element, joins, parts, reduces or pads takes whatever form
its input has; a transpose changes what the form means and moves nothing. What has no rule here gets the logical form,
and so do the function's outputs: one transpose for each value, made when it is first asked for. A transpose that only
moves axes of extent 1 is a reshape.

    conv2d(x, w)            →  conv2d(permute_dims(x, 0 2 3 1), permute_dims(w, 2 3 1 0), NHWC, HWIO)
    add(that, b[1,c,1,1])   →  add(that, b[c])
    relu(that)              →  relu(that)
    return that             →  return permute_dims(that, 0 3 1 2)

Weights are permuted as well, which lifting moves out of inference. Owns no decision for which targets this pays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import tvm
from tvm import relax

from pipeline.compiler.axes import (
    Permutation,
    Shape,
    groups,
    identity,
    in_groups,
    last,
    order,
    through_reshape,
    through_transpose,
    without,
)
from pipeline.compiler.rewriting import Rewriter, operator, rewrite, shape_of


@tvm.transform.module_pass(opt_level=0, name="ChannelsLast")
def channels_last(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Rewrites functions as the top of this file says. Parameters from `num_input` on are weights."""
    return rewrite(mod, _ChannelsLast)


@dataclass
class _Tensor:
    """A tensor by its forms. `native` is the one that it was made in."""

    shape: Shape
    native: Permutation
    forms: dict[Permutation, relax.Expr] = field(default_factory=dict)


Rule = Callable[[relax.Call], "_Tensor | None"]

_UNARY = (
    *("abs", "acos", "acosh", "asin", "asinh", "astype", "atan", "atanh", "bitwise_not", "ceil", "clip", "cos", "cosh"),
    *("erf", "exp", "floor", "isfinite", "isinf", "isnan", "log", "logical_not", "negative", "nn.gelu", "nn.gelu_tanh"),
    *("nn.leakyrelu", "nn.relu", "nn.relu6", "nn.selu", "nn.silu", "nn.softplus", "round", "rsqrt", "sigmoid", "sign"),
    *("sin", "sinh", "sqrt", "square", "tan", "tanh", "trunc"),
)
_BROADCAST = (
    *("add", "divide", "equal", "floor_divide", "floor_mod", "greater", "greater_equal", "less", "less_equal"),
    *("logical_and", "logical_or", "logical_xor", "maximum", "minimum", "mod", "multiply", "not_equal", "power"),
    *("subtract", "where"),
)
_REDUCTIONS = ("max", "mean", "min", "prod", "std", "sum", "variance")


class _ChannelsLast(Rewriter):
    def __init__(self, mod: tvm.IRModule, func: relax.Function) -> None:
        super().__init__(mod, func)
        self._tensors: dict[relax.Var, _Tensor] = {}  # by old variable
        self._parts: dict[relax.Var, Permutation] = {}  # old tuples whose fields are not in the logical form
        self._rules: dict[str, Rule] = {
            **dict.fromkeys(_UNARY, self._unary),
            **dict.fromkeys(_BROADCAST, self._broadcast),
            **dict.fromkeys(_REDUCTIONS, self._reduce),
            **dict.fromkeys(("nn.softmax", "nn.log_softmax"), self._softmax),
            **dict.fromkeys(("reshape", "expand_dims", "squeeze"), self._reshape),
            **dict.fromkeys(("nn.conv1d", "nn.conv2d"), self._convolve),
            **dict.fromkeys(("nn.max_pool2d", "nn.avg_pool2d"), self._pool),
            **dict.fromkeys(("nn.max_pool3d", "nn.avg_pool3d"), self._pool_any),
            "nn.adaptive_avg_pool2d": self._adaptive_pool,
            "nn.conv2d_transpose": self._convolve_transposed,
            "image.resize2d": self._resize,
            "nn.pad": self._pad,
            "concat": self._concat,
            "strided_slice": self._slice,
            "permute_dims": self._transpose,
        }

    # What stands for an old leaf is its logical form, made when it is asked for.
    def leaf(self, expr: relax.Expr) -> relax.Expr:
        if isinstance(expr, relax.Var) and expr in self._tensors:
            tensor = self._tensors[expr]
            return self._ask(tensor, identity(len(tensor.shape)))
        if isinstance(expr, relax.Var) and expr in self._parts:
            return self._logical_tuple(expr)
        return super().leaf(expr)

    def call(self, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        name = operator(call)
        if name == "split":
            return self._split(var, call)
        rule = self._rules.get(name)
        if rule is None or shape_of(call) is None or all(self._is_weight(arg) for arg in call.args):
            return None
        made = rule(call)
        if made is None:
            return None
        self._tensors[var] = made
        return var

    def field(self, var: relax.Var, item: relax.TupleGetItem) -> relax.Expr | None:
        perm = self._parts.get(item.tuple_value)
        shape = shape_of(var)
        if perm is None or shape is None:
            return super().field(var, item)
        whole = self._stands[item.tuple_value]
        self._tensors[var] = self._tensor(shape, perm, relax.TupleGetItem(whole, item.index))
        return var

    # Forms

    def _is_weight(self, old: relax.Expr) -> bool:
        if isinstance(old, relax.Tuple):
            return all(self._is_weight(each) for each in old.fields)
        if not isinstance(old, relax.Var):
            return True
        if old in self._tensors:
            tensor = self._tensors[old]
            return self.is_fixed(tensor.forms[tensor.native])
        return old not in self._parts and self.is_fixed(super().leaf(old))

    def _of(self, old: relax.Expr) -> _Tensor | None:
        """The tensor behind an old leaf, None where its shape is open."""
        if isinstance(old, relax.Var) and old in self._tensors:
            return self._tensors[old]
        shape = shape_of(old)
        if shape is None or (isinstance(old, relax.Var) and old in self._parts):
            return None
        plain = identity(len(shape))
        tensor = _Tensor(shape, plain, {plain: super().leaf(old)})
        if isinstance(old, relax.Var):
            # Kept, so that one transpose serves all that ask for it.
            self._tensors[old] = tensor
        return tensor

    def _tensor(self, shape: Shape, perm: Permutation, value: relax.Expr) -> _Tensor:
        """A tensor that is made by an expression in one form."""
        return _Tensor(shape, perm, {perm: value if isinstance(value, relax.Var) else self.emit(value)})

    def _ask(self, tensor: _Tensor, perm: Permutation) -> relax.Expr:
        """The tensor in a form, made from what is there where it is not."""
        if perm not in tensor.forms:
            wanted = order(tensor.shape, perm)
            same = [have for have in tensor.forms if order(tensor.shape, have) == wanted]
            have = same[0] if same else tensor.native
            source = tensor.forms[have]
            if same:
                made = self.reshaped(source, tuple(tensor.shape[axis] for axis in perm))
            else:
                made = self.emit(relax.op.permute_dims(source, [have.index(axis) for axis in perm]))
            tensor.forms[perm] = made
        return tensor.forms[perm]

    def _has(self, tensor: _Tensor, perm: Permutation) -> bool:
        """Whether a form is there without moving data."""
        wanted = order(tensor.shape, perm)
        return any(order(tensor.shape, have) == wanted for have in tensor.forms)

    def _logical_tuple(self, old: relax.Var) -> relax.Expr:
        perm, whole = self._parts[old], self._stands[old]
        fields = []
        for i, ty in enumerate(old.ty.fields):
            part = relax.TupleGetItem(whole, i)
            tensor = self._tensor(tuple(int(extent) for extent in ty.shape.values), perm, part)
            fields.append(self._ask(tensor, identity(len(perm))))
        return self.emit(relax.Tuple(fields))

    # Rules: what stands for a call, or None where it wants the logical form

    def _unary(self, call: relax.Call) -> _Tensor | None:
        x = self._of(call.args[0])
        if x is None:
            return None
        made = relax.Call(call.op, [self._ask(x, x.native), *call.args[1:]], call.attrs, call.ty_args)
        return self._tensor(x.shape, x.native, made)

    def _broadcast(self, call: relax.Call) -> _Tensor | None:
        shape = shape_of(call) or ()
        fixed = [self._is_weight(arg) for arg in call.args]
        operands = [self._of(arg) for arg in call.args]
        moving = [x for x, weight in zip(operands, fixed, strict=True) if x is not None and not weight]
        if None in operands or not moving:
            return None
        perm = self._common([self._widened(x, len(shape)) for x in moving], shape)
        taken = [
            self._as_operand(arg, x, perm) if weight else self._ask(self._widened(x, len(shape)), perm)
            for arg, x, weight in zip(call.args, operands, fixed, strict=True)
            if x is not None
        ]
        return self._tensor(shape, perm, relax.Call(call.op, taken, call.attrs))

    def _common(self, tensors: Sequence[_Tensor], shape: Shape) -> Permutation:
        """The form in which least has to be moved; of equals, one that is not the logical one."""
        plain = identity(len(shape))

        def cost(perm: Permutation) -> tuple[int, bool]:
            moved = [x for x in tensors if not self._has(x, perm)]
            return sum(_size(x.shape) for x in moved), perm == plain

        full = [x for x in tensors if x.shape == shape] or list(tensors)
        return min((x.native for x in full), key=cost)

    def _widened(self, x: _Tensor, rank: int) -> _Tensor:
        """The tensor with axes of extent 1 before its own."""
        more = rank - len(x.shape)
        if more == 0:
            return x
        front = identity(more)
        native = (*front, *(axis + more for axis in x.native))
        held = self._ask(x, x.native)
        shape = (*(1 for _ in front), *x.shape)
        return _Tensor(shape, native, {native: self.reshaped(held, tuple(shape[axis] for axis in native))})

    def _as_operand(self, old: relax.Expr, x: _Tensor, perm: Permutation) -> relax.Expr:
        """A weight to be combined with a tensor of a form: without the leading axes of extent 1.

        b[1,8,1,1] for 0 2 3 1  →  b[8]
        """
        if len(x.shape) == 0 or all(extent == 1 for extent in x.shape):
            return super().leaf(old)
        wide = self._widened(x, len(perm))
        shape = tuple(wide.shape[axis] for axis in perm)
        first = next(i for i, extent in enumerate(shape) if extent != 1)
        if order(wide.shape, perm) == order(wide.shape, identity(len(perm))):
            return self.reshaped(super().leaf(old), shape[first:])
        return self.reshaped(self._ask(wide, perm), shape[first:])

    def _reduce(self, call: relax.Call) -> _Tensor | None:
        x = self._of(call.args[0])
        if x is None:
            return None
        rank = len(x.shape)
        axes = [int(a) % rank for a in call.attrs.axis] if call.attrs.axis is not None else list(range(rank))
        kept = bool(call.attrs.keepdims)
        physical = sorted(x.native.index(axis) for axis in axes)
        made = _OPERATORS[operator(call)](self._ask(x, x.native), physical, kept)
        return self._tensor(shape_of(call) or (), x.native if kept else without(x.native, axes), made)

    def _softmax(self, call: relax.Call) -> _Tensor | None:
        x = self._of(call.args[0])
        if x is None:
            return None
        axis = x.native.index(int(call.attrs.axis) % len(x.shape))
        return self._tensor(x.shape, x.native, _OPERATORS[operator(call)](self._ask(x, x.native), axis))

    def _transpose(self, call: relax.Call) -> _Tensor | None:
        x = self._of(call.args[0])
        shape = shape_of(call)
        if x is None or shape is None:
            return None
        rank = len(x.shape)
        axes = identity(rank)[::-1] if call.attrs.axes is None else tuple(int(a) % rank for a in call.attrs.axes)
        forms = {through_transpose(perm, axes): value for perm, value in x.forms.items()}
        return _Tensor(shape, through_transpose(x.native, axes), forms)

    def _reshape(self, call: relax.Call) -> _Tensor | None:
        x, shape = self._of(call.args[0]), shape_of(call)
        grouped = groups(x.shape, shape) if x is not None and shape is not None else None
        if x is None or shape is None or grouped is None:
            return None

        def fits(perm: Permutation) -> bool:
            return order(x.shape, in_groups(x.shape, perm, grouped)) == order(x.shape, perm)

        ready = [perm for perm in (x.native, *x.forms) if fits(perm)]
        held = ready[0] if ready else in_groups(x.shape, x.native, grouped)
        perm = through_reshape(held, shape, grouped)
        made = self.reshaped(self._ask(x, held), tuple(shape[axis] for axis in perm))
        return _Tensor(shape, perm, {perm: made})

    def _concat(self, call: relax.Call) -> _Tensor | None:
        shape, parts = shape_of(call), call.args[0]
        if shape is None or not isinstance(parts, relax.Tuple) or call.attrs.axis is None:
            return None
        tensors = [self._of(part) for part in parts.fields]
        moving = [x for x, old in zip(tensors, parts.fields, strict=True) if x is not None and not self._is_weight(old)]
        if None in tensors or not moving:
            return None
        # Parts differ in extent, so the first one's axes of extent 1 may be longer in others.
        perm = self._common(moving, shape)
        axis = perm.index(int(call.attrs.axis) % len(shape))
        made = relax.op.concat([self._ask(x, perm) for x in tensors if x is not None], axis)
        return self._tensor(shape, perm, made)

    def _split(self, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        x = None if self._is_weight(call.args[0]) else self._of(call.args[0])
        if x is None or not all(shape_of(relax.Var("", ty)) is not None for ty in var.ty.fields):
            return None
        axis = x.native.index(int(call.attrs.axis) % len(x.shape))
        given = call.attrs.indices_or_sections
        where = int(given) if isinstance(given, int | tvm.tirx.IntImm) else [int(index) for index in given]
        self._parts[var] = x.native
        return self.emit(relax.op.split(self._ask(x, x.native), where, axis))

    def _slice(self, call: relax.Call) -> _Tensor | None:
        x, shape = self._of(call.args[0]), shape_of(call)
        if x is None or shape is None or not isinstance(call.args[1], relax.Tuple):
            return None
        rank = len(x.shape)
        axes = relax.Tuple([tvm.tirx.IntImm("int64", x.native.index(int(a) % rank)) for a in call.args[1].fields])
        made = relax.Call(call.op, [self._ask(x, x.native), axes, *call.args[2:]], call.attrs)
        return self._tensor(shape, x.native, made)

    def _pad(self, call: relax.Call) -> _Tensor | None:
        x, shape = self._of(call.args[0]), shape_of(call)
        if x is None or shape is None:
            return None
        width = [int(n) for n in call.attrs.pad_width]
        moved = [n for axis in x.native for n in width[2 * axis : 2 * axis + 2]]
        value = float(call.attrs.pad_value)
        made = relax.op.nn.pad(self._ask(x, x.native), moved, str(call.attrs.pad_mode), value)
        return self._tensor(shape, x.native, made)

    def _convolve(self, call: relax.Call) -> _Tensor | None:
        attrs, shape = call.attrs, shape_of(call)
        x, weight = self._of(call.args[0]), self._of(call.args[1])
        plain, wanted = _LAYOUTS[operator(call)]
        if x is None or weight is None or shape is None or not _is_plain(attrs, plain):
            return None
        perm = last(len(shape))
        kernel = (*range(2, len(shape)), 1, 0)
        made = _OPERATORS[operator(call)](
            self._ask(x, perm),
            self._ask(weight, kernel),
            list(attrs.strides),
            list(attrs.padding),
            list(attrs.dilation),
            int(attrs.groups),
            *wanted,
            out_layout=wanted[0],
            out_dtype=attrs.out_dtype,
        )
        return self._tensor(shape, perm, made)

    def _convolve_transposed(self, call: relax.Call) -> _Tensor | None:
        """A transposed convolution whose patches neither overlap nor leave gaps, as a product and a shuffle.

        conv2d_transpose(x[n,c,h,w], k[c,o,2,2], strides=2)
        →  y = conv2d(x[n,h,w,c], k[1,1,c,2*2*o])[n,h,w,2,2,o];  y[n,h,2,w,2,o]  as  [n,2*h,2*w,o]
        """
        attrs, shape = call.attrs, shape_of(call)
        x, weight = self._of(call.args[0]), self._of(call.args[1])
        if x is None or weight is None or shape is None or not _is_plain(attrs, ("NCHW", "IOHW")):
            return None
        inner, outer, *window = weight.shape
        apart = window == [int(stride) for stride in attrs.strides] and int(attrs.groups) == 1
        rest = (*attrs.padding, *attrs.output_padding, *(int(n) - 1 for n in attrs.dilation))
        if (
            call.ty.dtype != call.args[0].ty.dtype
            or not apart
            or any(int(n) != 0 for n in rest)
            or not self._is_weight(call.args[1])
        ):
            return None
        n, _, high, wide = x.shape
        kernel = self.reshaped(self._ask(weight, (0, 2, 3, 1)), (1, 1, inner, window[0] * window[1] * outer))
        y = self.emit(
            relax.op.nn.conv2d(
                self._ask(x, last(4)), kernel, data_layout="NHWC", kernel_layout="HWIO", out_layout="NHWC"
            )
        )
        patches = self.emit(relax.op.reshape(y, (n, high, wide, *window, outer)))
        woven = self.emit(relax.op.permute_dims(patches, [0, 1, 3, 2, 4, 5]))
        return self._tensor(shape, last(4), relax.op.reshape(woven, tuple(shape[axis] for axis in last(4))))

    def _pool(self, call: relax.Call) -> _Tensor | None:
        attrs = call.attrs
        made = self._channels_last_of(call)
        if made is None:
            return None
        data, shape = made
        call = _OPERATORS[operator(call)](
            data,
            list(attrs.pool_size),
            list(attrs.strides),
            list(attrs.padding),
            list(attrs.dilation),
            bool(attrs.ceil_mode),
            bool(attrs.count_include_pad),
            "NHWC",
        )
        return self._tensor(shape, last(4), call)

    def _adaptive_pool(self, call: relax.Call) -> _Tensor | None:
        made = self._channels_last_of(call)
        if made is None:
            return None
        size = call.attrs.output_size
        pooled = relax.op.nn.adaptive_avg_pool2d(made[0], None if size is None else list(size), "NHWC")
        return self._tensor(made[1], last(4), pooled)

    def _resize(self, call: relax.Call) -> _Tensor | None:
        made = self._channels_last_of(call)
        if made is None:
            return None
        a = call.attrs
        resized = relax.op.image.resize2d(
            made[0],
            call.args[1],
            list(a.roi),
            "NHWC",
            a.method,
            a.coordinate_transformation_mode,
            a.rounding_method,
            float(a.cubic_alpha),
            int(a.cubic_exclude),
            float(a.extrapolation_value),
            a.out_dtype,
        )
        return self._tensor(made[1], last(4), resized)

    def _channels_last_of(self, call: relax.Call) -> tuple[relax.Expr, Shape] | None:
        """The input channels-last and the result's shape; None where the input has other layouts, or lies as it was
        written: moving it is not worth while for this operator alone."""
        x, shape = self._of(call.args[0]), shape_of(call)
        attrs = call.attrs
        if x is None or shape is None or str(attrs.layout) != "NCHW":
            return None
        if str(getattr(attrs, "out_layout", "") or "NCHW") != "NCHW" or not self._has(x, last(4)):
            return None
        return self._ask(x, last(4)), shape

    def _pool_any(self, call: relax.Call) -> _Tensor | None:
        """Pooling over three axes, which may lie in any order: the window is permuted with them.

        avg_pool3d(x[n,1,c,h,w], 5 1 1)  →  avg_pool3d(x[n,1,h,w,c], 1 1 5)
        """
        x, shape, attrs = self._of(call.args[0]), shape_of(call), call.attrs
        if x is None or shape is None or {str(attrs.layout), str(attrs.out_layout or attrs.layout)} != {"NCDHW"}:
            return None
        perm = (0, 1, *(axis for axis in x.native if axis > 1))
        spatial = [axis - 2 for axis in perm[2:]]
        padding = [int(n) for n in attrs.padding]
        made = _OPERATORS[operator(call)](
            self._ask(x, perm),
            [attrs.pool_size[i] for i in spatial],
            [attrs.strides[i] for i in spatial],
            [padding[i] for i in (*spatial, *(i + 3 for i in spatial))],
            [attrs.dilation[i] for i in spatial],
            bool(attrs.ceil_mode),
            bool(attrs.count_include_pad),
        )
        return self._tensor(shape, perm, made)


_OPERATORS = {
    **{name: getattr(relax.op, name) for name in _REDUCTIONS},
    **{f"nn.{name}": getattr(relax.op.nn, name) for name in ("softmax", "log_softmax", "conv1d", "conv2d")},
    **{f"nn.{kind}_pool{n}d": getattr(relax.op.nn, f"{kind}_pool{n}d") for kind in ("max", "avg") for n in (2, 3)},
}
_LAYOUTS = {
    "nn.conv1d": (("NCW", "OIW"), ("NWC", "WIO")),
    "nn.conv2d": (("NCHW", "OIHW"), ("NHWC", "HWIO")),
}


def _is_plain(attrs: tvm.ir.Attrs, layouts: tuple[str, str]) -> bool:
    """Whether a convolution reads and writes the layouts in which models are written."""
    data, kernel = layouts
    out = str(attrs.out_layout or data)
    return (str(attrs.data_layout), str(attrs.kernel_layout), out) == (data, kernel, data)


def _size(shape: Shape) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
