"""Shared folders: what is one, what is none, and disks that are full, read-only, away or hang."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, RemoteError, Trouble
from pipeline.hashing import Digest
from pipeline.remotes import Remote, Terms, folder, open_remote
from tests.remotes.places import new_key

DATA = os.urandom(5000)
DIGEST = Digest.of(DATA)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "blob"
    path.write_bytes(DATA)
    return path


def at(path: Path, terms: Terms | None = None) -> Remote:
    return open_remote(f"file://{path}", terms)


def trouble(call: Callable[[], object]) -> Trouble:
    with pytest.raises(RemoteError) as caught:
        call()
    return caught.value.trouble


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    assert caught.value.hint or "not a folder" in str(caught.value)
    return str(caught.value)


def test_nothing_is_made_until_something_is_written(tmp_path: Path, file: Path) -> None:
    root = tmp_path / "deep" / "shared"
    remote = at(root)
    assert remote.action(new_key()) is None
    assert remote.missing([DIGEST]) == {DIGEST}
    assert not root.parent.exists()
    remote.put_blob(DIGEST, file)
    assert (root / "TVMAKE_REMOTE").read_text() == folder.FORMAT
    assert (root / "cas" / DIGEST.hash).read_bytes() == DATA
    assert list((root / "tmp").iterdir()) == []
    assert remote.missing([DIGEST]) == set()


def test_a_name_with_spaces_and_signs_is_decoded(tmp_path: Path, file: Path) -> None:
    open_remote(f"file://{tmp_path}/caf%C3%A9%23").put_blob(DIGEST, file)
    assert (tmp_path / "café#" / "cas" / DIGEST.hash).exists()


def test_a_folder_that_has_something_else_is_left_alone(tmp_path: Path, file: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("x")
    for call in (lambda: at(home).action(new_key()), lambda: at(home).put_blob(DIGEST, file)):
        assert "thesis.tex" in refusal(call)
    assert [path.name for path in home.iterdir()] == ["thesis.tex"]


def test_what_a_file_system_puts_there_does_not_count(tmp_path: Path, file: Path) -> None:
    for name in ("lost+found", ".snapshot"):
        (tmp_path / "shared" / name).mkdir(parents=True)
    at(tmp_path / "shared").put_blob(DIGEST, file)


@pytest.mark.parametrize(
    "found", [b"tvmake remote, format 2\n", b"tvmake remote, format 0\n", b"", b"\xff\xfe", b"x" * 999]
)
def test_another_format_is_refused_by_its_name(tmp_path: Path, file: Path, found: bytes) -> None:
    (tmp_path / "TVMAKE_REMOTE").write_bytes(found)
    for call in (lambda: at(tmp_path).blob(DIGEST), lambda: at(tmp_path).put_blob(DIGEST, file)):
        said = refusal(call)
        assert "format 1" in said
        assert found[:15].decode(errors="replace").strip() in said
    assert not (tmp_path / "cas").exists()


def test_a_local_store_is_no_remote(tmp_path: Path, file: Path) -> None:
    from pipeline.store import Store

    Store(tmp_path / "store")
    for call in (
        lambda: at(tmp_path / "store").put_blob(DIGEST, file),
        lambda: at(tmp_path / "store").action(new_key()),
    ):
        assert "other things" in refusal(call)


def test_a_file_in_place_of_the_folder(tmp_path: Path, file: Path) -> None:
    for url in (file, file / "below"):
        assert "not a folder" in refusal(lambda: at(url).action(new_key()))  # noqa: B023
        assert "not a folder" in refusal(lambda: at(url).put_blob(DIGEST, file))  # noqa: B023


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do anything")
def test_a_folder_that_may_not_be_read_or_written(tmp_path: Path, file: Path) -> None:
    root = tmp_path / "shared"
    at(root).put_blob(DIGEST, file)
    (root / "cas").chmod(0)
    try:
        assert trouble(lambda: at(root).blob(DIGEST)) is Trouble.REFUSED
        assert trouble(lambda: at(root).put_blob(DIGEST, file)) is Trouble.REFUSED
    finally:
        (root / "cas").chmod(0o755)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, Trouble.FULL),
        (errno.EDQUOT, Trouble.FULL),
        (errno.EACCES, Trouble.REFUSED),
        (errno.EROFS, Trouble.REFUSED),
        (errno.EIO, Trouble.AWAY),
        (errno.ENOTCONN, Trouble.AWAY),
        (errno.ESTALE, Trouble.AWAY),
    ],
)
def test_what_the_system_answers_a_writer(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: Trouble
) -> None:
    remote = at(tmp_path / "shared")
    remote.put_blob(DIGEST, file)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("pipeline.store.files.os.fsync", fail)
    assert trouble(lambda: remote.put_action(new_key(), b"x")) is expected
    assert list((tmp_path / "shared" / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.EACCES, Trouble.REFUSED), (errno.EIO, Trouble.AWAY), (errno.ESTALE, None)]
)
def test_what_the_system_answers_a_reader(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: Trouble | None
) -> None:
    remote = at(tmp_path / "shared")
    remote.put_blob(DIGEST, file)
    right = os.open

    def fail(path: Any, flags: int, *rest: Any) -> int:
        if str(path).endswith(DIGEST.hash):
            raise OSError(number, os.strerror(number))
        return right(path, flags, *rest)

    monkeypatch.setattr(os, "open", fail)
    if expected is None:
        assert remote.blob(DIGEST) is None
    else:
        assert trouble(lambda: remote.blob(DIGEST)) is expected


def test_what_another_machine_just_made_is_looked_for_twice(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = at(tmp_path / "shared")
    remote.put_blob(DIGEST, file)
    right, misses = os.open, []

    def late(path: Any, flags: int, *rest: Any) -> int:
        if str(path).endswith(DIGEST.hash) and not misses:
            misses.append(path)
            raise FileNotFoundError(errno.ENOENT, "not yet")
        return right(path, flags, *rest)

    monkeypatch.setattr(os, "open", late)
    pieces = remote.blob(DIGEST)
    assert pieces is not None
    assert b"".join(pieces) == DATA
    assert misses


def test_a_disk_that_hangs_is_given_up(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = at(tmp_path / "shared", Terms(connect=0.2, stall=0.3))
    remote.put_blob(DIGEST, file)
    until = threading.Event()
    monkeypatch.setattr("pipeline.store.files.os.fsync", lambda _: until.wait(5))
    try:
        began = time.monotonic()
        assert trouble(lambda: remote.put_action(new_key(), b"x")) is Trouble.AWAY
        assert time.monotonic() - began < 1.0
    finally:
        until.set()


def test_a_disk_that_hangs_at_first_sight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    until = threading.Event()
    monkeypatch.setattr(Path, "read_bytes", lambda _: until.wait(5))
    try:
        began = time.monotonic()
        assert trouble(lambda: at(tmp_path / "shared", Terms(connect=0.2)).action(new_key())) is Trouble.AWAY
        assert time.monotonic() - began < 1.0
    finally:
        until.set()


def test_a_disk_that_is_taken_away_is_not_made_anew_elsewhere(tmp_path: Path, file: Path) -> None:
    root = tmp_path / "mount"
    remote = at(root)
    remote.put_blob(DIGEST, file)
    root.rename(tmp_path / "elsewhere")
    root.mkdir()  # what is left of a mount: its point
    assert trouble(lambda: remote.put_blob(DIGEST, file)) is Trouble.AWAY
    assert remote.blob(DIGEST) is None
    assert list(root.iterdir()) == []


def test_things_that_are_no_files(tmp_path: Path, file: Path) -> None:
    root = tmp_path / "shared"
    remote = at(root)
    remote.put_blob(DIGEST, file)
    (root / "cas" / DIGEST.hash).unlink()
    os.mkfifo(root / "cas" / DIGEST.hash)
    assert trouble(lambda: remote.blob(DIGEST)) is Trouble.GARBLED
    assert remote.missing([DIGEST]) == {DIGEST}
    remote.put_blob(DIGEST, file)  # which heals it
    assert remote.missing([DIGEST]) == set()
    (root / "cas" / DIGEST.hash).unlink()
    (root / "cas" / DIGEST.hash).mkdir()
    assert trouble(lambda: remote.blob(DIGEST)) is Trouble.GARBLED
    assert trouble(lambda: remote.put_blob(DIGEST, file)) is Trouble.GARBLED


def test_a_blob_of_another_length_is_missing_and_never_read_beyond(tmp_path: Path, file: Path) -> None:
    root = tmp_path / "shared"
    remote = at(root)
    remote.put_blob(DIGEST, file)
    path = root / "cas" / DIGEST.hash
    path.unlink()
    path.write_bytes(DATA + b"x")
    assert remote.missing([DIGEST]) == {DIGEST}
    pieces = remote.blob(DIGEST)
    assert pieces is not None
    assert trouble(lambda: list(pieces)) is Trouble.GARBLED


def test_a_document_that_would_fill_the_memory(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "LARGEST_DOCUMENT", 1000)
    remote, key = at(tmp_path / "shared"), new_key()
    remote.put_action(key, bytes(1001))
    assert trouble(lambda: remote.action(key)) is Trouble.GARBLED


def test_whoever_may_write_into_the_folder_may_write_into_its_parts(tmp_path: Path, file: Path) -> None:
    root = tmp_path / "team"
    root.mkdir()
    root.chmod(0o2775)
    at(root).put_blob(DIGEST, file)
    assert {(root / name).stat().st_mode & 0o7777 for name in ("cas", "ac", "tmp")} == {0o2775}


def test_leftovers_go_unless_clocks_disagree(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "shared"
    at(root).put_blob(DIGEST, file)
    left = root / "tmp" / "other-machine-1-2"
    left.write_bytes(b"x")
    os.utime(left, (0, 0))
    monkeypatch.setattr(folder.time, "time", lambda: 3e9)  # this machine believes that it is 2065
    at(root).put_action(new_key(), b"x")
    assert left.exists()
    monkeypatch.undo()
    at(root).put_action(new_key(), b"x")
    assert not left.exists()


def _write(root: str, worker: int, keys: list[str]) -> None:
    remote = open_remote(f"file://{root}")
    for number, key in enumerate(keys):
        remote.put_action(key, b"%d %d " % (worker, number) * 1000)


def test_processes_that_begin_a_folder_at_once_all_write_into_it(tmp_path: Path) -> None:
    root, keys = tmp_path / "shared", [new_key() for _ in range(40)]
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_write, args=(str(root), number, keys)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    remote = at(root)
    for number, key in enumerate(keys):
        assert remote.action(key) in [b"%d %d " % (worker, number) * 1000 for worker in range(4)]
    assert list((root / "tmp").iterdir()) == []
