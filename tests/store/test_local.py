"""The contract of a store, and what its folder may and may not be."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import StoreError
from pipeline.hashing import Digest
from pipeline.store import ActionEntry, Store, default_root
from pipeline.store.local import FORMAT

KEY, OTHER_KEY = "ab" * 32, "cd" * 32
BLOBS = {"empty": b"", "text": b"some bytes", "more than a chunk": bytes(range(256)) * 5000}
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Store:
    return Store(root)


def entry_of(store: Store, **outputs: bytes) -> ActionEntry:
    return ActionEntry("codegen", {"stage": "codegen"}, {name: store.put(data) for name, data in outputs.items()}, 0.5)


def files(root: Path) -> list[Path]:
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())


# blobs


@pytest.mark.parametrize("data", BLOBS.values(), ids=BLOBS)
@pytest.mark.parametrize("way", ["put", "put view", "put_file", "put_stream"])
def test_what_was_put_is_found(store: Store, tmp_path: Path, way: str, data: bytes) -> None:
    (tmp_path / "source").write_bytes(data)
    chunks = iter([data[i : i + 1000] for i in range(0, len(data), 1000)])
    puts = {
        "put": lambda: store.put(data),
        "put view": lambda: store.put(memoryview(data)),
        "put_file": lambda: store.put_file(tmp_path / "source"),
        "put_stream": lambda: store.put_stream(lambda: memoryview(next(chunks, b""))),
    }
    digest = puts[way]()
    assert digest == Digest.of(data)
    for reader in (store, Store(store.root)):
        assert reader.has(digest)
        assert reader.get(digest) == data
        path = reader.path(digest)
        assert path is not None
        assert path.read_bytes() == data
        assert path.stat().st_mode & 0o777 == 0o444
    assert files(store.root) == [Path("TVMAKE_STORE"), Path("cas", digest.hash[:2], digest.hash)]
    assert store.counts.corrupt == 0


def test_what_was_never_put_is_missing(store: Store) -> None:
    digest = Digest.of(b"never")
    assert not store.has(digest)
    assert store.get(digest) is None
    assert store.path(digest) is None


def test_a_digest_of_another_size_is_missing(store: Store) -> None:
    digest = store.put(b"some bytes")
    assert Store(store.root).get(Digest(digest.hash, 3)) is None


def test_putting_what_is_there_writes_nothing(store: Store) -> None:
    path = store.path(store.put(b"some bytes"))
    assert path is not None
    before = path.stat()
    Store(store.root).put(b"some bytes")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_deleted_blob_is_missing_and_can_be_put_again(store: Store) -> None:
    digest = store.put(b"some bytes")
    path = store.path(digest)
    assert path is not None
    path.unlink()
    assert not store.has(digest)
    assert store.get(digest) is None
    assert store.counts.corrupt == 0
    assert store.put(b"some bytes") == digest
    assert store.get(digest) == b"some bytes"


def test_a_stream_that_fails_leaves_nothing(store: Store) -> None:
    chunks: Iterator[bytes] = iter([b"first"])

    def read() -> bytes:
        for chunk in chunks:
            return chunk
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put_stream(read)
    assert files(store.root) == [Path("TVMAKE_STORE")]


# entries


def test_an_entry_is_found_by_its_key_alone(store: Store) -> None:
    entry = entry_of(store, library=b"lib", log=b"")
    store.commit(KEY, entry)
    for reader in (store, Store(store.root)):
        assert reader.lookup(KEY) == entry
        assert reader.lookup(OTHER_KEY) is None


def test_an_entry_without_outputs_is_a_hit(store: Store) -> None:
    store.commit(KEY, entry_of(store))
    assert store.lookup(KEY) == entry_of(store)


def test_the_last_commit_counts(store: Store) -> None:
    store.commit(KEY, entry_of(store, out=b"one"))
    store.commit(KEY, entry_of(store, out=b"two"))
    found = store.lookup(KEY)
    assert found is not None
    assert store.get(found.outputs["out"]) == b"two"


def test_a_missing_blob_makes_a_miss_until_it_is_back(store: Store) -> None:
    entry = entry_of(store, a=b"one", b=b"two")
    store.commit(KEY, entry)
    path = store.path(entry.outputs["b"])
    assert path is not None
    path.unlink()
    for reader in (store, Store(store.root)):
        assert reader.lookup(KEY) is None
    store.put(b"two")
    assert store.lookup(KEY) == entry


def test_an_entry_under_the_key_of_another_is_no_hit(store: Store) -> None:
    store.commit(KEY, entry_of(store, out=b"one"))
    store.commit(OTHER_KEY, entry_of(store, out=b"two"))
    (store.root / "ac" / "ab" / KEY).replace(store.root / "ac" / "cd" / OTHER_KEY)
    assert store.lookup(OTHER_KEY) is None
    assert store.counts.corrupt == 1


# the folder


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TVMAKE_CACHE", "relative")
    assert default_root() == tmp_path / "relative"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TVMAKE_CACHE", "~/there")
    assert default_root() == tmp_path / "there"
    monkeypatch.setenv("TVMAKE_CACHE", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_root() == tmp_path / ".cache" / "tvmake"


def test_an_empty_folder_becomes_a_store(root: Path) -> None:
    root.mkdir()
    Store(root)
    assert (root / "TVMAKE_STORE").read_text() == FORMAT


@pytest.mark.parametrize("below", [".", "below", "below/it"])
def test_a_file_is_no_store(root: Path, below: str) -> None:
    root.write_text("mine")
    with pytest.raises(StoreError, match="is not a folder") as caught:
        Store(root / below)
    assert "TVMAKE_CACHE" in caught.value.hint
    assert root.read_text() == "mine"


def test_a_folder_with_other_things_is_not_touched(root: Path) -> None:
    root.mkdir()
    (root / "thesis.tex").write_text("mine")
    with pytest.raises(StoreError, match="neither empty nor a store") as caught:
        Store(root)
    assert "TVMAKE_CACHE" in caught.value.hint
    assert files(root) == [Path("thesis.tex")]


@pytest.mark.parametrize("marker", [b"tvmake store, format 2\n", b"", b"\xff\xfe", FORMAT.encode()[:-1]])
def test_another_format_is_refused_and_kept(root: Path, marker: bytes) -> None:
    root.mkdir()
    (root / "TVMAKE_STORE").write_bytes(marker)
    with pytest.raises(StoreError, match="another format") as caught:
        Store(root)
    assert "delete" in caught.value.hint
    assert files(root) == [Path("TVMAKE_STORE")]


@pytest.mark.parametrize("gone", ["cas", "ac", "locks", "quarantine", "tmp"])
def test_a_deleted_folder_is_made_again(store: Store, gone: str) -> None:
    (store.root / gone).rmdir()
    entry = entry_of(store, out=b"out")
    store.commit(KEY, entry)
    with store.locked(KEY):
        pass
    path = store.path(entry.outputs["out"])
    assert path is not None
    path.chmod(0o600)
    path.write_bytes(b"tuo")
    assert Store(store.root).lookup(KEY) is None
    assert not path.exists()
    store.put(b"out")
    assert store.lookup(KEY) == entry


def test_leftovers_do_no_harm_and_old_ones_are_removed(store: Store) -> None:
    entry = entry_of(store, out=b"out")
    store.commit(KEY, entry)
    old, new = store.root / "tmp" / "host-1-old", store.root / "tmp" / "host-2-new"
    for path in (old, new):
        path.write_bytes(b"half a bl")
    os.utime(old, (time.time() - 90_000,) * 2)
    again = Store(store.root)
    assert again.lookup(KEY) == entry
    assert not old.exists()
    assert new.exists()


# a disk that refuses


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own that holds 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@root_only
@pytest.mark.parametrize("way", ["put", "put_file", "put_stream"])
def test_a_full_disk_is_an_error_and_leaves_nothing(small: Path, tmp_path: Path, way: str) -> None:
    store = Store(small / "store")
    kept = entry_of(store, out=b"out")
    store.commit(KEY, kept)
    before, data = files(store.root), os.urandom(400_000)
    (tmp_path / "source").write_bytes(data)
    chunks = iter([data])
    puts = {
        "put": lambda: store.put(data),
        "put_file": lambda: store.put_file(tmp_path / "source"),
        "put_stream": lambda: store.put_stream(lambda: next(chunks, b"")),
    }
    with pytest.raises(StoreError, match="No space left on device") as caught:
        puts[way]()
    assert "free some space" in caught.value.hint
    assert files(store.root) == before
    assert not store.has(Digest.of(data))
    assert store.get(Digest.of(data)) is None
    assert store.lookup(KEY) == kept
    assert store.put(b"small") == Digest.of(b"small")


@root_only
def test_a_full_disk_refuses_an_entry_and_leaves_the_old_one(small: Path) -> None:
    store = Store(small / "store")
    kept = entry_of(store, out=b"out")
    store.commit(KEY, kept)
    with open(small / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(4096))
    with pytest.raises(StoreError, match="No space left on device"):
        store.commit(KEY, kept)
    with pytest.raises(StoreError, match="No space left on device"):
        store.commit(OTHER_KEY, kept)
    assert store.lookup(KEY) == kept
    assert store.lookup(OTHER_KEY) is None
    assert not list((store.root / "tmp").iterdir())
    with pytest.raises(StoreError, match="making the store"):
        Store(small / "another")


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_refusal_at_each_step_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kept = entry_of(store, out=b"out")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        for attempt in (
            lambda: store.put(b"new"),
            lambda: store.put_stream(iter([b"new", b""]).__next__),
            lambda: store.commit(KEY, kept),
        ):
            with pytest.raises(StoreError, match="No space left"):
                attempt()
    assert len(files(store.root)) == 2
    assert not store.has(Digest.of(b"new"))
    assert store.lookup(KEY) is None


@root_only
def test_a_read_only_store_can_be_read_and_says_why_it_cannot_be_written(small: Path) -> None:
    store = Store(small / "store")
    kept = entry_of(store, out=b"out")
    store.commit(KEY, kept)
    damaged = store.path(store.put(b"damaged"))
    assert damaged is not None
    damaged.chmod(0o600)
    damaged.write_bytes(b"degamad")
    subprocess.run(["mount", "-o", "remount,ro", small], check=True)
    store = Store(small / "store")
    assert store.lookup(KEY) == kept
    assert store.get(kept.outputs["out"]) == b"out"
    assert store.put(b"out") == kept.outputs["out"]
    assert store.get(Digest.of(b"damaged")) is None
    assert store.counts.corrupt == 1
    refused = [lambda: store.put(b"new"), lambda: store.commit(OTHER_KEY, kept), lambda: Store(small / "other")]
    for attempt in refused:
        with pytest.raises(StoreError, match="Read-only file system") as caught:
            attempt()
        assert "can be written" in caught.value.hint
    with pytest.raises(StoreError, match="Read-only file system"), store.locked(KEY):
        pass


@root_only
def test_a_folder_of_another_user_says_so(root: Path, store: Store) -> None:
    digest = store.put(b"out")
    child = os.fork()
    if child == 0:
        os.chmod(root.parent, 0o755)
        os.chmod(root / "cas" / digest.hash[:2], 0)
        os.setresuid(65534, 65534, 65534)
        seen = []
        for attempt in (
            lambda: Store(root).put(b"new"),
            lambda: Store(root).has(digest),
            lambda: Store(root).get(digest),
        ):
            try:
                attempt()
            except StoreError as error:
                seen.append("Permission denied" in error.message and "who owns" in error.hint)
        os._exit(0 if seen == [True] * 3 else 1)
    assert os.waitpid(child, 0)[1] == 0
