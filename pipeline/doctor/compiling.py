"""TVM and the code that it makes: whatever may kill the process that tries it, so these run in the child, the first
one first. They import pipeline.compiler inside, as this module is also imported where neither may be."""

from __future__ import annotations

import importlib
import os
import platform
import tempfile
import time
from pathlib import Path

from pipeline import toolchain
from pipeline.doctor.findings import AGAIN, Finding, fault, ok, warning
from pipeline.processor import missing_features

_PLAIN_TARGET = 'target = {{kind = "llvm", mcpu = "{}"}}'
GOOD_PAIR = 'pip install "apache-tvm==0.27.0.post1" "apache-tvm-ffi==0.1.14.post1"'
OLDER = "name an older processor in the target's file, such as " + _PLAIN_TARGET.format("x86-64-v2")
UNRUN = "see whether the C++ compiler works by itself; where it is the code that cannot run, " + OLDER

_SLOW_IMPORT = 5.0  # seconds; 1 to 2 are usual
_X86 = ("x86_64", "i686")

# LLVM uses these only where a program asks for them by name, and a virtual machine may well hide them.
_NEVER_CHOSEN = frozenset({"avx512vp2intersect", "amx-tile", "amx-int8", "amx-bf16", "amx-fp16", "amx-complex"})


def tvm_import() -> Finding:
    if os.environ.get("TVM_USE_RUNTIME_LIB") == "1":
        return fault("TVM_USE_RUNTIME_LIB is set, so TVM loads without its compiler", "unset TVM_USE_RUNTIME_LIB")
    started = time.perf_counter()
    importlib.import_module("tvm")
    seconds = time.perf_counter() - started
    said = f"{seconds:.1f} s"
    if seconds > _SLOW_IMPORT:
        return warning(f"{said}; 1 to 2 s are usual", "try again: the first time reads the disk, and a load slows it")
    return ok(said)


def saving_ir() -> Finding:
    """The first thing that a wrong pair of TVM and FFI dies of."""
    from pipeline.compiler import ir, trial

    written = ir.canonical(trial.addition())
    if ir.canonical(ir.load(written)) != written:
        return fault("a function that is saved and loaded is not the same function", GOOD_PAIR)
    return ok(f"a function is the same after JSON ({len(written)} bytes)")


def llvm() -> Finding:
    from pipeline.compiler import targets

    native = targets.resolve(targets.NATIVE)
    cpu = native.get("mcpu")
    said = f"LLVM {targets.llvm_version()}, processor {cpu}, triple {native.get('mtriple')}"
    if cpu in (None, "", "generic", "x86-64"):
        return warning(f"{said}: LLVM does not know this processor, so native code is slow", _by_name())
    return ok(said)


def processor() -> Finding:
    """Features that LLVM takes for granted by the processor's name, and a virtual machine may hide."""
    from pipeline.compiler import targets, trial

    native = targets.resolve(targets.NATIVE)
    if platform.machine() not in _X86:
        return ok(f"{native.get('mcpu')}; its features are not compared on {platform.machine()}")
    assumed = trial.assumed_features(native) - _NEVER_CHOSEN
    # Both spellings of one feature may be in the list: Linux's avx512_bf16 and LLVM's avx512bf16.
    missing = {name.replace("_", ""): name for name in missing_features({**native, "mattr": sorted(assumed)})}
    if missing:
        return fault(
            f"LLVM takes this for a {native.get('mcpu')}, which has {', '.join(missing)}; this machine does not show "
            "them (a virtual machine may hide them), so native code can die of an illegal instruction",
            _by_name(),
        )
    return ok(f"has the vector instructions that LLVM assumes of a {native.get('mcpu')}")


def _by_name() -> str:
    """The hint to name a processor: for x86, the highest level of its ABI that is all here."""
    if platform.machine() not in _X86:
        return "name the processor in the target's file: " + _PLAIN_TARGET.format("...")
    levels = ("x86-64-v4", "x86-64-v3", "x86-64-v2")
    level = next((level for level in levels if not missing_features({"mcpu": level})), "x86-64")
    return "in the target's file: " + _PLAIN_TARGET.format(level)


def compile_and_run() -> Finding:
    """The way of every operator: code for this processor, linked by the compiler driver, loaded and called."""
    from pipeline.compiler import objects, targets, trial
    from pipeline.linker import link

    started = time.perf_counter()
    made = objects.compile_function(trial.addition(), "tvmake_doctor", targets.resolve(targets.NATIVE))
    if toolchain.compiler() is None:
        return warning("code is generated, but without a compiler not linked and not run", AGAIN)
    with tempfile.TemporaryDirectory(prefix="tvmake-doctor-") as folder:
        library = Path(folder) / "doctor.so"
        library.write_bytes(link({"doctor.o": made}))
        right = trial.adds(library, "tvmake_doctor")
    if not right:
        return fault("a compiled addition gives wrong sums on this processor", OLDER)
    return ok(f"a function was compiled, linked, loaded and run in {time.perf_counter() - started:.2f} s")
