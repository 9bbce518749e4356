"""Builds at the same time: right, and no operator is compiled twice."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

import pytest

from pipeline import artifact

from .workspaces import Outcome, Place, Undisturbed, finish

pytest.importorskip("onnx")
from . import networks

WORKSPACES = 8


def at_once(places: list[Place], **environment: str) -> list[Outcome]:
    outcomes = [finish(build) for build in [place.start(**environment) for place in places]]
    for outcome in outcomes:
        assert outcome.code == 0, outcome.output
        assert outcome.summary["corrupt"] == 0, outcome.output
    return outcomes


def require_compiled_once(outcomes: list[Outcome]) -> None:
    assert sum(outcome.summary["compiled"] for outcome in outcomes) == networks.OPERATORS
    assert sum(outcome.summary["linked"] for outcome in outcomes) == 1


def require_whole_database(place: Place) -> None:
    with sqlite3.connect(place.folder / ".doit.db") as database:
        assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
    assert f"codegen:native:{next(iter(operators(place)))}" in place.run("list", "--all").output
    assert place.build().output.endswith("nothing to do\n")


def operators(place: Place) -> set[str]:
    listed = place.run("list", "--all").output.split()
    return {word.removeprefix("codegen:native:") for word in listed if word.startswith("codegen:native:")}


@pytest.fixture
def right(undisturbed: Undisturbed) -> dict[str, bytes]:
    return undisturbed.right[8]


def two_in_one_workspace(place: Place, right: dict[str, bytes], rounds: int) -> None:
    networks.convolutional(place.folder / "net.onnx", 8)
    for i in range(rounds):
        if i % 2 == 0:
            place.forget()  # doit's database is made by two at once; otherwise it is there
        place.empty_store()
        for path in (place.folder / "artifacts").rglob("lib.so"):
            path.unlink()
        require_compiled_once(at_once([place, place]))
        assert place.artifacts() == right
        require_whole_database(place)
        assert len(operators(place)) == networks.OPERATORS


def test_two_builds_in_one_workspace(place: Place, right: dict[str, bytes]) -> None:
    two_in_one_workspace(place, right, 1)


@pytest.mark.slow
def test_twenty_times_two_builds_in_one_workspace(place: Place, right: dict[str, bytes]) -> None:
    two_in_one_workspace(place, right, 20)


def test_two_builds_that_only_write_the_artifact(place: Place, right: dict[str, bytes]) -> None:
    """Everything is in the store, so both come to the artifact's folder at about the same time."""
    networks.convolutional(place.folder / "net.onnx", 8)
    place.build()
    for _ in range(3):
        place.forget()
        outcomes = at_once([place, place])
        assert [outcome.summary["compiled"] for outcome in outcomes] == [0, 0]
        assert place.artifacts() == right
        assert [path.name for path in (place.folder / "artifacts" / "native").iterdir()] == ["net"]


def test_an_artifact_that_another_build_put_there_a_moment_ago_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lib.so").write_text(name)
    with monkeypatch.context() as moment_before:
        moment_before.setattr(Path, "exists", lambda path: False)
        artifact._exchange(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "lib.so").read_text() == "new"


def test_what_a_killed_build_left_beside_an_artifact_is_removed_after_a_day(place: Place) -> None:
    networks.tiny(place.folder / "net.onnx")
    place.build()
    folder = place.folder / "artifacts" / "native"
    for name, age in ((".net-old", 2 * 86400), (".net-in-use", 60)):
        (folder / name).mkdir()
        (folder / name / "lib.so").touch()
        os.utime(folder / name, (time.time() - age,) * 2)
    (folder / "net" / "manifest.json").unlink()
    place.build()
    assert {path.name for path in folder.iterdir()} == {"net", ".net-in-use"}


def test_eight_workspaces_on_one_store(tmp_path: Path, right: dict[str, bytes]) -> None:
    places = [Place(tmp_path / f"workspace-{i}", tmp_path / "store") for i in range(WORKSPACES)]
    for place in places:
        networks.convolutional(place.folder / "net.onnx", 8)
    require_compiled_once(at_once(places, TVMAKE_JOBS="1"))
    for place in places:
        assert place.artifacts() == right
        place.require_nobody_left()
