"""Builds follow tuning.lock to the letter, or say what cannot be followed and why."""

from __future__ import annotations

import os
import re
import shutil
import time

import models
import msgspec
import pytest
from conftest import WorkspaceFolder
from test_libraries import MINE
from tuning_runs import NET, implementations, lanes, plain

from pipeline.lock import FILE, pins_of
from pipeline.store import Pins, Store
from pipeline.tuning.records import Outcome, Record, RetestRecord, TrialRecord, WithdrawnRecord, encoded
from tests.lock.machines import RELU, SIGMOID, Machine


def test_what_was_thrown_away_or_is_no_longer_the_best_is_still_what_is_locked(locked: Machine) -> None:
    made = locked.artifact()
    sets, key = Store(locked.workspace.cache).sets, locked.key(RELU)
    gone = WithdrawnRecord(records=tuple(sets.names(key)), measured=True, at=time.time())
    sets.add(key, [encoded(gone)], sets.about(key))
    locked.build("--locked").good()
    assert locked.artifact() == made


def test_an_operator_without_a_line(machine: Machine) -> None:
    done = machine.lock("*sigmoid*").good()
    assert list(machine.entries()) == [SIGMOID]
    assert re.search(rf"WARNING native: {RELU}-\w+ is not in tuning\.lock: doit lock", done.err)
    machine.workspace.idle_build()
    before = machine.artifact()
    failed = machine.build("--locked")
    assert failed.code == 1
    ((task, said),) = failed.failures.items()
    assert RELU in task
    assert "is not in tuning.lock" in said
    assert f"doit lock '{RELU}-" in said
    assert machine.artifact() == before, "what was there stays"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"candidate": "0" * 64}, "is neither here nor on a remote"),
        pytest.param({"function": "0" * 64}, "another function of it than the locked one", marks=pytest.mark.slow),
        pytest.param({"use": "onednn"}, "onednn is not in the order of targets/native.toml", marks=pytest.mark.slow),
        ({"use": "default"}, "another function of it than the locked one"),
        pytest.param({"workload": "0" * 64}, "is not in tuning.lock", marks=pytest.mark.slow),
    ],
)
def test_a_line_that_cannot_be_followed(locked: Machine, change: dict[str, str], said: str) -> None:
    made = locked.artifact()
    locked.change(RELU, **change)
    failed = locked.build("--locked")
    assert failed.code == 1
    (told,) = failed.failures.values()
    assert f"dispatch of native:{RELU}-" in told
    assert said in told
    assert "→" in told
    assert locked.artifact() == made
    done = locked.build().good()
    assert said in done.err
    assert RELU in next(line for line in done.err.splitlines() if said in line)
    locked.workspace.idle_build()
    assert locked.artifact()["lib.so"] == made["lib.so"], "the free choice is the same here"
    assert locked.build("--locked").code == 1, "a build that made do is not enough"


def test_what_another_compiler_made_is_compared_before_it_is_used(locked: Machine) -> None:
    made = locked.artifact()

    def older(record: Record) -> Record:
        is_made = isinstance(record, TrialRecord | RetestRecord)
        return msgspec.structs.replace(record, tools={"tvm": "0.1"}) if is_made else record

    locked.rewrite(RELU, older)
    done = locked.build("--locked").good()
    assert "timed the candidates" in done.err, done.err
    assert {plain(name) for name in re.findall(r"timed the candidates of native:(\S+)", done.err)} == {RELU}
    assert locked.artifact() == made


def test_what_is_wrong_is_not_built(locked: Machine) -> None:
    sets, key = Store(locked.workspace.cache).sets, locked.key(RELU)
    wrong = msgspec.structs.replace(locked.candidates(RELU)[0], outcome=Outcome.WRONG, seconds=None, at=time.time())
    sets.add(key, [encoded(wrong)], sets.about(key))
    assert "was found to be wrong" in locked.build("--locked").err
    assert "was found to be wrong" in locked.build().good().err


def test_a_space_that_makes_another_function(locked: Machine) -> None:
    locked.workspace.write("spaces/lanes.py", lanes().replace("schedule.split(loops[0], [None, rows])", "pass"))
    assert "makes another function" in locked.build("--locked").err
    locked.workspace.write("spaces/lanes.py", lanes())
    locked.build("--locked").good()


def test_a_library_of_another_version_or_none(workspace: WorkspaceFolder) -> None:
    workspace.onnx("net.onnx", models.dense())
    workspace.dodo(NET)
    workspace.write("libraries/mine.py", MINE)
    workspace.write("targets/native.toml", 'target = "native"\norder = ["library", "default"]\nlibraries = ["mine"]\n')
    machine = Machine(workspace)
    assert re.search(r"not locked → mine 1", machine.lock().good().out)
    (found,) = machine.entries().values()
    assert (found.use, found.version) == ("mine", "1")
    assert 'use = "mine", version = "1"' in machine.path.read_text()
    workspace.idle_build("--locked")
    workspace.write("libraries/mine.py", MINE.replace('Installed("1"', 'Installed("2"'))
    assert "mine 1 is locked, and 2 is what is installed here" in machine.build("--locked").err
    workspace.write("libraries/mine.py", MINE.replace('return Installed("1", (), {})', "return None"))
    assert "mine offers nothing for it here" in machine.build("--locked").err
    assert "mine offers nothing for it here" in machine.build().good().err
    assert set(implementations(workspace).values()) == {"default"}


def test_rules_that_forbid_what_is_locked(locked: Machine) -> None:
    path = locked.workspace.folder / "targets/native.toml"
    rule = '[[operators]]\nmatch = "*relu*"\nforbid = ["tuned"]\n'
    locked.workspace.write("targets/native.toml", path.read_text() + rule)
    assert "forbids tuned" in locked.build("--locked").err
    done = locked.build().good()
    assert "forbids tuned" in done.err
    assert implementations(locked.workspace)[RELU] == "default"


@pytest.mark.parametrize("text", ["format = 9\n", "<<<<<<< HEAD\n", "nonsense\n"])
def test_a_broken_lock_stops_every_command_and_stays(machine: Machine, text: str) -> None:
    machine.workspace.write(FILE, text)
    for run in (machine.build, machine.lock):
        done = run()
        assert done.code == 2
        assert done.err.count("ERROR") == 1
        assert "FAILED" not in done.err
        assert "tuning.lock" in done.err
        assert machine.path.read_text() == text
    assert machine.build("--locked").code == 2


def test_plain_doit_follows_it_as_well(locked: Machine) -> None:
    made = locked.artifact()
    locked.win(RELU, 2, 1300.0)
    locked.workspace.doit().good()
    assert locked.artifact() == made
    locked.workspace.write(FILE, "nonsense\n")
    done = locked.workspace.doit()
    assert done.code != 0
    assert "tuning.lock is broken" in done.out + done.err
    assert "Traceback" not in done.out + done.err
    assert locked.artifact() == made


def test_without_a_lock_there_is_nothing_to_be_exact_about(machine: Machine) -> None:
    machine.build().good()
    done = machine.build("--locked")
    assert done.code == 2
    assert "there is no tuning.lock to build by" in done.err
    assert "doit lock" in done.err
    machine.lock().good()
    reasons = [each["reason"] for each in machine.workspace.manifest("net")["operators"]]
    machine.path.unlink()
    machine.build().good()
    assert reasons != [each["reason"] for each in machine.workspace.manifest("net")["operators"]]


def test_what_is_locked_stays_in_the_store(locked: Machine) -> None:
    pins = Pins(locked.workspace.cache)
    (original,) = pins.names()
    pins.remove(original)  # of the workspace that this one is a copy of
    locked.build().good()
    (name,) = pins.names()
    assert name.startswith(pins_of(locked.workspace.folder))
    for kind in ("ac", "cas"):
        for path in (locked.workspace.cache / kind).rglob("*"):
            os.utime(path, (0, 0))
    locked.workspace.doit("cache", "gc", "--size", "0")
    shutil.rmtree(locked.workspace.folder / "artifacts")
    (locked.workspace.folder / ".doit.db").unlink()
    assert not locked.build("--locked", forbid_tvm=True).good().ran
    locked.path.unlink()
    locked.build().good()
    assert pins.names() == []
