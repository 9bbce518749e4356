"""The journal: what builds were made of, told line by line, whatever befalls the file."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import models
import msgspec
import pytest
from conftest import WorkspaceFolder
from hypothesis import given
from hypothesis import strategies as st

from pipeline import artifact, journal
from pipeline.hashing import Digest, key_of
from pipeline.journal import KEPT, Events, Journal, Operator, Origin, State, patch, patched
from pipeline.memoizer import Action, Memoizer
from pipeline.remotes import open_remote
from pipeline.remotes.cache import RemoteCache
from pipeline.remotes.settings import Policy
from pipeline.stages import CODEGEN
from pipeline.store import ActionEntry, Store
from pipeline.toolchain import Toolchain
from pipeline.types import MANIFEST_FORMAT, CheckState, Manifest, Reference, Trial
from pipeline.workers import Workers

_fork = multiprocessing.get_context("fork")
TREES: Any = st.recursive(
    st.integers() | st.text() | st.booleans() | st.lists(st.integers() | st.none()),
    lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
)
MAPPINGS = st.dictionaries(st.text(max_size=2), TREES, max_size=5)


def operator(name: str, key: str) -> Operator:
    trials = (Trial("rules", 1e-6), Trial("manual", refused="another result"))
    return Operator(name, Digest.of(name.encode()), ("2x4:float32",), 1, "rules", "", trials, {"codegen:rules": key})


def state(tvm: str = "1", **operators: str) -> State:
    made = {name: operator(name, key) for name, key in operators.items()}
    return State(tvmake="0.1.0", tools={"tvm": tvm}, settings={"models": None, "order": ["rules"]}, operators=made)


@pytest.fixture
def book(tmp_path: Path) -> Journal:
    return Journal(tmp_path, "native", "net")


def lines(book: Journal) -> list[dict[str, Any]]:
    return [json.loads(line) for line in book.path.read_text().splitlines()]


@given(MAPPINGS, MAPPINGS)
def test_a_patch_makes_one_tree_of_the_other(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert patched(before, patch(before, after)) == after
    assert patch(after, after) == {}


def test_builds_are_told_as_they_were_noted(book: Journal) -> None:
    assert book.builds() == []
    told = [state(a="k1", b="k2"), state(a="k1", b="k3"), state("2", b="k3"), state("2", b="k3")]
    for number, each in enumerate(told):
        book.append(each, Events(artifact={"lib.so": "missing"} if number == 3 else {}), 100.0 + number)
    found = book.builds()
    assert [(build.number, build.at) for build in found] == [(1, 100.0), (2, 101.0), (3, 102.0), (4, 103.0)]
    assert [journal.plain(build.state) for build in found] == [journal.plain(each) for each in told]
    assert found[0].state.operators["a"] == operator("a", "k1")
    assert found[-1].events.artifact == {"lib.so": "missing"}
    written = lines(book)
    assert written[1]["news"] == {"operators": {"b": {"actions": {"codegen:rules": "k3"}}}}
    assert written[3] == {"format": 1, "build": 4, "on": 3, "at": 103.0, "artifact": {"lib.so": "missing"}}


def test_where_entries_came_from(book: Journal) -> None:
    key, other = "a" * 64, "b" * 64
    before = msgspec.structs.replace(state(a=key), origins={key[: journal.SHORT]: Origin()})
    after = msgspec.structs.replace(state(a=other), origins={other[: journal.SHORT]: Origin("there", "ada", True)})
    book.append(before, Events(), 1.0)
    book.append(after, Events(), 2.0)
    book.append(after, Events(again={other: "corrupted"}), 3.0)
    first, second, third = book.builds()
    assert first.state.origin(key) == Origin()
    assert second.state.origin(other) == Origin("there", "ada", True)
    assert second.state.origin(key) is None
    assert second.has_news_of(other, first.state)
    assert third.has_news_of(other, second.state), "it was made again"
    book.append(after, Events(), 4.0)
    assert not book.builds()[-1].has_news_of(other, third.state)


@pytest.mark.parametrize("torn", ["cut", "no end", "rubbish"])
def test_a_torn_line_is_passed_over_and_the_next_stands(book: Journal, torn: str) -> None:
    for number in range(3):
        book.append(state(a=f"k{number}"), Events(), float(number))
    text = book.path.read_bytes()
    damaged = {"cut": text[:-20], "no end": text.rstrip(b"\n"), "rubbish": text + b"\0\xff{"}[torn]
    book.path.write_bytes(damaged)
    kept = 2 if torn == "cut" else 3
    assert [build.number for build in book.builds()] == list(range(1, kept + 1))
    book.append(state(a="new"), Events(), 9.0)
    found = book.builds()
    assert len(found) == kept + 1
    assert found[-1].state.operators["a"].actions == {"codegen:rules": "new"}


def test_what_stands_on_a_lost_line_is_lost_until_the_next_whole_one(book: Journal) -> None:
    for number in range(4):
        book.append(state(a=f"k{number}"), Events(), float(number))
    first, _, *rest = book.path.read_bytes().splitlines(keepends=True)
    book.path.write_bytes(b"".join([first, *rest]))
    assert [build.number for build in book.builds()] == [1]
    book.append(state(a="new"), Events(), 9.0)
    assert [build.number for build in book.builds()] == [1, 5]
    assert lines(book)[-1].get("on", 0) == 0


def test_what_another_version_wrote_is_passed_over(book: Journal) -> None:
    book.append(state(a="k"), Events(), 1.0)
    with open(book.path, "a") as stream:
        stream.write('{"format": 2, "build": 2, "at": 2.0, "on": 1, "news": {"tools": [1]}}\n')
    assert [build.number for build in book.builds()] == [1]
    book.append(state(a="l"), Events(), 3.0)
    assert [build.state.operators["a"].actions["codegen:rules"] for build in book.builds()] == ["k", "l"]
    with open(book.path, "a") as stream:
        stream.write('{"format": 1, "build": 9, "at": 2.0, "on": 0, "news": {"tools": [1]}}\n')
    assert book.builds()[-1].state == State(), "what makes no sense is nothing"


def test_only_the_latest_are_kept_and_told_as_before(book: Journal) -> None:
    for number in range(200):
        book.append(state(str(number // 7), a=f"k{number // 3}"), Events(), float(number))
    found = book.builds()
    assert KEPT <= len(found) <= KEPT + 14
    assert [build.number for build in found] == list(range(201 - len(found), 201))
    for build in found:
        assert build.state.tools == {"tvm": str((build.number - 1) // 7)}
        assert build.state.operators["a"].actions == {"codegen:rules": f"k{(build.number - 1) // 3}"}
    assert [path.name for path in book.path.parent.iterdir()] == ["net.jsonl"]


def _append(folder: Path, name: str) -> None:
    book = Journal(folder, "native", "net")
    for number in range(20):
        book.append(state(a=f"{name}{number}"), Events(), float(number))


def test_processes_write_at_once_and_nothing_is_torn(tmp_path: Path) -> None:
    writers = [_fork.Process(target=_append, args=(tmp_path, name)) for name in "xyz"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = Journal(tmp_path, "native", "net").builds()
    assert [build.number for build in found] == list(range(1, 61))
    keys = [build.state.operators["a"].actions["codegen:rules"] for build in found]
    assert sorted(keys) == sorted(f"{name}{number}" for name in "xyz" for number in range(20))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    Journal(tmp_path, "native", "net").append(state(), Events(), 1.0)
    tmp_path.chmod(0o755)


def test_a_file_in_its_place_is_no_error(tmp_path: Path) -> None:
    (tmp_path / journal.FOLDER).write_text("mine")
    Journal(tmp_path, "native", "net").append(state(), Events(), 1.0)
    assert Journal(tmp_path, "native", "net").builds() == []


# what the journal is told


def filed(store: Store, key: str, data: bytes = b"object") -> ActionEntry:
    entry = ActionEntry("codegen", {"stage": "codegen"}, {"object": store.put(data)}, 1.0)
    store.commit(key, entry)
    return entry


def test_what_is_wrong_with_an_artifact(tmp_path: Path, artifact_folder: Path) -> None:
    assert artifact.damage(tmp_path / "none") == {"": "missing"}
    folder = tmp_path / "made"
    shutil.copytree(artifact_folder, folder)
    assert artifact.damage(folder) == {}
    (folder / "mine").mkdir()
    (folder / "mine" / "notes").write_text("mine")
    (folder / "lib.so").unlink()
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert artifact.damage(folder) == {"lib.so": "missing", weights.name: "changed", "mine/notes": "alien"}
    (folder / "manifest.json").write_text("{")
    assert artifact.damage(folder) == {"manifest.json": "changed"}
    (folder / "manifest.json").unlink()
    assert artifact.damage(folder) == {"manifest.json": "missing"}


@pytest.fixture
def artifact_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    folder.mkdir()
    for name in ("lib.so", "weights.safetensors"):
        (folder / name).write_bytes(name.encode() * 9)
    files = {path.name: Digest.of_file(path) for path in folder.iterdir()}
    made = Manifest(
        MANIFEST_FORMAT, "net", "native", {}, {}, (), (), (), "beside", files, Reference(CheckState.PASSED), ()
    )
    (folder / "manifest.json").write_bytes(msgspec.json.encode(made))
    return folder


def test_the_memoizer_knows_what_was_lost(tmp_path: Path) -> None:
    action = Action(CODEGEN, "native:a")
    memoizer = Memoizer(Store(tmp_path / "store"), Workers(tmp_path / "store", 1), Toolchain({}))
    key = key_of(action.components(memoizer.toolchain))
    assert memoizer.found(action) is None
    assert memoizer.lost(key) == ()
    entry = filed(memoizer.store, key)
    assert memoizer.found(action) is not None
    assert memoizer.lost(key) == ()
    again = Memoizer(Store(tmp_path / "store"), memoizer.workers, memoizer.toolchain)
    path = again.store.path(entry.outputs["object"])
    assert path is not None
    path.unlink()
    assert again.found(action) is None
    assert again.lost(key) == (entry.outputs["object"].hash,)
    assert (again.origin(key), again.refused(key)) == (None, "")
    again.forget()
    assert again.lost(key) == ()


@pytest.fixture
def shared(tmp_path: Path) -> str:
    return (tmp_path / "shared").as_uri()


def cache(folder: Path, url: str, **more: Any) -> RemoteCache:
    return RemoteCache(Store(folder), open_remote(url), Policy.READ_WRITE, lambda said: None, **more)


def keys(folder: Path, count: int) -> list[str]:
    from pipeline.remotes.trust import new_key

    folder.mkdir(exist_ok=True)
    return [new_key(folder / f"{number}.pem") for number in range(count)]


def test_the_remote_says_where_an_entry_came_from(tmp_path: Path, shared: str) -> None:
    from pipeline.remotes.trust import signer, trusting

    ada, ben = keys(tmp_path / "keys", 2)
    key = key_of({"a": 1})
    writer = cache(tmp_path / "one", shared, signer=signer(tmp_path / "keys" / "0.pem"))
    assert writer.send(key, filed(writer.store, key))
    plain = cache(tmp_path / "two", shared)
    assert plain.find(key) is not None
    origin = plain.origins[key]
    assert (origin.remote, origin.signer, origin.checked) == (plain.remote.name, ada, False)
    careful = cache(tmp_path / "three", shared, trust=trusting([ada, ben], True))
    assert careful.find(key) is not None
    assert (careful.origins[key].signer, careful.origins[key].checked) == (ada, True)
    strict = cache(tmp_path / "four", shared, trust=trusting([ben], True))
    assert strict.find(key) is None
    assert strict.refused == {key: "not signed by a trusted key"}
    assert strict.origins == {}


def test_the_remote_says_what_it_refused(tmp_path: Path, shared: str) -> None:
    key, other = key_of({"a": 1}), key_of({"a": 2})
    writer = cache(tmp_path / "one", shared)
    entry = filed(writer.store, key)
    assert writer.send(key, entry)
    assert writer.send(other, ActionEntry("codegen", {}, {"object": writer.store.put(b"other")}, 1.0))
    for path in (tmp_path / "shared").rglob(f"*{key}*"):
        path.chmod(0o600)
        path.write_bytes(b"rubbish")
    for path in (tmp_path / "shared").rglob(f"*{Digest.of(b'other').hash}*"):
        path.unlink()
    reader = cache(tmp_path / "two", shared)
    assert reader.find(key) is None
    assert reader.find(other) is None
    assert set(reader.refused) == {key, other}
    assert "not all that it made is there" in reader.refused[other]


def test_what_is_remembered_of_a_remote_is_bounded(
    tmp_path: Path, shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.remotes import cache as module

    monkeypatch.setattr(module, "_NOTED", 3)
    writer, reader = cache(tmp_path / "one", shared), cache(tmp_path / "two", shared)
    wanted = [key_of({"a": number}) for number in range(5)]
    for key in wanted:
        assert writer.send(key, filed(writer.store, key))
        assert reader.find(key) is not None
    assert list(reader.origins) == wanted[-3:]


# in a workspace


def test_a_build_notes_itself_and_one_with_nothing_to_do_notes_nothing(workspace: WorkspaceFolder) -> None:
    workspace.onnx("net.onnx", models.chain("Relu", "Sigmoid"))
    workspace.dodo('Model.onnx("net", "net.onnx"),')
    workspace.build().good()
    book = Journal(workspace.folder, "native", "net")
    text = book.path.read_bytes()
    (first,) = book.builds()
    assert set(first.state.actions) == {"read", "extract", "link", "check", "profile"}
    assert [each.name for each in first.state.operators.values()] == ["fused_matmul_relu", "fused_matmul_sigmoid"]
    for each in first.state.operators.values():
        assert set(each.actions) == {"apply:default", "codegen:default"}
        assert all(first.state.origin(key) == Origin() for key in each.actions.values())
    workspace.idle_build()
    assert book.path.read_bytes() == text

    (workspace.folder / ".doit.db").unlink()
    assert workspace.build().good().compiled == 0
    assert set(lines(book)[-1]) == {"format", "build", "on", "at"}, "nothing was new"
    assert (workspace.folder / journal.FOLDER / ".gitignore").read_text() == "*\n"

    (workspace.artifact("net") / "lib.so").unlink()
    (workspace.artifact("net") / "weights.safetensors").write_bytes(b"mine")
    workspace.build().good()
    assert lines(book)[-1]["artifact"] == {"lib.so": "missing", "weights.safetensors": "changed"}

    workspace.doit("clean").good()
    assert not book.path.exists()
    assert not workspace.artifact("net").exists()
