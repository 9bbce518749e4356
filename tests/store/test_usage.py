"""Counts over runs: each run is counted once, however often they were merged, by whom, and wherever that was killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from pipeline.store import Store
from pipeline.store import usage as usage_module
from pipeline.store.usage import RemoteUsage, StageUsage, Usage, UsageCounts

_fork = multiprocessing.get_context("fork")
DAY = 86_400


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Store(tmp_path / "store").root


def one(n: int = 1) -> UsageCounts:
    stages = {"link": StageUsage(hits=n, misses=2, seconds_saved=0.5), f"only {n % 3}": StageUsage(bytes_sent=n)}
    return UsageCounts(stages, {"http://cache": RemoteUsage(requests=3, errors=1, bytes_received=10)})


def names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "usage").iterdir())


def test_a_run_is_read_as_it_was_added(root: Path) -> None:
    Usage(root).add(one())
    assert Usage(root).read() == one()
    assert len(names(root)) == 1
    assert not list((root / "tmp").iterdir())


def test_nothing_was_used_yet(root: Path) -> None:
    assert Usage(root).read() == UsageCounts(runs=0)
    (root / "usage").rmdir()
    assert Usage(root).read() == UsageCounts(runs=0)
    Usage(root).add(one())
    assert Usage(root).read() == one()


def test_runs_add_up_and_become_one_file(root: Path) -> None:
    for n in range(200):
        Usage(root).add(one(n))
        assert len(names(root)) <= 66
    total = Usage(root).read()
    assert total.runs == 200
    assert total.stages["link"] == StageUsage(hits=sum(range(200)), misses=400, seconds_saved=100.0)
    assert sum(total.stages[f"only {n}"].bytes_sent for n in range(3)) == sum(range(200))
    assert total.remotes == {"http://cache": RemoteUsage(requests=600, errors=200, bytes_received=2000)}
    assert total.torn == 0
    assert "merged.json" in names(root)


def test_runs_since_a_time(root: Path) -> None:
    now = 20_000 * DAY + 1000.0
    for days in range(100):
        Usage(root).add(one(), at=now - days * DAY)
    assert "merged.json" in names(root)
    usage = Usage(root)
    assert usage.read(since=now + 1).runs == 1  # what was merged of today counts as a whole
    assert usage.read(since=now - 10 * DAY - 1).runs == 11
    assert usage.read(since=now - 90 * DAY - 1).runs == 91
    assert usage.read(since=0).runs == usage.read().runs == 100


@pytest.mark.parametrize(
    "content", [b"", b'{"format":1,"at":1', b"<html>", b"\xff\xfe", b"[]", b'{"format":1,"at":"x"}']
)
def test_a_torn_file_is_counted_and_passed_over(root: Path, content: bytes) -> None:
    usage = Usage(root)
    for _ in range(3):
        usage.add(one())
    (root / "usage" / "run-1-torn.json").write_bytes(content)
    assert (usage.read().runs, usage.read().torn) == (3, 1)
    for _ in range(64):
        usage.add(one())
    assert (usage.read().runs, usage.read().torn) == (67, 1)
    assert "run-1-torn.json" not in names(root)


def test_a_torn_merged_file_loses_only_what_was_in_it(root: Path) -> None:
    usage = Usage(root)
    for _ in range(70):
        usage.add(one())
    left = len(names(root)) - 1
    (root / "usage" / "merged.json").chmod(0o600)
    (root / "usage" / "merged.json").write_bytes(b'{"format":1,"days":')
    assert (usage.read().runs, usage.read().torn) == (left, 1)
    for _ in range(70):
        usage.add(one())
    assert (usage.read().runs, usage.read().torn) == (left + 70, 1)


def test_what_a_later_version_wrote_is_left_as_it_is(root: Path) -> None:
    usage = Usage(root)
    merged, run = root / "usage" / "merged.json", root / "usage" / "run-1-later.json"
    run.write_bytes(b'{"format":2}')
    for _ in range(80):
        usage.add(one())
    assert (usage.read().runs, usage.read().torn) == (80, 1)
    assert run.read_bytes() == b'{"format":2}'
    merged.unlink()
    merged.write_bytes(b'{"format":2}')
    count = len(names(root))
    for _ in range(80):
        usage.add(one())
    assert merged.read_bytes() == b'{"format":2}'
    assert len(names(root)) == count + 80


def test_other_files_are_passed_over(root: Path) -> None:
    Usage(root).add(one())
    for name in (".nfs001", "notes.txt", "run-1.json.part"):
        (root / "usage" / name).write_bytes(b"mine")
    assert Usage(root).read() == one()


def test_processes_that_add_at_once_lose_nothing(root: Path) -> None:
    def add(_: int) -> None:
        for _ in range(60):
            Usage(root).add(one())

    processes = [_fork.Process(target=add, args=(i,)) for i in range(4)]
    for process in processes:
        process.start()
    seen = [Usage(root).read().runs]
    while any(process.is_alive() for process in processes):
        seen.append(Usage(root).read().runs)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert seen == sorted(seen), "a run was counted twice, or not at all, while others merged"
    assert Usage(root).read().runs == 240


def test_a_merge_while_one_reads_changes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = Usage(root)
    for _ in range(64):
        usage.add(one())
    real, merges = Usage._names, iter([True])

    def merged_first(self: Usage) -> list[str]:
        if next(merges, False):
            usage.add(one())
            assert names(root) == ["merged.json"]
        return real(self)

    monkeypatch.setattr(Usage, "_names", merged_first)
    assert Usage(root).read().runs == 65


def test_wherever_a_merge_is_killed_every_run_is_counted_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at random moments while nearly every run merges; what `add` returned from is there, and nothing twice."""
    import filelock  # noqa: F401  # or a child would spend its life on that

    monkeypatch.setattr(usage_module, "_MANY", 2)
    chance, least, most, cut, kills = random.Random(5), 0, 0, 0, 0
    while kills < 40 or (not cut and kills < 400):
        kills += 1
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            while True:
                os.write(writing, b"b")  # begins
                Usage(root).add(one())
                os.write(writing, b"e")  # is done
        os.close(writing)
        with os.fdopen(reading, "rb") as stream:
            told = stream.read(1)
            time.sleep(chance.uniform(0.0005, 0.008))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            told += stream.read()
        least, most = least + told.count(b"e"), most + told.count(b"b")
        counts = Usage(root).read()
        assert least <= counts.runs <= most
        assert counts.torn == 0
        least = most = counts.runs
        merged = root / "usage" / "merged.json"
        if merged.exists():
            cut += not set(json.loads(merged.read_bytes())["holds"]).isdisjoint(names(root))
    assert most >= 40
    assert cut > 0, "no merge was killed in its middle: the test proves nothing"


@pytest.mark.parametrize("step", range(8))
def test_a_merge_that_stops_at_each_step_counts_once(root: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    usage, steps = Usage(root), 0
    for _ in range(5):
        usage.add(one())
    monkeypatch.setattr(usage_module, "_MANY", 5)
    calls = {name: getattr(Path, name) for name in ("unlink", "read_bytes")}

    def stopping(name: str):  # type: ignore[no-untyped-def]
        def call(path: Path, *rest: object, **named: object) -> object:
            nonlocal steps
            if path.parent.name == "usage":
                steps += 1
                if steps == step * 2:
                    raise KeyboardInterrupt
            return calls[name](path, *rest, **named)

        return call

    with monkeypatch.context() as patch:
        for name in calls:
            patch.setattr(Path, name, stopping(name))
        try:
            usage.add(one())
        except KeyboardInterrupt:
            assert step
    assert usage.read().runs == 6
    usage.add(one())
    usage.add(one())
    assert usage.read().runs == 8
