"""Many processes of two machines write one shared folder at once: nothing is torn, nothing is lost."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from pipeline.hashing import key_of
from pipeline.remotes import open_remote
from pipeline.remotes.cache import RemoteCache
from pipeline.remotes.settings import Policy
from pipeline.store import ActionEntry, Store

PROCESSES = 8


def key(process: int, number: int) -> str:
    return key_of({"process": process, "number": number})


def contents(process: int, number: int) -> list[bytes]:
    """One blob that only this entry has, and one that entries of all processes share."""
    return [b"%d of %d " % (number, process) * 50, b"shared %d " % (number % 100) * 200]


def _write(store: Path, shared: Path, process: int, count: int) -> None:
    opened = Store(store, durable=False)
    said: list[str] = []
    cache = RemoteCache(opened, open_remote(shared.as_uri()), Policy.READ_WRITE, said.append)
    for number in range(count):
        outputs = {f"o{i}": opened.put(data) for i, data in enumerate(contents(process, number))}
        entry = ActionEntry("codegen", {"process": process}, outputs, 1.0)
        opened.commit(key(process, number), entry)
        cache.publish(key(process, number), entry)
    cache.finish()
    assert not said, said
    assert cache.counts.published == count


@pytest.mark.parametrize("count", [50, pytest.param(1250, marks=pytest.mark.slow)])
def test_eight_processes_of_two_machines_lose_nothing(tmp_path: Path, count: int) -> None:
    shared, machines = tmp_path / "shared", [tmp_path / "one", tmp_path / "other"]
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(machines[i % 2], shared, i, count)) for i in range(PROCESSES)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * PROCESSES
    reader = RemoteCache(
        Store(tmp_path / "third", durable=False), open_remote(shared.as_uri()), Policy.READ_ONLY, lambda said: None
    )
    for process in range(PROCESSES):
        for number in range(count):
            entry = reader.find(key(process, number))
            assert entry is not None, (process, number)
            got = [reader.store.get(digest) for digest in entry.outputs.values()]
            assert got == contents(process, number)
    assert reader.counts.garbled == reader.counts.errors == 0
    assert len(list((shared / "ac").iterdir())) == PROCESSES * count
    assert not list((shared / "tmp").iterdir())
