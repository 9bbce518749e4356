"""Boards that the tests of this folder share, a store of its own for each, and candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import measuring
from pipeline.config import Device
from pipeline.linker import compile_source
from pipeline.measuring import Contender
from tests.devices.boards import SOURCE, STARTING, Boards


@pytest.fixture(scope="session")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boards]:
    """A tracker with two servers of the key "board". Tests that end one start it again, or take keys of their own."""
    made = Boards(tmp_path_factory.mktemp("boards"))
    made.start("board")
    made.start("board")
    try:
        made.await_free("board", 2)
        yield made
    finally:
        made.close()


@pytest.fixture
def device(boards: Boards) -> Device:
    return Device(boards.address, "board", timeout=120.0, wait=STARTING)


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVMAKE_CACHE", str(tmp_path / "store"))
    monkeypatch.setattr(measuring, "_known", type(measuring._known)())


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., Contender]:
    """Makes a contender of a function's body: y = what it makes of x, four floats."""

    def made(name: str, body: str, triple: str = "") -> Contender:
        path = tmp_path / f"{name}.o"
        path.write_bytes(compile_source(SOURCE.format(body=body).encode(), triple))
        return Contender(name, "main", {"f.o": path})

    return made
