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


class Measure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[measure]: how candidates are timed where select is "fastest", and whether a built model is.

    profile   whether it is found out where a model's time goes: some runs of it at the end of a build
    noise     share by which a candidate must beat one that comes before it in the order
    seconds   of timing for each candidate of each operator
    patience  seconds after which a candidate that has not ended is given up
    """

    profile: bool = True
    noise: float = 0.03
    seconds: float = 0.1
    patience: float = 20.0


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[device]: devices that candidates are measured on: those behind TVM's RPC tracker, or workers of a cluster. See
    docs/devices.md.

    tracker   "host:port"
    key       what servers of this kind of device call themselves there
    label     instead of these: what workers of this kind are labelled
    parallel  how many of them are used at once
    timeout   seconds that one session on a device may take
    wait      seconds to wait for a device that is away: rebooting, hanging, taken by others
    """

    tracker: str = ""
    key: str = ""
    label: str = ""
    parallel: int = 1
    timeout: float = 600.0
    wait: float = 600.0


class Tune(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[tune]: how `doit tune` searches.

    spaces    search spaces in order: "rules", "post-order-apply", "dlight"; where absent those that suit the target
    trials    candidates of each operator, at most
    patience  candidates without a gain after which an operator is left
    batch     candidates that are measured together
    seconds   of timing for each candidate
    timeout   seconds that compiling one may take
    """

    spaces: tuple[str, ...] | None = None
    trials: int = 512
    patience: int = 96
    batch: int = 24
    seconds: float = 0.03
    timeout: float = 60.0


class Stale(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[stale]: when what was tuned for an operator counts as stale. `doit status` shows it, `doit tune` tunes it again.

    days       nobody has measured a candidate of the operator for so many days; never where absent
    toolchain  what is applied was validated with another TVM than the one that is installed
    device     it was tuned on other devices only
    validator  its candidates were validated by an older version of the comparison with the default
    failures   more than this share of its candidates failed; any share is let pass where absent
    caught_up  what it runs on without tuning has become as fast as what was tuned
    """

    days: float | None = None
    toolchain: bool = True
    device: bool = True
    validator: bool = True
    failures: float | None = None
    caught_up: bool = True


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[policy]: what `doit check` asks of every model that is built for the target. What is absent is not asked.

    tuned       least share of the operators' time that must be spent in operators which do not run on "rules" or
                "default": on what was tuned, written by hand or taken from a library
    validated   whether every tuned function in use must have been validated with the tools that are installed
    younger     days: every tuned function in use must have been validated since
    regression  whether no operator, nor a model as a whole, may be slower than in tuning.lock, beyond the noise
    """

    tuned: float | None = None
    validated: bool = False
    younger: float | None = None
    regression: bool = False


class Operators(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[[operators]]: which strategies some operators may use. Of several that match, each has its say.

    match   operators by name as `doit list` shows it, with * and ?: "fused_conv2d*", "conv2d-4b17c507"
    only    strategies that these may use, in the target's order; all where absent
    forbid  strategies that these may not use
    """

    match: str
    only: tuple[str, ...] | None = None
    forbid: tuple[str, ...] = ()


class TargetFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The keys that a target's file may have.

    target   "native" (this machine), a tag or string of TVM's, or a table of a TVM target's attributes
    models   names of the models to build for it; all of the workspace's where absent
    order    strategies in the order of choice; "library" stands for all of `libraries`
    libraries  libraries in the order of choice; where absent all that are installed, but for those that want naming
    select   "first": the first strategy that applies; "fastest": all are built, compared and timed
    layout   "NHWC": convolutions are computed channels-last; "as-is": as the model is written
    records  folders of MetaSchedule databases, from the workspace's folder, that "tuned" takes its records from
    weights  "beside" the library in a file, or "inside" it
    timeout  seconds that one action may take
    device   where candidates are measured; on this machine where absent, if its code runs there
    check, measure, tune, stale, policy, device, operators  see Check, Measure, Tune, Stale, Policy, Device, Operators
    """

    target: str | dict[str, Any]
    models: tuple[str, ...] | None = None
    order: tuple[str, ...] = ("manual", "library", "tuned", "rules", "default")
    libraries: tuple[str, ...] | None = None
    select: Literal["first", "fastest"] = "first"
    layout: Literal["NHWC", "as-is"] = "NHWC"
    records: tuple[str, ...] = ()
    weights: Literal["beside", "inside"] = "beside"
    timeout: float = 1800.0
    check: Check = Check()
    measure: Measure = Measure()
    tune: Tune = Tune()
    stale: Stale = Stale()
    policy: Policy = Policy()
    device: Device | None = None
    operators: tuple[Operators, ...] = ()


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
    _require_known(path, read, strategies)
    _require_sensible(path, read)
    if not read.check.seeds and read.check.enabled:
        raise ConfigError(
            f"{_shown(path)}: check.seeds is empty", hint="give at least one, or set check.enabled = false"
        )
    return read


def _require_known(path: Path, read: TargetFile, strategies: Collection[str] | None) -> None:
    if not read.order:
        raise ConfigError(f"{_shown(path)}: order is empty", hint=f"strategies: {', '.join(strategies or ())}")
    named = {"order": read.order, "libraries": read.libraries or ()}
    for rule in read.operators:
        named[f"only of operators {rule.match!r}"], named[f"forbid of operators {rule.match!r}"] = (
            rule.only or (),
            rule.forbid,
        )
    for key, names in named.items():
        unknown = [name for name in names if strategies is not None and name not in strategies]
        if unknown:
            raise ConfigError(
                f"{_shown(path)}: {key} names {', '.join(map(repr, unknown))}",
                hint=f"strategies: {', '.join(strategies or ())}",
            )


def _allowed() -> str:
    """The keys of a target's file, and the values of those that have a few."""
    hints = get_type_hints(TargetFile)
    keys = []
    for name in TargetFile.__struct_fields__:
        choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
        keys.append(name + (f" ({', '.join(choices)})" if choices else ""))
    tables = {
        "[check]": Check,
        "[measure]": Measure,
        "[tune]": Tune,
        "[stale]": Stale,
        "[policy]": Policy,
        "[device]": Device,
        "[[operators]]": Operators,
    }
    under = "; ".join(f"under {name}: {', '.join(table.__struct_fields__)}" for name, table in tables.items())
    return f"keys: {', '.join(keys)}; {under}"


def _require_sensible(path: Path, read: TargetFile) -> None:
    if not read.timeout > 0:
        raise ConfigError(f"{_shown(path)}: timeout is {read.timeout}", hint="give seconds, more than 0")
    if not read.check.tolerance >= 0:
        raise ConfigError(f"{_shown(path)}: check.tolerance is {read.check.tolerance}", hint="give 0 or more")
    if not 0 <= read.measure.noise < 1:
        raise ConfigError(f"{_shown(path)}: measure.noise is {read.measure.noise}", hint="give a share from 0 to 1")
    for name, seconds in (("seconds", read.measure.seconds), ("patience", read.measure.patience)):
        if not seconds > 0:
            raise ConfigError(f"{_shown(path)}: measure.{name} is {seconds}", hint="give seconds, more than 0")
    for name, number in (("trials", read.tune.trials), ("patience", read.tune.patience), ("batch", read.tune.batch)):
        if number < 1:
            raise ConfigError(f"{_shown(path)}: tune.{name} is {number}", hint="give a number of 1 or more")
    for name, seconds in (("seconds", read.tune.seconds), ("timeout", read.tune.timeout)):
        if not seconds > 0:
            raise ConfigError(f"{_shown(path)}: tune.{name} is {seconds}", hint="give seconds, more than 0")
    for name, days in (("stale.days", read.stale.days), ("policy.younger", read.policy.younger)):
        if days is not None and not days > 0:
            raise ConfigError(f"{_shown(path)}: {name} is {days}", hint="give days, more than 0")
    for name, share in (("stale.failures", read.stale.failures), ("policy.tuned", read.policy.tuned)):
        if share is not None and not 0 <= share <= 1:
            raise ConfigError(f"{_shown(path)}: {name} is {share}", hint="give a share from 0 to 1")
    if read.device is not None:
        _require_sensible_device(path, read.device)
    if any(seed < 0 for seed in read.check.seeds):
        raise ConfigError(f"{_shown(path)}: check.seeds is {list(read.check.seeds)}", hint="give numbers of 0 or more")


def _require_sensible_device(path: Path, device: Device) -> None:
    if device.parallel < 1:
        raise ConfigError(f"{_shown(path)}: device.parallel is {device.parallel}", hint="give a number of 1 or more")
    for name, seconds in (("timeout", device.timeout), ("wait", device.wait)):
        if not seconds > 0:
            raise ConfigError(f"{_shown(path)}: device.{name} is {seconds}", hint="give seconds, more than 0")
    word = "give a word without spaces and colons"
    if device.label:
        if not is_label(device.label):
            raise ConfigError(f"{_shown(path)}: device.label is {device.label!r}", hint=word)
        if device.tracker or device.key:
            raise ConfigError(
                f"{_shown(path)}: device.label and device.tracker are given",
                hint="give a label for workers of a cluster, or a tracker and a key for devices behind it",
            )
        return
    host, _, port = device.tracker.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"{_shown(path)}: device.tracker is {device.tracker!r}", hint='write "host:port"')
    if not is_label(device.key):
        raise ConfigError(f"{_shown(path)}: device.key is {device.key!r}", hint=word)


def is_label(text: str) -> bool:
    """Whether workers can be known by it, or devices by their tracker: one word, without colons."""
    return text.split() == [text] and ":" not in text


def _shown(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
