"""CUDA C++ → machine code for one architecture of NVIDIA's, by nvcc. Needs no device and no driver."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from pipeline.errors import SetupError, last_line
from pipeline.toolchain import nvcc

_LIMIT_S = 600


def cubin(source: bytes, architecture: str) -> bytes:
    """The kernels of `source` compiled for an architecture such as `sm_80`. Same source and nvcc, same bytes.

    Raises SetupError where there is no nvcc, RuntimeError with what nvcc says where it refuses.
    """
    compiler = nvcc()
    if compiler is None:
        raise SetupError("there is no nvcc to compile CUDA kernels with", hint="install NVIDIA's CUDA toolkit")
    with tempfile.TemporaryDirectory(prefix="tvmake-nvcc-") as name:
        folder = Path(name)
        (folder / "kernels.cu").write_bytes(source)
        # Relative names, so that no path of the machine enters the code.
        command = [compiler, "--cubin", "-O3", f"-arch={architecture}", "-o", "kernels.cubin", "kernels.cu"]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=_LIMIT_S,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RuntimeError(f"nvcc cannot be run: {last_line(error)}") from error
        if done.returncode != 0:
            raise RuntimeError("nvcc refused: " + " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:]))
        return (folder / "kernels.cubin").read_bytes()
