"""Weights laid out ahead: what is marked, and that the parts of a function compute what the whole does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T  # noqa: N812

from pipeline.compiler import ir, prepack
from tests.compiler.strategies.workloads import DENSE, FREE, W, X, Y, block, by_rows, call, in_panels, scheduled

WIDE = np.random.default_rng(2).standard_normal((32, 8)).astype("float32")


def require_parts_give(func: tirx.PrimFunc, expected: np.ndarray, x: np.ndarray, *weights: np.ndarray) -> None:
    """Lays out each weight as its packing does, and gives the rest what that made."""
    rest, packings = prepack.split(func)
    arguments = [x, *weights]
    for packing in packings:
        arguments[packing.param] = call(packing.function, arguments[packing.param], name="pack")
    np.testing.assert_allclose(call(rest, *arguments), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(call(func, x, *weights), expected, rtol=1e-4, atol=1e-5)


def test_a_packing_block_leaves_the_function() -> None:
    func = scheduled(FREE, in_panels)
    rest, (packing,) = prepack.split(func)
    assert packing.param == 1
    assert ir.shapes(packing.function) == ("16x32:float32", "4x16x8:float32")
    assert ir.shapes(rest) == ("8x16:float32", "4x16x8:float32", "8x32:float32")
    assert prepack.PREPROCESS not in rest.script()
    assert not prepack.layout_free(rest)
    require_parts_give(func, Y, X, W)


def test_the_two_parts_are_functions_of_their_own() -> None:
    rest, (packing,) = prepack.split(scheduled(FREE, in_panels))
    for func in (rest, packing.function):
        assert ir.canonical(ir.load(ir.canonical(func))) == ir.canonical(func)
        tvm.s_tir.Schedule(func)  # it is well formed


@pytest.mark.parametrize("value", [True, 1, tirx.IntImm("bool", 1)], ids=repr)
def test_the_mark_is_read_however_it_is_written(value: object) -> None:
    def change(sch: Schedule) -> None:
        in_panels(sch)
        laid_out = block(sch)
        sch.unannotate(laid_out, prepack.PREPROCESS)
        sch.annotate(laid_out, prepack.PREPROCESS, value)

    assert len(prepack.split(scheduled(FREE, change))[1]) == 1


def test_the_rest_may_be_scheduled_in_any_way() -> None:
    def change(sch: Schedule) -> None:
        in_panels(sch)
        pack, product, relu = sch.get_child_blocks(sch.get_sblock("root"))
        i, j, k = sch.get_loops(product)
        outer, inner = sch.split(j, [None, 8])
        sch.reorder(outer, i, k, inner)
        sch.vectorize(inner)
        sch.parallel(outer)
        sch.vectorize(sch.get_loops(relu)[1])
        sch.parallel(sch.fuse(*sch.get_loops(pack)))

    require_parts_give(scheduled(FREE, change), Y, X, W)


def _unmarked(sch: Schedule) -> None:
    in_panels(sch)
    sch.unannotate(block(sch), prepack.PREPROCESS)


def _inside(sch: Schedule) -> None:
    in_panels(sch)
    pack, product = sch.get_child_blocks(sch.get_sblock("root"))[:2]
    sch.compute_at(pack, sch.get_loops(product)[0])


def _of_an_input(sch: Schedule) -> None:
    product = block(sch)
    laid_out = sch.cache_read(product, 0, "global")
    sch.annotate(laid_out, prepack.PREPROCESS, True)


@pytest.mark.parametrize(
    ("func", "change"),
    [
        (DENSE, in_panels),  # the weight has other uses, or is none
        (FREE, _unmarked),
        (FREE, _inside),
        (FREE, _of_an_input),
        (FREE, by_rows),
        (FREE, lambda sch: None),
    ],
    ids=["not free", "not marked", "not at the top", "of an input", "no packing", "as it is"],
)
def test_what_must_stay_stays(func: tirx.PrimFunc, change: Callable[[Schedule], None]) -> None:
    made = scheduled(func, change)
    rest, packings = prepack.split(made)
    assert packings == ()
    assert rest.same_as(made)
    np.testing.assert_allclose(call(rest, X, W), Y, rtol=1e-4, atol=1e-5)


@T.prim_func(s_tir=True)
def _twice(
    x: T.Buffer((8, 16), "float32"),
    w: T.Buffer((16, 32), "float32"),
    v: T.Buffer((32, 8), "float32"),
    y: T.Buffer((8, 8), "float32"),
):
    T.func_attr({"tirx.noalias": True, "layout_free_buffers": [1, 2]})
    h = T.sblock_alloc_buffer((8, 32), "float32")
    for i, j, k in T.grid(8, 32, 16):
        with T.sblock("first"):
            vi, vj, vk = T.axis.remap("SSR", [i, j, k])
            with T.init():
                h[vi, vj] = T.float32(0)
            h[vi, vj] = h[vi, vj] + x[vi, vk] * w[vk, vj]
    for i, j, k in T.grid(8, 8, 32):
        with T.sblock("second"):
            vi, vj, vk = T.axis.remap("SSR", [i, j, k])
            with T.init():
                y[vi, vj] = T.float32(0)
            y[vi, vj] = y[vi, vj] + h[vi, vk] * v[vk, vj]


def test_several_weights_are_laid_out_apart() -> None:
    def change(sch: Schedule) -> None:
        for product in sch.get_child_blocks(sch.get_sblock("root")):
            laid_out = sch.cache_read(product, 1, "global")
            sch.transform_layout(product, ("read", 1), lambda k, j: (j, k))
            sch.annotate(laid_out, prepack.PREPROCESS, True)

    func = scheduled(_twice.without_attr("global_symbol"), change)
    rest, packings = prepack.split(func)
    assert sorted(packing.param for packing in packings) == [1, 2]
    assert ir.shapes(rest) == ("8x16:float32", "32x16:float32", "8x32:float32", "8x8:float32")
    require_parts_give(func, X @ W @ WIDE, X, W, WIDE)


@T.prim_func(s_tir=True)
def _read_again(x: T.Buffer((8, 16), "float32"), w: T.Buffer((16, 32), "float32"), y: T.Buffer((8, 32), "float32")):
    T.func_attr({"tirx.noalias": True, "layout_free_buffers": [1]})
    product = T.sblock_alloc_buffer((8, 32), "float32")
    for i, j, k in T.grid(8, 32, 16):
        with T.sblock("product"):
            vi, vj, vk = T.axis.remap("SSR", [i, j, k])
            with T.init():
                product[vi, vj] = T.float32(0)
            product[vi, vj] = product[vi, vj] + x[vi, vk] * w[vk, vj]
    for i, j in T.grid(8, 32):
        with T.sblock("row"):
            vi, vj = T.axis.remap("SS", [i, j])
            y[vi, vj] = product[vi, vj] + w[0, vj]


def test_a_weight_that_is_read_as_it_is_as_well_stays() -> None:
    def change(sch: Schedule) -> None:
        product = block(sch)
        sch.annotate(sch.cache_read(product, 1, "global", [product]), prepack.PREPROCESS, 1)

    require_parts_give(scheduled(_read_again.without_attr("global_symbol"), change), X @ W + W[0], X, W)


def test_a_function_that_does_nothing_but_lay_out_stays_whole() -> None:
    pack = prepack.split(scheduled(FREE, in_panels))[1][0].function
    assert prepack.split(pack.with_attr(prepack.LAYOUT_FREE, [0]))[1] == ()


# Which weights are marked.

Body = Callable[..., list[relax.Expr]]


def module(weights: int, body: Body) -> tvm.IRModule:
    """main(x, w0, w1, …): what `body` makes of `call(x, w)`, which calls the dense function, and of its parameters."""
    builder = relax.BlockBuilder()
    shapes = [(8, 16), *[(16, 32)] * weights]
    params = [relax.Var(f"p{i}", relax.TensorType(list(shape), "float32")) for i, shape in enumerate(shapes)]
    with builder.function("main", params):
        dense = builder.add_func(DENSE, "dense")
        with builder.dataflow():

            def apply(x: relax.Expr, w: relax.Expr, callee: tvm.ir.GlobalVar = dense) -> relax.Expr:
                return builder.emit(relax.call_tir(callee, [x, w], relax.TensorType([8, 32], "float32")))

            made = builder.emit_output(relax.Tuple(body(builder, apply, *params)))
        builder.emit_func_output(made)
    return builder.get()


def marked(mod: tvm.IRModule, inputs: int = 1) -> tuple[dict[str, list[int]], dict[int, tuple[str, int]]]:
    """What is free in each function, and where each free weight is used."""
    after, places = prepack.mark_layout_free(mod, "main", inputs)
    functions = {gvar.name_hint: func for gvar, func in after.functions_items() if isinstance(func, tirx.PrimFunc)}
    free = {name: sorted(prepack.layout_free(func)) for name, func in functions.items()}
    return free, {i: (gvar.name_hint, param) for i, (gvar, param) in places.items()}


def test_a_weight_with_one_use_is_free() -> None:
    mod = module(1, lambda _, apply, x, w: [apply(x, w)])
    assert marked(mod) == ({"dense": [1]}, {0: ("dense", 1)})


def test_weights_of_calls_of_one_function_are_free_together() -> None:
    mod = module(2, lambda _, apply, x, w, v: [apply(x, w), apply(x, v)])
    assert marked(mod) == ({"dense": [1]}, {0: ("dense", 1), 1: ("dense", 1)})


def test_one_weight_given_to_one_function_twice_is_free() -> None:
    mod = module(1, lambda _, apply, x, w: [apply(x, w), apply(x, w)])
    assert marked(mod) == ({"dense": [1]}, {0: ("dense", 1)})


def test_inputs_are_never_free() -> None:
    mod = module(1, lambda _, apply, x, w: [apply(x, w)])
    assert marked(mod, inputs=2) == ({"dense": []}, {})


def _two_functions(builder: relax.BlockBuilder, apply: Callable, x: relax.Expr, w: relax.Expr) -> list[relax.Expr]:
    other = builder.add_func(scheduled(DENSE, by_rows), "other")
    return [apply(x, w), apply(x, w, other)]


@pytest.mark.parametrize(
    "body",
    [
        _two_functions,
        lambda builder, apply, x, w: [apply(x, w), builder.emit(relax.op.add(w, w))],
        lambda builder, apply, x, w: [apply(x, w), w],
        lambda builder, apply, x, w: [apply(x, builder.emit(relax.op.nn.relu(w)))],
    ],
    ids=["of two functions", "of an operator", "returned", "changed before"],
)
def test_a_weight_with_another_use_is_not_free(body: Body) -> None:
    free, places = marked(module(1, body))
    assert not any(free.values())
    assert places == {}


def test_one_call_with_an_input_leaves_no_weight_of_the_function_free() -> None:
    def body(builder: relax.BlockBuilder, apply: Callable, x: relax.Expr, w: relax.Expr, v: relax.Expr) -> list:
        return [apply(x, w), apply(x, v)]

    assert marked(module(2, body), inputs=2) == ({"dense": []}, {})
