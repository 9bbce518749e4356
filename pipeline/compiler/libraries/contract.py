"""What a library of operators must offer, and what is known of it. TVM is not loaded here."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import tvm


@dataclass(frozen=True)
class Installed:
    """A library as this machine has it.

    includes  folders with its headers
    shared    what an artifact must carry, by the name that the loader asks for, in the order of linking
    flags     what its shim is compiled and linked with beside that
    """

    version: str
    includes: tuple[Path, ...]
    shared: Mapping[str, Path]
    flags: tuple[str, ...] = ()


class Shim:
    """A compiled shim, loaded into this process to be asked what its library would do."""

    def __init__(self, name: str, library: ctypes.CDLL) -> None:
        self.library = library
        self._plan = getattr(library, f"tvmake_{name}_plan", None)
        if self._plan is not None:
            self._plan.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]

    def plan(self, description: str, threads: int = 0) -> dict[str, str] | None:
        """What the library would do with an operator, on that many threads; None where it refuses, or is not asked.

        "conv x=..."  →  {"implementation": "brgconv:avx512_core", "threads": "2", "bytes": "18432", "packed": "9a3f…"}
        """
        answer = ctypes.create_string_buffer(4096)
        if self._plan is None or self._plan(description.encode(), threads, answer, len(answer)) != 0:
            return None
        return dict(word.split("=", 1) for word in answer.value.decode().split())


class Library(Protocol):
    """One library: how it is found, and which functions it computes."""

    name: str
    version: int  # of the matching and the shim together
    licence: str  # SPDX
    install: str  # what to type where it is missing
    threads: Literal["openmp", "caller"]  # whose threads it runs on: OpenMP's, or the loop's that calls it

    @property
    def shim(self) -> Path | str:
        """Its C++ source: a file, or the text itself."""
        ...

    def find(self) -> Installed | None:
        """Where this machine has it. Reads no more than a few paths, and loads nothing."""
        ...

    def match(self, func: tvm.tirx.PrimFunc, target: tvm.target.Target, shim: Shim) -> tvm.tirx.PrimFunc | None:
        """The function computed by the library, with what the library cannot take left after it; None where nothing
        of it is for the library. `shim` is the compiled shim."""
        ...
