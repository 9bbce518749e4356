"""Bundles of small blobs: they come back as they were, stay as they are where nothing changed, and are refused where
they are not what was told of them."""

from __future__ import annotations

import tracemalloc
import zlib
from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.hashing import Digest
from pipeline.remotes import bundles
from pipeline.remotes.bundles import LARGEST_MEMBER, Bundle

LARGEST = bundles._LARGEST
BLOBS = [b"code" * 100, b"", b"x", bytes(range(256)) * 20]
MEMBERS = tuple(map(Digest.of, BLOBS))
PACKED = bundles.pack(BLOBS)


def digests(count: int, size: int | None = None) -> list[Digest]:
    """Digests of blobs that all differ."""
    made = (Digest.of(b"%d" % i) for i in range(count))
    return [each if size is None else replace(each, size=size) for each in made]


def unpacked(data: bytes, members: tuple[Digest, ...] = MEMBERS) -> list[tuple[Digest, bytes]]:
    return list(bundles.unpack(data, members))


# packing


@given(st.lists(st.binary(max_size=300)))
def test_what_is_packed_comes_back(blobs: list[bytes]) -> None:
    members = tuple(map(Digest.of, blobs))
    packed = bundles.pack(blobs)
    assert unpacked(packed, members) == list(zip(members, blobs, strict=True))
    assert bundles.pack(list(blobs)) == packed, "same blobs, same bytes"


@given(st.lists(st.binary(max_size=50), min_size=1), st.data())
def test_whatever_a_bundle_is_changed_to_nothing_is_taken_for_what_it_is_not(
    blobs: list[bytes], data: st.DataObject
) -> None:
    """Each piece is given with the digest that it should have; whoever takes it compares."""
    members = tuple(map(Digest.of, blobs))
    packed = bytearray(bundles.pack(blobs))
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        came = unpacked(bytes(packed), members)
    except ValueError:
        return
    assert [digest for digest, _ in came] == list(members)
    assert all(len(piece) == digest.size for digest, piece in came)


def test_many_alike_take_less_room_than_each_alone() -> None:
    blobs = [b'{"stage": "codegen", "number": %d}' % i for i in range(64)]
    assert len(bundles.pack(blobs)) < sum(map(len, blobs)) / 2


# cutting


@given(st.lists(st.integers(0, 2 * LARGEST_MEMBER), max_size=300), st.integers(0, 5))
def test_each_small_blob_is_in_one_bundle_at_most_and_none_is_too_large(sizes: list[int], repeated: int) -> None:
    each = [replace(digest, size=size) for digest, size in zip(digests(len(sizes)), sizes, strict=True)]
    groups = bundles.cut(each + each[:repeated])
    cut = list(chain.from_iterable(groups))
    small = [digest for digest in each if digest.size <= LARGEST_MEMBER]
    assert len(cut) == len(set(cut))
    assert cut == [digest for digest in small if digest in set(cut)], "in order"
    assert all(len(group) > 1 for group in groups)
    assert all(sum(digest.size for digest in group) <= LARGEST for group in groups)
    assert all(Bundle(Digest.of(b""), group).is_sound for group in groups), "what is made may be asked for"


def test_a_bundle_has_some_sixty_blobs_in_the_mean() -> None:
    groups = bundles.cut(digests(10_000))
    assert 40 <= 10_000 / len(groups) <= 90
    assert sum(map(len, groups)) > 9_950


def test_large_blobs_fill_a_bundle_to_its_bound() -> None:
    groups = bundles.cut(digests(1_000, LARGEST_MEMBER))
    assert max(map(len, groups)) == LARGEST // LARGEST_MEMBER


@pytest.mark.parametrize("at", [0, 1, 700, 1999])
@pytest.mark.parametrize("how", ["changed", "gone", "new"])
def test_what_one_blob_changes_is_its_own_bundle(at: int, how: str) -> None:
    before = digests(2_000)
    for number in range(20):  # some of them are where a bundle ends
        fresh = [] if how == "gone" else [Digest.of(b"fresh %d" % number)]
        after = [*before[:at], *fresh, *before[at + (how != "new") :]]
        groups = set(bundles.cut(before))
        assert len(groups) > 20
        assert len(groups - set(bundles.cut(after))) <= 2


def test_a_blob_where_a_bundle_ends_changes_two() -> None:
    before = digests(2_000)
    end = next(i for i, digest in enumerate(before) if int(digest.hash[:2], 16) < bundles._ENDS)
    kept = set(bundles.cut(before)) & set(bundles.cut([*before[:end], Digest.of(b"fresh"), *before[end + 1 :]]))
    assert len(kept) >= len(bundles.cut(before)) - 2


def test_one_alone_is_no_bundle() -> None:
    assert bundles.cut(digests(1)) == []
    assert bundles.cut(digests(1) * 3) == []
    assert bundles.cut([]) == []


# what is refused


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html><body>please log in</body></html>",
        PACKED[:-1],
        PACKED[: len(PACKED) // 2],
        PACKED[1:],
        PACKED[:-1] + bytes([PACKED[-1] ^ 1]),
        bundles.pack(BLOBS[:-1]),
        bundles.pack([*BLOBS, b"!"]),
        zlib.compress(bytes(300 << 20)),
    ],
    ids=["empty", "html", "short", "half", "headless", "checksum", "less", "more", "bomb"],
)
def test_what_is_no_bundle_of_these_blobs_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="no bundle"):
        unpacked(data)


def test_a_bomb_is_not_unpacked() -> None:
    bomb = zlib.compress(bytes(300 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="size"):
            unpacked(bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(bomb) + (1 << 20)


def test_other_bytes_of_the_right_size_are_for_the_digest_to_refuse() -> None:
    other = [*BLOBS[:-1], bytes(len(BLOBS[-1]))]
    came = dict(unpacked(bundles.pack(other)))
    assert [digest for digest, data in came.items() if Digest.of(data) != digest] == [MEMBERS[-1]]


SOUND = Bundle(Digest.of(PACKED), MEMBERS)
HASH = MEMBERS[0].hash


@pytest.mark.parametrize(
    "bundle",
    [
        Bundle(SOUND.blob, (*MEMBERS, Digest(HASH, -1))),
        Bundle(SOUND.blob, (Digest(HASH, LARGEST + 1), Digest(HASH, -1))),
        Bundle(SOUND.blob, (*MEMBERS, Digest("../../precious", 5))),
        Bundle(SOUND.blob, (*MEMBERS, Digest(HASH.upper(), 5))),
        Bundle(SOUND.blob, (*MEMBERS, Digest(HASH + "\n", 5))),
        Bundle(SOUND.blob, (*MEMBERS, Digest("", 0))),
        Bundle(SOUND.blob, (Digest(HASH, LARGEST + 1),)),
        Bundle(SOUND.blob, tuple(digests(65, LARGEST_MEMBER))),
        Bundle(SOUND.blob, (Digest(HASH, 10**400),)),
        Bundle(Digest("../" + HASH, 5), MEMBERS),
        Bundle(Digest(HASH, -1), MEMBERS),
        Bundle(Digest(HASH, 1 << 40), MEMBERS),
    ],
)
def test_a_bundle_that_may_not_be_asked_for(bundle: Bundle) -> None:
    assert SOUND.is_sound
    assert not bundle.is_sound


def test_the_largest_bundle_that_is_made_may_be_asked_for() -> None:
    """Bytes that no compression makes smaller take a little more."""
    blobs = [bytes(LARGEST_MEMBER - 1) + bytes([i]) for i in range(LARGEST // LARGEST_MEMBER)]
    bundle = Bundle(Digest("f" * 64, len(zlib.compress(bytes(LARGEST), 0))), tuple(map(Digest.of, blobs)))
    assert bundle.is_sound
