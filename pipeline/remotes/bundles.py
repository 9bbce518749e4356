"""Small blobs in one piece: who lacks a thousand of them asks a few times, not a thousand.

    bundle    the bytes of some blobs, one after the other, compressed by zlib (RFC 1950)

A bundle is a second copy of blobs that the remote has anyhow, and proves nothing: what comes out of it is verified by
digest, blob by blob. One that is gone or wrong costs the questions that it would have saved.

Where one bundle ends and the next begins is for the blobs to say (content-defined chunking), so that a blob that
changes changes its own bundle only, and the others need not be sent again.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import msgspec

from pipeline.hashing import Digest, is_sha256

LARGEST_MEMBER = 64 << 10  # bytes; to ask for a larger blob takes no longer than to bring it
_LARGEST = 4 << 20  # bytes of the blobs in one bundle
_LEVEL = 1
_ENDS = 4  # of 256: where a hash begins below this its bundle ends, so that one has 64 blobs in the mean


class Bundle(msgspec.Struct, frozen=True, array_like=True):
    """A bundle and what lies in it, in order."""

    blob: Digest
    members: tuple[Digest, ...]

    @property
    def is_sound(self) -> bool:
        """Whether it may be asked for: others may have made it, and it is unpacked in memory."""
        digests = (self.blob, *self.members)
        sound = all(is_sha256(digest.hash) and digest.size >= 0 for digest in digests)
        return sound and sum(digest.size for digest in self.members) <= _LARGEST and self.blob.size <= 2 * _LARGEST


def cut(digests: Iterable[Digest]) -> list[tuple[Digest, ...]]:
    """Which blobs go together, of those that are small, each once. What changes together should stand together."""
    groups: list[list[Digest]] = [[]]
    size = 0
    for digest in dict.fromkeys(digests):
        if digest.size > LARGEST_MEMBER:
            continue
        if size + digest.size > _LARGEST:
            groups.append([])
            size = 0
        groups[-1].append(digest)
        size += digest.size
        if int(digest.hash[:2], 16) < _ENDS:
            groups.append([])
            size = 0
    return [tuple(group) for group in groups if len(group) > 1]


def pack(blobs: Iterable[bytes]) -> bytes:
    """Same blobs, same bytes."""
    packer = zlib.compressobj(_LEVEL)
    return b"".join([*map(packer.compress, blobs), packer.flush()])


def unpack(data: bytes, members: Iterable[Digest]) -> Iterator[tuple[Digest, bytes]]:
    """What lies in a bundle, each with the digest that it should have. Raises ValueError where it cannot be that."""
    wanted = tuple(members)
    size = sum(digest.size for digest in wanted)
    unpacker = zlib.decompressobj()
    try:
        text = memoryview(unpacker.decompress(data, size + 1))
    except zlib.error as error:
        raise ValueError(f"it is no bundle: {error}") from error
    if len(text) != size or not unpacker.eof:
        raise ValueError("it is no bundle of these blobs: it has another size")
    begin = 0
    for digest in wanted:
        yield digest, bytes(text[begin : begin + digest.size])
        begin += digest.size
