"""The tools of this machine that can change what a stage makes: named, versioned, found without importing TVM.

Every tool is one entry of a mapping from name to identity. A stage declares which of them enter its key, so that a new
onnxruntime checks artifacts again and recompiles nothing.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pipeline.errors import SetupError

# The only pairs of TVM and its FFI that are known to work together, as (major.minor.patch, major.minor.patch).
GOOD_PAIRS = {"0.27.0": ("0.1.14",)}
PACKAGES = {
    "tvm": "apache-tvm",
    "tvm-ffi": "apache-tvm-ffi",
    "onnx": "onnx",
    "onnxsim": "onnxsim",
    "onnxruntime": "onnxruntime",
    "torch": "torch",
}
ABSENT = "absent"


@dataclass(frozen=True)
class Toolchain:
    """What this machine builds with. `identities` maps each tool's name to what tells it from another version."""

    identities: Mapping[str, str]

    def pick(self, names: Sequence[str]) -> dict[str, str]:
        return {name: self.identities.get(name, ABSENT) for name in names}


def detect() -> Toolchain:
    """Looks at what is installed. Raises SetupError for a pair of TVM and FFI that would crash."""
    require_good_pair()
    identities = {name: package_version(package) for name, package in PACKAGES.items()}
    identities["libtvm"] = library_identity(tvm_library("libtvm_compiler.so"))
    identities["cc"] = compiler_identity()
    identities["host"] = host_identity()
    return Toolchain(identities)


def package_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def require_good_pair() -> None:
    """Refuses a pair of TVM and FFI that is not known to work: the wrong one segfaults where IR is serialised."""
    tvm, ffi = package_version("apache-tvm"), package_version("apache-tvm-ffi")
    if tvm == ABSENT or ffi == ABSENT:
        missing = "apache-tvm" if tvm == ABSENT else "apache-tvm-ffi"
        raise SetupError(f"{missing} is not installed", hint="pip install tvmake")
    good = GOOD_PAIRS.get(_release(tvm), ())
    if _release(ffi) not in good:
        wanted = "; ".join(f"apache-tvm {t} with apache-tvm-ffi {' or '.join(f)}" for t, f in GOOD_PAIRS.items())
        raise SetupError(
            f"apache-tvm {tvm} with apache-tvm-ffi {ffi} is not a pair known to work (known: {wanted}); "
            "other pairs crash where IR is saved",
            hint='pip install "apache-tvm==0.27.0.post1" "apache-tvm-ffi==0.1.14.post1"',
        )


def _release(version: str) -> str:
    return ".".join(version.split(".")[:3])


def tvm_library(name: str) -> Path:
    """Where a library of the TVM package lies. The package is found, not imported."""
    spec = importlib.util.find_spec("tvm")
    if spec is None or spec.origin is None:
        raise SetupError("apache-tvm is not installed", hint="pip install tvmake")
    path = Path(spec.origin).parent / "lib" / name
    if not path.is_file():
        raise SetupError(f"the installed TVM has no {name}", hint="pip install --force-reinstall tvmake")
    return path


# An ELF note of type NT_GNU_BUILD_ID, which linkers make of a library's content and put near its beginning.
_BUILD_ID = (3).to_bytes(4, sys.byteorder) + b"GNU\0"
_HEAD = 1 << 16


def library_identity(path: Path) -> str:
    """XXH3-128 of a library's bytes, or of the head that holds its build ID: two builds of a version are two tools."""
    hasher = xxhash.xxh3_128()
    with open(path, "rb") as stream:
        head = stream.read(_HEAD)
        if _BUILD_ID in head:
            return f"build ID, {xxhash.xxh3_128_hexdigest(head)}"
        hasher.update(head)
        while chunk := stream.read(1 << 22):
            hasher.update(chunk)
    return hasher.hexdigest()


@functools.cache
def compiler() -> str | None:
    """The compiler driver that links: CXX, or the first of g++, clang++, c++ on the path."""

    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


_COMPILER_HINT = "run it by hand; name another C++ compiler in CXX, or mend this one"


def compiler_identity() -> str:
    """The first lines of what the compiler driver and its linker say of themselves.

    Raises SetupError where they say nothing: an identity that is guessed would be a wrong key.
    """
    driver = compiler()
    if driver is None:
        return ABSENT
    said = [_first_line([driver, "--version"]), _first_line([driver, "-Wl,--version"])]
    return "; ".join(line for line in said if line)


def _first_line(argv: list[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"{shlex.join(argv)} cannot be run: {error}", hint=_COMPILER_HINT) from error
    if done.returncode != 0:
        raise SetupError(f"{shlex.join(argv)} failed: {done.stderr.strip()[-200:]}", hint=_COMPILER_HINT)
    return done.stdout.partition("\n")[0].strip()


def host_identity() -> str:
    """The machine's architecture, processor and its features, as far as the system tells."""
    wanted = ("model name", "flags", "Features", "CPU part", "isa")
    seen: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() in wanted:
                    seen.setdefault(name.strip(), value.strip())
                elif not line.strip():
                    break
    except OSError:
        seen["processor"] = platform.processor()
    described = "; ".join(f"{name}={value}" for name, value in sorted(seen.items()))
    return f"{platform.machine()} {xxhash.xxh3_128_hexdigest(described.encode())}"
