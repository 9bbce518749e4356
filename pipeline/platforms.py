"""What a target's attributes say of where its code runs, read without TVM: which part runs on a host, and on which.

    {"kind": "llvm", "mtriple": "aarch64-linux-gnu"}     one object for each operator, for that triple
    {"kind": "c"}                                        one C source for each operator, for whoever compiles it
    {"kind": "opencl", ..., "host": {"kind": "llvm"}}    one object that launches, and device code that it carries

Must not: know a tool or a file. Tools are found by pipeline.toolchain.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from typing import cast

Attributes = Mapping[str, object]

# Kinds whose code runs on a device and is launched by a host, and what their source is called in a file.
DEVICE_SUFFIXES = {"cuda": ".cu", "metal": ".metal", "opencl": ".cl", "webgpu": ".wgsl"}

_SAME = {"amd64": "x86_64", "arm64": "aarch64"}


def has_device_code(attributes: Attributes) -> bool:
    """Whether operators have a part that a host launches on a device."""
    return attributes["kind"] in DEVICE_SUFFIXES


def host_of(attributes: Attributes) -> Attributes:
    """The attributes of the part that runs on a host: the target itself where it has no device code."""
    return cast("Attributes", attributes["host"]) if has_device_code(attributes) else attributes


def triple_of(attributes: Attributes) -> str:
    """The triple that the host part is for; empty for this machine's, as for C sources that name none."""
    return str(host_of(attributes).get("mtriple") or "")


def is_source(attributes: Attributes) -> bool:
    """Whether operators become C sources instead of objects."""
    return host_of(attributes)["kind"] == "c"


def suffix_of(attributes: Attributes) -> str:
    """What the file of an operator's host part ends in."""
    return ".c" if is_source(attributes) else ".o"


def architecture(triple: str) -> str:
    """The first part of a triple, by one name: arm64-apple-macos → aarch64; this machine's for none."""
    first = triple.partition("-")[0] or platform.machine()
    return _SAME.get(first.lower(), first.lower())


def is_wasm(triple: str) -> bool:
    return architecture(triple).startswith("wasm")


def is_linux(triple: str) -> bool:
    return "linux" in triple if triple else sys.platform == "linux"


def is_glibc(triple: str) -> bool:
    """Whether a triple's C library is GNU's, whose functions have versions."""
    return "linux-gnu" in triple if triple else "CS_GNU_LIBC_VERSION" in os.confstr_names


def is_here(triple: str) -> bool:
    """Whether code for a triple is for machines of this one's kind."""
    return not triple or (architecture(triple) == architecture("") and is_linux(triple) == is_linux(""))


def runs_here(attributes: Attributes) -> bool:
    """Whether what is built for a target can be tried on this machine: not what needs a device or another processor.

    Processors are compared by architecture alone: whether this one has the features that the code uses is another
    question, which pipeline.processor answers.
    """
    return not has_device_code(attributes) and is_here(triple_of(attributes))
