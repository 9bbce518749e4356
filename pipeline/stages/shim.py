"""shim: a library's C++ shim → an object, to be linked with the functions that call the library."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import cast

from pipeline.compiler import libraries
from pipeline.compiler.libraries import Installed, Library
from pipeline.errors import ConfigError, SetupError
from pipeline.sources import object_of
from pipeline.stages import Inputs, Options, Outputs
from pipeline.toolchain import compiler

_OPENMP = Installed("", (), {}, ("-fopenmp",))


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: shim, C++; header, what shims include; source, the module of a library that the workspace has.

    Options: library, "" for what brings TVM's parallel loops to OpenMP's threads. Outputs: object.
    """
    name = cast(str, options["library"])
    installed = installed_of(library_of(name, inputs.get("source"))) if name else _OPENMP
    with tempfile.TemporaryDirectory(prefix="tvmake-") as folder:
        path = Path(folder) / f"{name or 'openmp_pool'}.cc"
        path.write_bytes(inputs["shim"])
        return {"object": libraries.compile_source(path, installed, driver())}


def library_of(name: str, source: bytes | None) -> Library:
    """A library of this project's, or the one that a file of the workspace's libraries/ is."""
    if source is None:
        return libraries.by_name(name)
    return cast("Library", object_of(source, f"libraries/{name}.py", "library"))


def installed_of(library: Library) -> Installed:
    installed = library.find()
    if installed is None:
        raise ConfigError(f"the library {library.name} is not installed", hint=library.install)
    return installed


def driver() -> str:
    """The C++ compiler driver of this machine."""
    found = compiler()
    if found is None:
        raise SetupError("there is no C++ compiler", hint="install one (Debian: apt-get install g++), or set CXX")
    return found
