"""Many processes on one store, and processes that are killed: what they share is whole at every moment."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from pipeline.hashing import Digest, key_of
from pipeline.store import ActionEntry, Store

ENTRIES = 2000
KILLS = 30
_fork = multiprocessing.get_context("fork")


def together(count: int, work: Callable[[int], object]) -> None:
    """Runs `work` in so many processes at once; fails where one fails."""
    processes = [_fork.Process(target=work, args=(i,)) for i in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * count


def blob(n: int) -> bytes:
    return random.Random(n).randbytes(n % 700)


def put_and_commit(store: Store, n: int) -> None:
    outputs = {"out": store.put(blob(n)), "log": store.put(b"log %d" % (n % 5))}
    store.commit(key_of({"n": n}), ActionEntry("link", {"n": n}, outputs, 0.0))


def all_is_whole(root: Path) -> list[ActionEntry]:
    """Every file that can be seen has the bytes that its name promises; every entry is a hit."""
    store = Store(root)
    for path in (root / "cas").glob("*/*"):
        assert Digest.of_file(path).hash == path.name
    entries = [store.lookup(path.name) for path in (root / "ac").glob("*/*")]
    assert store.counts.corrupt == 0
    assert not list((root / "quarantine").iterdir())
    whole = [entry for entry in entries if entry is not None]
    assert len(whole) == len(entries)
    return whole


def test_eight_processes_make_one_store(tmp_path: Path) -> None:
    for attempt in range(5):
        root = tmp_path / str(attempt) / "deep" / "store"
        together(8, lambda i, root=root: put_and_commit(Store(root), i))
        assert len(all_is_whole(root)) == 8


def test_eight_processes_write_and_read_the_same_entries(tmp_path: Path) -> None:
    root = tmp_path / "store"

    def work(i: int) -> None:
        store, order = Store(root), list(range(ENTRIES))
        random.Random(i // 2).shuffle(order)  # two each go the same way, so that they meet
        for n in order:
            if (entry := store.lookup(key_of({"n": n}))) is None:
                put_and_commit(store, n)
                entry = store.lookup(key_of({"n": n}))
            assert entry is not None
            assert entry.components == {"n": n}
            assert store.get(entry.outputs["out"]) == blob(n)
        assert store.counts.corrupt == 0

    together(8, work)
    assert len(all_is_whole(root)) == ENTRIES
    assert not list((root / "tmp").iterdir())


def test_a_process_that_is_killed_while_it_writes_leaves_a_whole_store(tmp_path: Path) -> None:
    root, chance = tmp_path / "store", random.Random(7)

    def write_for_ever(start: int, begun: Connection) -> None:
        store = Store(root)
        begun.send(True)
        for n in range(start, start + 10**6):
            data = blob(n) + bytes(n % 3 * 100_000)
            stream = iter([data[:1000], data[1000:], b""])
            outputs = {"streamed": store.put_stream(lambda stream=stream: next(stream)), "out": store.put(b"x" + data)}
            store.commit(key_of({"n": n}), ActionEntry("link", {"n": n}, outputs, 0.0))

    half_written, committed, kills = 0, 0, 0
    # On a busy machine a process may be killed before it gets to write, some of them, but not all of so many.
    while kills < KILLS or (not (half_written and committed) and kills < 20 * KILLS):
        told, tells = _fork.Pipe(duplex=False)
        process = _fork.Process(target=write_for_ever, args=(kills * 10**6, tells))
        process.start()
        assert told.recv()
        time.sleep(chance.uniform(0.001, 0.025))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        half_written, committed = len(list((root / "tmp").iterdir())), len(list((root / "ac").glob("*/*")))
    assert committed > 0, "no process lived long enough to write"
    assert half_written > 0, "no process was killed while it wrote: the test proves nothing"
    assert len(all_is_whole(root)) == committed
    put_and_commit(Store(root), -1)
    assert len(all_is_whole(root)) == committed + 1


# locks


def test_two_processes_do_the_same_work_once(tmp_path: Path) -> None:
    root, key = tmp_path / "store", key_of({"n": 1})

    def work(i: int) -> None:
        store = Store(root)
        with store.locked(key):
            if store.lookup(key) is None:
                (tmp_path / f"worked-{i}").touch()
                time.sleep(0.2)
                put_and_commit(store, 1)

    together(4, work)
    assert len(list(tmp_path.glob("worked-*"))) == 1


def test_threads_and_store_objects_exclude_each_other(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    inside: list[int] = []
    most: list[int] = []
    stores = [Store(tmp_path / "store") for _ in range(2)]

    def work(i: int) -> None:
        with stores[i % 2].locked("ab" * 32):
            inside.append(i)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(i)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(8)))
    assert max(most) == 1


def test_other_keys_are_not_held_up(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with store.locked("abc" + "0" * 61), store.locked("abd" + "0" * 61):
        pass


@pytest.mark.parametrize("held_by", ["killed", "raised"])
def test_a_lock_ends_with_whoever_held_it(tmp_path: Path, held_by: str) -> None:
    root, key = tmp_path / "store", "ab" * 32
    Store(root)

    def hold() -> None:
        with Store(root).locked(key):
            (tmp_path / "held").touch()
            if held_by == "raised":
                raise SystemExit
            time.sleep(60)

    process = _fork.Process(target=hold)
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.002)
    process.kill()
    begun = time.monotonic()
    with Store(root).locked(key):
        assert time.monotonic() - begun < 1
    process.join()
