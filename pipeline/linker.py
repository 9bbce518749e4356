"""Object files → one shared library, by the C++ compiler driver of this machine. Same objects, same bytes."""

from __future__ import annotations

import mmap
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import SetupError
from pipeline.toolchain import compiler
from pipeline.weightfile import WEIGHTS_BEGIN, WEIGHTS_END

_INCBIN = """\
    .section .rodata.tvmake_weights, "a", @progbits
    .global {begin}
    .global {end}
    .balign 64
{begin}:
    .incbin "weights"
{end}:
    .byte 0
    .section .note.GNU-stack, "", @progbits
"""


def link(objects: Mapping[str, Path | bytes], weights: Path | None = None) -> memoryview:
    """Links object files, given by the names that they shall have, and optionally a weight file, into a library.

    Works in a folder of its own with relative names, so that no path of the machine enters the library. Raises
    SetupError where there is no compiler driver, RuntimeError with the linker's words where it refuses.
    """
    driver = compiler()
    if driver is None:
        raise SetupError(
            "there is no C++ compiler to link with",
            hint="install one (Debian: apt-get install g++), or name one in the environment variable CXX",
        )
    with tempfile.TemporaryDirectory(prefix="tvmake-link-") as name:
        folder = Path(name)
        for file, content in objects.items():
            if isinstance(content, bytes):
                (folder / file).write_bytes(content)
            else:
                (folder / file).symlink_to(content)
        arguments = sorted(objects)
        if weights is not None:
            (folder / "weights").symlink_to(weights)
            (folder / "weights.S").write_text(_INCBIN.format(begin=WEIGHTS_BEGIN, end=WEIGHTS_END))
            arguments.append("weights.S")
        # A response file: thousands of objects do not fit on a command line.
        (folder / "arguments").write_text("\n".join(arguments))
        command = [driver, "-shared", "-fPIC", "-o", "lib.so", "@arguments"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()
            raise RuntimeError("the linker refused: " + " | ".join(said[-3:]))
        with open(folder / "lib.so", "rb") as library:
            return memoryview(mmap.mmap(library.fileno(), 0, access=mmap.ACCESS_READ))
