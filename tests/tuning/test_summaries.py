"""Summaries of record sets: the same as what the sets say, and few sets opened."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.hashing import RACY_NS
from pipeline.store import Store
from pipeline.tuning import summaries as summing
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.records import BEST, NONE, PreferredRecord
from pipeline.tuning.summaries import EMPTY, Summaries
from tests.made_up import ATTRIBUTES, Made, digest_of, trial, tune, won

TOOLS = {"tvm": "0.27.0"}
NOISE = 0.03


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def opened(store: Store) -> Callable[[], Summaries]:
    """The summaries as another process sees them."""
    return lambda: Summaries(Store(store.root), NOISE, TOOLS)


def settle() -> None:
    """Waits until what was written is no longer so new that it would be read again."""
    time.sleep(2 * RACY_NS / 1e9)


def many(store: Store, count: int = 3) -> list[Made]:
    made = [
        Made(f"op{i}", records=[*won("a", 2.0, 50.0 + i, TOOLS), trial("b", None, 60.0, tools=TOOLS)])
        for i in range(count)
    ]
    tune(store.root, made)
    return made


def test_a_summary_is_what_the_ledger_says(store: Store, opened: Callable[[], Summaries]) -> None:
    (one,) = many(store, 1)
    stands = Ledger(store, NOISE, tools=TOOLS).standing(one.key)
    found = opened().of(one.key)
    assert (found.trials, found.timed, found.failures) == (2, 1, {"failed": 1})
    assert (found.gain, found.spent, found.baseline) == (stands.gain, stands.spent, stands.baseline)
    assert (found.candidate, found.validated, found.is_proven) == (digest_of("a"), 50.0, True)
    assert found.measured == 60.0
    assert opened().of(Made("nobody").key) == EMPTY


def test_sets_are_opened_once_and_again_when_they_change(store: Store, opened: Callable[[], Summaries]) -> None:
    made = many(store)
    settle()
    first = opened()
    known = [first.of(each.key) for each in made]
    assert first.opened == 3
    first.save()
    second = opened()
    assert [second.of(each.key) for each in made] == known
    assert second.opened == 0
    tune(store.root, [Made(made[1].name, records=won("c", 3.0, 70.0, TOOLS))])
    settle()
    third = opened()
    assert [third.of(each.key).gain for each in made] == [2.0, 3.0, 2.0]
    assert third.opened == 1


def test_a_set_that_was_read_within_a_tick_of_its_change_is_read_again(
    store: Store, opened: Callable[[], Summaries]
) -> None:
    (one,) = many(store, 1)
    folder = store.sets.changed.parent / one.key[:2] / one.key
    now = time.time_ns()
    os.utime(folder, ns=(now, now))
    racy = opened()
    racy.of(one.key)
    racy.save()
    later = opened()
    later.of(one.key)
    assert later.opened == 1


def test_a_set_whose_time_was_set_back_is_read_again(store: Store, opened: Callable[[], Summaries]) -> None:
    (one,) = many(store, 1)
    folder = store.sets.changed.parent / one.key[:2] / one.key
    settle()
    before = folder.stat().st_mtime_ns
    first = opened()
    first.of(one.key)
    first.save()
    tune(store.root, [Made(one.name, records=won("c", 3.0, 70.0, TOOLS))])
    os.utime(folder, ns=(before, before))
    assert opened().of(one.key).gain == 3.0


@pytest.mark.parametrize("harm", ["torn", "flipped", "other", "gone"])
def test_a_broken_file_is_thrown_away(store: Store, opened: Callable[[], Summaries], harm: str) -> None:
    made = many(store)
    settle()
    first = opened()
    known = [first.of(each.key) for each in made]
    first.save()
    (path,) = (store.root / "summaries").iterdir()
    data = path.read_bytes()
    path.unlink()
    if harm != "gone":
        flipped = data[:100] + bytes([data[100] ^ 1]) + data[101:]
        path.write_bytes({"torn": data[:-9], "flipped": flipped, "other": b"{}"}[harm])
    second = opened()
    assert [second.of(each.key) for each in made] == known
    assert second.opened == 3
    second.save()
    assert path.read_bytes() == data


def test_a_store_that_cannot_be_written_is_read_all_the_same(
    store: Store, opened: Callable[[], Summaries], monkeypatch: pytest.MonkeyPatch
) -> None:
    (one,) = many(store, 1)
    settle()

    def refused(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(summing, "written_atomically", refused)
    known = opened()
    assert known.of(one.key).gain == 2.0
    known.save()
    assert not list((store.root / "summaries").iterdir())


def test_another_noise_and_other_tools_are_summed_up_apart(store: Store) -> None:
    (one,) = many(store, 1)
    settle()
    for noise, tools, gain, is_proven in (
        (NOISE, TOOLS, 2.0, True),
        (NOISE, {"tvm": "0.28.0"}, 2.0, False),
        (NOISE, TOOLS, 2.0, True),
    ):
        known = Summaries(store, noise, tools)
        assert (known.of(one.key).gain, known.of(one.key).is_proven) == (gain, is_proven)
        known.save()
    assert len(list((store.root / "summaries").iterdir())) == 2
    assert Summaries(store, NOISE, {"tvm": "0.28.0"}).of(one.key).tools == TOOLS


def test_files_of_long_ago_are_removed(store: Store, opened: Callable[[], Summaries]) -> None:
    many(store, 1)
    old = store.root / "summaries" / "0"
    old.parent.mkdir(exist_ok=True)
    old.write_bytes(b"")
    os.utime(old, (1.0, 1.0))
    settle()
    known = opened()
    known.of(Made("op0").key)
    known.save()
    assert not old.exists()
    assert len(list(old.parent.iterdir())) == 1


def test_a_set_that_is_gone_is_forgotten(store: Store, opened: Callable[[], Summaries]) -> None:
    import shutil

    (one,) = many(store, 1)
    settle()
    first = opened()
    first.of(one.key)
    first.save()
    shutil.rmtree(store.sets.changed.parent / one.key[:2] / one.key)
    assert opened().of(one.key) == EMPTY


def test_what_somebody_decided_is_known(store: Store, opened: Callable[[], Summaries]) -> None:
    (one,) = many(store, 1)
    assert opened().of(one.key).preferred is None
    for i, (candidate, applied) in enumerate(((NONE, ""), (BEST, digest_of("a")))):
        Ledger(store, NOISE).add(one.key, {}, [PreferredRecord(candidate=candidate, at=100.0 + i)])
        found = opened().of(one.key)
        assert (found.preferred, found.candidate) == (candidate, applied)


def test_sets_of_other_devices_are_found_and_asked_once(store: Store, opened: Callable[[], Summaries]) -> None:
    here, there = Made("op", device="here"), Made("op", device="there", records=won("a", 2.0, tools=TOOLS))
    tune(store.root, [there, Made("other", device="here", records=won("a", 2.0, tools=TOOLS))])
    Ledger(store, NOISE).add("f" * 64, {"operator": "says little"}, won("a", 2.0, tools=TOOLS))
    known = opened()
    assert known.elsewhere(ATTRIBUTES, "here") == {here.digest: ["there"]}
    assert known.elsewhere(ATTRIBUTES, "there").keys() == {Made("other").digest}
    assert known.elsewhere({**ATTRIBUTES, "mcpu": "znver4"}, "here") == {}
    known.save()
    again = opened()
    again._store.sets.about = None  # type: ignore[assignment,method-assign]
    assert again.elsewhere(ATTRIBUTES, "here") == {here.digest: ["there"]}
