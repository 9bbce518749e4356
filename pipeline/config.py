"""targets/<name>.toml: one hardware target each, and how to build for it. What is not known is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec

from pipeline.errors import ConfigError


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[check]: the comparison of each artifact with a reference.

    enabled    whether it is made
    tolerance  largest error allowed: max |y - r| / max |r| for each output
    seeds      of the inputs
    """

    enabled: bool = True
    tolerance: float = 1e-3
    seeds: tuple[int, ...] = (0,)


class TargetFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The keys that a target's file may have.

    target   "native" (this machine), a tag or string of TVM's, or a table of a TVM target's attributes
    models   names of the models to build for it; all of the workspace's where absent
    order    strategies in the order of choice
    select   "first": the first strategy that applies
    weights  "beside" the library in a file, or "inside" it
    timeout  seconds that one action may take
    check    see Check
    """

    target: str | dict[str, Any]
    models: tuple[str, ...] | None = None
    order: tuple[str, ...] = ("default",)
    select: Literal["first"] = "first"
    weights: Literal["beside", "inside"] = "beside"
    timeout: float = 1800.0
    check: Check = Check()


STRATEGY_NAMES = ("default",)


def load_target(path: Path) -> TargetFile:
    """Reads a target's file. Raises ConfigError that says which file, which key, and what is allowed."""
    try:
        table = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{_shown(path)} is not TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{_shown(path)} cannot be read: {error.strerror}") from error
    try:
        read = msgspec.convert(table, TargetFile)
    except msgspec.ValidationError as error:
        said = str(error).replace("Object contains unknown", "unknown").replace("Object missing required", "missing")
        allowed = (
            f"keys: {', '.join(TargetFile.__struct_fields__)}; under [check]: {', '.join(Check.__struct_fields__)}"
        )
        raise ConfigError(f"{_shown(path)}: {said.replace('field', 'key')}", hint=allowed) from error
    unknown = [name for name in read.order if name not in STRATEGY_NAMES]
    if unknown or not read.order:
        what = f"order names {', '.join(map(repr, unknown))}" if unknown else "order is empty"
        raise ConfigError(f"{_shown(path)}: {what}", hint=f"strategies: {', '.join(STRATEGY_NAMES)}")
    if not read.check.seeds and read.check.enabled:
        raise ConfigError(
            f"{_shown(path)}: check.seeds is empty", hint="give at least one, or set check.enabled = false"
        )
    return read


def _shown(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
