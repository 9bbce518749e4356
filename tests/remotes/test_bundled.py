"""Many small blobs of a remote that come in a bundle: in few calls, and never wrong."""

from __future__ import annotations

import random
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from pipeline import closures
from pipeline.closures import Closure
from pipeline.hashing import Digest, key_of
from pipeline.remotes import bundles
from pipeline.remotes.bundles import Bundle
from pipeline.store import ActionEntry, Store
from tests.remotes.machines import KEY, Machine, away


@dataclass
class Told:
    """What one machine tells others of what it made."""

    entries: Mapping[str, ActionEntry]
    closure: Closure

    @property
    def bundles(self) -> tuple[Bundle, ...]:
        return self.closure.bundles

    @property
    def blobs(self) -> set[Digest]:
        return {digest for entry in self.entries.values() for digest in entry.outputs.values()}


CLOSURE = key_of({"closure": "of all"})


def told(machine: Machine, entries: int = 20, blobs: int = 20) -> Told:
    """Has a remote hold entries, each with so many blobs, and bundles of them."""
    chance = random.Random(1)
    made = {}
    for i in range(entries):
        outputs = {f"o{j}": machine.store.put(chance.randbytes(300)) for j in range(blobs)}
        made[key_of({"i": i})] = ActionEntry("codegen", {"number": i}, outputs, 1.0)
    for key, entry in made.items():
        machine.cache.publish(key, entry)
    found = {key: (f"native:operator-{i}", entry) for i, (key, entry) in enumerate(made.items())}
    closures.publish(machine.cache, machine.store, found, [CLOSURE])
    machine.finish()
    closure = closures.ask(machine.cache, machine.store, CLOSURE)
    assert closure is not None
    assert closure.bundles
    return Told(made, closure)


def brought(machine: Machine, what: Told) -> int:
    """How many entries come to a machine that was told of them; all that do are whole and right."""
    machine.cache.expect(what.closure.said, what.bundles)
    came = machine.cache.fetch(what.closure.said)
    for key in what.entries:
        assert machine.store.lookup(key) in (None, what.entries[key])
    return came


@pytest.fixture
def small_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles of eight blobs in the mean, so that there are many."""
    monkeypatch.setattr(bundles, "_ENDS", 32)


def test_many_small_blobs_come_in_few_calls(tmp_path: Path, between: Path, one: Machine) -> None:
    what = told(one)
    calls: list[str] = []
    other = Machine(tmp_path / "other", between, fault=calls.append)
    assert brought(other, what) == 20
    assert len(what.blobs) == 400
    assert calls.count("blob") <= len(what.bundles) + 2 <= 20, "what stands alone is no bundle"
    assert "action" not in calls
    assert other.cache.counts.received == 400 * 300
    assert not other.cache.counts.garbled + other.cache.counts.errors + other.cache.counts.incomplete


def test_entries_that_are_asked_for_one_by_one_bring_their_bundles(tmp_path: Path, between: Path, one: Machine) -> None:
    what = told(one)
    calls: list[str] = []
    other = Machine(tmp_path / "other", between, fault=calls.append)
    other.cache.expect(what.closure.said, what.bundles)
    assert not calls, "a bundle stays there until somebody wants what lies in it"
    assert all(other.cache.find(key) == entry for key, entry in what.entries.items())
    assert len(calls) <= len(what.bundles) + 2


def damaged(path: Path, how: str, what: Told, bundle: Bundle, store: Store) -> None:
    blobs = [store.get(digest) or b"" for digest in bundle.members]
    path.chmod(0o644)
    others = [each for each in what.bundles if each is not bundle]
    contents = {
        "garbled": b"\0" * bundle.blob.size,
        "html": b"<html><body>please log in</body></html>",
        "truncated": path.read_bytes()[: bundle.blob.size // 2],
        "empty": b"",
        "bomb": zlib.compress(bytes(1 << 20)),
        "huge": bytes(20 << 20),
        "one wrong member": bundles.pack([*blobs[:-1], bytes(len(blobs[-1]))]),
        "first wrong member": bundles.pack([bytes(len(blobs[0])), *blobs[1:]]),
        "in another order": bundles.pack(reversed(blobs)),
        "swapped": bundles.pack(store.get(digest) or b"" for digest in others[0].members),
    }
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(contents[how])


DAMAGES = ["gone", "garbled", "html", "truncated", "empty", "bomb", "huge", "swapped", "in another order"]


@pytest.mark.usefixtures("small_bundles")
@pytest.mark.parametrize("how", [*DAMAGES, "one wrong member", "first wrong member"])
def test_bundles_that_are_wrong_cost_the_questions_that_they_would_have_saved(
    tmp_path: Path, between: Path, one: Machine, how: str
) -> None:
    what = told(one)
    assert len(what.bundles) > 16, "more than wrong answers in a row after which a remote is left alone"
    for bundle in what.bundles:
        damaged(between / "cas" / bundle.blob.hash, how, what, bundle, one.store)
    calls: list[str] = []
    other = Machine(tmp_path / "other", between, fault=calls.append)
    assert brought(other, what) == 20
    assert other.cache.counts.garbled == (0 if how == "gone" else len(what.bundles))
    assert other.cache.counts.received == 400 * 300
    assert calls.count("blob") <= len(what.bundles) + 400, "each bundle is tried once"
    assert not other.said
    assert not list((other.store.root / "quarantine").iterdir())


@pytest.mark.usefixtures("small_bundles")
def test_one_bundle_that_is_wrong_keeps_no_other_from_being_used(tmp_path: Path, between: Path, one: Machine) -> None:
    what = told(one)
    (between / "cas" / what.bundles[3].blob.hash).unlink()
    calls: list[str] = []
    other = Machine(tmp_path / "other", between, fault=calls.append)
    assert brought(other, what) == 20
    alone = 400 - sum(len(bundle.members) for bundle in what.bundles)
    assert calls.count("blob") == len(what.bundles) + alone + len(what.bundles[3].members)


def test_a_bundle_whose_blobs_are_mostly_here_is_not_fetched(tmp_path: Path, between: Path, one: Machine) -> None:
    what = told(one)
    largest = max(what.bundles, key=lambda bundle: len(bundle.members))
    lacking = largest.members[:: len(largest.members) // 3][:3]
    seen: list[Digest] = []
    other = Machine(tmp_path / "other", between)
    real = other.cache.remote.blob
    other.cache.remote.blob = lambda digest: seen.append(digest) or real(digest)  # type: ignore[method-assign]
    for digest in what.blobs.difference(lacking):
        other.store.put(one.store.get(digest) or b"")
    assert brought(other, what) == 20
    assert sorted(seen) == sorted(lacking)


def test_threads_that_want_what_lies_in_one_bundle_fetch_it_once(tmp_path: Path, between: Path, one: Machine) -> None:
    what = told(one)
    bundle = max(what.bundles, key=lambda bundle: len(bundle.members))
    calls: list[str] = []

    def slowly(call: str) -> None:
        calls.append(call)
        time.sleep(0.2)

    other = Machine(tmp_path / "other", between, fault=slowly)
    other.cache.expect({}, what.bundles)
    wanted = bundle.members[:10]
    begun, came = threading.Barrier(len(wanted)), []

    def ask(digest: Digest, number: int) -> None:
        begun.wait()
        time.sleep(0.01 * number)  # the first is under way when the others ask
        came.append(other.cache.blobs([digest]))

    threads = [threading.Thread(target=ask, args=each) for each in zip(wanted, count())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert came == [True] * 10
    assert calls == ["blob"]


@pytest.mark.parametrize("how", ["a member elsewhere", "a member of no size", "too large", "elsewhere"])
def test_bundles_that_may_not_be_asked_for_are_passed_over(
    tmp_path: Path, between: Path, one: Machine, how: str
) -> None:
    what = told(one)
    victim = tmp_path / "precious"
    victim.write_text("precious")
    evil = {
        "a member elsewhere": lambda each: Bundle(each.blob, (*each.members, Digest("../../../precious", 8))),
        "a member of no size": lambda each: Bundle(each.blob, (*each.members, Digest(each.blob.hash, -1))),
        "too large": lambda each: Bundle(Digest(each.blob.hash, 1 << 40), each.members),
        "elsewhere": lambda each: Bundle(Digest("../precious", 8), each.members),
    }[how]
    calls: list[str] = []
    other = Machine(tmp_path / "other", between, fault=calls.append)
    other.cache.expect({}, map(evil, what.bundles))
    assert other.cache.fetch(what.closure.said) == 20
    assert len(calls) == 400, "blob by blob"
    assert victim.read_text() == "precious"


def test_a_bundle_without_an_end_is_not_read_to_it(tmp_path: Path, between: Path, one: Machine) -> None:
    what = told(one)
    names = {bundle.blob: bundle for bundle in what.bundles}
    read: list[int] = []

    def endless() -> Iterator[bytes]:
        while True:
            read.append(1000)
            assert sum(read) < 10 << 20
            yield bytes(1000)

    other = Machine(tmp_path / "other", between)
    real = other.cache.remote.blob
    other.cache.remote.blob = lambda each: endless() if each in names else real(each)  # type: ignore[method-assign]
    assert brought(other, what) == 20
    assert sum(read) <= sum(digest.size + 1000 for digest in names)


def test_a_bundle_gives_nothing_that_was_not_asked_for_by_digest(tmp_path: Path, between: Path, one: Machine) -> None:
    """One of another's making, of blobs of their own beside one that is wanted."""
    entry = one.make(KEY, b"code", b"more code")
    one.finish()
    evil = b"evil code"
    wanted, alien = entry.outputs["o0"], Digest.of(evil)
    packed = bundles.pack([evil, evil[:4]])
    (between / "cas" / Digest.of(packed).hash).write_bytes(packed)
    other = Machine(tmp_path / "other", between)
    other.cache.expect({}, [Bundle(Digest.of(packed), (alien, wanted))])
    assert other.cache.find(KEY) == entry
    assert other.store.get(wanted) == b"code"
    assert other.cache.counts.garbled == 1


def test_a_remote_that_goes_away_in_the_middle_of_bundles_is_waited_for_once(
    tmp_path: Path, between: Path, one: Machine
) -> None:
    what = told(one)
    other = Machine(tmp_path / "other", between, fault=away)
    assert brought(other, what) == 0
    assert len(other.said) == 1
    assert "going on without it" in other.said[0]


@pytest.mark.usefixtures("small_bundles")
def test_wrong_blobs_among_many_that_are_right_do_not_close_a_remote(
    tmp_path: Path, between: Path, one: Machine
) -> None:
    """Not eight in a row."""
    what = told(one)
    for bundle in what.bundles:
        (between / "cas" / bundle.blob.hash).unlink()
    wrong = {entry.outputs["o0"] for entry in list(what.entries.values())[:12]}
    for digest in wrong:
        path = between / "cas" / digest.hash
        path.unlink()
        path.write_bytes(b"wrong")
    other = Machine(tmp_path / "other", between)
    assert brought(other, what) == 8
    assert other.cache.counts.garbled == 12
    assert not other.said
