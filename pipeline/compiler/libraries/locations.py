"""Where libraries lie on this machine, and what of a target concerns them. TVM is not loaded here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def prefixes(variable: str) -> Iterator[Path]:
    """Folders that may hold include/ and lib/: what an environment variable names, or else where packages are put."""
    named = os.environ.get(variable)
    if named:
        yield Path(named)
        return
    yield from dict.fromkeys(map(Path, (sys.prefix, "/usr/local", "/usr")))


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def threads_of(target: Any) -> int:
    """The number of threads that code for a target is to expect: its num-cores, or this machine's."""
    return int(target.attrs.get("num-cores", 0) or len(os.sched_getaffinity(0)))


def runs_here(target: Any) -> bool:
    """Whether a target's code runs on machines of this one's architecture: shims and libraries are this machine's."""
    architecture = str(target.attrs.get("mtriple", "")).partition("-")[0]
    return str(target.kind.name) == "llvm" and architecture in ("", platform.machine())
