"""Relax: an IRModule or an nn.Module made in Python → a skeleton without weights, and the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax

from pipeline.compiler import passes
from pipeline.compiler.frontends import Read, raw
from pipeline.compiler.lowering import ENTRY
from pipeline.errors import ModelError
from pipeline.types import TensorSpec

_RETURNS = "return an IRModule; (IRModule, {weight: array}); or (nn.Module, spec) as for export_tvm"


def read(function: Callable[[], Any]) -> Read:
    """Calls a function of the user's and takes the weights out of what it returns.

    IRModule                 constants that training would change become weights
    (IRModule, weights)      the entry function's parameters of these names are weights too
    (nn.Module, spec)        exported with `spec`; its parameters are the weights and must have data
    """
    return from_module(*_module_and_weights(function()))


def from_module(mod: tvm.IRModule, given: Mapping[str, Any], cases: tuple[Any, ...] = ()) -> Read:
    """A module whose entry takes inputs and the given weights, in any order → skeleton and weights."""
    mod = _with_entry(mod)
    mod = _weights_last(mod, list(given))
    mod, constants = passes.detach_constants(mod, ENTRY, "constant_")
    arrays = {**{name: _array(value) for name, value in given.items()}, **constants}
    func = mod[ENTRY]
    order = [str(var.name) for var in func.params][len(func.params) - len(arrays) :]
    weights = []
    for name in order:
        array = arrays[name]
        weights.append((TensorSpec(name, tuple(array.shape), str(array.dtype)), raw(array)))
    return Read(tvm.ir.save_json(mod).encode(), weights, cases)


def load(skeleton: bytes) -> tuple[tvm.IRModule, list[str]]:
    """The module of a skeleton. Its outputs have no names of their own."""
    return tvm.ir.load_json(skeleton.decode()), []


def _module_and_weights(returned: Any) -> tuple[tvm.IRModule, Mapping[str, Any]]:
    from tvm.relax.frontend import nn

    if isinstance(returned, tvm.IRModule):
        return returned, {}
    if isinstance(returned, tuple) and len(returned) == 2:
        first, second = returned
        if isinstance(first, tvm.IRModule) and isinstance(second, Mapping):
            return first, second
        if isinstance(first, nn.Module):
            mod, parameters = first.export_tvm(second)[:2]
            empty = [name for name, parameter in parameters if parameter.data is None]
            if empty:
                raise ModelError(
                    f"{len(empty)} parameters of the nn.Module have no data: {', '.join(empty[:5])}",
                    hint="load a state dict, or set parameter.data, before returning the module",
                )
            return mod, {name: parameter.data for name, parameter in parameters}
    raise ModelError(f"the function returned {type(returned).__name__}, not a Relax model", hint=_RETURNS)


def _with_entry(mod: tvm.IRModule) -> tvm.IRModule:
    """The module with its one public Relax function called `main`."""
    public = [
        gvar
        for gvar, func in mod.functions_items()
        if isinstance(func, relax.Function) and "global_symbol" in func.attrs
    ]
    if not public:
        raise ModelError("the model is empty: its module has no public Relax function")
    chosen = next((gvar for gvar in public if gvar.name_hint == ENTRY), public[0] if len(public) == 1 else None)
    if chosen is None:
        names = ", ".join(sorted(gvar.name_hint for gvar in public))
        raise ModelError(f"the module has several entry functions: {names}", hint="keep one, or name it main")
    others = {gvar: func for gvar, func in mod.functions_items() if not gvar.same_as(chosen)}
    entry = mod[chosen].with_attr("global_symbol", ENTRY)
    return tvm.IRModule({**others, ENTRY: entry}) if chosen.name_hint != ENTRY else mod


def _weights_last(mod: tvm.IRModule, names: list[str]) -> tvm.IRModule:
    func = mod[ENTRY]
    known = [str(var.name) for var in func.params]
    if missing := [name for name in names if name not in known]:
        raise ModelError(f"weights are given for {', '.join(missing[:5])}, which {ENTRY} does not take", hint=_RETURNS)
    inputs = [var for var in func.params if var.name not in names]
    weights = [var for var in func.params if var.name in names]
    if [var.name for var in inputs + weights] == known:
        return mod
    mod = tvm.IRModule(dict(mod.functions_items()))
    mod[ENTRY] = relax.Function(inputs + weights, func.body, func.ret_ty, func.is_pure, func.attrs)
    return mod


def _array(value: Any) -> np.ndarray:
    return value.numpy() if hasattr(value, "numpy") else np.asarray(value)
