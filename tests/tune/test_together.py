"""Runs of `doit tune` that share a store or a remote: they share the work, and time nothing twice."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import WorkspaceFolder
from tuning_runs import (
    FEW,
    MANY,
    RELU,
    event,
    fill,
    finish,
    idle,
    implementations,
    lanes,
    relu,
    require_nothing_timed_twice,
    right,
    running,
    sigmoid,
    timed_in_all,
    tune,
)


def at_once(workspaces: Sequence[WorkspaceFolder], tiles: Sequence[Sequence[int]]) -> None:
    """A run in each of these workspaces, which have one store and the same two operators, all at once."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(running(each)) for each in workspaces]
        nights = [finish(process) for process in processes]
    for night in nights:
        night.done.good()
    assert sum(night.trials.total() for night in nights) == 2 * len(tiles)
    require_nothing_timed_twice(workspaces[0])
    for each in workspaces:
        idle(each)


def test_two_at_once_share_the_work(workspace: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]) -> None:
    other = new_workspace()
    other.cache = workspace.cache
    fill(workspace, "Relu", "Sigmoid")
    fill(other, "Sigmoid", "Relu")
    at_once([workspace, other], FEW)


@pytest.mark.slow
def test_four_at_once_in_two_workspaces_share_the_work(
    workspace: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]
) -> None:
    other = new_workspace()
    other.cache = workspace.cache
    fill(workspace, "Relu", "Sigmoid", space=lanes(MANY))
    fill(other, "Sigmoid", "Relu", space=lanes(MANY))
    at_once([workspace, other, workspace, other], MANY)


@pytest.mark.parametrize("tiles", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_two_machines_tune_through_a_remote_and_never_the_same_candidate(
    new_workspace: Callable[[], WorkspaceFolder], tmp_path: Path, tiles: list[list[int]]
) -> None:
    remote = {"TVMAKE_REMOTE": (tmp_path / "shared").as_uri()}
    one, other, third = (new_workspace() for _ in range(3))
    for workspace in (one, other, third):
        fill(workspace, "Relu", "Sigmoid", space=lanes(tiles))
    with running(one, **remote) as first, running(other, **remote) as second:
        nights = [finish(first), finish(second)]
    for night in nights:
        night.done.good()
    assert third.build(**remote).good().compiled <= 2
    assert set(implementations(third).values()) == {"tuned"}
    right(third, relu, sigmoid)
    require_nothing_timed_twice(third)
    assert timed_in_all(third) == sum(night.ended["timed"] for night in nights) == 2 * len(tiles)
    idle(third, **remote)


def test_what_a_machine_found_before_it_was_killed_is_on_the_remote(
    new_workspace: Callable[[], WorkspaceFolder], tmp_path: Path
) -> None:
    remote = {"TVMAKE_REMOTE": (tmp_path / "shared").as_uri()}
    one, other = new_workspace(), new_workspace()
    for workspace in (one, other):
        fill(workspace, "Relu", space=lanes(MANY))
    with running(one, **remote) as process:
        event(process, "batch")
        event(process, "batch")
        process.send_signal(signal.SIGKILL)
    other.build(**remote).good()
    assert timed_in_all(other) >= 4
    require_nothing_timed_twice(other)


def test_tuning_goes_on_without_its_remote(relu_built: WorkspaceFolder) -> None:
    night = tune(relu_built, TVMAKE_REMOTE="http://127.0.0.1:1")
    night.done.good()
    assert night.trials == {RELU: 4}
    assert night.done.err.count("going on without it") == 1
