"""Closures: all that an artifact is made of, as one small document."""

from __future__ import annotations

import random
import zlib
from collections.abc import Collection
from pathlib import Path

import msgspec
import pytest

from pipeline import closures
from pipeline.closures import Closure, Part
from pipeline.hashing import Digest, key_of
from pipeline.remotes import bundles, open_remote
from pipeline.remotes.bundles import Bundle
from pipeline.remotes.cache import RemoteCache
from pipeline.remotes.settings import Policy
from pipeline.store import ActionEntry, Store

PARTS = tuple(Part(key_of({"i": i}), f"native:conv-{i}", f"check\n{{{i}}}\n") for i in range(50))


def test_a_closure_comes_back_and_its_order_does_not_matter() -> None:
    data = Closure(PARTS).to_bytes()
    assert Closure(tuple(reversed(PARTS))).to_bytes() == data
    assert set(Closure.from_bytes(data).parts) == set(PARTS)
    assert Closure.from_bytes(data).said[PARTS[3].key] == PARTS[3].said.encode()
    assert len(data) < len(msgspec.json.encode(PARTS))


def test_bundles_come_back_in_their_order() -> None:
    digests = [Digest.of(b"%d" % i) for i in range(20)]
    told = (Bundle(digests[0], tuple(digests[1:10])), Bundle(digests[10], tuple(digests[11:])))
    assert Closure.from_bytes(Closure(PARTS, told).to_bytes()).bundles == told


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>",
        Closure(PARTS).to_bytes()[:-1],
        zlib.compress(b"[]")[:-1],
        zlib.compress(b"{}"),
        zlib.compress(b'[["key"]]'),
        zlib.compress(b'{"parts": [["key"]]}'),
        zlib.compress(b'{"parts": [], "bundles": [["a"]]}'),
        zlib.compress(b'{"parts": [], "bundles": [[{"hash": "a", "size": "1"}, []]]}'),
        zlib.compress(msgspec.json.encode(PARTS)),  # as it was before there were bundles
        zlib.compress(b"not json"),
    ],
)
def test_what_is_no_closure_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="closure"):
        Closure.from_bytes(data)


def test_what_unpacks_to_more_than_it_should_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closures, "_LARGEST", 1000)
    with pytest.raises(ValueError, match="too large"):
        Closure.from_bytes(zlib.compress(b" " * 10_000_000))


@pytest.mark.parametrize("key", ["../../../home/user/.profile", "a" * 63, "A" * 64, "a" * 64 + "\n", "a\0b", ""])
def test_a_closure_with_keys_that_are_none_is_refused(key: str) -> None:
    """A key is where an entry lies in the store."""
    with pytest.raises(ValueError, match="closure"):
        Closure.from_bytes(Closure((*PARTS, Part(key, "evil", "said"))).to_bytes())


# with a remote

Found = dict[str, tuple[str, ActionEntry]]
UNDER = [key_of({"under": i}) for i in range(2)]


class Machine:
    """A store behind a shared folder."""

    def __init__(self, folder: Path, shared: Path) -> None:
        self.store = Store(folder, durable=False)
        self.remote = RemoteCache(self.store, open_remote(shared.as_uri()), Policy.READ_WRITE, print)

    def made(self, operators: int, changed: int | None = None, version: int = 1) -> Found:
        """Actions of so many operators, each with eight small blobs and a large one; one of them is another. `version`
        is in all keys and in no blob."""
        found: Found = {}
        for i in range(operators):
            chance = random.Random(f"{i}{' changed' if i == changed else ''}")
            outputs = {f"o{j}": self.store.put(chance.randbytes(100)) for j in range(8)}
            outputs["object"] = self.store.put(chance.randbytes(bundles.LARGEST_MEMBER + 1))
            key = key_of({"operator": i, "changed": i == changed, "version": version})
            found[key] = (f"native:operator-{i:03}", ActionEntry("codegen", {}, outputs, 1.0))
        return found

    def told(self, found: Found, known: Collection[Digest] = ()) -> Closure:
        """What others are told of these actions."""
        closures.publish(self.remote, self.store, found, UNDER, known)
        self.remote.finish()
        asked = [closures.ask(self.remote, self.store, key) for key in UNDER]
        assert asked[0] is not None
        assert asked[0] == asked[1]
        return asked[0]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "store", tmp_path / "shared")


def test_a_closure_tells_of_entries_and_of_bundles_of_their_small_blobs(machine: Machine, tmp_path: Path) -> None:
    found = machine.made(30)
    told = machine.told(found)
    assert {part.key: part.subject for part in told.parts} == {key: subject for key, (subject, _) in found.items()}
    bundled = [member for bundle in told.bundles for member in bundle.members]
    small = {digest for _, entry in found.values() for name, digest in entry.outputs.items() if name != "object"}
    assert set(bundled) <= small
    assert len(small) - len(bundled) <= 2, "what stands alone is in none"
    on_remote = {path.name for path in (tmp_path / "shared" / "cas").iterdir()}
    assert {bundle.blob.hash for bundle in told.bundles} <= on_remote


def test_an_operator_that_changes_leaves_most_bundles_as_they_were(machine: Machine) -> None:
    before = machine.told(machine.made(200))
    after = machine.told(machine.made(200, changed=77, version=2))
    assert len(before.bundles) > 15
    # At most where its blobs were and where they are now, and where a bundle ended with one of them.
    assert len(set(before.bundles) - set(after.bundles)) <= 3


def test_what_is_known_by_then_is_in_no_bundle(machine: Machine) -> None:
    found = machine.made(30)
    known = {digest for _, entry in list(found.values())[:10] for digest in entry.outputs.values()}
    told = machine.told(found, known)
    assert len(told.parts) == 30
    assert told.bundles
    assert known.isdisjoint(member for bundle in told.bundles for member in bundle.members)


def test_a_blob_that_is_gone_meanwhile_leaves_out_its_bundle(machine: Machine) -> None:
    found = machine.made(60)
    whole = machine.told(found)
    gone = whole.bundles[1].members[0]
    path = machine.store.path(gone)
    assert path is not None
    path.unlink()
    told = machine.told(found)
    assert set(told.bundles) == {bundle for bundle in whole.bundles if gone not in bundle.members}
    assert len(told.parts) == 60


def test_the_closure_of_one_action_lies_where_no_other_does() -> None:
    keys = [key_of({"i": i}) for i in range(3)]
    assert len({*keys, *map(closures.key_of_one, keys)}) == 6
    assert closures.key_of_one(keys[0]) == closures.key_of_one(keys[0])
