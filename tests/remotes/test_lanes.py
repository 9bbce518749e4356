"""Sets that several machines share: their union comes to all, and nobody overwrites anybody."""

from __future__ import annotations

import multiprocessing
import shutil
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from pipeline.hashing import key_of
from pipeline.remotes import open_remote
from pipeline.remotes.cache import RemoteCache
from pipeline.remotes.lanes import Lanes
from pipeline.remotes.settings import Policy
from pipeline.store import Store

CONV, POOL = key_of({"set": "conv"}), key_of({"set": "pool"})
ABOUT: dict[str, object] = {"operator": "conv2d"}


def lanes(store: Path, shared: Path, policy: Policy = Policy.READ_WRITE) -> Lanes:
    opened = Store(store)
    return Lanes(RemoteCache(opened, open_remote(shared.as_uri()), policy, lambda said: None), opened)


def members(store: Path, key: str = CONV) -> set[bytes]:
    return {data for _, data in Store(store).sets.read(key)}


def add(store: Path, *datas: bytes, key: str = CONV) -> None:
    Store(store).sets.add(key, datas, ABOUT)


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return tmp_path / "one"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return tmp_path / "other"


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return tmp_path / "shared"


def test_the_union_comes_to_all(one: Path, other: Path, shared: Path) -> None:
    add(one, b"a", b"b")
    add(other, b"b", b"c")
    add(other, b"p", key=POOL)
    assert lanes(one, shared).publish() == 2
    assert lanes(other, shared).publish() == 3
    assert lanes(one, shared).gather() == 2
    assert lanes(other, shared).gather() == 1
    assert members(one) == members(other) == {b"a", b"b", b"c"}
    assert members(one, POOL) == {b"p"}
    assert Store(one).sets.about(POOL) == ABOUT
    assert lanes(one, shared).gather() == lanes(other, shared).gather() == 0
    assert lanes(one, shared).publish() == lanes(other, shared).publish() == 0, "what came from others is not sent"


def test_a_lane_has_few_bundles_however_often_it_grows(one: Path, other: Path, shared: Path) -> None:
    ours = lanes(one, shared)
    for i in range(40):
        add(one, b"member %d" % i)
        assert ours.publish() == 1
    assert len(ours._own_bundles()) <= 8
    assert lanes(other, shared).gather() == 40
    assert members(other) == members(one)


def test_a_reader_reads_each_bundle_once(one: Path, other: Path, shared: Path) -> None:
    add(one, b"x" * 10_000)
    lanes(one, shared).publish()
    theirs = lanes(other, shared)
    theirs.gather()
    received = theirs._cache.counts.received
    theirs.gather()
    assert theirs._cache.counts.received == received
    assert lanes(other, shared)._cache.counts.received == 0


def test_what_a_remote_lost_is_sent_again(one: Path, other: Path, shared: Path) -> None:
    add(one, b"a")
    lanes(one, shared).publish()
    shutil.rmtree(shared)
    add(one, b"b")
    lanes(one, shared).publish()
    lanes(other, shared).gather()
    assert members(other) == {b"a", b"b"}


def test_a_store_that_lost_what_it_knew_begins_anew(one: Path, other: Path, shared: Path) -> None:
    add(one, b"a")
    lanes(one, shared).publish()
    shutil.rmtree(one / "sets" / "remotes")
    add(one, b"b")
    lanes(one, shared).publish()
    lanes(other, shared).gather()
    assert members(other) == {b"a", b"b"}


def test_torn_memory_of_a_remote_loses_nothing(one: Path, other: Path, shared: Path) -> None:
    add(one, b"a")
    lanes(one, shared).publish()
    (state,) = (one / "sets" / "remotes").iterdir()
    for name in ("lane", "read"):
        (state / name).write_bytes(b"{")
    with open(state / "known", "ab") as stream:
        stream.write(b"torn")
    add(one, b"b")
    lanes(one, shared).publish()
    lanes(one, shared).gather()
    add(one, b"c")
    lanes(one, shared).publish()
    lanes(other, shared).gather()
    assert {b"b", b"c"} <= members(other)


def test_what_is_no_bundle_is_passed_over(one: Path, other: Path, shared: Path) -> None:
    add(one, b"a")
    lanes(one, shared).publish()
    for path in (shared / "cas").iterdir():
        path.chmod(0o644)
        path.write_bytes(b"<html>")
    assert lanes(other, shared).gather() == 0
    assert members(other) == set()


def test_reading_and_writing_are_apart(one: Path, other: Path, shared: Path) -> None:
    add(one, b"a")
    assert lanes(one, shared, Policy.READ_ONLY).publish() == 0
    assert not shared.exists()
    assert lanes(one, shared, Policy.WRITE_ONLY).publish() == 1
    assert lanes(other, shared, Policy.WRITE_ONLY).gather() == 0
    assert lanes(other, shared, Policy.READ_ONLY).gather() == 1


def test_a_copied_store_is_another_writer(one: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(one, b"a")
    ours = lanes(one, shared)
    ours.publish()
    name = ours._writer()
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    assert ours._writer() != name


def _writes(store: Path, shared: Path, count: int) -> None:
    ours = lanes(store, shared)
    for i in range(count):
        add(store, f"{store.name} {i}".encode())
        ours.publish()


def test_many_stores_that_write_at_once_lose_nothing(tmp_path: Path, shared: Path) -> None:
    stores = [tmp_path / f"store{i}" for i in range(4)]
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_writes, args=(store, shared, 10)) for store in stores for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    reader = tmp_path / "reader"
    lanes(reader, shared).gather()
    assert members(reader) == {f"{store.name} {i}".encode() for store in stores for i in range(10)}


def test_a_lease_is_held_by_one(one: Path, other: Path, shared: Path) -> None:
    ours, theirs = lanes(one, shared), lanes(other, shared)
    assert ours.lease(CONV)
    assert not theirs.lease(CONV)
    assert theirs.lease(POOL)
    assert ours.lease(CONV), "who has it, has it"
    ours.release(CONV)
    assert theirs.lease(CONV)


def test_leases_of_many_sets_are_asked_for_at_once_by_a_new_store(one: Path, other: Path, shared: Path) -> None:
    keys = [key_of({"set": i}) for i in range(24)]
    ours, again, theirs = lanes(one, shared), lanes(one, shared), lanes(other, shared)
    with ThreadPoolExecutor(len(keys)) as threads:
        taken = list(threads.map(lambda i: (ours, again)[i % 2].lease(keys[i]), range(len(keys))))
        assert all(taken)
        assert not any(threads.map(theirs.lease, keys))
    assert ours._writer() == again._writer() == lanes(one, shared)._writer() != theirs._writer()
    assert [path.name for path in one.rglob("writer*")] == ["writer"]


def test_a_lease_of_one_that_died_runs_out(one: Path, other: Path, shared: Path) -> None:
    assert lanes(one, shared).lease(CONV)
    theirs = lanes(other, shared)
    assert not theirs.lease(CONV)
    later = Lanes(theirs._cache, Store(other), now=lambda: time.time() + 601)
    assert later.lease(CONV)


def test_a_lease_of_a_run_that_was_killed_does_not_hold_up_the_next_of_its_store(
    one: Path, other: Path, shared: Path
) -> None:
    assert lanes(one, shared).lease(CONV)
    assert lanes(one, shared).lease(CONV), "the sets of a store have locks of their own"
    assert not lanes(other, shared).lease(CONV)


def test_a_lease_of_a_clock_that_is_ahead_runs_out_as_well(one: Path, other: Path, shared: Path) -> None:
    ahead = lanes(one, shared)
    Lanes(ahead._cache, Store(one), now=lambda: time.time() + 1e6).lease(CONV)
    assert lanes(other, shared).lease(CONV), "one that ends later than any lease does is none"


def test_of_many_that_ask_at_once_one_gets_a_lease(tmp_path: Path, shared: Path) -> None:
    for attempt in range(3):
        key, got = key_of({"attempt": attempt}), []
        ready = threading.Barrier(6)

        def ask(i: int, key: str, got: list[bool], ready: threading.Barrier) -> None:
            ours = lanes(tmp_path / f"store{i}", shared)
            ready.wait()
            got.append(ours.lease(key))

        threads = [threading.Thread(target=ask, args=(i, key, got, ready)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(got) <= 1


def test_without_the_remote_everybody_may(one: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert lanes(one, tmp_path / "file" / "shared").lease(CONV)


def _hostile(writer: Path, shared: Path, bundle: bytes) -> None:
    """Has a remote hold a bundle of these bytes, in a lane of a writer that is listed."""
    ours = lanes(writer, shared)
    blob = ours._store.put(zlib.compress(bundle))
    assert ours._send("writers", {"writers": ["evil"]}, {})
    assert ours._send("lane", {}, {"0": blob}, writer="evil")


def _packed(about: object) -> bytes:
    return msgspec.msgpack.encode({CONV: (about, [b"m"])})


DEEP = b"\x81" + msgspec.msgpack.encode(CONV) + b"\x92\x81\xa1a" + b"\x91" * 5000 + b"\xc0\x91\xc4\x01m"
ALIEN = b"\x81" + msgspec.msgpack.encode(CONV) + b"\x92\x81\xa1\xff\xc0\x91\xc4\x01m"


@pytest.mark.parametrize(
    "bundle",
    [
        _packed({"a": {1: 2, "b": 3}}),
        _packed({"a": {b"x": 2}}),
        _packed([1]),
        DEEP,
        ALIEN,
        msgspec.msgpack.encode([1, 2]),
        msgspec.msgpack.encode({CONV: ({}, ["text"])}),
    ],
)
def test_a_hostile_bundle_is_passed_over(tmp_path: Path, other: Path, shared: Path, bundle: bytes) -> None:
    _hostile(tmp_path / "evil", shared, bundle)
    assert lanes(other, shared).gather() == 0
    assert members(other) == set()


def test_what_calls_itself_a_set_and_is_none_is_passed_over(tmp_path: Path, other: Path, shared: Path) -> None:
    named = {key: ({}, [b"m"]) for key in ("../../evil", "a\0b", "A" * 64, CONV)}
    _hostile(tmp_path / "evil", shared, msgspec.msgpack.encode(named))
    assert lanes(other, shared).gather() == 1
    assert Store(other).sets.all_keys() == [CONV]


def test_a_bundle_that_is_too_large_is_not_fetched(
    one: Path, other: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(one, b"a")
    lanes(one, shared).publish()
    monkeypatch.setattr("pipeline.remotes.lanes._LARGEST", 3)
    theirs = lanes(other, shared)
    assert theirs.gather() == 0
    assert theirs._cache.counts.received == 0


@pytest.mark.parametrize("until", [10**400, float("nan"), "soon", None, True, [1]])
def test_a_lease_until_no_time_at_all_is_none(one: Path, other: Path, shared: Path, until: object) -> None:
    lanes(one, shared)._send("lease", {"run": "evil", "until": until}, {}, set=CONV)
    assert lanes(other, shared).lease(CONV)
