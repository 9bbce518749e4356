"""Whatever the shape, a scheduled function gives what it gave before, and no rule fails on the way."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm import relax, tirx

from pipeline.compiler import prepack, rules
from tests.compiler.rules.cases import NATIVE, all_fused, assert_same, conv2d, fused, target

R = relax.op
few = settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
many = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


class _Refused(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage())


@pytest.fixture(autouse=True, scope="module")
def _no_rule_fails() -> Iterator[None]:
    handler = _Refused()
    logging.getLogger("pipeline.compiler.rules").addHandler(handler)
    yield
    logging.getLogger("pipeline.compiler.rules").removeHandler(handler)


def check(functions: tirx.PrimFunc | list[tirx.PrimFunc]) -> None:
    for func in functions if isinstance(functions, list) else [functions]:
        assert_same(func, rules.schedule(func, NATIVE))


@pytest.mark.parametrize(
    ("data", "weight", "more"),
    [
        ((1, 14, 14, 16), (3, 3, 16, 32), {"padding": 1}),
        ((2, 9, 7, 5), (3, 3, 5, 3), {"padding": 1, "strides": 2}),
        ((1, 13, 13, 48), (1, 1, 48, 58), {"epilogue": ("bias", "residual", "relu")}),
        ((1, 28, 28, 24), (1, 1, 24, 24), {"epilogue": ()}),
        ((1, 31, 17, 3), (7, 7, 3, 20), {"padding": 3, "strides": 2, "epilogue": ("bias", "silu")}),
        ((1, 12, 12, 8), (3, 3, 8, 40), {"padding": 2, "dilation": 2}),
        ((1, 1, 1, 240), (1, 1, 240, 60), {}),
        ((1, 7, 7, 64), (3, 3, 64, 160), {"padding": 1}),
        ((1, 12, 12, 68), (1, 1, 17, 68), {"groups": 4}),
        ((2, 10, 10, 32), (3, 3, 8, 48), {"groups": 4, "padding": 1}),
        ((1, 1, 1, 24), (1, 1, 6, 24), {"groups": 4}),
        ((1, 15, 15, 33), (3, 3, 1, 33), {"groups": 33, "padding": 1}),
        ((1, 30, 30, 16), (5, 5, 1, 16), {"groups": 16, "padding": 2, "strides": 2}),
        ((1, 9, 9, 6), (3, 3, 1, 12), {"groups": 6, "padding": 1}),
        ((1, 8, 9, 12), (16, 8, 3, 3), {"layout": "NCHW", "padding": 1}),
        ((1, 40, 9, 12), (24, 40, 1, 1), {"layout": "NCHW", "epilogue": ("bias", "silu")}),
    ],
)
def test_convolutions(data: tuple[int, ...], weight: tuple[int, ...], more: dict) -> None:
    check(conv2d(data, weight, **more))


shape = st.integers(1, 40)


@st.composite
def convolutions(draw: st.DrawFn) -> tirx.PrimFunc:
    groups, kernel = draw(st.sampled_from((1, 1, 1, 2, 3, 4))), draw(st.sampled_from((1, 2, 3, 5)))
    inner, outer = draw(st.integers(1, 20)), draw(st.integers(1, 50))
    dilation = draw(st.sampled_from((1, 1, 2)))
    least = dilation * (kernel - 1) + 1
    h, w = draw(st.integers(least, least + 20)), draw(st.integers(least, least + 20))
    return conv2d(
        (draw(st.integers(1, 2)), h, w, inner * groups),
        (kernel, kernel, inner, outer * groups),
        strides=draw(st.integers(1, 3)),
        padding=draw(st.integers(0, 2)),
        dilation=dilation,
        groups=groups,
        epilogue=draw(st.sampled_from(((), ("bias",), ("bias", "relu"), ("residual", "silu")))),
    )


@st.composite
def depthwise(draw: st.DrawFn) -> tirx.PrimFunc:
    channels, kernel, times = draw(st.integers(2, 70)), draw(st.sampled_from((1, 3, 5))), draw(st.integers(1, 2))
    h, w = draw(st.integers(kernel, 30)), draw(st.integers(kernel, 30))
    return conv2d(
        (draw(st.integers(1, 2)), h, w, channels),
        (kernel, kernel, 1, channels * times),
        strides=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 2)),
        groups=channels,
    )


@st.composite
def products(draw: st.DrawFn) -> list[tirx.PrimFunc]:
    batch = draw(st.sampled_from(((), (1,), (3,), (2, 2))))
    m, k, n = draw(shape), draw(st.integers(1, 150)), draw(st.integers(1, 150))
    is_transposed, is_shared = draw(st.booleans()), draw(st.booleans())
    right = (n, k) if is_transposed else (k, n)

    def make(emit, a, b, c):
        if is_transposed:
            order = [*range(len(b.ty.shape) - 2), len(b.ty.shape) - 1, len(b.ty.shape) - 2]
            b = emit(R.permute_dims(b, order))
        return emit(R.nn.relu(emit(R.add(emit(R.matmul(a, b)), c))))

    specs = ((*batch, m, k), right if is_shared else (*batch, *right), (n,))
    return all_fused(make, *specs)


@st.composite
def reductions(draw: st.DrawFn) -> list[tirx.PrimFunc]:
    extents = tuple(draw(st.lists(st.integers(1, 70), min_size=1, max_size=4)))
    axes = draw(st.lists(st.sampled_from(range(len(extents))), min_size=1, unique=True))
    kind = draw(st.sampled_from((R.sum, R.max, R.min, R.mean)))
    keepdims, squared = draw(st.booleans()), draw(st.booleans())
    dtype = draw(st.sampled_from(("float32", "float32", "int32", "float16")))
    if kind is R.mean and dtype != "float32":
        kind = R.max

    def make(emit, x):
        return emit(kind(emit(R.multiply(x, x)) if squared else x, sorted(axes), keepdims))

    return all_fused(make, (extents, dtype))


@st.composite
def rows(draw: st.DrawFn) -> tirx.PrimFunc:
    extents = (*draw(st.lists(st.integers(1, 12), min_size=1, max_size=2)), draw(st.integers(1, 300)))
    if draw(st.booleans()):
        return fused(lambda emit, x: emit(R.nn.softmax(x, -1)), extents)
    return fused(lambda emit, x, g, b: emit(R.nn.layer_norm(x, g, b, axes=[-1])), extents, extents[-1:], extents[-1:])


@st.composite
def pools(draw: st.DrawFn) -> tirx.PrimFunc:
    kernel, strides, padding = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 1))
    h, w, c = draw(st.integers(kernel, 30)), draw(st.integers(kernel, 30)), draw(st.integers(1, 70))
    layout = draw(st.sampled_from(("NHWC", "NHWC", "NCHW")))
    data = (draw(st.integers(1, 2)), h, w, c) if layout == "NHWC" else (1, c, h, w)
    pool = draw(st.sampled_from((R.nn.max_pool2d, R.nn.avg_pool2d)))
    padding = min(padding, kernel // 2)
    window, step, pad = (kernel, kernel), (strides, strides), (padding, padding)
    return fused(lambda emit, x: emit(pool(x, window, step, pad, layout=layout)), data)


@st.composite
def elementwise(draw: st.DrawFn) -> tirx.PrimFunc:
    extents = tuple(draw(st.lists(st.integers(1, 30), min_size=1, max_size=4)))
    other = tuple(extent if draw(st.booleans()) else 1 for extent in extents)
    dtype = draw(st.sampled_from(("float32", "float32", "float16", "int8", "int32", "uint8", "int64")))
    combine = draw(st.sampled_from((R.add, R.multiply, R.maximum, R.subtract, R.less)))
    return fused(lambda emit, x, y: emit(combine(x, y)), (extents, dtype), (other, dtype))


@st.composite
def moves(draw: st.DrawFn) -> tirx.PrimFunc:
    extents = tuple(draw(st.lists(st.integers(1, 40), min_size=2, max_size=4)))
    axis = draw(st.sampled_from(range(len(extents))))
    kind = draw(st.sampled_from(("concat", "transpose", "pad", "reshape", "slice", "take")))
    if kind == "concat":
        others = [tuple(draw(st.integers(1, 30)) if i == axis else n for i, n in enumerate(extents)) for _ in range(2)]
        return fused(lambda emit, *x: emit(R.nn.relu(emit(R.concat(list(x), axis)))), extents, *others)
    if kind == "transpose":
        order = draw(st.permutations(range(len(extents))))
        return fused(lambda emit, x: emit(R.add(emit(R.permute_dims(x, order)), relax.const(1.0))), extents)
    if kind == "pad":
        widths = [draw(st.integers(0, 3)) for _ in range(2 * len(extents))]
        return fused(lambda emit, x: emit(R.nn.pad(x, widths)), extents)
    if kind == "reshape":
        flat = (extents[0] * extents[1], *extents[2:])
        return fused(lambda emit, x: emit(R.exp(emit(R.reshape(x, flat)))), extents)
    if kind == "slice":
        start = draw(st.integers(0, extents[axis] - 1))
        return fused(lambda emit, x: emit(R.strided_slice(x, [axis], [start], [extents[axis]], [1])), extents)
    wanted = draw(st.lists(st.integers(0, extents[axis] - 1), min_size=1, max_size=5))
    return fused(lambda emit, x: emit(R.take(x, relax.const(wanted, "int64"), axis, mode="clip")), extents)


EVERYTHING = (convolutions, depthwise, products, reductions, rows, pools, elementwise, moves)


@pytest.mark.parametrize("functions", EVERYTHING, ids=lambda functions: functions.__name__)
def test_random_shapes(functions) -> None:
    few(given(functions())(check))()


@pytest.mark.slow
@pytest.mark.parametrize("functions", EVERYTHING, ids=lambda functions: functions.__name__)
def test_many_random_shapes(functions) -> None:
    many(given(functions())(check))()


@pytest.mark.parametrize("exponent", [0.25, 0.5, 0.75, 2.0, 1.3])
def test_powers(exponent: float) -> None:
    check(fused(lambda emit, x: emit(R.power(emit(R.abs(x)), relax.const(exponent, "float32"))), (7, 33)))


@pytest.mark.parametrize(
    ("data", "weight", "is_laid_out"),
    [
        ((1, 9, 9, 16), (3, 3, 16, 64), True),
        ((1, 1, 1, 64), (1, 1, 64, 96), True),
        ((1, 5, 5, 16), (1, 1, 16, 58), False),
    ],
)
def test_free_weights_are_laid_out_ahead(data: tuple[int, ...], weight: tuple[int, ...], is_laid_out: bool) -> None:
    func = conv2d(data, weight).with_attr(prepack.LAYOUT_FREE, [1])
    result = rules.schedule(func, target("znver5"))
    assert_same(func, rules.schedule(func, NATIVE))
    _, packings = prepack.split(result)
    assert [packing.param for packing in packings] == [1] * is_laid_out


def test_weights_that_are_not_free_stay() -> None:
    _, packings = prepack.split(rules.schedule(conv2d((1, 9, 9, 16), (3, 3, 16, 64)), target("znver5")))
    assert not packings


def test_padding_of_an_axis_whose_last_tile_moves_back() -> None:
    pool = R.nn.max_pool2d
    check(fused(lambda emit, x: emit(pool(x, (2, 2), (1, 1), (1, 1), layout="NCHW")), (1, 1, 20, 2)))
    check(conv2d((1, 1, 37, 8), (1, 3, 8, 16), padding=1))


def test_transposed_convolution() -> None:
    check(
        fused(
            lambda emit, x, f: emit(R.sigmoid(emit(R.nn.conv2d_transpose(x, f, strides=2)))),
            (1, 6, 9, 11),
            (6, 5, 2, 2),
        )
    )


def test_resize() -> None:
    check(fused(lambda emit, x: emit(R.image.resize2d(x, (21, 18), layout="NHWC")), (1, 7, 9, 20)))


def test_argmax_has_no_rule_of_its_own() -> None:
    check(fused(lambda emit, x: emit(R.argmax(x, 1)), (40, 50)))


def test_scalars_and_single_elements() -> None:
    check(fused(lambda emit, x: emit(R.add(x, relax.const(1.0))), ()))
    check(fused(lambda emit, x: emit(R.sum(x)), (1,)))
    check(fused(lambda emit, x, y: emit(R.matmul(x, y)), (1, 1), (1, 1)))


def test_two_consumers_of_a_reduction() -> None:
    def make(emit, x, y):
        total = emit(R.matmul(x, y))
        return emit(R.add(emit(R.nn.relu(total)), emit(R.exp(total))))

    check(fused(make, (9, 30), (30, 35)))


@pytest.mark.parametrize("mcpu", ["x86-64", "haswell"])
def test_other_processors_give_the_same(mcpu: str) -> None:
    for func in (
        conv2d((1, 13, 13, 16), (3, 3, 16, 58), padding=1),
        fused(lambda emit, x: emit(R.nn.softmax(x, -1)), (10, 70)),
    ):
        assert_same(func, rules.schedule(func, target(mcpu)))
