"""This machine, without TVM: Python, packages, the compiler that links, processors, memory, temporary files."""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path

from pipeline import toolchain
from pipeline.compiler.libraries import Library
from pipeline.doctor.findings import Finding, by_limits, fault, gigabytes, ok, warning

COMPILER = "install one (Debian: apt-get install g++), or name one in the environment variable CXX"
TMPDIR = "set TMPDIR to a folder that can be written and run from"

_LOW_MEMORY, _NO_MEMORY = 2_000_000_000, 500_000_000  # bytes; a process with TVM loaded holds 0.2 GB and grows


def python() -> Finding:
    """A Python too old for tvmake is refused by pip and would not have come this far."""
    said = f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} {platform.machine()}"
    if platform.system() != "Linux":
        return warning(f"{said}; tvmake is tested on Linux only", "run it on Linux, in a container for instance")
    return ok(said)


def doit() -> Finding:
    version = toolchain.package_version("doit")
    if not version.startswith("0.37."):
        return warning(f"{version}; tvmake is tested with 0.37", 'pip install "doit==0.37.*"')
    return ok(version)


def tvm_pair() -> Finding:
    toolchain.require_good_pair()
    tvm, ffi = toolchain.package_version("apache-tvm"), toolchain.package_version("apache-tvm-ffi")
    return ok(f"apache-tvm {tvm} with apache-tvm-ffi {ffi}, a pair known to work")


def compiler() -> Finding:
    driver = toolchain.compiler()
    if driver is None:
        named = os.environ.get("CXX")
        missing = f"CXX names {named}, which is not there" if named else "none of g++, clang++, c++ is on the PATH"
        return fault(f"there is no C++ compiler to link with: {missing}", COMPILER)
    return ok(f"{driver}: {toolchain.compiler_identity() or 'says nothing of itself'}")


def cores() -> Finding:
    usable, present, load = len(os.sched_getaffinity(0)), os.cpu_count() or 1, os.getloadavg()[0]
    said = f"{usable} of {present} usable, load {load:.1f}"
    if load > present:
        return warning(f"{said}: what is timed now will be noisy", "measure again when `uptime` shows a smaller load")
    return ok(said)


def memory() -> Finding:
    import psutil

    found = psutil.virtual_memory()
    said = f"{gigabytes(found.available)} available of {gigabytes(found.total)}"
    hint = "close what uses the memory (`ps aux --sort -rss | head`): a compiler that gets none is killed"
    return by_limits(found.available, _LOW_MEMORY, _NO_MEMORY, said, hint)


def temporary_files() -> Finding:
    folder, wanted = tempfile.gettempdir(), os.environ.get("TMPDIR")
    with tempfile.TemporaryFile() as stream:
        stream.write(bytes(4096))
        stream.flush()
    if wanted and Path(wanted).resolve() != Path(folder).resolve():
        return warning(f"{folder} is used, because TMPDIR ({wanted}) cannot be written", TMPDIR)
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        return warning(f"{folder} is mounted so that no library can be loaded from it", TMPDIR)
    return ok(f"{folder}, can be written")


def optional(package: str, what: str, extra: str) -> Finding:
    version = toolchain.package_version(toolchain.PACKAGES[package])
    if version == toolchain.ABSENT:
        return ok(f"not installed; only needed to {what}", f'pip install "tvmake[{extra}]"')
    return ok(version)


def library_of(wanted: Library) -> Finding:
    found = wanted.find()
    if found is None:
        return ok("not installed; only needed for the functions that it would compute", wanted.install)
    return ok(f"{found.version}, {wanted.licence}")
