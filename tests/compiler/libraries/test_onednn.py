"""oneDNN computes what the functions compute that it claims, and leaves alone what it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tvm
from operators import (
    ACTIVATIONS,
    ATTRIBUTES,
    TARGET,
    arguments,
    call,
    const,
    conv,
    fused,
    linked,
    matmul,
    one,
    ready,
    remaining,
    same,
)
from tvm import relax, tirx

from pipeline.compiler import prepack
from pipeline.compiler.libraries import by_name

LIBRARY = by_name("onednn")
op = relax.op


def claimed(func: tirx.PrimFunc) -> tirx.PrimFunc:
    made = LIBRARY.match(func, TARGET, ready(LIBRARY)[2])
    assert made is not None
    return made


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_follows_a_convolution_is_taken_along(activation: str) -> None:
    func = one(conv(activation, strides=2, padding=1), [(1, 14, 14, 16), (3, 3, 16, 32), (1, 1, 1, 32)], [1])
    made = claimed(func)
    assert remaining(made) == 0
    same(func, made, LIBRARY)


CONVOLUTIONS = {
    "1x1": ([(1, 13, 13, 48), (1, 1, 48, 64)], {}),
    "3 channels, 7x7": ([(1, 32, 32, 3), (7, 7, 3, 24)], {"strides": 2, "padding": 3}),
    "depthwise": ([(1, 14, 14, 24), (5, 5, 1, 24)], {"groups": 24, "padding": 2}),
    "depthwise, strided": ([(1, 15, 15, 24), (3, 3, 1, 24)], {"groups": 24, "padding": 1, "strides": 2}),
    "depthwise, two of each": ([(1, 14, 14, 8), (3, 3, 1, 16)], {"groups": 8, "padding": 1}),
    "groups": ([(1, 9, 9, 32), (1, 1, 8, 48)], {"groups": 4}),
    "3x3 in groups": ([(1, 9, 9, 32), (3, 3, 8, 48)], {"groups": 4, "padding": 1}),
    "dilated": ([(1, 14, 14, 16), (3, 3, 16, 16)], {"dilation": 2, "padding": 2}),
    "lopsided": ([(1, 14, 10, 16), (3, 2, 16, 16)], {"padding": [1, 0, 2, 1], "strides": [2, 1]}),
    "batch": ([(3, 8, 8, 16), (3, 3, 16, 20)], {"padding": 1}),
    "one pixel": ([(1, 1, 1, 96), (1, 1, 96, 24)], {}),
    "odd": ([(1, 7, 5, 13), (3, 3, 13, 17)], {"padding": 1}),
}


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case: str, packs: bool) -> None:
    (x, w), attributes = CONVOLUTIONS[case]
    bias = (1, 1, 1, w[-1])
    func = one(conv("relu", **attributes), [x, w, bias], [1] if packs else [])
    made = claimed(func)
    assert remaining(made) == 0
    same(func, made, LIBRARY)


def test_channels_first() -> None:
    func = one(conv("relu", "NCHW", padding=1), [(1, 16, 14, 14), (32, 16, 3, 3), (1, 32, 1, 1)], [1])
    same(func, claimed(func), LIBRARY)


def test_a_residual_and_more_operands_than_one() -> None:
    shapes = [(1, 14, 14, 16), (3, 3, 16, 32), (1, 1, 1, 32), (1, 14, 14, 32)]
    func = one(conv("relu", padding=1), shapes, [1])
    made = claimed(func)
    assert remaining(made) == 0
    same(func, made, LIBRARY)


def test_a_residual_of_one_row() -> None:
    func = one(conv("relu"), [(1, 1, 9, 16), (1, 1, 16, 32), (1, 1, 9, 32)], [1])
    same(func, claimed(func), LIBRARY)


def test_one_dimension() -> None:
    def build(emit: Callable[..., relax.Var], x: relax.Var, w: relax.Var) -> relax.Expr:
        return op.nn.relu(emit(op.nn.conv1d(x, w, padding=2, data_layout="NWC", kernel_layout="WIO")))

    func = one(build, [(1, 40, 8), (5, 8, 16)], [1])
    made = claimed(func)
    assert remaining(made) == 0
    same(func, made, LIBRARY)


def test_what_the_library_cannot_do_stays_after_the_call() -> None:
    def build(emit: Callable[..., relax.Var], x: relax.Var, w: relax.Var, b: relax.Var) -> relax.Expr:
        y = emit(op.nn.conv2d(x, w, data_layout="NHWC", kernel_layout="HWIO"))
        y = emit(op.nn.relu(emit(op.add(y, b))))
        return op.multiply(emit(op.sin(y)), const(2.0))

    func = one(build, [(1, 9, 9, 16), (3, 3, 16, 32), (1, 1, 1, 32)], [1])
    made = claimed(func)
    assert remaining(made) == 2
    assert "then=relu" in made.script()
    same(func, made, LIBRARY)


def test_what_is_left_is_shared_out_between_threads_where_it_is_long() -> None:
    def build(emit: Callable[..., relax.Var], x: relax.Var, w: relax.Var, g: relax.Var) -> relax.Expr:
        y = emit(op.nn.conv2d(x, w, data_layout="NHWC", kernel_layout="HWIO"))
        return op.multiply(y, g)  # the result is larger than the convolution's

    func = one(build, [(1, 1, 1, 16), (1, 1, 16, 32), (1, 40, 40, 32)], [1])
    made = claimed(func)
    assert made.script().count("T.parallel") == 1
    same(func, made, LIBRARY)


def test_a_value_that_is_needed_again_later_is_where_the_call_ends() -> None:
    def build(emit: Callable[..., relax.Var], x: relax.Var, w: relax.Var, b: relax.Var) -> relax.Expr:
        y = emit(op.add(emit(op.nn.conv2d(x, w, data_layout="NHWC", kernel_layout="HWIO")), b))
        return op.add(emit(op.nn.relu(y)), emit(op.sin(y)))

    func = one(build, [(1, 9, 9, 16), (3, 3, 16, 32), (1, 1, 1, 32)], [1])
    made = claimed(func)
    assert "then=relu" not in made.script()
    assert "then=add" in made.script()
    same(func, made, LIBRARY)


MATMULS = {
    "layer": [(40, 120), (120, 360), (360,)],
    "layer, three dimensions": [(2, 40, 120), (120, 360), (360,)],
    "vector": [(1, 512), (512, 214), (214,)],
    "tall": [(257, 33), (33, 5), (5,)],
    "residual": [(40, 64), (64, 48), (48,), (40, 48)],
}


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("case", MATMULS)
def test_layers(case: str, activation: str, packs: bool) -> None:
    func = one(matmul(activation), MATMULS[case], [1] if packs else [])
    made = claimed(func)
    assert remaining(made) == 0
    same(func, made, LIBRARY)


BATCHED = {
    "attention": [(1, 8, 40, 15), (1, 8, 15, 40)],
    "attention, added to": [(1, 8, 40, 15), (1, 8, 15, 40), (1, 1, 40, 40)],
    "broadcast weights": [(4, 8, 12, 15), (8, 15, 20)],
    "vectors": [(8, 1, 32), (8, 32, 24)],
}


@pytest.mark.parametrize("case", BATCHED)
def test_batches_of_products(case: str) -> None:
    func = one(matmul("none"), BATCHED[case])
    same(func, claimed(func), LIBRARY)


def test_a_transposed_factor() -> None:
    from tvm import te

    x, w = te.placeholder((24, 40), name="x"), te.placeholder((56, 40), name="w")
    k = te.reduce_axis((0, 40), "k")
    y = te.compute((24, 56), lambda i, j: te.sum(x[i, k] * w[j, k], axis=k))
    func = te.create_prim_func([x, w, y])
    same(func, claimed(func), LIBRARY)
    func = func.with_attr("layout_free_buffers", [1])
    same(func, claimed(func), LIBRARY)


def pool(kind: str, **attributes: object) -> Callable[..., relax.Expr]:
    return lambda emit, x: getattr(op.nn, f"{kind}_pool2d")(x, layout="NHWC", **attributes)


MAPPINGS = {
    "max": (pool("max", pool_size=(3, 3), strides=(2, 2)), [(1, 27, 27, 32)]),
    "max, padded": (pool("max", pool_size=(3, 3), padding=1), [(1, 14, 14, 24)]),
    "max, rounded up": (pool("max", pool_size=(3, 3), strides=(2, 2), ceil_mode=True), [(1, 14, 14, 24)]),
    "mean": (pool("avg", pool_size=(3, 2), strides=(3, 2)), [(1, 9, 10, 48)]),
    "mean of what is inside": (pool("avg", pool_size=(3, 3), strides=(2, 2), padding=1), [(1, 14, 14, 24)]),
    "mean with zeros": (
        pool("avg", pool_size=(3, 3), strides=(2, 2), padding=1, count_include_pad=True),
        [(1, 14, 14, 24)],
    ),
    "global": (lambda emit, x: op.mean(x, axis=[1, 2], keepdims=True), [(1, 10, 12, 96)]),
    "global, flat": (lambda emit, x: op.mean(x, axis=[1, 2]), [(2, 10, 12, 96)]),
    "channels first": (lambda emit, x: op.nn.max_pool2d(x, (2, 2), strides=(2, 2)), [(2, 8, 10, 12)]),
    "softmax": (lambda emit, x: op.nn.softmax(x), [(40, 125)]),
    "softmax of an inner axis": (lambda emit, x: op.nn.softmax(x, axis=1), [(4, 12, 5)]),
}


@pytest.mark.parametrize("case", MAPPINGS)
def test_pooling_and_softmax(case: str) -> None:
    build, shapes = MAPPINGS[case]
    func = one(build, shapes)
    made = LIBRARY.match(func, TARGET, ready(LIBRARY)[2])
    if made is None:
        pytest.skip("oneDNN has no fast implementation here")
    assert remaining(made) == 0
    same(func, made, LIBRARY)


NOT = {
    "sum": (lambda emit, x: op.sum(x, axis=[1]), [(4, 8)]),
    "variance": (lambda emit, x: op.variance(x, axis=[1]), [(4, 8)]),
    "elementwise": (lambda emit, x: op.nn.relu(x), [(4, 8)]),
    "argmax": (lambda emit, x: op.argmax(x, axis=1), [(4, 8)]),
}


@pytest.mark.parametrize("case", NOT)
def test_other_operators_are_left_alone(case: str) -> None:
    build, shapes = NOT[case]
    for func in fused(build, shapes):
        assert LIBRARY.match(func, TARGET, ready(LIBRARY)[2]) is None


def test_a_transposed_convolution_is_one_of_a_tensor_with_gaps() -> None:
    shapes = [(1, 8, 5, 5), (8, 6, 3, 3)]
    for func in fused(lambda emit, x, w: op.nn.conv2d_transpose(x, w, strides=2), shapes):
        made = LIBRARY.match(func, TARGET, ready(LIBRARY)[2])
        if made is not None:
            same(func, made, LIBRARY)


def test_other_types_are_left_alone() -> None:
    from tvm import te

    x, w = te.placeholder((8, 8), "float64", name="x"), te.placeholder((8, 8), "float64", name="w")
    k = te.reduce_axis((0, 8), "k")
    y = te.compute((8, 8), lambda i, j: te.sum(x[i, k] * w[k, j], axis=k))
    assert LIBRARY.match(te.create_prim_func([x, w, y]), TARGET, ready(LIBRARY)[2]) is None


def test_a_padding_of_something_else_than_zeros_is_left_alone() -> None:
    from tvm import te

    x, w = te.placeholder((1, 8, 8, 4), name="x"), te.placeholder((3, 3, 4, 8), name="w")

    def padded(value: float, first: int) -> tirx.PrimFunc:
        inside = lambda i: tirx.all(i >= first, i < 9)  # noqa: E731
        pad = te.compute(
            (1, 10, 10, 4),
            lambda n, h, v, c: tirx.if_then_else(
                tirx.all(inside(h), v >= 1, v < 9), x[n, h - 1, v - 1, c], tirx.const(value, "float32")
            ),
        )
        r, s, c = te.reduce_axis((0, 3)), te.reduce_axis((0, 3)), te.reduce_axis((0, 4))
        y = te.compute((1, 8, 8, 8), lambda n, h, v, o: te.sum(pad[n, h + r, v + s, c] * w[r, s, c, o], axis=[r, s, c]))
        return te.create_prim_func([x, w, y])

    func = padded(0.0, 1)
    same(func, claimed(func), LIBRARY)
    assert "before=1x1" in claimed(func).script()
    for other in (padded(1.0, 1), padded(0.0, 2)):
        made = LIBRARY.match(other, TARGET, ready(LIBRARY)[2])
        assert made is None or "before=0x0" in made.script()
        if made is not None:
            same(other, made, LIBRARY)


def test_the_weights_part_from_the_function_and_are_packed_once() -> None:
    shapes = [(1, 14, 14, 16), (3, 3, 16, 40), (1, 1, 1, 40)]
    func = one(conv("relu", padding=1), shapes, [1])
    main, packings = prepack.split(claimed(func))
    ((index, pack),) = [(packing.param, packing.function) for packing in packings]
    assert index == 1
    loaded = linked({"plain": func, "main": main, "pack": pack}, LIBRARY)
    x, w, b, y = arguments(func)
    packed = call(loaded["pack"], [w, np.zeros(int(main.params[1].shape[0]), np.float32)])
    wanted, got = call(loaded["plain"], [x, w, b, y]), call(loaded["main"], [x, packed, b, y])
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_call_with_another_format_of_weights_raises() -> None:
    func = one(conv("relu"), [(1, 6, 6, 16), (1, 1, 16, 32)], [1])
    made = claimed(func)
    signature = made.script().partition("packed=")[2].partition(" ")[0]
    other = tvm.ir.load_json(tvm.ir.save_json(made).replace(signature, "0123456789abcdef"))
    function = linked({"claimed": other}, LIBRARY)["claimed"]
    with pytest.raises(RuntimeError, match="oneDNN refused"):
        call(function, arguments(func))


_ELSEWHERE = """
import sys
import numpy as np, tvm, tvm_ffi, ctypes
ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)
given = np.load(sys.argv[3])
tensors = [tvm.runtime.tensor(given[f"arr_{i}"]) for i in range(4)]
tvm_ffi.load_module(sys.argv[1])["claimed"](*tensors)
np.testing.assert_allclose(tensors[-1].numpy(), given["arr_4"], rtol=1e-4, atol=1e-4)
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3, 8, 16])
def test_weights_packed_for_another_number_of_threads_serve(threads: int, tmp_path: Path) -> None:
    from operators import driver, objects, pool

    func = one(conv("relu"), [(1, 1, 1, 256), (1, 1, 256, 40), (1, 1, 1, 40)], [1])
    installed, shim, asked = ready(LIBRARY)
    formats = set()
    for built_for in (1, 2, 8):
        target = tvm.target.Target({**ATTRIBUTES, "num-cores": built_for})
        made = LIBRARY.match(func, target, asked)
        assert made is not None
        formats.add(made.script().partition("packed=")[2].partition(" ")[0])
        library = tmp_path / f"{built_for}.so"
        for name, data in (
            ("f.o", objects.compile_function(made, "claimed", ATTRIBUTES)),
            ("s.o", shim),
            ("p.o", pool()),
        ):
            (tmp_path / name).write_bytes(data)
        shared = str(installed.shared["libdnnl.so.3"])
        files = [str(tmp_path / name) for name in ("f.o", "s.o", "p.o")]
        subprocess.run([driver(), "-shared", "-o", str(library), *files, shared, "-fopenmp"], check=True)
        arrays = arguments(func)
        wanted = call(linked({"plain": func})["plain"], arrays)
        np.savez(tmp_path / "given.npz", *arrays, wanted)
        subprocess.run(
            [sys.executable, "-c", _ELSEWHERE, str(library), shared, str(tmp_path / "given.npz")],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    assert len(formats) > 1


def test_many_threads_may_call_at_once() -> None:
    func = one(conv("relu", padding=1), [(1, 14, 14, 16), (3, 3, 16, 32), (1, 1, 1, 32)], [1])
    loaded = linked({"plain": func, "claimed": claimed(func)}, LIBRARY)

    def right(seed: int) -> bool:
        arrays = arguments(func, seed)
        got = [call(loaded["claimed"], arrays) for _ in range(20)]
        wanted = call(loaded["plain"], arrays)
        return all(np.allclose(each, wanted, rtol=1e-4, atol=1e-4) for each in got)

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(right, range(24)))


def test_it_is_not_found_where_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNNLROOT", str(tmp_path))
    assert LIBRARY.find() is None


def test_the_same_function_gives_the_same_call() -> None:
    from pipeline.compiler import ir

    func = one(conv("silu"), [(1, 6, 6, 16), (1, 1, 16, 32)], [1])
    again = ir.load(ir.canonical(func))
    assert ir.canonical(claimed(func)) == ir.canonical(claimed(again))
