"""Libraries of operators that others wrote: each claims the functions that it computes, and says how it is linked.

To add one, write a file with a class that has these members, beside it a shim of the same name in C++, and name it in
LIBRARIES, in the order of preference. A library's `match` is a K0 pass like a strategy's: it answers with a function of
the same parameters and meaning that calls the shim, or None. The version enters the key: raise it with any change to
the matching or the shim. Import TVM inside `match`: names and versions are read where TVM is not loaded.

A library may also have a method `patterns`, of Relax operators that it would rather have as one function:
pipeline.compiler.patterns. What is grouped so is a workload like any other, for which all strategies compete.

What a shim offers to C, under the name of its library:

    int tvmake_<name>_plan(const char* description, int threads, char* answer, size_t size)
    int tvmake_<name>_...                  whatever the functions that `match` makes call; anything but 0 is an error
"""

from __future__ import annotations

from pipeline.compiler.libraries.attention import Attention
from pipeline.compiler.libraries.contract import Installed, Library, Shim
from pipeline.compiler.libraries.onednn import OneDNN
from pipeline.compiler.libraries.openblas import OpenBLAS
from pipeline.compiler.libraries.shims import POOL, compile_shim, compile_source, load_shim
from pipeline.compiler.libraries.xnnpack import XNNPACK

__all__ = [
    "LIBRARIES",
    "POOL",
    "Installed",
    "Library",
    "Shim",
    "by_name",
    "compile_shim",
    "compile_source",
    "load_shim",
]

LIBRARIES: tuple[Library, ...] = (Attention(), OneDNN(), OpenBLAS(), XNNPACK())


def by_name(name: str) -> Library:
    return next(library for library in LIBRARIES if library.name == name)
