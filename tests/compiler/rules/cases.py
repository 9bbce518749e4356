"""Functions to schedule, as lowering makes them, and the comparison with what they gave unscheduled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.relax import transform
from tvm.target import codegen

from pipeline.compiler import ir

NATIVE = tvm.target.Target(
    {"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu(), "mtriple": codegen.llvm_get_system_triple()}
)
Make = Callable[..., relax.Expr]
Shape = tuple[int, ...]


def target(mcpu: str, triple: str = "x86_64-linux-gnu", **more: object) -> tvm.target.Target:
    return tvm.target.Target({"kind": "llvm", "mcpu": mcpu, "mtriple": triple, **more})


def fused(make: Make, *specs: Shape | tuple[Shape, str]) -> tirx.PrimFunc:
    """The one function that legalisation and fusion make of an expression over inputs, under canonical names.

    `make` takes a function that binds an expression, and the inputs: fused(lambda emit, x: emit(relax.op.exp(x)), (4,))
    """
    (func,) = all_fused(make, *specs)
    return func


def all_fused(make: Make, *specs: Shape | tuple[Shape, str]) -> list[tirx.PrimFunc]:
    """As `fused`, for what makes several functions."""
    builder = relax.BlockBuilder()
    full = [spec if spec and isinstance(spec[0], tuple) else (spec, "float32") for spec in specs]
    inputs = [relax.Var(f"p{i}", relax.TensorType(shape, dtype)) for i, (shape, dtype) in enumerate(full)]
    with builder.function("main", inputs):
        with builder.dataflow():
            output = builder.emit_output(make(builder.emit, *inputs))
        builder.emit_func_output(output)
    mod = builder.finalize()
    with NATIVE:
        for phase in (
            transform.DecomposeOpsForInference(),
            transform.LegalizeOps(),
            transform.AnnotateTIROpPattern(),
            transform.FuseOps(),
            transform.FuseTIR(),
            transform.DeadCodeElimination(),
        ):
            mod = phase(mod)
    return [ir.load(ir.canonical(func)) for _, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)]


def conv2d(
    data: Shape,
    weight: Shape,
    *,
    strides: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    epilogue: Sequence[str] = ("bias", "relu"),
    layout: str = "NHWC",
) -> tirx.PrimFunc:
    """A convolution and what follows it: bias, relu, residual, silu."""
    kernel = "HWIO" if layout == "NHWC" else "OIHW"
    channels = weight[3] if layout == "NHWC" else weight[0]
    h, w = (data[1:3], weight[:2]) if layout == "NHWC" else (data[2:], weight[2:])
    out = [(h[i] + 2 * padding - dilation * (w[i] - 1) - 1) // strides + 1 for i in (0, 1)]
    whole = (data[0], *out, channels) if layout == "NHWC" else (data[0], channels, *out)
    specs: list[Shape] = [data, weight]
    if "bias" in epilogue:
        specs.append((1, 1, 1, channels) if layout == "NHWC" else (1, channels, 1, 1))
    if "residual" in epilogue:
        specs.append(whole)

    def make(emit: Any, x: relax.Var, f: relax.Var, *rest: relax.Var) -> relax.Expr:
        left = list(rest)
        y = emit(
            relax.op.nn.conv2d(
                x,
                f,
                strides=strides,
                padding=padding,
                dilation=dilation,
                groups=groups,
                data_layout=layout,
                kernel_layout=kernel,
            )
        )
        for step in epilogue:
            if step == "relu":
                y = emit(relax.op.nn.relu(y))
            elif step == "silu":
                y = emit(relax.op.multiply(y, emit(relax.op.sigmoid(y))))
            else:
                y = emit(relax.op.add(y, left.pop(0)))
        return y

    return fused(make, *specs)


def arrays(func: tirx.PrimFunc, seed: int = 0) -> list[np.ndarray]:
    """One array for each parameter, the results included. Floats lie around 0, integers between -20 and 20."""
    rng = np.random.default_rng(seed)
    made = []
    for param in func.params:
        shape, dtype = tuple(int(extent) for extent in param.ty.shape), str(param.ty.dtype)
        if dtype == "bool":
            made.append(rng.integers(0, 2, shape).astype(bool))
        elif dtype.startswith("float"):
            made.append(rng.standard_normal(shape).astype(dtype))
        else:
            made.append(rng.integers(-20 if dtype.startswith("i") else 0, 20, shape).astype(dtype))
    return [np.asarray(array) for array in made]


def run(func: tirx.PrimFunc, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Every parameter after a call of the function, compiled as it is for this machine."""
    named = func.with_attr("global_symbol", "main")
    library = tvm.tirx.build(tvm.IRModule({"main": named}), target=NATIVE)
    tensors = [tvm.runtime.tensor(array) for array in inputs]
    library(*tensors)
    return [tensor.numpy() for tensor in tensors]


def assert_same(func: tirx.PrimFunc, scheduled: tirx.PrimFunc | None, rtol: float = 1e-4) -> None:
    """Asserts that both give the same on the same inputs, but for the order in which floats are added."""
    assert scheduled is not None
    inputs = arrays(func)
    for want, got in zip(run(func, inputs), run(scheduled, inputs), strict=True):
        if want.dtype.kind == "f":
            scale = float(np.abs(want.astype("float64")).max(initial=0))
            loose = 50 if want.dtype.itemsize < 4 else 1
            np.testing.assert_allclose(
                got.astype("float64"), want.astype("float64"), rtol=rtol * loose, atol=rtol * loose * 0.1 * scale
            )
        else:
            np.testing.assert_array_equal(got, want)
