"""`doit tune`, `doit rollback` and `doit invalidate` say where tuning.lock keeps builds from what they found or did."""

from __future__ import annotations

import json

import pytest
from conftest import Done
from tuning_runs import plain, tune

from pipeline.lock import FILE, better_held_back, held_back_for
from pipeline.store import Store
from tests.lock.machines import RELU, SIGMOID, Machine

HELD = "tuning.lock holds this back for {}: doit lock"


def run(machine: Machine, *arguments: str) -> Done:
    return machine.workspace.doit(*arguments, forbid_tvm=True)


def last(done: Done) -> str:
    return done.good().out.splitlines()[-1]


def test_the_words() -> None:
    assert better_held_back([]) == ""
    assert better_held_back([1.3]) == "tuning.lock holds back a better winner (1.3 times): doit lock"
    assert better_held_back([1.1, 1.3]) == "tuning.lock holds back 2 better winners (up to 1.3 times): doit lock"
    assert held_back_for(1) == HELD.format("1 operator")
    assert held_back_for(2) == HELD.format("2 operators")


def test_a_rollback_that_the_lock_does_not_follow(locked: Machine) -> None:
    made = locked.artifact()
    assert last(run(locked, "rollback", f"{RELU}*", "--to", "none")) == HELD.format("1 operator")
    locked.build().good()
    assert locked.artifact() == made, "it is as was said"
    done = run(locked, "rollback", f"{RELU}*", "--to", "best")
    assert "doit build" in last(done), "that is what is locked"

    named = locked.entries()[RELU].candidate
    locked.win(RELU, 2, 1300.0)
    assert last(run(locked, "rollback", f"{RELU}*", "--to", "best")) == HELD.format("1 operator")
    assert "doit build" in last(run(locked, "rollback", f"{RELU}*", "--to", named[:12]))
    locked.path.unlink()
    assert "doit build" in last(run(locked, "rollback", f"{RELU}*", "--to", "none"))


def test_a_rollback_where_the_lock_names_no_tuned_function(locked: Machine) -> None:
    locked.change(RELU, use="default", candidate="")
    assert "doit build" in last(run(locked, "rollback", f"{RELU}*", "--to", "none"))
    assert last(run(locked, "rollback", f"{RELU}*", "--to", "best")) == HELD.format("1 operator")
    locked.workspace.edit('["tuned", "default"]', '["default", "tuned"]', "targets/native.toml")
    done = run(locked, "rollback", f"{RELU}*", "--to", "best")
    assert "doit build" in last(done), "what is tuned is chosen for it with no lock either"


def test_what_is_thrown_away_and_stays_locked(locked: Machine) -> None:
    made = locked.artifact()
    shown = run(locked, "invalidate", "--all")
    assert "Nothing was changed" in shown.good().out
    assert "holds this back" not in shown.out
    done = run(locked, "invalidate", "--all", "--yes")
    assert last(done) == HELD.format("2 operators")
    assert "doit build" not in done.out
    locked.build().good()
    assert locked.artifact() == made, "it is as was said"


def test_what_is_thrown_away_and_is_not_what_is_locked(locked: Machine) -> None:
    locked.change(RELU, use="default", candidate="")
    told = json.loads(run(locked, "invalidate", "--all", "--json").good().out)
    assert {plain(each["operator"]): each["held_back"] for each in told} == {RELU: False, SIGMOID: True}
    done = run(locked, "invalidate", "--all", "--json", "--yes").good()
    assert json.loads(done.out) == told, "nothing but JSON on standard output"
    assert done.err.splitlines()[-1] == HELD.format("1 operator")
    assert "doit build" in done.err


def test_what_is_thrown_away_without_a_lock(locked: Machine) -> None:
    locked.path.unlink()
    assert "doit build" in last(run(locked, "invalidate", "--all", "--yes"))


def test_a_night_says_how_many_better_ones_are_known(locked: Machine) -> None:
    assert "tuning.lock" not in tune(locked.workspace).done.good().err
    locked.win(RELU, 2, 1300.0)
    locked.win(SIGMOID, 3, 1200.0)
    two = "tuning.lock holds back 2 better winners (up to 1.3 times): doit lock"
    one = "tuning.lock holds back a better winner (1.2 times): doit lock"
    assert tune(locked.workspace).done.good().err.splitlines()[-1] == two
    assert tune(locked.workspace, f"{SIGMOID}*").done.good().err.splitlines()[-1] == one
    assert two in locked.build().good().err, "a build says the same"


@pytest.mark.parametrize("command", [["rollback", f"{RELU}*", "--to", "none"], ["invalidate", "--all", "--yes"]])
def test_a_broken_lock_is_told_before_anything_is_decided(locked: Machine, command: list[str]) -> None:
    locked.workspace.write(FILE, "nonsense\n")
    sets, key = Store(locked.workspace.cache).sets, locked.key(RELU)
    before = sets.names(key)
    done = run(locked, *command)
    assert done.code == 2
    assert "tuning.lock is broken" in done.err
    assert sets.names(key) == before
