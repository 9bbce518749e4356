"""Workspaces that are built and not tuned, once for all tests of this folder; each test has a copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import WorkspaceFolder
from tuning_runs import dense, fill, twin


@pytest.fixture(scope="session")
def relu_once(new_workspace: Callable[[], WorkspaceFolder]) -> WorkspaceFolder:
    workspace = new_workspace()
    fill(workspace, "Relu")
    workspace.build().good()
    return workspace


@pytest.fixture
def relu_built(relu_once: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]) -> WorkspaceFolder:
    """One operator with few candidates."""
    return twin(relu_once, new_workspace())


@pytest.fixture(scope="session")
def dense_once(new_workspace: Callable[[], WorkspaceFolder]) -> WorkspaceFolder:
    workspace = new_workspace()
    dense(workspace, "right")
    workspace.build().good()
    return workspace


@pytest.fixture
def dense_built(dense_once: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]) -> WorkspaceFolder:
    """One operator whose space holds what is planted there."""
    return twin(dense_once, new_workspace())
