"""What of this machine would keep tvmake from working, found by trying it.

Owns: the checks, in the order in which they are told. Must not: repair anything, print for people, or leave anything
behind but an empty store.

    examine()                    the findings, each as soon as it is known
    python -m pipeline.doctor    the child: the findings of the checks that load TVM
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from functools import partial
from typing import IO

from pipeline.compiler.libraries import LIBRARIES
from pipeline.doctor import child, compiling, machine, surroundings
from pipeline.doctor.findings import Check, Finding, Place, State

__all__ = ["CHECKS", "Check", "Finding", "Place", "State", "examine", "tell"]

TIME_LIMIT = 60.0  # seconds for the child; it needs about two, and a cold network disk some ten more

CHECKS = (
    Check(machine.python),
    Check(machine.doit),
    Check(machine.tvm_pair),
    Check(compiling.tvm_import, Place.CHILD),
    Check(compiling.saving_ir, Place.CHILD, compiling.GOOD_PAIR, name="saving IR"),
    Check(compiling.llvm, Place.CHILD),
    Check(compiling.processor, Place.CHILD, compiling.OLDER),
    Check(machine.compiler, hint=machine.COMPILER),
    Check(compiling.compile_and_run, Place.CHILD, compiling.UNRUN),
    Check(machine.cores),
    Check(machine.memory),
    Check(surroundings.store, hint=surroundings.OTHER_STORE),
    Check(surroundings.store_disk, hint=surroundings.OTHER_STORE),
    Check(surroundings.quarantine, hint=surroundings.OTHER_STORE),
    Check(surroundings.remote, hint="see docs/caches.md"),
    Check(surroundings.devices, hint="see docs/devices.md"),
    Check(surroundings.executor, hint="see docs/cluster.md"),
    Check(machine.temporary_files, hint=machine.TMPDIR),
    Check(lambda: machine.optional("onnx", "read ONNX models", "onnx"), name="onnx"),
    Check(lambda: machine.optional("onnxsim", "simplify ONNX models", "onnx"), name="onnxsim"),
    Check(lambda: machine.optional("onnxruntime", "compare ONNX models with a reference", "check"), name="onnxruntime"),
    Check(lambda: machine.optional("torch", "read PyTorch models", "torch"), name="torch"),
    *(Check(partial(machine.library_of, library), name=library.name) for library in LIBRARIES),
)


def examine(command: Sequence[str] | None = None, limit: float = TIME_LIMIT) -> Generator[Finding]:
    """Every check of CHECKS in order. `command` is the child's, instead of this module's; `limit` is in seconds.

    Never raises for what a check meets. The child is gone when the last finding is taken or the iterator is closed.
    """
    with child.Child(command or [sys.executable, "-m", "pipeline.doctor"], limit) as other:
        for check in CHECKS:
            yield check.finding() if check.place is Place.HERE else other.finding(check)


def tell(stream: IO[str]) -> None:
    """The child's findings, as lines of JSON."""
    child.tell(CHECKS, stream)
