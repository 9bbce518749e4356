"""XNNPACK computes the convolutions and products that it claims, whatever the number of tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tvm
from operators import ATTRIBUTES, TARGET, arguments, call, conv, linked, matmul, one, ready, remaining, same
from tvm import tirx

from pipeline.compiler.libraries import by_name

LIBRARY = by_name("xnnpack")


def claimed(func: tirx.PrimFunc, threads: int = 2) -> tirx.PrimFunc:
    target = tvm.target.Target({**ATTRIBUTES, "num-cores": threads})
    made = LIBRARY.match(func, target, ready(LIBRARY)[2])
    assert made is not None
    return made


CONVOLUTIONS = {
    "1x1": ([(1, 33, 33, 48), (1, 1, 48, 64)], {}),
    "3 channels, 7x7": ([(1, 64, 64, 3), (7, 7, 3, 24)], {"strides": 2, "padding": 3}),
    "depthwise": ([(1, 34, 34, 124), (5, 5, 1, 124)], {"groups": 124, "padding": 2}),
    "depthwise, strided": ([(1, 65, 35, 124), (3, 3, 1, 124)], {"groups": 124, "padding": 1, "strides": 2}),
    "3x3 in groups": ([(1, 29, 29, 32), (3, 3, 8, 48)], {"groups": 4, "padding": 1}),
    "dilated": ([(1, 34, 34, 16), (3, 3, 16, 16)], {"dilation": 2, "padding": 2}),
    "lopsided": ([(1, 44, 30, 16), (3, 2, 16, 16)], {"padding": [1, 0, 2, 1], "strides": [2, 1]}),
    "few rows": ([(1, 3, 30, 96), (3, 3, 96, 96)], {"padding": 1}),
}


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case: str, threads: int) -> None:
    (x, w), attributes = CONVOLUTIONS[case]
    func = one(conv("relu6", **attributes), [x, w, (1, 1, 1, w[-1])], [1, 2])
    made = claimed(func, threads)
    assert remaining(made) == 0
    same(func, made, LIBRARY)


@pytest.mark.parametrize("threads", [1, 3])
def test_products(threads: int) -> None:
    func = one(matmul("relu"), [(2, 64, 120), (120, 360), (360,)], [1, 2])
    made = claimed(func, threads)
    assert remaining(made) == 0
    same(func, made, LIBRARY)


def test_what_is_no_bound_stays_after_the_call() -> None:
    func = one(conv("silu"), [(1, 9, 9, 16), (1, 1, 16, 32), (1, 1, 1, 32)], [1, 2])
    made = claimed(func)
    assert remaining(made) > 0
    same(func, made, LIBRARY)


def test_weights_that_may_change_are_left_alone() -> None:
    func = one(conv("relu"), [(1, 9, 9, 16), (1, 1, 16, 32)])
    assert LIBRARY.match(func, TARGET, ready(LIBRARY)[2]) is None


def test_channels_first_and_batches_are_left_alone() -> None:
    for build, shapes in (
        (conv("relu", "NCHW"), [(1, 16, 9, 9), (32, 16, 3, 3)]),
        (conv("relu"), [(2, 9, 9, 16), (3, 3, 16, 32)]),
        (matmul("relu"), [(3, 9, 16), (3, 16, 32)]),
    ):
        assert LIBRARY.match(one(build, shapes, [1]), TARGET, ready(LIBRARY)[2]) is None


def test_other_weights_at_the_same_place_are_noticed() -> None:
    func = one(matmul("none"), [(8, 16), (16, 32)], [1])
    loaded = linked({"plain": func, "claimed": claimed(func)}, LIBRARY)
    x, w, y = (tvm.runtime.tensor(array) for array in arguments(func))
    for scale in (1.0, 2.0, 3.0):
        w.copyfrom(np.full((16, 32), scale, np.float32))
        loaded["claimed"](x, w, y)
        np.testing.assert_allclose(
            y.numpy(), call(loaded["plain"], [x.numpy(), w.numpy(), y.numpy()]), rtol=1e-4, atol=1e-4
        )


def test_it_is_not_found_where_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XNNPACK_ROOT", str(tmp_path))
    assert LIBRARY.find() is None
