"""targets/<name>.toml: one hardware target each, and how to build for it. What is not known is refused."""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

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


def load_target(path: Path, strategies: Collection[str] | None = None) -> TargetFile:
    """Reads a target's file, which may name these strategies (any, where None).

    Raises ConfigError that says which file, which key, and what is allowed.
    """
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
        raise ConfigError(f"{_shown(path)}: {said.replace('field', 'key')}", hint=_allowed()) from error
    unknown = [name for name in read.order if strategies is not None and name not in strategies]
    if unknown or not read.order:
        what = f"order names {', '.join(map(repr, unknown))}" if unknown else "order is empty"
        raise ConfigError(f"{_shown(path)}: {what}", hint=f"strategies: {', '.join(strategies or ())}")
    _require_sensible(path, read)
    if not read.check.seeds and read.check.enabled:
        raise ConfigError(
            f"{_shown(path)}: check.seeds is empty", hint="give at least one, or set check.enabled = false"
        )
    return read


def _allowed() -> str:
    """The keys of a target's file, and the values of those that have a few."""
    hints = get_type_hints(TargetFile)
    keys = []
    for name in TargetFile.__struct_fields__:
        choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
        keys.append(name + (f" ({', '.join(choices)})" if choices else ""))
    return f"keys: {', '.join(keys)}; under [check]: {', '.join(Check.__struct_fields__)}"


def _require_sensible(path: Path, read: TargetFile) -> None:
    if not read.timeout > 0:
        raise ConfigError(f"{_shown(path)}: timeout is {read.timeout}", hint="give seconds, more than 0")
    if not read.check.tolerance >= 0:
        raise ConfigError(f"{_shown(path)}: check.tolerance is {read.check.tolerance}", hint="give 0 or more")
    if any(seed < 0 for seed in read.check.seeds):
        raise ConfigError(f"{_shown(path)}: check.seeds is {list(read.check.seeds)}", hint="give numbers of 0 or more")


def _shown(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
