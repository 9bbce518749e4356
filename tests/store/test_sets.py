"""Sets in a store: what came in stays, whoever writes, and whatever else lies in their folders."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from pipeline.errors import StoreError
from pipeline.hashing import Stamp, key_of
from pipeline.store import Store
from pipeline.store.local import FORMAT

KEY, OTHER = key_of({"n": 1}), key_of({"n": 2})
ABOUT = {"operator": "conv2d", "target": {"kind": "llvm"}}
MEMBERS = [b"", b"one", b"two", bytes(range(256)) * 600]
_fork = multiprocessing.get_context("fork")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


DIGESTS = [digest(data) for data in MEMBERS]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def folder(store: Store, key: str = KEY) -> Path:
    return store.root / "sets" / key[:2] / key


def quarantined(store: Store) -> list[bytes]:
    return [path.read_bytes() for path in (store.root / "quarantine").iterdir()]


def test_what_was_added_is_read_by_everybody(store: Store) -> None:
    assert store.sets.add(KEY, MEMBERS, ABOUT) == DIGESTS
    for reader in (store, Store(store.root)):
        assert dict(reader.sets.read(KEY)) == dict(zip(DIGESTS, MEMBERS, strict=True))
        assert reader.sets.names(KEY) == set(DIGESTS)
        assert reader.sets.about(KEY) == ABOUT
        assert reader.counts.torn == reader.counts.corrupt == 0
    assert [name for name, _ in store.sets.read(KEY)] == sorted(DIGESTS)
    assert (folder(store) / DIGESTS[1]).stat().st_mode & 0o777 == 0o444
    assert not list((store.root / "tmp").iterdir())


@pytest.mark.parametrize("size", [(1 << 16) - 1, 1 << 16, (1 << 16) + 1, 1 << 20])
def test_a_large_member_is_read_whole_and_one_that_grew_is_not(store: Store, size: int) -> None:
    data = os.urandom(size)
    (name,) = store.sets.add(KEY, [data], ABOUT)
    assert dict(store.sets.read(KEY)) == {name: data}
    path = store.root / "sets" / KEY[:2] / KEY / name
    path.chmod(0o600)
    with open(path, "ab") as stream:
        stream.write(b"more")
    assert dict(store.sets.read(KEY)) == {}
    assert store.counts.torn == 1
    assert not path.exists()


def test_a_set_that_was_never_written_is_empty(store: Store) -> None:
    store.sets.add(KEY, MEMBERS, ABOUT)
    assert dict(store.sets.read(OTHER)) == {}
    assert store.sets.names(OTHER) == frozenset()
    assert store.sets.about(OTHER) == {}
    assert not folder(store, OTHER).exists()
    assert store.sets.add(OTHER, [], ABOUT) == []
    assert not folder(store, OTHER).exists()


def test_what_is_known_is_not_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.sets.add(KEY, MEMBERS, ABOUT)
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(str(path)) or real(path, *rest))
    assert dict(store.sets.read(KEY, but=DIGESTS[:3])) == {DIGESTS[3]: MEMBERS[3]}
    assert [Path(path).name for path in opened if Path(path).name in DIGESTS] == [DIGESTS[3]]


def test_adding_what_is_there_writes_nothing(store: Store) -> None:
    store.sets.add(KEY, MEMBERS, ABOUT)
    before = {path: path.stat().st_ino for path in (store.root / "sets").rglob("*")}
    assert Store(store.root).sets.add(KEY, MEMBERS, {"said": "later"}) == DIGESTS
    assert {path: path.stat().st_ino for path in (store.root / "sets").rglob("*")} == before
    assert store.sets.about(KEY) == ABOUT


def test_a_snapshot_is_of_the_members_alone(store: Store, tmp_path: Path) -> None:
    empty = store.sets.snapshot(KEY)
    store.sets.add(KEY, MEMBERS[:2], ABOUT)
    some = store.sets.snapshot(KEY)
    store.sets.add(KEY, MEMBERS, ABOUT)
    other = Store(tmp_path / "other")
    for data in reversed(MEMBERS):
        other.sets.add(OTHER, [data], {})
    assert store.sets.snapshot(KEY) == other.sets.snapshot(OTHER)
    assert len({empty, some, store.sets.snapshot(KEY)}) == 3


def test_a_stamp_tells_that_something_came_into_any_set(store: Store) -> None:
    assert Stamp.of(store.sets.changed) is None
    stamps = []
    for key, data in ((KEY, b"a"), (OTHER, b"b"), (KEY, b"c")):
        store.sets.add(key, [data], ABOUT)
        at = time.time_ns()
        stamps.append(Stamp.of(store.sets.changed))
        store.sets.add(key, [data], ABOUT)
        assert stamps[-1].still_holds(store.sets.changed, at)
        assert not any(stamp.still_holds(store.sets.changed, at) for stamp in stamps[:-1])


TEARS = {
    "half": lambda data: data[: len(data) // 2],
    "one byte long": lambda data: data + b"\n",
    "other bytes": lambda data: b"\0" * len(data),
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("tear", TEARS.values(), ids=TEARS)
def test_a_torn_member_is_set_aside_counted_and_can_come_again(store: Store, tear: object) -> None:
    store.sets.add(KEY, MEMBERS, ABOUT)
    path = folder(store) / DIGESTS[3]
    path.chmod(0o600)
    path.write_bytes(torn := tear(MEMBERS[3]))
    store.sets.add(KEY, MEMBERS[:3], ABOUT)
    assert dict(store.sets.read(KEY)) == dict(zip(DIGESTS[:3], MEMBERS[:3], strict=True))
    assert (store.counts.torn, store.counts.corrupt) == (1, 0)
    assert quarantined(store) == [torn]
    assert not path.exists()
    store.sets.add(KEY, MEMBERS, ABOUT)
    assert dict(store.sets.read(KEY))[DIGESTS[3]] == MEMBERS[3]
    assert store.counts.torn == 1


def test_adding_puts_a_torn_member_right_that_nobody_read(store: Store) -> None:
    store.sets.add(KEY, MEMBERS, ABOUT)
    path = folder(store) / DIGESTS[3]
    path.chmod(0o600)
    path.write_bytes(b"\0" * len(MEMBERS[3]))
    store.sets.add(KEY, MEMBERS[3:], ABOUT)
    assert dict(store.sets.read(KEY))[DIGESTS[3]] == MEMBERS[3]
    assert store.counts.torn == 0


def test_what_is_no_member_is_set_aside(store: Store) -> None:
    store.sets.add(KEY, MEMBERS[:2], ABOUT)
    (folder(store) / "notes.txt").write_text("mine")
    (folder(store) / DIGESTS[2]).mkdir()
    os.mkfifo(folder(store) / DIGESTS[3])  # to open it would wait for ever
    (folder(store) / ("A" * 64)).symlink_to("/dev/zero")
    assert set(dict(store.sets.read(KEY))) == set(DIGESTS[:2])
    assert store.counts.torn == 4
    assert {path.name for path in folder(store).iterdir()} == {*DIGESTS[:2], "about.json"}
    assert len(list((store.root / "quarantine").iterdir())) == 4


def test_what_others_are_copying_is_left_alone(store: Store) -> None:
    store.sets.add(KEY, MEMBERS[:2], ABOUT)
    coming = folder(store) / f".{DIGESTS[2]}.k3Jx0a"  # as rsync names a file on its way
    coming.write_bytes(MEMBERS[2][:1])
    assert set(dict(store.sets.read(KEY))) == set(DIGESTS[:2])
    assert store.counts.torn == 0
    coming.write_bytes(MEMBERS[2])
    coming.rename(folder(store) / DIGESTS[2])
    assert set(dict(store.sets.read(KEY))) == set(DIGESTS[:3])


def test_what_a_set_says_of_itself_is_never_trusted(store: Store) -> None:
    for said in (b"", b"{", b"[]", b"\xff"):
        path = folder(store) / "about.json"
        path.unlink(missing_ok=True)
        store.sets.add(KEY, [said + b"member"], ABOUT)
        path.chmod(0o600)
        path.write_bytes(said)
        assert store.sets.about(KEY) == {}
    assert len(dict(store.sets.read(KEY))) == 4
    assert store.counts.torn == 0


def test_the_folders_of_two_stores_copied_together_are_the_union(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    store.sets.add(KEY, MEMBERS[:3], ABOUT)
    other.sets.add(KEY, MEMBERS[2:], ABOUT)
    shutil.copytree(other.root / "sets", store.root / "sets", dirs_exist_ok=True, copy_function=_copied)
    assert set(dict(store.sets.read(KEY))) == set(DIGESTS)
    assert store.counts.torn == 0


def _copied(source: str, goal: str) -> None:
    Path(goal).unlink(missing_ok=True)
    shutil.copy(source, goal)


def test_an_old_store_works_and_gets_its_sets_when_something_comes(tmp_path: Path) -> None:
    root = tmp_path / "store"
    (root / "cas").mkdir(parents=True)
    (root / "TVMAKE_STORE").write_text(FORMAT)
    store = Store(root)
    assert dict(store.sets.read(KEY)) == {}
    assert not (root / "sets").exists()
    store.sets.add(KEY, MEMBERS, ABOUT)
    assert len(dict(Store(root).sets.read(KEY))) == len(MEMBERS)
    (root / "TVMAKE_STORE").unlink()
    assert len(dict(Store(root).sets.read(KEY))) == len(MEMBERS)


def test_a_folder_that_cannot_be_listed_is_an_error_in_words(store: Store) -> None:
    (store.root / "sets").mkdir(exist_ok=True)
    (store.root / "sets" / KEY[:2]).write_text("no folder")
    with pytest.raises(StoreError, match="the set"):
        store.sets.names(KEY)
    with pytest.raises(StoreError, match="the set"):
        store.sets.add(KEY, MEMBERS, ABOUT)


# several processes


def written(root: Path, writer: int, batches: int) -> None:
    for batch in range(batches):
        # Some members are everybody's, as where two tuners meet.
        members = [b"shared %d" % (batch * 7 + i) for i in range(3)] + [
            b"%d %d %d" % (writer, batch, i) for i in range(5)
        ]
        Store(root).sets.add(KEY, members, {"writer": writer})


def test_writers_at_once_lose_nothing_and_what_they_write_is_never_seen_half(tmp_path: Path) -> None:
    root = tmp_path / "store"
    writers = [_fork.Process(target=written, args=(root, i, 20)) for i in range(4)]
    for process in writers:
        process.start()
    reader, seen = Store(root), set()
    while any(process.is_alive() for process in writers):
        now = set(dict(reader.sets.read(KEY)))
        assert seen <= now
        seen = now
    for process in writers:
        process.join(30)
    assert [process.exitcode for process in writers] == [0] * 4
    members = dict(reader.sets.read(KEY))
    shared = {digest(b"shared %d" % (batch * 7 + i)) for batch in range(20) for i in range(3)}
    own = {digest(b"%d %d %d" % (w, batch, i)) for w in range(4) for batch in range(20) for i in range(5)}
    assert set(members) == shared | own
    assert reader.counts.torn == 0
    assert json.loads((folder(reader) / "about.json").read_text())["writer"] in range(4)


def test_a_writer_that_is_killed_leaves_whole_members_and_all_that_it_had_finished(tmp_path: Path) -> None:
    root, chance = tmp_path / "store", random.Random(3)
    Store(root)

    def write_for_ever(log: int, start: int) -> None:
        for batch in range(start, start + 10**6):
            Store(root).sets.add(KEY, [b"%d %d" % (batch, i) * 300 for i in range(8)], ABOUT)
            os.write(log, b"%d\n" % batch)

    finished: list[int] = []
    for kill in range(12):
        reading, writing = os.pipe()
        process = _fork.Process(target=write_for_ever, args=(writing, kill * 10**6))
        process.start()
        os.close(writing)
        time.sleep(chance.uniform(0.02, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with os.fdopen(reading) as stream:
            finished += [int(line) for line in stream.read().splitlines()]
    store = Store(root)
    members = set(dict(store.sets.read(KEY)))
    assert store.counts.torn == 0
    assert finished, "no writer lived long enough to finish a batch"
    assert {digest(b"%d %d" % (batch, i) * 300) for batch in finished for i in range(8)} <= members


def test_a_lock_is_given_to_one_and_nobody_waits(store: Store) -> None:
    other = Store(store.root)
    with store.sets.try_locked(KEY) as mine:
        assert mine
        for rival in (store, other):
            with rival.sets.try_locked(KEY) as theirs:
                assert not theirs
        with other.sets.try_locked(OTHER) as theirs:
            assert theirs
    with other.sets.try_locked(KEY) as theirs:
        assert theirs


def test_sets_whose_keys_begin_alike_have_locks_of_their_own(store: Store) -> None:
    keys = [KEY[:-1] + last for last in "0123"]
    with store.sets.try_locked(keys[0]) as first, store.sets.try_locked(keys[1]) as second:
        assert first
        assert second


def test_a_lock_of_a_process_that_was_killed_is_free(store: Store) -> None:
    ready = _fork.Event()

    def hold() -> None:
        with Store(store.root).sets.try_locked(KEY):
            ready.set()
            time.sleep(60)

    process = _fork.Process(target=hold)
    process.start()
    assert ready.wait(10)
    with store.sets.try_locked(KEY) as mine:
        assert not mine
    process.kill()
    process.join()
    with store.sets.try_locked(KEY) as mine:
        assert mine


def test_what_goes_wrong_in_the_block_comes_out_and_frees_the_lock(store: Store) -> None:
    with pytest.raises(OSError, match="of the block"), store.sets.try_locked(KEY):
        raise OSError("of the block")
    with store.sets.try_locked(KEY) as mine:
        assert mine
