"""What a function computes is read from its structure: cores, steps, and where it can be parted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tvm
from tvm import relax, te, tirx
from tvm.relax import transform
from tvm.script import tirx as T  # noqa: N812

from pipeline.compiler import activations, anatomy, ir, products, windows

op = relax.op


def function(build: Callable[..., relax.Expr], shapes: Sequence[tuple[int, ...]]) -> tirx.PrimFunc:
    """The one function that a Relax function of tensors of these shapes is lowered to, under canonical names."""
    builder = relax.BlockBuilder()
    params = [relax.Var(f"p{i}", relax.TensorType(shape, "float32")) for i, shape in enumerate(shapes)]
    with builder.function("main", params):
        with builder.dataflow():
            result = builder.emit_output(build(builder.emit, *params))
        builder.emit_func_output(result)
    mod = builder.get()
    for phase in (
        transform.LegalizeOps(),
        transform.AnnotateTIROpPattern(),
        transform.FuseOps(),
        transform.FuseTIR(),
    ):
        mod = phase(mod)
    (func,) = [func for _, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)]
    return ir.load(ir.canonical(func))


def dissected(build: Callable[..., relax.Expr], shapes: Sequence[tuple[int, ...]]) -> anatomy.Anatomy:
    found = anatomy.dissect(function(build, shapes))
    assert found is not None
    return found


def conv(emit: Callable[..., relax.Var], x: relax.Var, w: relax.Var, **attributes: object) -> relax.Var:
    return emit(op.nn.conv2d(x, w, data_layout="NHWC", kernel_layout="HWIO", **attributes))


def steps(cut: anatomy.Cut) -> list[str]:
    return [step.name for step in cut.steps]


def test_a_convolution() -> None:
    found = dissected(
        lambda emit, x, w: conv(emit, x, w, strides=[2, 1], padding=[1, 0, 2, 1], dilation=[1, 2]),
        [(2, 14, 12, 16), (3, 5, 16, 32)],
    )
    read = products.convolution(found.core)
    assert read == products.Convolution(
        source="nhwc",
        weight="hwio",
        result="nhwc",
        batch=2,
        channels=(16, 32),
        extents=(14, 12),
        results=(8, 5),
        kernel=(3, 5),
        strides=(2, 1),
        dilation=(1, 2),
        before=(1, 0),
        after=(2, 1),
        groups=1,
    )


@pytest.mark.parametrize(
    ("layout", "kernel", "groups", "weight"),
    [
        ("NCHW", "OIHW", 1, (24, 12, 3, 3)),
        ("NCHW", "OIHW", 4, (24, 3, 3, 3)),
        ("NCHW", "OIHW", 12, (24, 1, 3, 3)),
        ("NHWC", "HWIO", 12, (3, 3, 1, 12)),
        ("NHWC", "OHWI", 1, (24, 3, 3, 12)),
    ],
)
def test_layouts_and_groups(layout: str, kernel: str, groups: int, weight: tuple[int, ...]) -> None:
    shape = {"NCHW": (1, 12, 9, 9), "NHWC": (1, 9, 9, 12)}[layout]
    found = dissected(
        lambda emit, x, w: op.nn.conv2d(x, w, groups=groups, data_layout=layout, kernel_layout=kernel), [shape, weight]
    )
    read = products.convolution(found.core)
    assert read is not None
    assert (read.source, read.weight, read.groups) == (layout.lower(), kernel.lower(), groups)
    assert read.channels == (12, weight[kernel.index("O")])


def test_three_dimensions() -> None:
    found = dissected(lambda emit, x, w: op.nn.conv3d(x, w, padding=1), [(1, 4, 6, 7, 8), (8, 4, 3, 3, 3)])
    read = products.convolution(found.core)
    assert read is not None
    assert (read.source, read.kernel, read.before) == ("ncdhw", (3, 3, 3), (1, 1, 1))


def test_a_chain_is_cut_at_every_value() -> None:
    def build(emit: Callable[..., relax.Var], x: relax.Var, w: relax.Var, b: relax.Var, r: relax.Var) -> relax.Expr:
        y = emit(op.add(conv(emit, x, w), b))
        return op.nn.relu(emit(op.add(y, r)))

    found = dissected(build, [(1, 9, 9, 8), (3, 3, 8, 16), (1, 1, 1, 16), (1, 7, 7, 16)])
    assert [steps(cut) for cut in found.cuts] == [[], ["add"], ["add", "add"], ["add", "add", "relu"]]
    assert [len(cut.after) for cut in found.cuts] == [3, 2, 1, 0]
    bias, residual = (step.operand for step in found.cuts[-1].steps[:2])
    assert bias is not None
    assert residual is not None
    assert (bias.strides, residual.strides) == ((0, 0, 0, 1), (0, 112, 16, 1))


def test_a_value_used_twice_can_only_be_the_end() -> None:
    def build(emit: Callable[..., relax.Var], x: relax.Var, w: relax.Var) -> relax.Expr:
        y = conv(emit, x, w)
        return op.add(emit(op.exp(y)), emit(op.sin(y)))

    found = dissected(build, [(1, 9, 9, 8), (3, 3, 8, 16)])
    assert [steps(cut) for cut in found.cuts] == [[]]


def test_activations_of_several_statements_are_one_step() -> None:
    def build(emit: Callable[..., relax.Var], x: relax.Var, w: relax.Var, b: relax.Var) -> relax.Expr:
        y = emit(op.nn.gelu(emit(op.add(conv(emit, x, w), b))))
        return op.nn.silu(y)

    found = dissected(build, [(1, 9, 9, 8), (3, 3, 8, 16), (1, 1, 1, 16)])
    assert steps(found.cuts[-1]) == ["add", "gelu_erf", "swish"]


def test_an_unknown_step_ends_the_chain() -> None:
    def build(emit: Callable[..., relax.Var], x: relax.Var, w: relax.Var) -> relax.Expr:
        return op.nn.relu(emit(op.sin(conv(emit, x, w))))

    found = dissected(build, [(1, 9, 9, 8), (3, 3, 8, 16)])
    assert [steps(cut) for cut in found.cuts] == [[]]
    assert len(found.cuts[0].after) == 2


def test_a_product_of_matrices() -> None:
    found = dissected(lambda emit, x, w, b: op.add(emit(op.matmul(x, w)), b), [(2, 40, 12), (12, 36), (36,)])
    assert products.convolution(found.core) is None
    (bias,) = [step.operand for step in found.cuts[-1].steps if step.operand is not None]
    axes = products.contraction(found.core, [bias])
    assert axes is not None
    assert [(axis.role, axis.extent, axis.operands) for axis in axes] == [
        ("m", 80, (0,)),
        ("n", 36, (1,)),
        ("k", 12, (0,)),
    ]
    assert [(axis.left, axis.right, axis.result) for axis in axes] == [(12, 0, 36), (0, 1, 1), (1, 36, 0)]


def test_batches() -> None:
    found = dissected(lambda emit, x, w: op.matmul(x, w), [(4, 8, 40, 15), (8, 15, 20)])
    axes = products.contraction(found.core)
    assert axes is not None
    assert [(axis.role, axis.extent) for axis in axes] == [("m", 4), ("b", 8), ("m", 40), ("n", 20), ("k", 15)]


@pytest.mark.parametrize("inside", ["v >= 1 and v < 9", "v >= 1", "v >= 2 and v < 9", "v >= 1 and v < 8"])
def test_padding_counts_only_where_its_condition_is_exact(inside: str) -> None:
    x, w = te.placeholder((1, 8, 4), name="x"), te.placeholder((3, 4, 8), name="w")
    condition = {
        "v >= 1 and v < 9": lambda v: tirx.all(v >= 1, v < 9),
        "v >= 1": lambda v: v >= 1,
        "v >= 2 and v < 9": lambda v: tirx.all(v >= 2, v < 9),
        "v >= 1 and v < 8": lambda v: tirx.all(v >= 1, v < 8),
    }[inside]
    zero = tirx.const(0, "float32")
    padded = te.compute((1, 10, 4), lambda n, v, c: tirx.if_then_else(condition(v), x[n, v - 1, c], zero))
    r, c = te.reduce_axis((0, 3)), te.reduce_axis((0, 4))
    y = te.compute((1, 8, 8), lambda n, v, o: te.sum(padded[n, v + r, c] * w[r, c, o], axis=[r, c]))
    found = anatomy.dissect(te.create_prim_func([x, w, y]))
    assert found is not None
    assert (found.core.before == (0, 1, 0)) == (inside == "v >= 1 and v < 9")
    assert len(found.first) == (0 if inside == "v >= 1 and v < 9" else 1)


def test_what_is_no_sum_of_products_is_none() -> None:
    assert anatomy.dissect(function(lambda emit, x: op.sum(x, axis=[1]), [(4, 8)])) is None
    assert anatomy.dissect(function(lambda emit, x: op.nn.relu(x), [(4, 8)])) is None
    assert anatomy.dissect(function(lambda emit, x: op.nn.softmax(x), [(4, 8)])) is None


@T.prim_func(s_tir=True)
def twice(x: T.Buffer((8, 8), "float32"), w: T.Buffer((8, 8), "float32"), y: T.Buffer((8, 8), "float32")):
    for i, j, k in T.grid(8, 8, 8):
        with T.sblock("y"):
            vi, vj, vk = T.axis.remap("SSR", [i, j, k])
            with T.init():
                y[vi, vj] = T.float32(1)
            y[vi, vj] = y[vi, vj] + x[vi, vk] * w[vk, vj]


def test_a_sum_that_begins_elsewhere_than_at_zero_is_none() -> None:
    assert anatomy.dissect(twice) is None


def test_a_scheduled_function_is_none() -> None:
    func = function(lambda emit, x, w: op.matmul(x, w), [(8, 8), (8, 8)])
    schedule = tvm.s_tir.Schedule(func)
    (block,) = schedule.get_child_blocks(schedule.get_sblock("root"))
    schedule.parallel(schedule.get_loops(block)[0])
    assert anatomy.dissect(schedule.mod["main"]) is None


# --- activations


VARIABLE = tirx.Var("x", "float32")


def named(expr: tirx.Expr) -> tuple[str, tuple[float, ...]] | None:
    found = activations.recognised(expr, VARIABLE)
    return None if found is None else (found[0], tuple(round(number, 6) for number in found[1]))


def f32(value: float) -> tirx.Expr:
    return tirx.const(value, "float32")


@pytest.mark.parametrize(
    ("expr", "wanted"),
    [
        (tirx.max(VARIABLE, f32(0)), ("relu", ())),
        (tirx.max(tirx.min(VARIABLE, f32(6)), f32(0)), ("clip", (0.0, 6.0))),
        (tirx.min(tirx.max(VARIABLE, f32(-1)), f32(1)), ("clip", (-1.0, 1.0))),
        (VARIABLE * f32(3) + f32(1), ("linear", (3.0, 1.0))),
        (f32(2) - VARIABLE, ("linear", (-1.0, 2.0))),
        (tirx.Select(f32(0) < VARIABLE, VARIABLE, VARIABLE * f32(0.2)), ("leaky", (0.2,))),
        (tirx.sigmoid(VARIABLE), ("sigmoid", ())),
        (f32(1) / (f32(1) + tirx.exp(f32(0) - VARIABLE)), ("sigmoid", ())),
        (VARIABLE * tirx.sigmoid(VARIABLE * f32(1.702)), ("swish", (1.702,))),
        (f32(0.5) * (VARIABLE + VARIABLE * tirx.erf(VARIABLE * f32(0.70710678))), ("gelu_erf", ())),
        (VARIABLE * VARIABLE, ("square", ())),
        (tirx.exp(VARIABLE), ("exp", ())),
        (tirx.max(VARIABLE, f32(0.05)) - f32(0.05), None),
        (tirx.Select(f32(0.05) < VARIABLE, VARIABLE, f32(0)), None),
        (tirx.sin(VARIABLE), None),
        (VARIABLE * VARIABLE * VARIABLE, None),
        (VARIABLE * tirx.erf(VARIABLE), None),
    ],
)
def test_an_expression_is_told_by_its_values(expr: tirx.Expr, wanted: tuple[str, tuple[float, ...]] | None) -> None:
    assert named(expr) == wanted


def test_activations_in_a_row_become_one() -> None:
    assert activations.composed([("linear", (0.2, 0.5)), ("clip", (0.0, 1.0))]) == (
        "hardsigmoid",
        pytest.approx((0.2, 0.5)),
    )
    assert activations.composed([("relu", ()), ("sigmoid", ())]) is None


# --- windows


def test_a_mean_of_what_is_inside_and_one_with_zeros() -> None:
    for with_zeros, wanted in ((False, "mean"), (True, "padded-mean")):
        func = function(
            lambda emit, x, z=with_zeros: op.nn.avg_pool2d(
                x, (3, 3), strides=(2, 2), padding=1, layout="NHWC", count_include_pad=z
            ),
            [(1, 14, 14, 8)],
        )
        found = windows.pooling(func)
        assert found is not None
        assert found.of == wanted
        assert found.dimensions[1] == windows.Dimension(14, 7, 3, 2, 1, 1, 1)


def test_a_sum_divided_by_something_else_is_no_mean() -> None:
    x = te.placeholder((1, 9, 4), name="x")
    r = te.reduce_axis((0, 3), "r")
    total = te.compute((1, 3, 4), lambda n, v, c: te.sum(x[n, v * 3 + r, c], axis=r))
    for divisor, wanted in ((3.0, "mean"), (2.0, None)):
        number = tirx.const(divisor, "float32")
        y = te.compute((1, 3, 4), lambda n, v, c: total[n, v, c] / number)  # noqa: B023
        found = windows.pooling(te.create_prim_func([x, y]))
        assert (found.of if found else None) == wanted


def test_softmax_is_read_with_its_axis() -> None:
    for axis in (0, 1, 2):
        found = windows.softmax(function(lambda emit, x, a=axis: op.nn.softmax(x, axis=a), [(4, 6, 8)]))
        assert found is not None
        assert found.axis == axis
    assert windows.softmax(function(lambda emit, x: op.nn.log_softmax(x), [(4, 8)])) is None


def test_formulas_hold_at_zero_and_far_out() -> None:
    assert activations.FORMULAS["gelu_erf"](np.array([0.0, 50.0])).tolist() == [0.0, 50.0]
    assert activations.FORMULAS["hardswish"](np.array([-9.0, 9.0]), 1 / 6, 0.5).tolist() == [0.0, 9.0]
