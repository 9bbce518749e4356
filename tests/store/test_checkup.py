"""Verifying finds all that is wrong and only that; sizes are what the folders hold."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pipeline.hashing import key_of
from pipeline.store import ActionEntry, Store
from pipeline.store.checkup import sizes, verify

BIG = bytes(3_000_000)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", durable=False)


def key(n: int) -> str:
    return key_of({"n": n})


def fill(store: Store, count: int = 20) -> list[ActionEntry]:
    """Entries of two stages in turn; each has a blob of its own and one that all share."""
    entries = []
    for n in range(count):
        outputs = {"own": store.put(b"%d" % n * n), "shared": store.put(b"shared")}
        entries.append(ActionEntry(["link", "codegen"][n % 2], {"n": n}, outputs, 1.5))
        store.commit(key(n), entries[-1])
    return entries


def path_of(store: Store, kind: str, name: str) -> Path:
    return store.root / kind / name[:2] / name


def damage(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)


def weigh(root: Path, *kinds: str) -> int:
    return sum(path.stat().st_size for kind in kinds for path in (root / kind).rglob("*") if path.is_file())


# verify


def test_what_is_whole_is_good(store: Store) -> None:
    fill(store)
    store.put(BIG)
    store.sets.add(key(0), [b"a", b"b"], {})
    told: list[tuple[int, int]] = []
    verified = verify(store, progress=lambda done, total: told.append((done, total)))
    assert verified.good
    assert (verified.entries, verified.blobs, verified.members) == (20, 22, 2)
    assert verified.bytes == weigh(store.root, "cas")
    assert told[-1] == (verified.bytes, verified.bytes)
    assert told == sorted(told)


def test_an_empty_store_is_good(store: Store) -> None:
    assert verify(store).good
    for name in ("cas", "ac", "sets", "pins"):
        (store.root / name).rmdir()
    assert verify(store).good


@pytest.mark.parametrize("threads", [1, 4])
def test_everything_that_is_wrong_is_found_named_and_set_aside(store: Store, threads: int) -> None:
    entries = fill(store)
    chance = random.Random(4)
    corrupt, gone, torn = chance.sample(range(1, 20), 3)
    for n in range(20):
        assert store.lookup(key(n)) is not None  # what was verified once is read again
    blob = entries[corrupt].outputs["own"].hash
    damage(path_of(store, "cas", blob), b"x" * entries[corrupt].outputs["own"].size)
    path_of(store, "cas", entries[gone].outputs["own"].hash).unlink()
    damage(path_of(store, "ac", key(torn)), path_of(store, "ac", key(torn)).read_bytes()[:-9])
    (member,) = store.sets.add(key(0), [b"a"], {})
    damage(store.root / "sets" / key(0)[:2] / key(0) / member, b"b")
    (store.root / "pins" / "broken.json").write_bytes(b"{")

    verified = verify(store, threads=threads)
    assert not verified.good
    assert verified.corrupt_blobs == (blob,)
    assert verified.corrupt_entries == (key(torn),)
    assert {(each.key, each.missing) for each in verified.incomplete} == {
        (key(n), (entries[n].outputs["own"].hash,)) for n in (corrupt, gone)
    }
    assert {each.stage for each in verified.incomplete} == {entries[n].stage for n in (corrupt, gone)}
    assert verified.torn == 1
    assert verified.unreadable_pins == (store.root / "pins" / "broken.json",)
    assert store.counts.corrupt == 2
    assert len(list((store.root / "quarantine").iterdir())) == 3

    again = verify(store)
    assert (again.corrupt_blobs, again.corrupt_entries, again.torn) == ((), (), 0)
    assert again.incomplete == verified.incomplete


def test_a_blob_that_all_name_and_that_is_corrupt_makes_all_incomplete(store: Store) -> None:
    entries = fill(store)
    damage(path_of(store, "cas", entries[0].outputs["shared"].hash), b"sh")
    assert {each.key for each in verify(store).incomplete} == {key(n) for n in range(20)}
    store.put(b"shared")
    assert verify(store).good


# sizes


def test_sizes_are_those_of_the_files(store: Store) -> None:
    fill(store)
    store.put(BIG)
    store.sets.add(key(0), [b"abc", b"b"], {"about": "it"})
    store.sets.add(key(1), [b"c"], {})
    found = sizes(store)
    assert (found.entries, found.blobs, found.bytes) == (20, 22, weigh(store.root, "cas", "ac"))
    assert (found.unnamed, found.unnamed_bytes) == (1, len(BIG))
    assert (found.sets, found.members, found.member_bytes) == (2, 3, 5)
    assert list(found.by_stage) == ["codegen", "link"]
    for n, stage in enumerate(("link", "codegen")):
        own = sum(len(b"%d" % each * each) for each in range(n, 20, 2)) + (len(b"shared") if stage == "codegen" else 0)
        entries = sum(path_of(store, "ac", key(each)).stat().st_size for each in range(n, 20, 2))
        assert (found.by_stage[stage].entries, found.by_stage[stage].seconds) == (10, 15.0)
        assert found.by_stage[stage].bytes == own + entries
    assert found.bytes == sum(each.bytes for each in found.by_stage.values()) + found.unnamed_bytes


def test_what_was_set_aside_is_counted_apart(store: Store) -> None:
    entries = fill(store, 3)
    damage(path_of(store, "cas", entries[2].outputs["own"].hash), b"1234")
    assert store.lookup(key(2)) is None or Store(store.root).lookup(key(2)) is None
    damage(path_of(store, "ac", key(0)), b"torn")
    found = sizes(store)
    assert (found.set_aside, found.set_aside_bytes) == (1, 4)
    assert (found.corrupt, found.entries) == (1, 2)
    assert path_of(store, "ac", key(0)).exists(), "sizes only looks"


def test_sizes_of_an_empty_store_and_of_one_of_the_version_before(store: Store) -> None:
    assert sizes(store).bytes == 0
    for name in ("cas", "ac", "sets", "pins", "usage", "quarantine"):
        (store.root / name).rmdir()
    assert sizes(store).by_stage == {}
