"""Every key of a target's file, wrong in turn: one ConfigError that names the file, the key, and what is allowed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.compiler.strategies import ORDER
from pipeline.config import Check, Device, Measure, Operators, Policy, Stale, TargetFile, Tune, load_target
from pipeline.errors import ConfigError

NAMES = [*ORDER, "onednn"]


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "targets" / "cpu.toml"
    path.parent.mkdir()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(path: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_target(path, NAMES)
    assert "targets/cpu.toml" in caught.value.message
    assert str(path) not in str(caught.value)
    return caught.value


def test_what_is_not_said_has_a_default(tmp_path: Path) -> None:
    assert load_target(write(tmp_path, 'target = "native"')) == TargetFile(target="native")


def test_everything_can_be_said(tmp_path: Path) -> None:
    text = """
        target = {kind = "llvm", mcpu = "x86-64-v3"}
        models = ["a", "b"]
        order = ["library", "default"]
        libraries = ["onednn"]
        select = "fastest"
        layout = "as-is"
        records = ["tuning/cpu"]
        weights = "inside"
        timeout = 60
        [check]
        enabled = false
        tolerance = 1e-2
        seeds = [1, 2]
        [measure]
        profile = false
        noise = 0.1
        seconds = 2
        patience = 5
        [tune]
        spaces = ["rules", "own"]
        trials = 64
        patience = 16
        batch = 8
        seconds = 0.1
        timeout = 30
        [stale]
        days = 90
        toolchain = false
        device = false
        validator = false
        failures = 0.5
        caught_up = false
        [policy]
        tuned = 0.9
        validated = true
        younger = 180.5
        regression = true
        [[operators]]
        match = "conv2d*"
        only = ["library"]
        [[operators]]
        match = "softmax*"
        forbid = ["onednn"]
    """
    assert load_target(write(tmp_path, text), NAMES) == TargetFile(
        target={"kind": "llvm", "mcpu": "x86-64-v3"},
        models=("a", "b"),
        order=("library", "default"),
        libraries=("onednn",),
        select="fastest",
        layout="as-is",
        records=("tuning/cpu",),
        weights="inside",
        timeout=60.0,
        check=Check(enabled=False, tolerance=1e-2, seeds=(1, 2)),
        measure=Measure(profile=False, noise=0.1, seconds=2.0, patience=5.0),
        tune=Tune(("rules", "own"), trials=64, patience=16, batch=8, seconds=0.1, timeout=30.0),
        stale=Stale(days=90.0, toolchain=False, device=False, validator=False, failures=0.5, caught_up=False),
        policy=Policy(tuned=0.9, validated=True, younger=180.5, regression=True),
        operators=(Operators("conv2d*", only=("library",)), Operators("softmax*", forbid=("onednn",))),
    )


# For each key: values that cannot be meant, as TOML.
WRONG: dict[str, tuple[str, ...]] = {
    "target": ("3", "true", '["llvm"]'),
    "models": ('"a"', "[1]", "3"),
    "order": ('"default"', "[1]", "[]", '["defualt"]', '["default", "nonesuch"]'),
    "libraries": ('"onednn"', "[1]", '["onedn"]'),
    "select": ('"last"', "1"),
    "layout": ('"NCHW4c"', "true"),
    "records": ('"tuning"', "[1]"),
    "weights": ('"outside"', "true"),
    "timeout": ('"60"', "-1", "0", "nan", "true"),
    "check": ("3", "false"),
    "check.enabled": ('"yes"', "1"),
    "check.tolerance": ('"1e-3"', "-1.0", "nan", "true"),
    "check.seeds": ("3", '["0"]', "[]", "[-1]", "[0.5]"),
    "measure": ("3",),
    "measure.profile": ('"no"', "1"),
    "measure.noise": ("-0.1", "1.0", "nan", '"3 %"'),
    "measure.seconds": ("0", "-1", "true"),
    "measure.patience": ("0", "nan"),
    "tune": ("3", '"all"'),
    "tune.spaces": ('"rules"', "[1]"),
    "tune.trials": ("0", "-1", "1.5", '"64"', "true"),
    "tune.patience": ("0", "0.5"),
    "tune.batch": ("0", "-8"),
    "tune.seconds": ("0", "nan", '"1"'),
    "tune.timeout": ("0", "-1", "nan"),
    "stale": ("3", "true"),
    "stale.days": ("0", "-1", "nan", '"90 days"', "true"),
    "stale.toolchain": ('"yes"', "1"),
    "stale.device": ('"yes"', "1"),
    "stale.validator": ('"yes"', "1"),
    "stale.failures": ("-0.1", "1.1", "nan", "true"),
    "stale.caught_up": ('"yes"', "1"),
    "device": ("3", '"board"'),
    "device.label": ('"a board"', '"a:b"', '"board"', "1"),  # a tracker is given as well
    "device.tracker": ('"host"', '"h:0"', '"h:port"', "9190"),
    "device.key": ('"a b"', '"a:b"', '""', "3"),
    "device.parallel": ("0", "-1", "1.5", '"all"'),
    "device.timeout": ("0", "-3", "nan", '"long"'),
    "device.wait": ("0", "-3", "nan", '"long"'),
    "policy": ("3", '"strict"'),
    "policy.tuned": ("-0.1", "90", "nan", '"90 %"', "true"),
    "policy.validated": ('"yes"', "1"),
    "policy.younger": ("0", "-30", "nan", '"30d"'),
    "policy.regression": ('"no"', "0.03"),
    "operators": ("3", '["conv2d"]', '[{only = ["default"]}]', '[{match = "a", only = ["nonesuch"]}]'),
}
CASES = [(key, value) for key, values in WRONG.items() for value in values]


def test_every_key_is_tried() -> None:
    tables = {"check": Check, "measure": Measure, "device": Device, "tune": Tune, "stale": Stale, "policy": Policy}
    under = {f"{table}.{name}" for table, kind in tables.items() for name in kind.__struct_fields__}
    assert set(WRONG) == under | {*TargetFile.__struct_fields__}


@pytest.mark.parametrize(("key", "value"), CASES)
def test_a_wrong_value_is_refused_by_name(tmp_path: Path, key: str, value: str) -> None:
    head = "" if key == "target" else 'target = "native"\n'
    if key.startswith("device."):  # what such a table must have
        needed = {"device.tracker": '"host:9190"', "device.key": '"board"'}
        head += "".join(f"{name} = {text}\n" for name, text in needed.items() if name != key)
    error = refused(write(tmp_path, f"{head}{key} = {value}\n"))
    assert key in error.message
    assert error.hint


@pytest.mark.parametrize("line", ["parallel = 0", "timeout = 0", "wait = -1", 'label = "a:b"', 'label = "a b"'])
def test_what_a_labelled_worker_is_told_must_make_sense_as_well(tmp_path: Path, line: str) -> None:
    label = "" if line.startswith("label") else 'label = "board"\n'
    assert line.partition(" ")[0] in refused(write(tmp_path, f'target = "native"\n[device]\n{label}{line}\n')).message


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("select", ["first", "fastest"]),
        ("layout", ["NHWC", "as-is"]),
        ("weights", ["beside", "inside"]),
        ("order", ["default"]),
    ],
)
def test_a_wrong_choice_tells_the_right_ones(tmp_path: Path, key: str, allowed: list[str]) -> None:
    value = '["nonesuch"]' if key == "order" else '"nonesuch"'
    error = refused(write(tmp_path, f'target = "native"\n{key} = {value}\n'))
    assert all(choice in str(error) for choice in allowed)


@pytest.mark.parametrize(
    "line", ["colour = 1", "check.colour = 1", "measure.colour = 1", "stale.colour = 1", "policy.colour = 1"]
)
def test_an_unknown_key_is_refused_and_the_known_are_told(tmp_path: Path, line: str) -> None:
    error = refused(write(tmp_path, f'target = "native"\n{line}\n'))
    assert "colour" in error.message
    known = {"check": Check, "measure": Measure, "stale": Stale, "policy": Policy}.get(
        line.partition(".")[0], TargetFile
    ).__struct_fields__
    assert all(name in error.hint for name in known)


def test_a_missing_target_is_told(tmp_path: Path) -> None:
    error = refused(write(tmp_path, 'weights = "inside"\n'))
    assert "missing" in error.message
    assert "target" in error.message


@pytest.mark.parametrize("text", ["target = ", "target = native", '[check\ntarget="native"', b'target = "\xff"'])
def test_what_is_no_toml_is_told(tmp_path: Path, text: str | bytes) -> None:
    assert "is not TOML" in refused(write(tmp_path, text)).message


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "targets" / "cpu.toml"
    assert "cannot be read: No such file" in refused(path).message
    path.mkdir(parents=True)
    assert "cannot be read: Is a directory" in refused(path).message


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_file_without_permission_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, 'target = "native"')
    path.chmod(0)
    child = os.fork()
    if child == 0:
        os.setresuid(65534, 65534, 65534)
        try:
            load_target(path, ["default"])
        except ConfigError as error:
            os._exit(0 if "cannot be read: Permission denied" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
