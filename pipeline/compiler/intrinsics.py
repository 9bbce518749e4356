"""The intrinsics that traces name: those of a target's processor are registered, and of no other.

To import the package `tvm.s_tir.tensor_intrin` takes half a minute, for those of CUDA, and MetaSchedule imports it
wherever a search begins. So a module that stands for it lets the one that is needed be imported alone.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import tvm

from pipeline.platforms import architecture

_PACKAGE = "tvm.s_tir.tensor_intrin"

# Where they are registered, among the modules of the package, by the processor's architecture.
_MODULES = {"x86_64": "x86", "aarch64": "arm_cpu", "riscv64": "riscv_cpu"}


def register(target: tvm.target.Target) -> None:
    """Registers the intrinsics of a target's processor. Afterwards the package can still be imported as a whole.

    A processor of none of these architectures has none. Of a device all are registered, which takes half a minute.
    """
    if target.kind.name != "llvm" or _PACKAGE in sys.modules:
        importlib.import_module(_PACKAGE)
        return
    triple = str(target.attrs.get("mtriple") or tvm.target.codegen.llvm_get_system_triple())
    if (name := _MODULES.get(architecture(triple))) is not None:
        with standing_in():
            importlib.import_module(f"{_PACKAGE}.{name}")


@contextmanager
def standing_in() -> Iterator[None]:
    """While this lasts, whoever imports the package gets a module that registers nothing; it is gone afterwards."""
    if _PACKAGE in sys.modules:
        yield
        return
    module = ModuleType(_PACKAGE)
    module.__path__ = [str(Path(tvm.__file__).parent / "s_tir" / "tensor_intrin")]
    sys.modules[_PACKAGE] = module
    try:
        yield
    finally:
        del sys.modules[_PACKAGE]
