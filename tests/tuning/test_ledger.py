"""The ledger: what tuning wrote down, incrementally read, by any number of processes at once."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import pytest

from pipeline.store import Store
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.records import Certificate, Outcome, RetestRecord, SetKeys, TrialRecord, decoded, encoded

KEY = Ledger.key_of("w" * 64, {"kind": "llvm"}, "a processor")
OTHER = Ledger.key_of("w" * 64, {"kind": "c"}, "a processor")
ABOUT = {"operator": "conv2d"}
_fork = multiprocessing.get_context("fork")


def trial(name: str, seconds: float = 1.0) -> TrialRecord:
    return TrialRecord(
        candidate=name,
        space="post-order-apply",
        space_version=1,
        decisions=[[["GetSBlock", [], ["block0", "main"], ["b0"]]], [[3, [4, 16]]]],
        outcome=Outcome.TIMED,
        seconds=seconds,
        baseline=2.0,
        cost=0.25,
    )


def retest(name: str, seconds: float = 1.0) -> RetestRecord:
    certificate = Certificate("default", (0, 1), 1e-3, 1e-6)
    return RetestRecord(candidate=name, seconds=seconds, baseline=2.0, noise=0.0, certificate=certificate, cost=0.5)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The members that are read."""
    names: list[str] = []
    real = os.open

    def watched(path: object, *rest: object) -> int:
        if len(name := Path(str(path)).name) == 64:
            names.append(name)
        return real(path, *rest)

    monkeypatch.setattr(os, "open", watched)
    return names


def test_what_was_written_stands(store: Store) -> None:
    ledger = Ledger(store, 0.02)
    assert ledger.standing(KEY).trials == ()
    ledger.add(KEY, ABOUT, [trial("aa"), trial("bb", 0.5), retest("bb", 0.5)])
    for each in (ledger, Ledger(Store(store.root), 0.02)):
        found = each.standing(KEY)
        assert (len(found.trials), found.gain, found.spent) == (2, 4.0, 1.0)
        assert found.best is not None
        assert decoded(encoded(found.best.trial)) == trial("bb", 0.5)
        assert each.unread(KEY) == 0
    assert Ledger(store, 0.9).standing(KEY).gain == 4.0, "no more than half is ever taken for noise"
    assert ledger.standing(OTHER).trials == ()
    assert store.sets.about(KEY) == ABOUT


def test_only_what_is_new_is_read(store: Store, opened: list[str]) -> None:
    ledger, other = Ledger(store, 0.02), Ledger(Store(store.root), 0.02)
    ledger.add(KEY, ABOUT, [trial("aa"), trial("bb")])
    opened.clear()
    first = ledger.standing(KEY)
    assert len(opened) == 2
    assert ledger.standing(KEY) is first
    other.add(KEY, ABOUT, [trial("cc", 0.1)])
    opened.clear()
    assert [each.candidate for each in ledger.standing(KEY).trials] == ["aa", "bb", "cc"]
    assert len(opened) == 1


def test_what_cannot_be_read_is_counted_and_costs_nothing_else(store: Store, opened: list[str]) -> None:
    ledger = Ledger(store, 0.02)
    ledger.add(KEY, ABOUT, [trial("aa"), trial("bb")])
    (newer, alien) = store.sets.add(KEY, [encoded(trial("cc")).replace(b'"format":1', b'"format":9'), b"[1]"], ABOUT)
    torn = next(name for name in store.sets.names(KEY) if name not in (newer, alien))
    path = store.root / "sets" / KEY[:2] / KEY / torn
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-9])
    (path.parent / "notes").write_text("mine")
    assert len(ledger.standing(KEY).trials) == 1
    assert (ledger.unread(KEY), ledger.newer(KEY)) == (4, 1)
    opened.clear()
    assert (ledger.unread(KEY), len(ledger.standing(KEY).trials)) == (4, 1)
    assert opened == []
    assert {newer, alien} <= store.sets.names(KEY), "what another version wrote stays for it"
    ledger.add(KEY, ABOUT, [trial("aa"), trial("bb")])
    assert len(ledger.standing(KEY).trials) == 2


def test_a_batch_with_a_record_that_cannot_be_read_back_is_not_written(store: Store) -> None:
    ledger = Ledger(store, 0.02)
    with pytest.raises(ValueError, match="seconds"):
        ledger.add(KEY, ABOUT, [trial("aa"), trial("bb", float("nan"))])
    assert store.sets.names(KEY) == frozenset()


def test_memory_is_bounded_and_what_was_forgotten_is_read_again(store: Store, opened: list[str]) -> None:
    size = len(encoded(trial("aa"))) * 12
    ledger = Ledger(store, 0.02, room=size)
    keys = [Ledger.key_of(str(i), {"kind": "llvm"}, "here") for i in range(5)]
    for key in keys:
        ledger.add(key, ABOUT, [trial(f"{i:02}") for i in range(5)])
    for _ in range(2):
        for key in keys:
            assert len(ledger.standing(key).trials) == 5
            assert ledger._size <= size
    opened.clear()
    assert len(ledger.standing(keys[-1]).trials) == 5
    assert opened == []
    assert len(ledger.standing(keys[0]).trials) == 5
    assert len(opened) == 5


def test_one_operator_larger_than_the_room_is_still_remembered(store: Store, opened: list[str]) -> None:
    ledger = Ledger(store, 0.02, room=1)
    ledger.add(KEY, ABOUT, [trial("aa")])
    ledger.standing(KEY)
    opened.clear()
    ledger.standing(KEY)
    assert opened == []


def test_threads_share_a_ledger(store: Store) -> None:
    ledger, failures = Ledger(store, 0.02), []

    def work(number: int) -> None:
        try:
            for i in range(10):
                ledger.add(KEY, ABOUT, [trial(f"{number}-{i}")])
                assert f"{number}-{i}" in ledger.standing(KEY).tried
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(ledger.standing(KEY).trials) == 40


def test_one_of_two_tuners_gets_an_operator(store: Store) -> None:
    one, other = Ledger(store, 0.02), Ledger(Store(store.root), 0.02)
    with one.claim(KEY) as mine, other.claim(KEY) as theirs, other.claim(OTHER) as another:
        assert (mine, theirs, another) == (True, False, True)
    with other.claim(KEY) as theirs:
        assert theirs


def test_the_key_of_a_set_is_pinned() -> None:
    """What was tuned is found again by every later version."""
    target = {"kind": "llvm", "mattr": ["+a", "+b"], "n": 3}
    expected = "37cbc0803f9a25f0f241215262e6ca24505addc5ec39c1eab8b9f9c5d2506382"
    assert Ledger.key_of("w" * 64, target, "a processor") == expected
    assert SetKeys(target, "a processor").of("w" * 64) == expected


def test_records_of_one_target_or_device_never_stand_for_another(store: Store) -> None:
    ledger = Ledger(store, 0.02)
    target = {"kind": "llvm", "mcpu": "znver4"}
    ledger.add(Ledger.key_of("w", target, "here"), ABOUT, [trial("aa", 0.5), retest("aa", 0.5)])
    assert ledger.standing(Ledger.key_of("w", target, "here")).gain == 4.0
    for other in (("w", {**target, "mcpu": "cortex-a72"}, "here"), ("w", target, "there"), ("v", target, "here")):
        assert ledger.standing(Ledger.key_of(*other)).trials == ()


def tuned(root: Path, writer: int) -> None:
    ledger = Ledger(Store(root), 0.02)
    for i in range(30):
        ledger.add(KEY, {"writer": writer}, [trial(f"{writer} {i} {j}") for j in range(4)])


def test_two_writers_on_one_folder_lose_nothing(tmp_path: Path) -> None:
    writers = [_fork.Process(target=tuned, args=(tmp_path / "store", i)) for i in range(2)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
    ledger = Ledger(Store(tmp_path / "store"), 0.02)
    found = ledger.standing(KEY)
    assert found.tried == {f"{writer} {i} {j}" for writer in range(2) for i in range(30) for j in range(4)}
    assert found.spent == 240 * 0.25
    assert ledger.unread(KEY) == 0


def test_the_records_of_two_machines_merge_by_copying(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    Ledger(store, 0.02).add(KEY, ABOUT, [trial("aa"), trial("bb")])
    Ledger(other, 0.02).add(KEY, ABOUT, [trial("bb"), trial("cc", 0.5), retest("cc", 0.5)])
    shutil.copytree(other.root / "sets" / KEY[:2] / KEY, folder := tmp_path / "brought")
    for path in folder.iterdir():
        path.replace(store.root / "sets" / KEY[:2] / KEY / path.name)
    found = Ledger(store, 0.02).standing(KEY)
    assert found.tried == {"aa", "bb", "cc"}
    assert (found.gain, found.spent) == (4.0, 1.25)
