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
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pipeline.errors import SetupError
from pipeline.platforms import architecture, is_here, is_linux, is_wasm

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
    path = _package("tvm") / "lib" / name
    if not path.is_file():
        raise SetupError(f"the installed TVM has no {name}", hint="pip install --force-reinstall tvmake")
    return path


def runtime_libraries() -> tuple[Path, ...]:
    """The libraries of TVM's runtime, from which generated code may take functions."""
    return tvm_library("libtvm_runtime.so"), _package("tvm_ffi") / "lib" / "libtvm_ffi.so"


def runtime_headers() -> tuple[Path, ...]:
    """The folders of headers that generated C source includes."""
    return _package("tvm") / "include", _package("tvm_ffi") / "include"


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SetupError(f"{PACKAGES[name.replace('_', '-')]} is not installed", hint="pip install tvmake")
    return Path(spec.origin).parent


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


@dataclass(frozen=True)
class Driver:
    """What links for a triple: the command's beginning, with the triple where it is a driver for many."""

    argv: tuple[str, ...]


# What Debian calls the compilers that link for another Linux, by architecture: triple of GCC, package.
_CROSS = {
    "aarch64": ("aarch64-linux-gnu", "g++-aarch64-linux-gnu"),
    "armv7": ("arm-linux-gnueabihf", "g++-arm-linux-gnueabihf"),
    "armv7a": ("arm-linux-gnueabihf", "g++-arm-linux-gnueabihf"),
    "powerpc64le": ("powerpc64le-linux-gnu", "g++-powerpc64le-linux-gnu"),
    "riscv64": ("riscv64-linux-gnu", "g++-riscv64-linux-gnu"),
    "s390x": ("s390x-linux-gnu", "g++-s390x-linux-gnu"),
    "x86_64": ("x86_64-linux-gnu", "g++-x86-64-linux-gnu"),
}
_WASM_LINKERS = ("wasm-ld", *(f"wasm-ld-{version}" for version in range(30, 13, -1)))


def driver_for(triple: str = "") -> Driver | None:
    """What links objects for a triple into a library, this machine's where it is empty; None where nothing is there.

    For this machine the compiler driver. For another Linux the command in CXX_<architecture>, GCC's cross compiler,
    zig, or clang++ where it finds that system's libraries. For WebAssembly wasm-ld or emcc.
    """
    if is_here(triple):
        driver = compiler()
        return Driver((driver,)) if driver else None
    if is_wasm(triple):
        linker = next((found for name in (*_WASM_LINKERS, "emcc") if (found := shutil.which(name))), None)
        return Driver((linker,)) if linker else None
    if not is_linux(triple):
        return None
    return _cross_driver(triple)


@functools.cache
def _cross_driver(triple: str) -> Driver | None:
    return next((driver for driver in _cross_drivers(triple) if _finds_libraries(driver)), None)


def _cross_drivers(triple: str) -> Iterator[Driver]:
    machine = architecture(triple)
    if named := os.environ.get(f"CXX_{machine}"):
        yield Driver(tuple(shlex.split(named)))
    gnu = _CROSS.get(machine, (f"{machine}-linux-gnu", ""))[0]
    candidates = ((f"{gnu}-g++",), ("zig", "c++", "-target", gnu), ("clang++", f"--target={gnu}"))
    for name, *rest in candidates:
        if found := shutil.which(name):
            yield Driver((found, *rest))


def _finds_libraries(driver: Driver) -> bool:
    """Whether a driver can link a library that has nothing in it: clang++ is often there without the other system."""
    with tempfile.TemporaryDirectory(prefix="tvmake-driver-") as folder:
        command = [*driver.argv, "-shared", "-x", "c", "-", "-o", "empty.so"]
        try:
            done = subprocess.run(command, cwd=folder, input=b"", capture_output=True, timeout=120, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0


def how_to_install(triple: str = "") -> str:
    """What to do where `driver_for` finds nothing."""
    if is_here(triple):
        return "install one (Debian: apt-get install g++), or name one in the environment variable CXX"
    if is_wasm(triple):
        return "install one (Debian: apt-get install lld, or emscripten)"
    machine = architecture(triple)
    if not is_linux(triple):
        return "link the objects on a machine of that system"
    package = _CROSS.get(machine, ("", f"g++-{machine}-linux-gnu"))[1]
    return f"install one (Debian: apt-get install {package}), or name one in the environment variable CXX_{machine}"


@functools.cache
def nvcc() -> str | None:
    """NVIDIA's compiler: NVCC, or nvcc on the path."""
    return shutil.which(os.environ.get("NVCC") or "nvcc")


_COMPILER_HINT = "run it by hand; name another C++ compiler in CXX, or mend this one"
_NVCC_HINT = "run it by hand; name another nvcc in NVCC, or take this one off the path"


def compiler_identity() -> str:
    """The first lines of what the compiler driver and its linker say of themselves.

    Raises SetupError where they say nothing: an identity that is guessed would be a wrong key.
    """
    return driver_identity()


def driver_identity(triple: str = "") -> str:
    """What tells the driver that links for a triple from another one: its own words and its linker's; `absent`."""
    driver = driver_for(triple)
    if driver is None:
        return ABSENT
    asked = [("--version",)] if is_wasm(triple) else [("--version",), ("-Wl,--version",)]
    hint = _COMPILER_HINT if is_here(triple) else how_to_install(triple)
    said = [_first_line([*driver.argv, *arguments], hint) for arguments in asked]
    return "; ".join(line for line in said if line)


def nvcc_identity() -> str:
    """The line of nvcc's in which its version stands; `absent`."""
    found = nvcc()
    if found is None:
        return ABSENT
    return next((line for line in reversed(_said([found, "--version"], _NVCC_HINT)) if line.startswith("Build")), "")


def _first_line(argv: list[str], hint: str) -> str:
    lines = _said(argv, hint)
    return lines[0].strip() if lines else ""


def _said(argv: list[str], hint: str) -> list[str]:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"{shlex.join(argv)} cannot be run: {error}", hint=hint) from error
    if done.returncode != 0:
        raise SetupError(f"{shlex.join(argv)} failed: {done.stderr.strip()[-200:]}", hint=hint)
    return done.stdout.splitlines()


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


@functools.cache
def openmp_runtime() -> Path | None:
    """The runtime library of the compiler driver's OpenMP, which artifacts carry; None where it has none."""
    driver = compiler()
    if driver is None:
        return None
    for name in ("libgomp.so.1", "libomp.so.5", "libomp.so"):
        path = Path(_first_line([driver, f"-print-file-name={name}"], _COMPILER_HINT))
        if path.is_absolute() and path.is_file():
            return Path(path.parent.resolve() / name)
    return None
