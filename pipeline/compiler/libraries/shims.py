"""The C++ sources beside the libraries → object files, and a shim loaded into this process to be asked questions."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.compiler.libraries.contract import Installed, Library, Shim
from pipeline.errors import SetupError

HEADER = Path(__file__).parent / "shim.h"
POOL = Path(__file__).parent / "openmp_pool.cc"  # for artifacts with a library whose threads are OpenMP's


def compile_shim(library: Library, installed: Installed, driver: str) -> bytes:
    """The object file of a library's shim, made by a C++ compiler driver. Same inputs, same bytes.

    Raises RuntimeError with the compiler's words where it refuses.
    """
    if isinstance(library.shim, Path):
        return compile_source(library.shim, installed, driver)
    with tempfile.TemporaryDirectory(prefix="tvmake-shim-") as name:
        source = Path(name) / f"{library.name}.cc"
        source.write_text(library.shim)
        return compile_source(source, installed, driver)


def compile_source(source: Path, installed: Installed, driver: str) -> bytes:
    """The object file of one C++ source of this package."""
    with tempfile.TemporaryDirectory(prefix="tvmake-shim-") as name:
        folder = Path(name)
        # Names without a folder, so that no path of the machine enters the object.
        for file in (source, HEADER):
            (folder / file.name).write_bytes(file.read_bytes())
        includes = [f"-I{path}" for path in installed.includes]
        options = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", *installed.flags, *includes]
        _run([driver, *options, "-c", "-o", "shim.o", source.name], folder, f"{source.name} does not compile")
        return (folder / "shim.o").read_bytes()


def load_shim(library: Library, compiled: bytes, installed: Installed, driver: str) -> Shim:
    """Links a shim's object file and loads it, together with its library, for as long as this process lives."""
    for path in installed.shared.values():
        try:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise SetupError(f"{library.name} cannot be loaded: {error}", hint=library.install) from error
    with tempfile.TemporaryDirectory(prefix="tvmake-shim-") as name:
        folder = Path(name)
        (folder / "shim.o").write_bytes(compiled)
        shared = [str(path) for path in installed.shared.values()]
        _run(
            [driver, "-shared", "-o", "shim.so", "shim.o", *shared, *installed.flags], folder, "the shim does not link"
        )
        return Shim(library.name, ctypes.CDLL(str(folder / "shim.so")))


def _run(command: Sequence[str], folder: Path, what: str) -> None:
    # The compiler's words in English, whatever the user's language: they may end up in a shared cache.
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{what}: " + " | ".join(done.stderr.strip().splitlines()[-3:]))
