"""The C that goes along to a device (probes.c): made for the functions of one library, and what its answers mean."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import xxhash

from pipeline.platforms import is_linux
from pipeline.types import Cause

_SOURCE = Path(__file__).with_name("probes.c")
_GUARDED = "guarded_"
DEVICE = "tvmake_device"  # says what the device is
_RAISED, _LATE = 77, -1  # as in probes.c
_KNOWN = ("model name", "Model", "Hardware", "cpu model", "uarch")  # what systems call their processor
_PARTS = ("CPU implementer", "CPU part", "CPU variant", "CPU revision", "isa")
_FEATURES = ("flags", "Features", "isa")
_THREADS = ("OMP_NUM_THREADS", "TVM_NUM_THREADS")


def can_guard(triple: str) -> bool:
    """Whether the system of a triple, this machine's where it is empty, has what probes.c asks for."""
    return is_linux(triple) or "darwin" in triple or "macos" in triple


def source(symbols: Iterable[str]) -> bytes:
    """C that runs each of these functions in a child, as `guarded(symbol)`, and says what the device is."""
    lines = [f"GUARDED({symbol})" for symbol in sorted(set(symbols))]
    return "\n".join([_SOURCE.read_text(), *lines, ""]).encode()


def guarded(symbol: str) -> str:
    return f"{_GUARDED}{symbol}"


def fault(status: int, seconds: float) -> tuple[str, Cause] | None:
    """What was wrong with a function that ended so; None where nothing was, or where it says so itself when called."""
    if status == _LATE:
        return f"had not ended after {seconds:g} s", Cause.TIMED_OUT
    if status < 0 or status == 0 or (os.WIFEXITED(status) and os.WEXITSTATUS(status) == _RAISED):
        return None
    if not os.WIFSIGNALED(status):
        return f"ended the process with exit code {os.WEXITSTATUS(status)}", Cause.CRASHED
    name = f"signal {os.WTERMSIG(status)}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(os.WTERMSIG(status)).name
    return f"crashed with {name}", Cause.CRASHED


def description(said: str) -> str:
    """What a device says of itself, in short: the same for all of a kind, another where times may be.

    machine    aarch64                     → Raspberry Pi 5 Model B Rev 1.0 (3b5d5c37), 4 processors
    board      Raspberry Pi 5 Model B Rev 1.0
    processors 4
    Features   fp asimd …
    """
    found: dict[str, str] = {}
    for line in said.splitlines():
        name, _, value = line.partition("\t")
        found.setdefault(name.strip(), value.strip())
    name = next((found[each] for each in ("board", *_KNOWN) if found.get(each)), found.get("machine", "unknown"))
    told = " ".join([*(found.get(each, "") for each in _PARTS), *sorted(_features(found))])
    parts = [f"{name} ({xxhash.xxh3_64_hexdigest(told.encode())[:8]})", f"{found.get('processors', '?')} processors"]
    return ", ".join([*parts, *(f"{each}={found[each]}" for each in _THREADS if found.get(each))])


def _features(found: dict[str, str]) -> set[str]:
    return {feature for name in _FEATURES for feature in found.get(name, "").split()}
