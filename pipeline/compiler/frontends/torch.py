"""PyTorch: an exported program → a skeleton without weights, the weights, and what PyTorch itself computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.compiler.frontends import Case, Read
from pipeline.errors import ModelError, SetupError, last_line

_INSTALL = "pip install 'tvmake[torch]'"


def read(source: Path | Callable[[], Any], seeds: tuple[int, ...] = (0,)) -> Read:
    """Reads a saved program (.pt2), or what a function returns: an ExportedProgram.

    PyTorch's own outputs on seeded inputs are recorded, and the artifact is later checked against them.
    """
    try:
        import torch
        from torch.export import ExportedProgram
    except ImportError as error:
        raise SetupError("reading exported programs needs torch", hint=_INSTALL) from error
    from tvm.relax.frontend.torch import from_exported_program

    from pipeline.compiler.frontends import relax

    if isinstance(source, Path):
        if not source.is_file():
            raise ModelError(f"there is no file {source}", hint="check the path in dodo.py")
        try:
            program = torch.export.load(source)
        except Exception as error:
            raise ModelError(f"{source} is no exported program: {last_line(error)}") from error
    else:
        program = source()
    if not isinstance(program, ExportedProgram):
        raise ModelError(
            f"the function returned a {type(program).__name__}, not an exported program",
            hint="return torch.export.export(module, example_inputs)",
        )
    try:
        mod = from_exported_program(program, keep_params_as_input=True, unwrap_unit_return_tuple=True)
    except Exception as error:
        raise ModelError(f"TVM's importer cannot take the program: {last_line(error)}") from error
    from tvm.relax.frontend import detach_params

    mod, params = detach_params(mod)
    entry = mod["main"]
    values = params.get("main", [])
    names = [var.name for var in entry.params]
    weights = dict(zip(names[len(names) - len(values) :], values, strict=True))
    inputs = [var for var in entry.params if var.name not in weights]
    cases = tuple(_recorded(program, inputs, seed, f"torch {torch.__version__}") for seed in seeds)
    return relax.from_module(mod, weights, cases)


def _recorded(program: Any, inputs: list[Any], seed: int, origin: str) -> Case:
    import torch

    from pipeline.samples import seeded_inputs
    from pipeline.types import TensorSpec

    specs = []
    for var in inputs:
        shape = [int(extent) for extent in var.ty.shape.values]
        specs.append(TensorSpec(var.name, tuple(shape), str(var.ty.dtype)))
    arrays = seeded_inputs(specs, seed)
    with torch.no_grad():
        returned = program.module()(*(torch.from_numpy(np.array(arrays[spec.name])) for spec in specs))
    outputs = list(returned) if isinstance(returned, tuple | list) else [returned]
    return Case(f"{origin}, seed {seed}", arrays, {f"output_{i}": o.numpy() for i, o in enumerate(outputs)})
