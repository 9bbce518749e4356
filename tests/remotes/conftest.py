"""Places that remotes are tested on: a folder, and the real servers that are installed here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.remotes.machines import Machine
from tests.remotes.places import KINDS, Place
from tests.servers import Server


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxies and no credentials but a test's own."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("AWS_", "GOOGLE_", "AZURE_", "GRPC_")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="package")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """Servers by name, each started once, when the first test asks for it."""
    running: dict[str, Server] = {}
    with contextlib.ExitStack() as stack:

        def get(name: str) -> Server:
            if name not in running:
                running[name] = stack.enter_context(KINDS[name](tmp_path_factory.mktemp(name)))
            return running[name]

        yield get


def _place(url: str, server: Server | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    folder.mkdir()
    for name, value in (server.environment if server is not None else {}).items():
        monkeypatch.setenv(name, value)
    place = Place(url, server, folder, [])
    yield place
    for remote in place.opened:
        remote.close()


@pytest.fixture(params=["folder", *KINDS])
def place(
    request: pytest.FixtureRequest,
    shared: Callable[[str], Server],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Place]:
    """Every kind of remote in turn. Servers go on between tests, so that what a test puts has to be its own."""
    server = None if request.param == "folder" else shared(request.param)
    url = server.url if server is not None else f"file://{tmp_path}/shared"
    yield from _place(url, server, tmp_path / "mine", monkeypatch)


@pytest.fixture(params=list(KINDS))
def frail(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Every kind of server in turn, for this test alone: it may be killed."""
    with KINDS[request.param](tmp_path / "server") as server:
        yield from _place(server.url, server, tmp_path / "mine", monkeypatch)


@pytest.fixture
def between(tmp_path: Path) -> Path:
    return tmp_path / "shared"


@pytest.fixture
def one(tmp_path: Path, between: Path) -> Machine:
    return Machine(tmp_path / "one", between)


@pytest.fixture
def other(tmp_path: Path, between: Path) -> Machine:
    return Machine(tmp_path / "other", between)
