"""OpenBLAS computes the matrix products that it claims, split over tasks, and what follows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tvm
from operators import ACTIVATIONS, ATTRIBUTES, TARGET, conv, fused, matmul, one, ready, remaining, same
from tvm import relax, te, tirx

from pipeline.compiler.libraries import by_name

LIBRARY = by_name("openblas")
op = relax.op


def claimed(func: tirx.PrimFunc, threads: int = 2) -> tirx.PrimFunc:
    target = tvm.target.Target({**ATTRIBUTES, "num-cores": threads})
    made = LIBRARY.match(func, target, ready(LIBRARY)[2])
    assert made is not None
    return made


PRODUCTS = {
    "layer": [(40, 120), (120, 360), (360,)],
    "layer, three dimensions": [(2, 40, 120), (120, 360), (360,)],
    "vector": [(1, 512), (512, 1214), (1214,)],
    "column": [(512, 600), (600, 1)],
    "tall": [(2057, 133), (133, 5), (5,)],
    "residual": [(140, 64), (64, 148), (148,), (140, 148)],
    "batches": [(1, 8, 140, 65), (1, 8, 65, 40)],
    "batches, added to": [(2, 8, 40, 65), (2, 8, 65, 40), (1, 1, 40, 40)],
    "batches with the same weights": [(4, 8, 42, 15), (8, 15, 120)],
    "one in the middle": [(4, 1, 42, 15), (8, 15, 120)],
    "vectors": [(8, 1, 132), (8, 132, 324)],
    "prime": [(131, 67), (67, 97)],
}


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("case", PRODUCTS)
def test_products(case: str, threads: int) -> None:
    func = one(matmul("relu"), PRODUCTS[case])
    made = claimed(func, threads)
    assert remaining(made) == 0
    same(func, made, LIBRARY)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_follows_is_taken_along_or_left(activation: str) -> None:
    func = one(matmul(activation), [(140, 120), (120, 60), (60,)])
    made = claimed(func)
    simple = {"none", "relu", "relu6", "leaky", "scaled", "from one", "hardswish", "hardsigmoid"}
    assert (remaining(made) == 0) == (activation in simple)
    same(func, made, LIBRARY)


@pytest.mark.parametrize(("x_turned", "w_turned"), [(True, False), (False, True), (True, True)])
def test_transposed_factors(x_turned: bool, w_turned: bool) -> None:
    x = te.placeholder((140, 124) if x_turned else (124, 140), name="x")
    w = te.placeholder((156, 140) if w_turned else (140, 156), name="w")
    k = te.reduce_axis((0, 140), "k")
    y = te.compute(
        (124, 156),
        lambda i, j: te.sum((x[k, i] if x_turned else x[i, k]) * (w[j, k] if w_turned else w[k, j]), axis=k),
    )
    func = te.create_prim_func([x, w, y])
    same(func, claimed(func), LIBRARY)


def test_a_transposed_result() -> None:
    """What channels first make of a 1x1 convolution: pixels run along the rows of the right matrix."""
    func = one(conv("relu", "NCHW"), [(1, 64, 14, 14), (96, 64, 1, 1), (1, 96, 1, 1)])
    made = claimed(func)
    assert remaining(made) == 0
    same(func, made, LIBRARY)


def test_a_1x1_convolution() -> None:
    func = one(conv("relu6"), [(1, 14, 14, 64), (1, 1, 64, 96), (1, 1, 1, 96), (1, 14, 14, 96)])
    made = claimed(func)
    assert remaining(made) == 0
    same(func, made, LIBRARY)


@pytest.mark.parametrize("attributes", [{"padding": 1}, {"groups": 4}, {}])
def test_other_convolutions_are_left_alone(attributes: dict[str, int]) -> None:
    kernel = (1, 1, 16, 96) if "groups" in attributes else (3, 3, 64, 96)
    func = one(conv("relu", **attributes), [(1, 14, 14, 64), kernel])
    assert LIBRARY.match(func, TARGET, ready(LIBRARY)[2]) is None


def test_a_convolution_along_rows_that_overlap_is_left_alone() -> None:
    func = one(conv("relu"), [(1, 52, 1, 16), (5, 1, 16, 24)])
    assert LIBRARY.match(func, TARGET, ready(LIBRARY)[2]) is None


def test_other_operators_are_left_alone() -> None:
    for build, shapes in (
        (lambda emit, x: op.nn.softmax(x), [(4, 8)]),
        (lambda emit, x: op.sum(x, axis=[1]), [(4, 8)]),
    ):
        for func in fused(build, shapes):
            assert LIBRARY.match(func, TARGET, ready(LIBRARY)[2]) is None


def test_it_is_not_found_where_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_ROOT", str(tmp_path))
    assert LIBRARY.find() is None
