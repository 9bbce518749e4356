"""`doit lock` writes what is decided, only what is meant, and nothing where anything fails."""

from __future__ import annotations

import json
import re

import models
from tuning_runs import NET, implementations, lanes, plain, relu, right, sigmoid, tune

from pipeline.lock import FILE, read
from pipeline.store import Pins
from tests.lock.machines import RELU, SIGMOID, Machine, lines_changed


def test_it_is_written_followed_and_nothing_is_left_to_do(machine: Machine) -> None:
    free = machine.artifact()
    done = machine.lock().good()
    assert done.last == "tuning.lock: 2 operators, 2 new"
    found = machine.entries()
    assert {name: each.candidate for name, each in found.items()} == {
        operator: machine.candidates(operator)[0].candidate for operator in (RELU, SIGMOID)
    }
    assert found[RELU].gain == 1000.0
    assert found[RELU].seconds == 0.001
    machine.workspace.idle_build()
    machine.workspace.idle_build("--locked")
    assert machine.artifact()["lib.so"] == free["lib.so"]
    (one, other) = machine.workspace.manifest("net")["operators"]
    assert one["reason"] == other["reason"] == "tuning.lock"
    assert [each["strategy"] for each in one["candidates"]] == ["tuned"]
    text = machine.path.read_text()
    assert str(machine.workspace.folder) not in text
    again = machine.lock().good()
    assert again.last == "tuning.lock: 2 operators, nothing changed"
    assert again.out == ""
    assert machine.path.read_text() == text
    machine.workspace.idle_build("--locked")


def test_a_better_record_changes_nothing_until_it_is_locked(machine: Machine) -> None:
    machine.lock().good()
    text, made = machine.path.read_text(), machine.artifact()
    better = machine.win(RELU, 2, 1300.0)

    done = machine.build().good()
    assert done.compiled == 0
    assert not done.ran["linked"]
    assert machine.artifact() == made
    assert "WARNING native: tuning.lock holds back a better winner (1.3 times): doit lock" in done.err
    machine.workspace.idle_build()
    machine.workspace.idle_build("--locked")

    shown = machine.lock("-n").good()
    assert "not written" in shown.last
    assert machine.path.read_text() == text
    assert machine.artifact() == made
    locked = machine.lock().good()
    assert shown.out == locked.out
    assert re.search(rf"native:{RELU}-\w+ +tuned \w+ → tuned {better[:8]} .* 1000\.00x → 1300\.00x", locked.out)
    (line,) = lines_changed(text, machine.path.read_text())
    assert line.startswith(f'"{RELU}')
    assert "gain = 1300.0" in line
    assert locked.last == "tuning.lock: 2 operators, 1 changed"
    assert machine.artifact() != made
    machine.workspace.idle_build("--locked")
    right(machine.workspace, relu, sigmoid)


def test_only_what_is_named_is_chosen_anew(locked: Machine) -> None:
    text = locked.path.read_text()
    for operator in (RELU, SIGMOID):
        locked.win(operator, 2, 1300.0)
    assert locked.lock("nothing*").code == 2
    assert locked.path.read_text() == text
    assert locked.lock("*sigmoid*").good().last == "tuning.lock: 2 operators, 1 changed"
    (line,) = lines_changed(text, locked.path.read_text())
    assert line.startswith(f'"{SIGMOID}')
    assert implementations(locked.workspace) == {RELU: "tuned", SIGMOID: "tuned"}


def test_where_a_model_fails_nothing_is_written(locked: Machine) -> None:
    text, made = locked.path.read_text(), locked.artifact()
    locked.workspace.write("bad.onnx", b"this is no model")
    locked.workspace.dodo(f'{NET},\nModel.onnx("bad", "bad.onnx")')
    locked.win(RELU, 2, 1300.0)
    done = locked.lock()
    assert done.code == 1
    assert "was left as it is" in done.err
    assert locked.path.read_text() == text
    assert locked.artifact() == made


def test_what_no_model_has_goes_and_what_is_left_out_stays(machine: Machine) -> None:
    machine.workspace.onnx("other.onnx", models.dense())
    machine.workspace.dodo(f'{NET},\nModel.onnx("other", "other.onnx")')
    machine.workspace.write("targets/second.toml", (machine.workspace.folder / "targets/native.toml").read_text())
    machine.lock().good()
    found = read(machine.path)
    assert found is not None
    assert {target: len(of) for target, of in found.targets.items()} == {"native": 3, "second": 3}
    text = machine.path.read_text()
    machine.workspace.dodo(NET)
    assert machine.lock("-t", "second").good().last == "tuning.lock: 5 operators, 1 gone"
    machine.workspace.write(FILE, text)
    (machine.workspace.folder / "targets/second.toml").unlink()
    assert machine.lock("-m", "net", "-n").good().last.startswith("tuning.lock: 3 operators, 3 gone")
    assert machine.lock().good().last == "tuning.lock: 2 operators, 4 gone"
    names = [name for name in Pins(machine.workspace.cache).names() if name.startswith("lock-")]
    assert len(names) == 1


def test_tuning_looks_past_it(locked: Machine) -> None:
    text = locked.path.read_text()
    locked.workspace.write(
        "spaces/lanes.py", lanes([[16, 1], [8, 1], [4, 1], [2, 1], [16, 2]]).replace("version = 1", "version = 2")
    )
    night = tune(locked.workspace, "*relu*")
    night.done.good()
    assert night.trials[RELU] >= 1
    assert locked.path.read_text() == text


def test_the_changes_as_json(machine: Machine) -> None:
    told = json.loads(machine.lock("--json", "-n").good().out)
    assert {plain(each["operator"]): each["after"]["use"] for each in told} == {RELU: "tuned", SIGMOID: "tuned"}
    assert all(each["before"] is None for each in told)
    assert not machine.path.exists()


def test_a_dry_run_changes_nothing_that_is_kept_of_the_artifact(machine: Machine) -> None:
    """Not its times either, which are those of what was built and not of what would be."""
    shown = machine.workspace.doit("report", "net").good().out
    machine.workspace.doit("rollback", f"{RELU}*", "--to", "none").good()
    machine.workspace.doit("lock", "-n").good()
    assert machine.workspace.doit("report", "net").good().out == shown
