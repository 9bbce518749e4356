"""The strategy of libraries: a function's body becomes a call of a library, where the library has such a function."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tvm

    from pipeline.compiler.libraries import Library, Shim


class Dispatch:
    """One library as a strategy. Its shim is compiled and loaded, to be asked what the library would do."""

    def __init__(self, library: Library, shim: Shim) -> None:
        self.name = library.name
        self.version = library.version
        self._library = library
        self._shim = shim

    def apply(self, func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc | None:
        return self._library.match(func, target, self._shim)
