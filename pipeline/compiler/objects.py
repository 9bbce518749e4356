"""A scheduled PrimFunc → an object file, and a virtual machine's bytecode → an object file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import tvm
from tvm.runtime import _ffi_api as runtime_api

from pipeline.compiler import targets


def compile_function(func: tvm.tirx.PrimFunc, symbol: str, attributes: Mapping[str, object]) -> bytes:
    """The object file of one function, callable as `symbol` through TVM's FFI. Same function, same bytes."""
    target = targets.load(attributes)
    named = func.with_attr("global_symbol", symbol)
    return _written(tvm.tirx.build(tvm.IRModule({symbol: named}), target=target))


def pack_bytecode(executable: tvm.runtime.Module, attributes: Mapping[str, object]) -> bytes:
    """The object file that carries a virtual machine's executable, to be linked with the functions that it calls."""
    host = {"kind": "llvm", "mtriple": attributes["mtriple"]}
    text = str(targets.load(host))
    return _written(runtime_api.ModulePackImportsToLLVM(executable, False, text, ""))


def _written(module: tvm.runtime.Module) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.o"
        module.write_to_file(str(path))
        return path.read_bytes()
