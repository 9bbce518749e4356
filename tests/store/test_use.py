"""Use is remembered in the times of files, and who uses a store now is known to others until they end."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.hashing import Digest, key_of
from pipeline.store import ActionEntry, Store
from pipeline.store.use import MARK_SECONDS

KEY = key_of({"n": 1})
_fork = multiprocessing.get_context("fork")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do this")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def committed(store: Store) -> ActionEntry:
    entry = ActionEntry("link", {"n": 1}, {"out": store.put(b"out"), "log": store.put(b"log")}, 1.0)
    store.commit(KEY, entry)
    return entry


def entry_path(store: Store) -> Path:
    return store.root / "ac" / KEY[:2] / KEY


def blob_path(store: Store, digest: Digest) -> Path:
    return store.root / "cas" / digest.hash[:2] / digest.hash


def age(path: Path, seconds: float) -> float:
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path.stat().st_mtime


def is_new(path: Path) -> bool:
    return abs(time.time() - path.stat().st_mtime) < 30


# marks


def test_a_hit_is_remembered_once_it_is_some_minutes_old(store: Store) -> None:
    entry = committed(store)
    age(entry_path(store), MARK_SECONDS + 10)
    assert store.lookup(KEY) == entry
    assert is_new(entry_path(store))


def test_what_was_used_just_now_is_not_touched(store: Store) -> None:
    committed(store)
    then = age(entry_path(store), MARK_SECONDS - 20)
    assert store.lookup(KEY) is not None
    assert entry_path(store).stat().st_mtime == then


def test_a_time_in_the_future_is_put_right_by_use(store: Store) -> None:
    committed(store)
    age(entry_path(store), -86_400)
    assert store.lookup(KEY) is not None
    assert is_new(entry_path(store))


def test_a_lookup_marks_the_entry_and_not_its_blobs(store: Store) -> None:
    entry = committed(store)
    times = {digest: age(blob_path(store, digest), 9999) for digest in entry.outputs.values()}
    assert store.lookup(KEY) is not None
    assert {digest: blob_path(store, digest).stat().st_mtime for digest in times} == times


def test_a_miss_marks_nothing(store: Store) -> None:
    entry = committed(store)
    then = age(entry_path(store), 9999)
    blob_path(store, entry.outputs["log"]).unlink()
    assert store.lookup(KEY) is None
    assert entry_path(store).stat().st_mtime == then


ASKED: dict[str, Callable[[Store, Digest], object]] = {
    "put": lambda store, _: store.put(b"out"),
    "put_stream": lambda store, _: store.put_stream(iter([b"out", b""]).__next__),
    "has": lambda store, digest: store.has(digest),
    "path": lambda store, digest: store.path(digest),
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_a_blob_that_is_put_or_asked_for_is_used(store: Store, ask: Callable[[Store, Digest], object]) -> None:
    digest = store.put(b"out")
    age(blob_path(store, digest), 9999)
    assert ask(store, digest)
    assert is_new(blob_path(store, digest))


def test_a_blob_that_goes_before_it_is_marked_is_put_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = store.put(b"out")
    age(blob_path(store, digest), 9999)
    real = os.utime

    def removed_first(path: str) -> None:
        os.unlink(path)
        real(path)

    monkeypatch.setattr(os, "utime", removed_first)
    assert store.put(b"out") == digest
    assert store.get(digest) == b"out"


def test_an_entry_that_goes_before_it_is_marked_is_a_miss(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    committed(store)
    age(entry_path(store), 9999)
    real = os.utime
    monkeypatch.setattr(os, "utime", lambda path: (os.unlink(path), real(path)))
    assert store.lookup(KEY) is None


@root_only
def test_where_times_cannot_be_changed_a_hit_is_a_hit() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        os.chmod(folder, 0o755)
        store = Store(Path(folder) / "store")
        entry = committed(store)
        age(entry_path(store), 9999)
        age(blob_path(store, entry.outputs["out"]), 9999)
        child = os.fork()
        if child == 0:
            right = False
            with contextlib.suppress(BaseException):
                os.setresuid(65534, 65534, 65534)
                other = Store(store.root)
                with other.in_use():
                    right = other.lookup(KEY) == entry and other.has(entry.outputs["out"])
            os._exit(0 if right else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert not is_new(entry_path(store))


@root_only
def test_a_read_only_disk_can_be_used(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        store = Store(disk / "store")
        entry = committed(store)
        then = age(entry_path(store), 9999)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with store.in_use():
            assert store.lookup(KEY) == entry
        assert entry_path(store).stat().st_mtime == then
        assert store.use.earliest() is None
        assert store.use.now() > 0
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# a name from elsewhere


@pytest.mark.parametrize("name", ["../../mine", "/etc/passwd", "", "AB" * 32, "ab" * 31, "ab" * 32 + "\n", "é" * 64])
def test_a_digest_that_is_none_lies_nowhere(store: Store, name: str) -> None:
    mine = store.root.parent / "mine"
    mine.write_bytes(b"mine")
    digest = Digest(name, 4)
    assert not store.has(digest)
    assert store.get(digest) is None
    assert store.path(digest) is None
    assert not store.receive(digest, [b"mine"])
    assert not list((store.root / "quarantine").iterdir())
    store.commit(KEY, ActionEntry("link", {}, {"out": digest}, 0.0))
    assert store.lookup(KEY) is None
    assert mine.read_bytes() == b"mine"
    assert [path.name[:64] for path in (store.root / "quarantine").iterdir()] == [KEY], "the entry is none"


def test_asking_for_a_wrong_size_harms_nothing(store: Store) -> None:
    digest = store.put(b"out")
    for other in (store, Store(store.root)):
        assert not other.has(Digest(digest.hash, 999))
        assert other.get(Digest(digest.hash, 999)) is None
        assert other.get(digest) == b"out"
        assert other.counts.corrupt == 0


# who uses it now


def test_a_run_is_known_from_its_beginning_to_its_end(store: Store) -> None:
    other = Store(store.root)
    assert other.use.earliest() is None
    before = store.use.now()
    with store.in_use():
        begun = other.use.earliest()
        assert begun is not None
        assert before <= begun <= other.use.now()
        with Store(store.root).in_use():
            assert other.use.earliest() == begun
        assert other.use.earliest() == begun
    assert other.use.earliest() is None
    assert not list((store.root / "locks").glob("use-*"))
    assert not list((store.root / "tmp").iterdir())


def test_looking_does_not_change_when_a_run_began(store: Store) -> None:
    with store.in_use():
        begun = store.use.earliest()
        time.sleep(0.02)
        assert [store.use.earliest() for _ in range(3)] == [begun] * 3


def test_a_run_ends_with_an_error(store: Store) -> None:
    with pytest.raises(KeyError), store.in_use():
        raise KeyError
    assert store.use.earliest() is None


def test_a_run_that_is_killed_has_ended_and_is_swept(store: Store, tmp_path: Path) -> None:
    def run() -> None:
        with Store(store.root).in_use():
            (tmp_path / "runs").touch()
            time.sleep(60)

    process = _fork.Process(target=run)
    process.start()
    while not (tmp_path / "runs").exists():
        time.sleep(0.002)
    assert store.use.earliest() is not None
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(list((store.root / "locks").glob("use-*"))) == 1
    assert store.use.earliest() is None
    assert not list((store.root / "locks").glob("use-*"))


def test_a_process_forked_meanwhile_does_not_keep_a_run_alive(store: Store, tmp_path: Path) -> None:
    with store.in_use():
        process = _fork.Process(target=time.sleep, args=(60,))
        process.start()
    try:
        assert store.use.earliest() is None
    finally:
        process.kill()
        process.join()


def test_a_store_without_the_folders_can_be_used(store: Store) -> None:
    for name in ("locks", "tmp", "pins", "usage", "quarantine"):
        (store.root / name).rmdir()
    assert store.use.earliest() is None
    with store.in_use():
        assert store.use.earliest() is not None


# who removes


def free(store: Store) -> bool:
    """Whether somebody could remove now without waiting."""
    with open(store.root / "locks" / "removing") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


CHANGES: dict[str, Callable[[Store], object]] = {
    "put": lambda store: store.put(b"new"),
    "put again": lambda store: store.put(b"out"),
    "put_stream": lambda store: store.put_stream(iter([b"out", b""]).__next__),
    "receive": lambda store: store.receive(Digest.of(b"out"), [b"out"]),
    "commit": lambda store: store.commit(KEY, ActionEntry("link", {}, {}, 0.0)),
    "lookup": lambda store: store.lookup(KEY),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_puts_or_marks_waits_for_who_removes(store: Store, change: Callable[[Store], object]) -> None:
    entry = committed(store)
    for path in (entry_path(store), *(blob_path(store, digest) for digest in entry.outputs.values())):
        age(path, 9999)
    with ThreadPoolExecutor(1) as thread:
        with store.use.removing():
            done = thread.submit(change, Store(store.root))
            with pytest.raises(TimeoutError):
                done.result(0.05)
        assert done.result(5) is not False


def test_who_removes_waits_for_who_places(store: Store) -> None:
    with store.use.removing():
        assert not free(store)
    assert free(store)
    with store.use.placing(), store.use.placing():
        assert not free(store)
    assert free(store)


@pytest.mark.parametrize("held", ["removing", "placing"])
def test_a_process_forked_meanwhile_holds_nobody_up(store: Store, held: str) -> None:
    with store.use.removing():
        pass
    with getattr(store.use, held)():
        process = _fork.Process(target=time.sleep, args=(60,))
        process.start()
    try:
        assert free(store)
    finally:
        process.kill()
        process.join()
