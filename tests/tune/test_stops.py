"""What stops `doit tune`: a kill, a budget, a signal. Nothing that was told is lost."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import WorkspaceFolder
from tuning_runs import (
    MANY,
    RELU,
    dense,
    event,
    finish,
    idle,
    implementations,
    lanes,
    relu,
    require_nothing_timed_twice,
    right,
    running,
    standings,
    timed_in_all,
    tune,
)


@pytest.fixture
def many(relu_built: WorkspaceFolder) -> WorkspaceFolder:
    """A workspace with so much to tune that there is time to stop it."""
    relu_built.write("spaces/lanes.py", lanes(MANY))
    return relu_built


def at_a_stretch(workspace: WorkspaceFolder) -> None:
    """What is left is measured in few batches."""
    workspace.edit("batch = 4", "batch = 24", "targets/native.toml")


def killed(workspace: WorkspaceFolder, kills: int, seed: int, folder: Path) -> None:
    """Kills so many runs, each after some batches, at a random moment; then one goes to its end."""
    chance = random.Random(seed)
    told = 0
    for _ in range(kills):
        with running(workspace, TMPDIR=str(folder)) as process:
            for _ in range(chance.randint(1, 2)):
                batch = event(process, "batch")
                told += batch["timed"] + sum(batch["failed"].values())
            time.sleep(chance.uniform(0, 0.5))
            process.kill()
        kept = timed_in_all(workspace)
        assert kept >= told, "a batch that was told is lost"
        require_nothing_timed_twice(workspace)
        told = kept
    left = list(folder.glob("tvmake-*"))
    assert left
    for each in left:
        os.utime(each, (time.time() - 120,) * 2)
    at_a_stretch(workspace)
    night = tune(workspace, TMPDIR=str(folder))
    night.done.good()
    assert night.trials.total() == len(MANY) - told
    assert all(len(each.trials) == len(MANY) for each in standings(workspace).values())
    require_nothing_timed_twice(workspace)
    assert not list(folder.glob("tvmake-*"))
    idle(workspace)


def test_what_is_killed_loses_nothing_that_was_told(many: WorkspaceFolder, tmp_path: Path) -> None:
    killed(many, 3, seed=1, folder=tmp_path)


def test_a_budget_is_kept_a_repeated_one_does_nothing_and_a_larger_one_goes_on(many: WorkspaceFolder) -> None:
    first = tune(many, "--budget", "2s")
    first.done.good()
    assert 0 < first.trials.total() < len(MANY)
    idle(many, "--budget", "2s")
    at_a_stretch(many)
    rest = tune(many, "--budget", "8h")
    rest.done.good()
    assert first.trials.total() + rest.trials.total() == len(MANY)
    require_nothing_timed_twice(many)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_it_after_the_batch_and_the_best_so_far_builds(
    many: WorkspaceFolder, number: signal.Signals
) -> None:
    with running(many) as process:
        event(process, "retest", won=True)
        process.send_signal(number)
        night = finish(process)
    assert night.done.code == 130
    assert night.ended["end"] == "stopped"
    assert "stopped\n" in night.done.err
    assert "goes on from here" in night.done.err
    assert "Traceback" not in night.done.err
    assert 0 < timed_in_all(many) < len(MANY)
    many.build().good()
    assert implementations(many) == {RELU: "tuned"}
    right(many, relu)


def test_a_second_signal_ends_it_at_once(dense_built: WorkspaceFolder) -> None:
    dense(dense_built, "loop", "right", patience=60)
    with running(dense_built) as process:
        event(process, "phase", phase="measuring")
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        night = finish(process)
    assert time.monotonic() - begun < 5
    assert night.done.code == 130
    assert "Traceback" not in night.done.err
