"""`doit why` tells what befell files of the artifact and the store, and what came of remotes."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest

from pipeline import stages
from pipeline.journal import Journal
from pipeline.remotes import open_remote
from pipeline.remotes.cache import RemoteCache
from pipeline.remotes.settings import Policy
from pipeline.store import Store
from tests.why.bench import Bench


def test_a_blob_was_corrupted(bench: Bench) -> None:
    bench.build()
    (operator,) = bench.builds()[-1].state.operators.values()
    store = Store(bench.place.cache)
    entry = store.lookup(operator.actions["codegen:default"])
    assert entry is not None
    blob = entry.outputs["object"]
    path = store.path(blob)
    assert path is not None
    path.chmod(0o644)
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    bench.build()
    said = bench.last()
    assert f"blob {blob} of the store was corrupted, and codegen default made again" in said
    assert "the same was made again" in said
    (store.root / "ac" / operator.actions["codegen:default"][:2] / operator.actions["codegen:default"]).unlink()
    bench.build()
    assert f"the entry {operator.actions['codegen:default'][:12]} of the store was removed" in bench.last()


def test_a_file_of_the_artifact_was_deleted(bench: Bench) -> None:
    bench.build()
    (bench.place.artifact("net") / "lib.so").unlink()
    bench.build()
    assert "lib.so of the artifact was deleted: the artifact was put there again" in bench.last()
    assert "nothing changed since" in bench.last()
    shutil.rmtree(bench.place.folder / "artifacts")
    bench.build()
    assert "the artifact was not there any more" in bench.why("net")


def test_nothing_at_all(bench: Bench) -> None:
    bench.build()
    bench.build()
    assert "nothing changed since the build of" in bench.last()
    assert "nothing changed since the build of" in bench.why("net")
    assert "the first that is noted" in bench.why("net", "-n", "2")


def test_what_the_store_has_forgotten(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.build()
    old = bench.builds()[-1].state
    monkeypatch.setattr(stages, "CODEGEN", dataclasses.replace(stages.CODEGEN, version=97))
    bench.build()
    (operator,) = old.operators.values()
    key = operator.actions["codegen:default"]
    path = Store(bench.place.cache).root / "ac" / key[:2] / key
    kept = path.read_bytes()
    path.unlink()
    try:
        assert "the store has no entry of codegen default any more" in bench.last()
    finally:
        path.write_bytes(kept)


@contextlib.contextmanager
def remote(cache: Path, shared: Path, **more: Any) -> Iterator[RemoteCache]:
    made = RemoteCache(Store(cache), open_remote(shared.as_uri()), Policy.READ_WRITE, lambda said: None, **more)
    yield made
    made.finish()
    made.close()


def test_an_entry_was_fetched_or_refused(bench: Bench, tmp_path: Path) -> None:
    from pipeline.remotes.trust import new_key, signer, trusting

    shared, store, other = (tmp_path / name for name in ("shared", "other", "third"))
    ada, ben = new_key(tmp_path / "ada.pem"), new_key(tmp_path / "ben.pem")
    with remote(bench.place.cache, shared, signer=signer(tmp_path / "ada.pem")) as made:
        bench.model(models.dense(activation="Softplus"))
        bench.build(remote=made)
    bench.place.dodo('Model.onnx("net", "net.onnx"),')
    with remote(store, shared, trust=trusting([ada], True)) as made:
        name = made.remote.name
        bench.build(cache=store, remote=made)
    said = bench.why(cache=store)
    assert f"{name}, signed by {ada}: apply default, codegen default" in said
    Journal(bench.place.folder, "native", "net").remove()
    with remote(other, shared, trust=trusting([ben], True)) as made:
        bench.build(cache=other, remote=made)
        bench.build(cache=other, remote=made)
    first, second = bench.builds()
    assert set(first.events.refused.values()) == {"not signed by a trusted key"}
    assert second.events.refused == {}
    assert "this machine: apply default, codegen default" in bench.why(cache=other)
    assert "was refused" in bench.why("net", "-n", "2", cache=other)
