"""Workspaces whose operators are tuned, and locked, once for all tests of this folder; each test has a copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import WorkspaceFolder
from tuning_runs import fill, tune

from tests.lock.machines import RELU, SIGMOID, Machine, copied


@pytest.fixture(scope="session")
def tuned_once(new_workspace: Callable[[], WorkspaceFolder]) -> WorkspaceFolder:
    """Two operators, for each of which four candidates were tried."""
    workspace = new_workspace()
    fill(workspace, "Relu", "Sigmoid")
    tune(workspace).done.good()
    machine = Machine(workspace)
    for operator in (RELU, SIGMOID):
        for number in range(4):
            machine.win(operator, number, 1000.0 if number == 0 else 500.0 + number)
    machine.build().good()
    return workspace


@pytest.fixture
def machine(tuned_once: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]) -> Machine:
    return copied(tuned_once, new_workspace())


@pytest.fixture(scope="session")
def locked_once(tuned_once: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]) -> WorkspaceFolder:
    machine = copied(tuned_once, new_workspace())
    machine.lock().good()
    return machine.workspace


@pytest.fixture
def locked(locked_once: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]) -> Machine:
    return copied(locked_once, new_workspace())
