"""C source → an object file; object files → one shared library, by the driver for their triple. Same in, same out.

A library for WebAssembly is one relocatable object: what runs there is linked as a whole, with TVM's web runtime.
"""

from __future__ import annotations

import mmap
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline import symbols
from pipeline.errors import ConfigError, NoLinkerError
from pipeline.platforms import is_glibc, is_wasm
from pipeline.toolchain import Driver, driver_for, how_to_install, runtime_headers, runtime_libraries
from pipeline.weightfile import WEIGHTS_BEGIN, WEIGHTS_END

_INCBIN = """\
    .section .rodata.tvmake_weights, "a", %progbits
    .global {begin}
    .global {end}
    .balign 64
{begin}:
    .incbin "weights"
{end}:
    .byte 0
    .section .note.GNU-stack, "", %progbits
"""
_OUTPUT = "lib.so"
# GCC's OpenMP runtime, which code that was compiled with -fopenmp calls.
_OPENMP = ("GOMP_", "omp_")


def no_linker(triple: str) -> NoLinkerError:
    """The error of a triple, this machine's where it is empty, for which nothing here links."""
    return NoLinkerError(f"there is no linker for {triple or 'this machine'}", hint=how_to_install(triple))


def compile_source(source: bytes, triple: str = "") -> bytes:
    """C source that TVM generated → an object file for a triple. Same source, same bytes.

    Raises NoLinkerError where nothing here compiles for the triple, RuntimeError with the compiler's words.
    """
    driver = driver_for(triple)
    if driver is None or is_wasm(triple):
        raise no_linker(triple)
    with _folder("tvmake-compile-") as name:
        folder = Path(name)
        (folder / "function.c").write_bytes(source)
        headers = [argument for path in runtime_headers() for argument in ("-isystem", f'"{path}"')]
        _run(folder, driver, ["-O2", "-fPIC", *headers, "-x", "c", "-c", "function.c", "-o", "function.o"])
        return (folder / "function.o").read_bytes()


def link(
    objects: Mapping[str, Path | bytes],
    weights: Path | None = None,
    *,
    libraries: Mapping[str, Path] | None = None,
    triple: str = "",
) -> memoryview:
    """Links object files, given by the names that they shall have, and optionally a weight file, into a library.

    libraries  shared libraries that lie beside the linked one, by file name: found there, and what they need as well
    triple     whose objects they are; this machine's where it is empty

    Works in a folder of its own with relative names, so that no path of the machine enters the library. Raises
    NoLinkerError where nothing links for the triple, RuntimeError with the linker's words where it refuses, and where
    a function is called that neither the objects, nor the libraries, nor the system's or TVM's runtime have.
    """
    driver = driver_for(triple)
    if driver is None:
        raise no_linker(triple)
    carried = dict(libraries or {})
    with _folder("tvmake-link-") as name:
        folder = Path(name)
        for file, content in {**objects, **carried}.items():
            if isinstance(content, bytes):
                (folder / file).write_bytes(content)
            else:
                (folder / file).symlink_to(content)
        arguments = sorted(objects)
        if weights is not None:
            if is_wasm(triple):
                raise ConfigError("a library for WebAssembly cannot hold weights", hint='set weights = "beside"')
            (folder / "weights").symlink_to(weights)
            (folder / "weights.S").write_text(_INCBIN.format(begin=WEIGHTS_BEGIN, end=WEIGHTS_END))
            arguments.append("weights.S")
        if is_wasm(triple):
            _run(folder, driver, ["-r", "-o", _OUTPUT, *arguments])
        else:
            _link_shared(folder, driver, arguments, carried)
            if is_glibc(triple):
                _require_complete(folder, driver, arguments, carried)
        with open(folder / _OUTPUT, "rb") as library:
            return memoryview(mmap.mmap(library.fileno(), 0, access=mmap.ACCESS_READ))


def _link_shared(folder: Path, driver: Driver, arguments: list[str], carried: Mapping[str, Path]) -> None:
    _run(folder, driver, ["-shared", "-fPIC", "-o", _OUTPUT, *arguments, *_beside(carried)])


def _require_complete(folder: Path, driver: Driver, arguments: list[str], carried: Mapping[str, Path]) -> None:
    """Looks whether all that the library calls is there. Where OpenMP is missing, links again, with it."""
    missing = _missing(folder, carried)
    if any(name.startswith(_OPENMP) for name in missing):
        _link_shared(folder, driver, [*arguments, "-lgomp"], carried)
        missing = _missing(folder, carried)
    if missing:
        raise RuntimeError(_who_misses(folder, arguments, missing))
    nameless = set(carried) - set(symbols.needed(folder / _OUTPUT))
    if nameless:
        raise RuntimeError(f"libraries that carry another name inside (DT_SONAME): {', '.join(sorted(nameless))}")


def _beside(carried: Mapping[str, Path]) -> list[str]:
    """The arguments for libraries that will lie beside the linked one.

    They come after the objects, and each is kept even where no object calls it, so that what they need of each other
    is loaded before it is looked for. RPATH, not RUNPATH: only the former also serves what they need in turn.
    """
    if not carried:
        return []
    paths = ["-Wl,-rpath,$ORIGIN", "-Wl,--disable-new-dtags", "-Wl,-rpath-link,."]
    return [*paths, "-Wl,--push-state,--no-as-needed", *carried, "-Wl,--pop-state"]


def _missing(folder: Path, carried: Mapping[str, Path]) -> list[str]:
    """Functions that the linked library wants of others and that none of those it is loaded with has."""
    wanted = symbols.open_ends(folder / _OUTPUT)
    if not wanted:
        return []
    for library in (*carried.values(), *runtime_libraries()):
        wanted -= symbols.provided(library, wanted)
    return sorted(wanted)


def _who_misses(folder: Path, files: Iterable[str], missing: list[str]) -> str:
    name, *others = missing
    callers = [file for file in files if file.endswith(".o") and name in symbols.undefined(folder / file)]
    more = f" (and {len(others)} more: {', '.join(others[:3])})" if others else ""
    return f"nothing that the library is linked with has {name}, which {', '.join(callers[:3]) or 'it'} calls{more}"


def _folder(prefix: str) -> tempfile.TemporaryDirectory[str]:
    """A folder of its own. A build that is interrupted removes it while the driver may write to it still."""
    return tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)


def _run(folder: Path, driver: Driver, arguments: list[str]) -> None:
    # A response file: thousands of objects do not fit on a command line.
    (folder / "arguments").write_text("\n".join(arguments))
    command = [*driver.argv, "@arguments"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise RuntimeError(f"{Path(driver.argv[0]).name} refused: " + " | ".join(said[-3:]))
