"""Operators for the tests of libraries: functions as lowering makes them, and what they compute, run for real."""

from __future__ import annotations

import ctypes
import functools
import itertools
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.relax import transform

from pipeline.compiler import objects, targets
from pipeline.compiler.libraries import POOL, Installed, Library, Shim, compile_shim, compile_source, load_shim
from pipeline.toolchain import compiler

ATTRIBUTES = targets.resolve("native")
TARGET = targets.load(ATTRIBUTES)
LAYOUT_FREE = "layout_free_buffers"

Build = Callable[..., relax.Expr]
op = relax.op
_numbers = itertools.count()


def fused(build: Build, shapes: Sequence[tuple[int, ...]], free: Sequence[int] = ()) -> list[tirx.PrimFunc]:
    """The functions that a Relax function of tensors of these shapes becomes; `free` parameters are weights."""
    builder = relax.BlockBuilder()
    params = [relax.Var(f"p{i}", relax.TensorType(shape, "float32")) for i, shape in enumerate(shapes)]
    with builder.function("main", params):
        with builder.dataflow():
            result = builder.emit_output(build(builder.emit, *params))
        builder.emit_func_output(result)
    mod = builder.get()
    with TARGET, tvm.transform.PassContext(opt_level=3):
        for phase in (
            transform.LegalizeOps(),
            transform.AnnotateTIROpPattern(),
            transform.FuseOps(),
            transform.FuseTIR(),
        ):
            mod = phase(mod)
    found = [func for _, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)]
    return [func.with_attr(LAYOUT_FREE, list(free)) if free else func for func in found]


def one(build: Build, shapes: Sequence[tuple[int, ...]], free: Sequence[int] = ()) -> tirx.PrimFunc:
    (func,) = fused(build, shapes, free)
    return func


@functools.cache
def driver() -> str:
    found = compiler()
    if found is None:
        pytest.skip("there is no C++ compiler")
    return found


@functools.cache
def ready(library: Library) -> tuple[Installed, bytes, Shim]:
    """A library with its shim compiled and loaded; skips the test where it is not installed."""
    installed = library.find()
    if installed is None:
        pytest.skip(f"{library.name} is not installed: {library.install}")
    made = compile_shim(library, installed, driver())
    return installed, made, load_shim(library, made, installed, driver())


@functools.cache
def pool() -> bytes:
    return compile_source(POOL, Installed("", (), {}, ("-fopenmp",)), driver())


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="tvmake-test-"))


def linked(funcs: dict[str, tirx.PrimFunc], library: Library | None = None) -> Any:
    """Compiles functions, links them with the library's shim, and loads what comes out."""
    name = f"lib{next(_numbers)}"
    files = []
    for symbol, func in funcs.items():
        files.append(_folder() / f"{name}.{symbol}.o")
        files[-1].write_bytes(objects.compile_function(func, symbol, ATTRIBUTES))
    options: list[str] = []
    if library is not None:
        installed, made, _ = ready(library)
        files.append(_folder() / f"{name}.shim.o")
        files[-1].write_bytes(made)
        if library.threads == "openmp":
            files.append(_folder() / f"{name}.pool.o")
            files[-1].write_bytes(pool())
        options = [*map(str, installed.shared.values()), *installed.flags]
        for path in installed.shared.values():
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    path = _folder() / f"{name}.so"
    subprocess.run([driver(), "-shared", "-o", str(path), *map(str, files), *options], check=True)
    return tvm_ffi.load_module(str(path))


def arguments(func: tirx.PrimFunc, seed: int = 0) -> list[np.ndarray]:
    """Random arrays for the parameters of a function, the last of which it writes."""
    rng = np.random.default_rng(seed)
    shapes = [[int(extent) for extent in param.shape] for param in func.params]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def call(function: Any, arrays: Sequence[np.ndarray]) -> np.ndarray:
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    function(*tensors)
    return tensors[-1].numpy()


def same(func: tirx.PrimFunc, claimed: tirx.PrimFunc, library: Library, seed: int = 0) -> None:
    """Asserts that a function and what a library makes of it compute the same."""
    loaded = linked({"plain": func, "claimed": claimed}, library)
    arrays = arguments(func, seed)
    wanted, got = call(loaded["plain"], arrays), call(loaded["claimed"], arrays)
    scale = max(1.0, float(np.abs(wanted).max()))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5 * scale)


def const(value: float) -> relax.Expr:
    return relax.const(value, "float32")


ACTIVATIONS: dict[str, Build] = {
    "none": lambda emit, y: y,
    "relu": lambda emit, y: op.nn.relu(y),
    "relu6": lambda emit, y: op.clip(y, 0, 6),
    "leaky": lambda emit, y: op.nn.leakyrelu(y, 0.1),
    "sigmoid": lambda emit, y: op.sigmoid(y),
    "tanh": lambda emit, y: op.tanh(y),
    "silu": lambda emit, y: op.nn.silu(y),
    "gelu": lambda emit, y: op.nn.gelu(y),
    "gelu_tanh": lambda emit, y: op.nn.gelu_tanh(y),
    "softplus": lambda emit, y: op.nn.softplus(y),
    "exp": lambda emit, y: op.exp(y),
    "scaled": lambda emit, y: op.multiply(y, const(0.25)),
    "from one": lambda emit, y: op.subtract(const(1.0), y),
    "hardswish": lambda emit, y: op.multiply(
        y, emit(op.divide(emit(op.clip(emit(op.add(y, const(3.0))), 0, 6)), const(6.0)))
    ),
    "hardsigmoid": lambda emit, y: op.clip(emit(op.add(emit(op.multiply(y, const(0.2))), const(0.5))), 0, 1),
}


def conv(activation: str = "none", layout: str = "NHWC", **attributes: object) -> Build:
    """A convolution, the sum with each further operand, and an activation."""

    def build(emit: Callable[..., relax.Var], x: relax.Var, w: relax.Var, *added: relax.Var) -> relax.Expr:
        kernel = {"NHWC": "HWIO", "NCHW": "OIHW"}[layout]
        y = emit(op.nn.conv2d(x, w, data_layout=layout, kernel_layout=kernel, **attributes))
        for each in added:
            y = emit(op.add(y, each))
        return ACTIVATIONS[activation](emit, y)

    return build


def matmul(activation: str = "none") -> Build:
    def build(emit: Callable[..., relax.Var], x: relax.Var, w: relax.Var, *added: relax.Var) -> relax.Expr:
        y = emit(op.matmul(x, w))
        for each in added:
            y = emit(op.add(y, each))
        return ACTIVATIONS[activation](emit, y)

    return build


def remaining(func: tirx.PrimFunc) -> int:
    """How many nests of loops the library left."""
    return func.script().count("T.grid") + func.script().count("in range")
