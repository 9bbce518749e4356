"""A hardware target as its file writes it → as TVM understands it, complete and the same on every machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

import tvm
from tvm.target import codegen

from pipeline.errors import ConfigError, last_line
from pipeline.platforms import DEVICE_SUFFIXES, architecture, has_device_code, host_of

NATIVE = "native"
# The kinds for which this build of TVM has a code generator that needs nothing installed on this machine.
GENERATED = ("llvm", "c", *sorted(DEVICE_SUFFIXES))
# Whose code launches kernels where the target's file does not say: a browser's, Apple's; otherwise this machine's.
_HOSTS = {"webgpu": "wasm32-unknown-unknown-wasm", "metal": "arm64-apple-macos"}
# What Linux distributions build for. LLVM's own default has no floating point, which their linkers refuse to mix.
_RISCV64 = {"mabi": "lp64d", "mattr": ["+m", "+a", "+f", "+d", "+c"]}


def resolve(written: str | Mapping[str, object]) -> dict[str, object]:
    """The attributes of a target, complete and in TVM's own terms.

        "native"                     →  {"kind": "llvm", "mcpu": "znver4", "mtriple": "x86_64-...", ...}
        "llvm -mcpu=..." or a tag    →  what TVM makes of it
        {"kind": "llvm", ...}        →  the same, with this machine's triple where none is given
        {..., "mtriple": "riscv64-"} →  the same, with the ABI of Linux distributions where no feature is named
        {"kind": "opencl"}           →  the same, with a host, whose code launches the kernels

    Raises ConfigError with what TVM says where TVM refuses it, and for kinds for which it generates no code here.
    """
    if written == NATIVE:
        written = {"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu(), "mtriple": codegen.llvm_get_system_triple()}
    try:
        attributes = _attributes(written)
        _require_generated(attributes)
        _require_architecture(written, attributes)
        if has_device_code(attributes):
            attributes = _attributes({**attributes, "host": _completed(_host(attributes))})
        else:
            attributes = _attributes(_completed(attributes))
    except ConfigError:
        raise
    except Exception as error:
        kinds = ", ".join(GENERATED)
        raise ConfigError(
            f"TVM refuses the target {written!r}: {last_line(error)}",
            hint=f"kinds that this TVM knows how to build for: {kinds}",
        ) from error
    _require_processor(host_of(attributes))
    return attributes


def _host(attributes: dict[str, object]) -> dict[str, object]:
    """What launches a target's kernels: as its file says, or usual for its kind."""
    host = dict(cast("Mapping[str, object]", attributes.get("host", {"kind": "llvm"})))
    if host["kind"] != "llvm":
        raise ConfigError(
            f"the host of a target of kind {attributes['kind']!r} is of kind {host['kind']!r}",
            hint='give host = {kind = "llvm"}, and its mtriple where it is not this machine',
        )
    usual = _HOSTS.get(str(attributes["kind"]))
    return {**host, "mtriple": usual} if usual and not host.get("mtriple") else host


def _completed(host: dict[str, object]) -> dict[str, object]:
    """A host's attributes with what decides how its objects are linked, where nothing of it is said."""
    if host["kind"] != "llvm":
        return host
    if not host.get("mtriple"):
        host = {**host, "mtriple": codegen.llvm_get_system_triple()}
    says_nothing = not any(host.get(name) for name in ("mabi", "mattr", "mcpu"))
    if architecture(str(host["mtriple"])) == "riscv64" and says_nothing:
        return {**host, **_RISCV64}
    return host


def _require_generated(attributes: Mapping[str, object]) -> None:
    if attributes["kind"] not in GENERATED:
        raise ConfigError(
            f"this TVM generates no code for targets of kind {attributes['kind']!r}",
            hint=f"kinds that it builds for: {', '.join(GENERATED)}",
        )


def _require_architecture(written: str | Mapping[str, object], attributes: Mapping[str, object]) -> None:
    """TVM takes the architecture of this machine's GPU where none is named: another machine would build other code."""
    if isinstance(written, str) and written.startswith("{"):
        written = json.loads(written)
    is_named = "arch" in written or "tag" in written if isinstance(written, Mapping) else written != attributes["kind"]
    if attributes["kind"] == "cuda" and not is_named:
        raise ConfigError("the CUDA target names no architecture", hint='say which, such as arch = "sm_80"')


def _require_processor(host: Mapping[str, object]) -> None:
    cpu, triple = host.get("mcpu"), str(host.get("mtriple", ""))
    if host["kind"] == "llvm" and cpu and not codegen.llvm_is_valid_cpu(cpu, triple):
        known = ", ".join(codegen.llvm_get_cpu_archlist(load(host)))
        raise ConfigError(f"LLVM has no processor {cpu!r} for {triple}", hint=f"it has {known}")


def load(attributes: Mapping[str, object]) -> tvm.target.Target:
    """The TVM object for what `resolve` returned."""
    return tvm.target.Target(dict(attributes))


def is_this_processor(attributes: Mapping[str, object]) -> bool:
    """Whether a target names the very processor of this machine, not only one whose code runs here."""
    return attributes.get("mcpu") == codegen.llvm_get_system_cpu()


def llvm_version() -> str:
    """The major version of the LLVM inside TVM."""
    return str(codegen.llvm_version_major())


def _attributes(written: str | Mapping[str, object]) -> dict[str, object]:
    target = tvm.target.Target(dict(written) if isinstance(written, Mapping) else written)
    attributes: dict[str, object] = json.loads(str(target))
    return attributes
