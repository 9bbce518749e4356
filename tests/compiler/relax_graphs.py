"""Relax functions written in a line each, and what they give: for tests of passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tvm
from tvm import relax

from pipeline.compiler.rewriting import INPUTS, operator, variables

Build = Callable[..., object]


def graph(
    inputs: Mapping[str, Sequence[int]],
    weights: Mapping[str, Sequence[int]],
    body: Callable[..., relax.Expr | list[relax.Expr]],
) -> tvm.IRModule:
    """A module whose function `main` returns what `body` makes of `emit`, its inputs and its weights."""
    builder = relax.BlockBuilder()
    shapes = {**inputs, **weights}
    params = [relax.Var(name, relax.TensorType(list(shape), "float32")) for name, shape in shapes.items()]
    with builder.function("main", params, attrs={INPUTS: len(inputs)}):
        with builder.dataflow():
            made = body(builder.emit, *params)
            out = builder.emit_output(relax.Tuple(made) if isinstance(made, list) else made)
        builder.emit_func_output(out)
    return builder.get()


def values(mod: tvm.IRModule, seed: int = 0) -> list[np.ndarray]:
    """Arrays for the parameters, kept away from zero."""
    random = np.random.default_rng(seed)
    shapes = [tuple(int(n) for n in param.ty.shape.values) for param in mod["main"].params]
    return [np.asarray(random.uniform(0.3, 1.3, shape) * random.choice([-1, 1], shape), "float32") for shape in shapes]


def run(mod: tvm.IRModule, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    machine = relax.VirtualMachine(relax.build(mod, tvm.target.Target("llvm")), tvm.cpu())
    result = machine["main"](*(tvm.runtime.tensor(array) for array in arrays))
    return [result.numpy()] if hasattr(result, "numpy") else [field.numpy() for field in result]


def require_same(before: tvm.IRModule, after: tvm.IRModule, seed: int = 0) -> None:
    relax.analysis.well_formed(after)
    arrays = values(before, seed)
    for one, other in zip(run(after, arrays), run(before, arrays), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def at_run_time(mod: tvm.IRModule) -> list[str]:
    """The operators that depend on an input, in order."""
    func = mod["main"]
    fixed = set(func.params[int(func.attrs[INPUTS]) :])
    names = []
    for block in func.body.blocks:
        for binding in block.bindings:
            if all(var in fixed for var in variables(binding.value)):
                fixed.add(binding.var)
            elif operator(binding.value):
                names.append(operator(binding.value))
    return names
