"""Machines that have built, or sent, once for all tests of this folder; each test has a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import WorkspaceFolder
from tuning_runs import twin

from tests import servers
from tests.sharing.machines import Machine, Machines, filled, found


@pytest.fixture
def machines(new_workspace: Callable[[], WorkspaceFolder]) -> Machines:
    def make(environment: dict[str, str], activation: str = "Relu", more: int = 0) -> Machine:
        """`more` layers of the last kind have weights of their own, and no operator."""
        return Machine(filled(new_workspace(), activation, more), environment)

    return make


@pytest.fixture
def folder(tmp_path: Path) -> dict[str, str]:
    return {"TVMAKE_REMOTE": (tmp_path / "shared").as_uri()}


@pytest.fixture(scope="session")
def built_once(new_workspace: Callable[[], WorkspaceFolder]) -> WorkspaceFolder:
    workspace = filled(new_workspace())
    Machine(workspace).build().good()
    return workspace


@pytest.fixture
def built(built_once: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]) -> Machine:
    """A machine without a remote that has built everything; a copy for each test."""
    return Machine(twin(built_once, new_workspace()))


@pytest.fixture(scope="session")
def sent_once(
    new_workspace: Callable[[], WorkspaceFolder], tmp_path_factory: pytest.TempPathFactory
) -> tuple[WorkspaceFolder, Path]:
    workspace, shared = filled(new_workspace()), tmp_path_factory.mktemp("sent") / "shared"
    assert found(Machine(workspace, {"TVMAKE_REMOTE": shared.as_uri()}).build().good())[2] > 10
    return workspace, shared


@pytest.fixture
def sender(
    sent_once: tuple[WorkspaceFolder, Path],
    folder: dict[str, str],
    new_workspace: Callable[[], WorkspaceFolder],
    tmp_path: Path,
) -> Machine:
    """A machine that has built everything, and sent it to the folder; a copy of both for each test."""
    workspace, shared = sent_once
    shutil.copytree(shared, tmp_path / "shared")
    return Machine(twin(workspace, new_workspace()), folder)


@pytest.fixture
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a machine that uses a remote of some kind."""
    if request.param == "folder":
        yield {"TVMAKE_REMOTE": (tmp_path / "shared").as_uri()}
        return
    with ExitStack() as stack:
        server = stack.enter_context(getattr(servers, request.param)(tmp_path / request.param))
        yield {"TVMAKE_REMOTE": server.url, **server.environment}
