"""A hardware target as its file writes it → as TVM understands it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import tvm
from tvm.target import codegen

from pipeline.errors import ConfigError, last_line

NATIVE = "native"


def resolve(written: str | Mapping[str, object]) -> dict[str, object]:
    """The attributes of a target, complete and in TVM's own terms.

        "native"                    →  {"kind": "llvm", "mcpu": "znver4", "mtriple": "x86_64-...", ...}
        "llvm -mcpu=..." or a tag   →  what TVM makes of it
        {"kind": "llvm", ...}       →  the same, with this machine's triple where none is given

    Raises ConfigError with what TVM says where TVM refuses it.
    """
    if written == NATIVE:
        written = {"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu(), "mtriple": codegen.llvm_get_system_triple()}
    try:
        attributes = _attributes(tvm.target.Target(dict(written) if isinstance(written, Mapping) else written))
        if attributes["kind"] == "llvm" and not attributes.get("mtriple"):
            attributes = _attributes(tvm.target.Target({**attributes, "mtriple": codegen.llvm_get_system_triple()}))
    except Exception as error:
        kinds = ", ".join(sorted(tvm.target.Target.list_kinds()))
        raise ConfigError(
            f"TVM refuses the target {written!r}: {last_line(error)}", hint=f"kinds that this TVM knows: {kinds}"
        ) from error
    cpu, triple = attributes.get("mcpu"), str(attributes.get("mtriple", ""))
    if attributes["kind"] == "llvm" and cpu and not codegen.llvm_is_valid_cpu(cpu, triple):
        known = ", ".join(codegen.llvm_get_cpu_archlist(load(attributes)))
        raise ConfigError(f"LLVM has no processor {cpu!r} for {triple}", hint=f"it has {known}")
    return attributes


def load(attributes: Mapping[str, object]) -> tvm.target.Target:
    """The TVM object for what `resolve` returned."""
    return tvm.target.Target(dict(attributes))


def llvm_version() -> str:
    """The major version of the LLVM inside TVM."""
    return str(codegen.llvm_version_major())


def _attributes(target: tvm.target.Target) -> dict[str, object]:
    attributes: dict[str, object] = json.loads(str(target))
    return attributes
