"""What goes and what stays: the decision over an inventory, and what collecting does to a store that others use."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from array import array
from collections.abc import Collection
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.hashing import Digest, key_of
from pipeline.store import ActionEntry, Store
from pipeline.store.inventory import Inventory, take_inventory
from pipeline.store.pins import Pins
from pipeline.store.upkeep import GRACE_SECONDS, Bounds, Plan, Share, collect, decide
from pipeline.store.use import MARK_SECONDS

_fork = multiprocessing.get_context("fork")
EMPTY = Bounds(max_bytes=0)
DAY = 86_400
NOW = 1_000_000


# the decision


def digest(n: int) -> bytes:
    return n.to_bytes(32, "big")


@st.composite
def inventories(draw: st.DrawFn) -> Inventory:
    """Some blobs, and entries that name some of them; sizes and times from few values, so that they meet."""
    inventory = Inventory()
    count = draw(st.integers(0, 12))
    times = st.integers(0, 10)
    for n in range(count):
        inventory.add_blob(digest(n), draw(st.integers(0, 20)), draw(times))
    for n in range(draw(st.integers(0, 10))):
        named = draw(st.lists(st.integers(0, count + 1), max_size=5))  # some of which are not here
        outputs = [(digest(blob), inventory.blob_sizes[blob] if blob < count else 1) for blob in named]
        stage = draw(st.sampled_from(["link", "codegen"]))
        inventory.add_entry(digest(100 + n), draw(st.integers(1, 5)), draw(times), stage, 1.0, outputs)
    return inventory


def kept_after(inventory: Inventory, plan: Plan) -> tuple[set[int], set[int]]:
    entries = set(range(len(inventory))) - set(plan.entries)
    return entries, {blob for blob in range(len(inventory.blobs)) if not plan.blobs[blob]}


def bytes_of(inventory: Inventory, entries: Collection[int], blobs: Collection[int]) -> int:
    return sum(inventory.entry_sizes[n] for n in entries) + sum(inventory.blob_sizes[n] for n in blobs)


@settings(max_examples=300, deadline=None)
@given(inventories(), st.none() | st.integers(0, 250), st.none() | st.integers(0, 11), st.integers(0, 11), st.data())
def test_the_decision(
    inventory: Inventory, max_bytes: int | None, max_age: int | None, used_since: int, data: st.DataObject
) -> None:
    pinned = {digest(100 + n) for n in data.draw(st.sets(st.integers(0, 12), max_size=4))}
    scaled = 10**9  # times are drawn in seconds
    for times in (inventory.blob_times, inventory.entry_times):
        times[:] = array("q", [each * scaled for each in times])
    plan = decide(inventory, Bounds(max_bytes, max_age), pinned, used_since * scaled, 10 * scaled)
    entries, blobs = kept_after(inventory, plan)

    def stays(entry: int) -> bool:
        return inventory.key(entry) in pinned or inventory.entry_times[entry] >= used_since * scaled

    gone = list(plan.entries)
    assert len(gone) == len(set(gone))
    assert not any(map(stays, gone))
    # No entry that stays lacks a blob that it had, and every blob that stays is named or was used of late.
    named = {blob for entry in entries for blob in inventory.outputs_of(entry)}
    assert named <= blobs
    assert all(inventory.blob_times[blob] >= used_since * scaled for blob in blobs - named)
    assert {blob for blob, used in enumerate(inventory.blob_times) if used >= used_since * scaled} <= blobs
    # Within the bounds, unless nothing else may go.
    free = [entry for entry in entries if not stays(entry)]
    if max_bytes is not None and bytes_of(inventory, entries, blobs) > max_bytes:
        assert not free
    if max_age is not None:
        assert all(inventory.entry_times[entry] >= (10 - max_age) * scaled for entry in free)
    # Least recently used first, and none more than that needs.
    assert [inventory.entry_times[entry] for entry in gone] == sorted(inventory.entry_times[entry] for entry in gone)
    if gone and free:
        assert inventory.entry_times[gone[-1]] <= min(inventory.entry_times[entry] for entry in free)
    if gone and (max_age is None or inventory.entry_times[gone[-1]] >= (10 - max_age) * scaled):
        back = {*entries, gone[-1]}
        named = {blob for entry in back for blob in inventory.outputs_of(entry)}
        assert max_bytes is not None
        assert bytes_of(inventory, back, blobs | named) > max_bytes


def test_a_shared_blob_goes_with_the_last_that_names_it() -> None:
    inventory = Inventory()
    inventory.add_blob(digest(0), 100, 0)
    inventory.add_blob(digest(1), 10, 0)
    for n in range(3):
        inventory.add_entry(digest(100 + n), 1, n, "link", 0.0, [(digest(0), 100)])
    inventory.add_entry(digest(103), 1, 3, "link", 0.0, [(digest(1), 10), (digest(1), 10)])
    plan = decide(inventory, Bounds(max_bytes=50), set(), 10, 10)
    assert list(plan.entries) == [0, 1, 2]
    assert list(plan.blobs) == [1, 0]


# a store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def key(n: int) -> str:
    return key_of({"n": n})


def path_of(store: Store, kind: str, name: str) -> Path:
    return store.root / kind / name[:2] / name


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def add(store: Store, n: int, *blobs: bytes, days: float = 1.0, stage: str = "link") -> ActionEntry:
    """An entry that was made and used so many days ago, with its blobs."""
    outputs = {f"out{i}": store.put(blob) for i, blob in enumerate(blobs)}
    entry = ActionEntry(stage, {"n": n}, outputs, 2.0)
    store.commit(key(n), entry)
    for output in outputs.values():
        age(path_of(store, "cas", output.hash), days * DAY)
    age(path_of(store, "ac", key(n)), days * DAY)
    return entry


def here(store: Store) -> set[int]:
    """Which of the entries 0 … 99 are hits; asking does not count as use."""
    entries = {n: path_of(store, "ac", key(n)) for n in range(100)}
    times = {n: path.stat().st_mtime for n, path in entries.items() if path.exists()}
    found = {n for n in times if Store(store.root).lookup(key(n)) is not None}
    for n, then in times.items():
        os.utime(entries[n], (then, then))
    return found


def files(root: Path, *kinds: str) -> dict[str, int]:
    return {str(path): path.stat().st_size for kind in kinds for path in (root / kind).rglob("*") if path.is_file()}


def pins(store: Store) -> Pins:
    return Pins(store.root)


def test_the_least_recently_used_go_until_the_store_is_small_enough(store: Store) -> None:
    for n in range(10):
        add(store, n, bytes([n]) * 1000, days=1 + (n * 7) % 10)
    before = sum(files(store.root, "ac", "cas").values())
    collected = collect(store, Bounds(max_bytes=before - 3000), pins(store))
    left = sum(files(store.root, "ac", "cas").values())
    oldest = sorted(range(10), key=lambda n: -((n * 7) % 10))[:3]
    assert here(store) == set(range(10)) - set(oldest)
    assert (collected.entries_removed, collected.blobs_removed, collected.entries_kept, collected.blobs_kept) == (
        3,
        3,
        7,
        7,
    )
    assert (collected.bytes_freed, collected.bytes_kept) == (before - left, left)
    assert collected.within


def test_what_was_used_again_stays(store: Store) -> None:
    for n in range(4):
        add(store, n, bytes([n]) * 10)
    assert store.lookup(key(2)) is not None
    collected = collect(store, EMPTY, pins(store))
    assert here(store) == {2}
    assert collected.entries_in_use == 1
    assert not collected.within


def test_entries_go_by_age(store: Store) -> None:
    for n in range(5):
        add(store, n, bytes([n]) * 10, days=n + 0.5)
    assert collect(store, Bounds(max_age_seconds=2 * DAY), pins(store)).within
    assert here(store) == {0, 1}
    collect(store, Bounds(), pins(store))
    assert here(store) == {0, 1}


def test_a_dry_run_says_what_would_go_and_removes_nothing(store: Store) -> None:
    for n in range(8):
        add(store, n, bytes([n]) * 100, b"shared", days=n + 1, stage=["link", "codegen"][n % 2])
    age(path_of(store, "cas", store.put(b"orphan").hash), DAY)
    (store.root / "ac" / key(0)[:2] / key(0)).chmod(0o600)
    (store.root / "ac" / key(0)[:2] / key(0)).write_bytes(b"torn")
    everything = {path: os.stat(path).st_mtime_ns for path in files(store.root, "")}
    told = collect(store, Bounds(max_bytes=2000), pins(store), dry_run=True)
    assert {path: os.stat(path).st_mtime_ns for path in files(store.root, "")} == everything
    done = collect(store, Bounds(max_bytes=2000), pins(store))
    assert told.dry_run
    assert told.entries_removed > 0
    told.dry_run = False
    assert told == done
    assert done.entries_corrupt == 1
    assert len(list((store.root / "quarantine").iterdir())) == 1


def test_it_adds_up_by_stage(store: Store) -> None:
    add(store, 0, b"a" * 100, b"shared" * 10, stage="link", days=3)
    add(store, 1, b"b" * 100, b"shared" * 10, stage="codegen", days=1)
    store.put(b"new")
    collected = collect(store, Bounds(max_age_seconds=2 * DAY), pins(store))
    shares = collected.by_stage
    assert list(shares) == ["", "codegen", "link"]
    assert shares[""] == Share(bytes_kept=3)
    assert (shares["link"].entries_removed, shares["link"].bytes_kept) == (1, 0)
    assert shares["link"].bytes_freed > 100
    assert (shares["codegen"].entries_kept, shares["codegen"].bytes_freed) == (1, 0)
    assert shares["codegen"].bytes_kept > 160
    assert collected.bytes_freed == sum(share.bytes_freed for share in shares.values())
    assert collected.bytes_kept == sum(share.bytes_kept for share in shares.values())


def test_blobs_that_nothing_names_go_after_a_while(store: Store) -> None:
    old, new = store.put(b"old"), store.put(b"new")
    age(path_of(store, "cas", old.hash), GRACE_SECONDS + 60)
    age(path_of(store, "cas", new.hash), GRACE_SECONDS - 60)
    collected = collect(store, Bounds(), pins(store))
    assert (collected.blobs_removed, collected.blobs_kept) == (1, 1)
    assert not store.has(old)
    assert store.has(new)


def test_what_is_pinned_stays(store: Store) -> None:
    for n in range(6):
        add(store, n, bytes([n]) * 10, b"shared", days=n + 1)
    pins(store).add("lock", [key(1), key(4), key(77)])
    pins(store).add("release", [key(5)])
    collected = collect(store, EMPTY, pins(store))
    assert here(store) == {1, 4, 5}
    assert collected.entries_pinned == 3
    pins(store).remove("release")
    collect(store, EMPTY, pins(store))
    assert here(store) == {1, 4}


def test_a_broken_pin_keeps_everything(store: Store) -> None:
    for n in range(3):
        add(store, n, bytes([n]) * 10)
    age(path_of(store, "cas", store.put(b"orphan").hash), DAY)
    broken = store.root / "pins" / "lock.json"
    broken.write_bytes(b"{")
    before = files(store.root, "")
    for dry_run in (True, False):
        collected = collect(store, EMPTY, pins(store), dry_run=dry_run)
        assert collected.unreadable_pins == (broken,)
        assert (collected.entries_removed, collected.blobs_removed, collected.bytes_freed) == (0, 0, 0)
        assert not collected.within
        assert files(store.root, "") == before


def test_what_is_pinned_while_it_collects_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(10):
        add(store, n, bytes([n]) * 10, days=10 - n)
    monkeypatch.setattr("pipeline.store.upkeep._AT_ONCE", 2)

    def pin(done: int, total: int) -> None:
        if (done, total) == (4, 20):
            pins(store).add("lock", [key(9)])

    collect(store, EMPTY, pins(store), progress=pin)
    assert here(store) == {9}


def test_a_pin_that_breaks_while_it_collects_ends_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(10):
        add(store, n, bytes([n]) * 10, days=10 - n)
    monkeypatch.setattr("pipeline.store.upkeep._AT_ONCE", 2)
    broken = store.root / "pins" / "lock.json"

    def break_it(done: int, total: int) -> None:
        if (done, total) == (4, 20):
            broken.write_bytes(b"{")

    collected = collect(store, EMPTY, pins(store), progress=break_it)
    assert collected.unreadable_pins == (broken,)
    assert here(store) == set(range(4, 10))
    assert (collected.entries_removed, collected.blobs_removed, collected.blobs_kept) == (4, 0, 10)


def test_what_is_used_while_it_collects_stays_with_its_blobs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(10):
        add(store, n, bytes([n]) * 10, b"shared", days=10 - n)
    orphan = store.put(b"orphan")
    age(path_of(store, "cas", orphan.hash), DAY)
    monkeypatch.setattr("pipeline.store.upkeep._AT_ONCE", 2)

    def use(done: int, total: int) -> None:
        if done == 4 and total < 100:
            assert Store(store.root).lookup(key(8)) is not None
            assert Store(store.root).put(b"orphan") == orphan

    collected = collect(store, EMPTY, pins(store), progress=use)
    assert here(store) == {8}
    assert collected.entries_kept == 1
    assert collected.blobs_kept == 3
    assert store.get(orphan) == b"orphan"


def test_what_was_used_since_the_first_run_began_stays(store: Store) -> None:
    add(store, 0, b"before", days=0.5)
    add(store, 1, b"since", days=0.2)
    put_before, put_since = store.put(b"put before"), store.put(b"put since")
    age(path_of(store, "cas", put_before.hash), 0.5 * DAY)
    age(path_of(store, "cas", put_since.hash), 0.2 * DAY)
    with store.in_use():
        for path in (store.root / "locks").glob("use-*"):
            age(path, 0.3 * DAY)
        collect(store, EMPTY, pins(store))
        assert here(store) == {1}
        assert not store.has(put_before)
        assert path_of(store, "cas", put_since.hash).exists()
    collect(store, EMPTY, pins(store))
    assert here(store) == set()


def test_what_a_run_used_without_marking_it_stays(store: Store) -> None:
    digest = store.put(b"put a minute before the run")
    age(path_of(store, "cas", digest.hash), DAY + MARK_SECONDS - 60)
    with store.in_use():
        for path in (store.root / "locks").glob("use-*"):
            age(path, DAY)
        collect(store, EMPTY, pins(store))
        assert store.get(digest) is not None


def test_times_in_the_future_are_put_right(store: Store) -> None:
    add(store, 0, b"out", days=-400)
    collect(store, EMPTY, pins(store))
    assert here(store) == {0}
    times = [os.stat(path).st_mtime for path in files(store.root, "ac", "cas")]
    assert all(abs(time.time() - each) < 60 for each in times)


def test_sets_are_never_touched(store: Store) -> None:
    store.sets.add(key(0), [b"record"], {})
    for path in (store.root / "sets").rglob("*"):
        age(path, 900 * DAY)
    before = files(store.root, "sets")
    assert collect(store, Bounds(0, 0.0), pins(store)).within
    assert files(store.root, "sets") == before


def test_other_files_in_the_folders_are_left_alone(store: Store) -> None:
    add(store, 0, b"out")
    blob = path_of(store, "cas", Digest.of(b"out").hash)
    others = [blob.with_name(".nfs0001"), blob.with_name(blob.name + ".part"), store.root / "cas" / "zz" / blob.name]
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(b"mine")
        age(other, 99 * DAY)
    collect(store, EMPTY, pins(store))
    assert all(other.exists() for other in others)
    assert not blob.exists()


def test_leftovers_of_a_day_ago_go(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("quarantine", "tmp"):
        (store.root / folder / "x").write_bytes(b"12345")
    age(store.root / "quarantine" / "x", 9 * DAY)  # it was set aside just now
    age(store.root / "tmp" / "x", 9 * DAY)
    assert collect(store, Bounds(), pins(store)).leftovers == 0
    now = time.time_ns()
    monkeypatch.setattr(type(store.use), "now", lambda _: now + 2 * DAY * 10**9)
    told = collect(store, Bounds(), pins(store), dry_run=True)
    done = collect(store, Bounds(), pins(store))
    assert (told.leftovers, told.leftover_bytes) == (done.leftovers, done.leftover_bytes) == (2, 10)
    assert not files(store.root, "quarantine", "tmp")


def test_a_store_of_the_version_before_is_collected(store: Store) -> None:
    add(store, 0, b"out")
    for folder in ("pins", "usage", "locks", "sets"):
        (store.root / folder).rmdir()
    assert collect(Store(store.root), EMPTY, pins(store)).entries_removed == 1


def test_progress_goes_from_front_to_end_twice(store: Store) -> None:
    for n in range(5):
        add(store, n, bytes([n]) * 10)
    told: list[tuple[int, int]] = []
    collect(store, EMPTY, pins(store), progress=lambda done, total: told.append((done, total)))
    reading = [each for each in told if each[1] == 512]
    removing = told[len(reading) :]
    assert reading == [(n + 1, 512) for n in range(512)]
    assert removing == [(5, 10), (10, 10)]


def test_the_inventory_holds_what_lies_there(store: Store) -> None:
    entries = [add(store, n, bytes([n]) * n, b"shared", stage=["link", "codegen"][n % 2]) for n in range(20)]
    path_of(store, "cas", entries[3].outputs["out0"].hash).unlink()
    inventory = take_inventory(store.root)
    assert len(inventory) == 20
    names = list(inventory.blobs)
    assert [inventory.blobs[name] for name in names] == list(range(20))
    for number in range(20):
        n = next(n for n in range(20) if key(n) == inventory.key(number).hex())
        digests = {output.hash for output in entries[n].outputs.values()}
        found = {names[blob].hex() for blob in inventory.outputs_of(number)}
        assert found == (digests - {entries[3].outputs["out0"].hash} if n == 3 else digests)
        assert (number in inventory.incomplete) == (n == 3)
        assert inventory.stages[inventory.entry_stages[number]] == entries[n].stage
        assert inventory.seconds[number] == 2.0
    assert set(inventory.owners()) == {inventory.stages.index("codegen"), inventory.stages.index("link")}


@pytest.mark.parametrize(
    "text", ["[]", '{"format":1}', '{"format":1,"stage":[],"components":{},"outputs":{},"seconds":[]}']
)
def test_an_entry_whose_check_holds_and_that_is_none_is_set_aside(store: Store, text: str) -> None:
    import hashlib

    path = path_of(store, "ac", key(0))
    path.parent.mkdir()
    path.write_text(hashlib.sha256(f"{key(0)}\n{text}".encode()).hexdigest() + f"\n{text}\n")
    assert collect(store, Bounds(), pins(store)).entries_corrupt == 1
    assert not path.exists()


# beside others


def work(root: Path, seed: int, until: float) -> None:
    """A build as a store sees it: looks up, puts, commits, and reads again what it put; all of it right or a miss."""
    store, chance = Store(root, durable=False), random.Random(seed)
    with store.in_use():
        put: dict[Digest, bytes] = {}
        while time.time() < until:
            n = chance.randrange(40)
            data = [b"%d " % n * 50, b"common %d" % (n % 4)]
            entry = store.lookup(key(n))
            if entry is None:
                outputs = {f"out{i}": store.put(each) for i, each in enumerate(data)}
                put.update(zip(outputs.values(), data, strict=True))
                stream = iter([b"streamed %d" % (n % 7), b""])
                put[store.put_stream(stream.__next__)] = b"streamed %d" % (n % 7)
                store.commit(key(n), ActionEntry("link", {"n": n}, outputs, 0.0))
            else:
                put.update(zip(entry.outputs.values(), data, strict=True))
            digest = chance.choice(list(put))
            assert store.get(digest) == put[digest], f"{digest} of {put[digest]!r}"
        assert store.counts.corrupt == 0


def collect_for_ever(root: Path, until: float) -> None:
    store = Store(root)
    while time.time() < until:
        collect(store, EMPTY, Pins(root))


def filled_long_ago(root: Path) -> Store:
    store = Store(root, durable=False)
    for n in range(40):
        add(store, n, b"%d " % n * 50, b"common %d" % (n % 4))
        age(path_of(store, "cas", store.put(b"streamed %d" % (n % 7)).hash), DAY)
    return store


def test_builds_beside_two_collections_never_miss_what_they_used(tmp_path: Path) -> None:
    """Everything is old when they begin, so that each first use competes with its removal."""
    for attempt in range(12):
        root = tmp_path / str(attempt)
        filled_long_ago(root)
        until = time.time() + 0.15
        processes = [_fork.Process(target=work, args=(root, seed, until)) for seed in range(3)]
        processes += [_fork.Process(target=collect_for_ever, args=(root, until)) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(30)
        assert [process.exitcode for process in processes] == [0] * 5
        store = Store(root)
        for path in (root / "cas").glob("*/*"):
            assert Digest.of_file(path).hash == path.name
        assert all(store.lookup(path.name) is not None for path in (root / "ac").glob("*/*"))


def test_a_collection_that_is_killed_leaves_a_whole_store(tmp_path: Path) -> None:
    chance, cut = random.Random(3), 0
    for attempt in range(12):
        root = tmp_path / str(attempt)
        store = filled_long_ago(root)
        process = _fork.Process(target=collect_for_ever, args=(root, time.time() + 30))
        process.start()
        while sum(1 for _ in root.glob("ac/*/*")) > chance.randrange(1, 40):
            time.sleep(0.0005)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        left = files(root, "ac")
        cut += 0 < len(left) < 40 or bool(files(root, "cas"))
        assert all(Store(root).lookup(Path(path).name) is not None for path in left)
        for path in files(root, "ac", "cas"):
            age(Path(path), DAY)
        collected = collect(store, EMPTY, Pins(root))
        assert (collected.entries_kept, collected.blobs_kept) == (0, 0)
    assert cut > 0, "no collection was killed in its middle: the test proves nothing"
