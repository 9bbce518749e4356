"""Blobs compressed by zstd, where the package zstandard is installed. What comes in is never believed to be small."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from pipeline.remotes.contract import CHUNK

_LEVEL = 1  # links are faster than what higher levels give
_WINDOW = 128 << 20  # bytes of memory that a compressed blob may ask for


class BrokenPackageError(ValueError):
    """What should be zstd is not."""


class Zstd:
    """The package, as it is used here. `Zstd.found()` is None without it."""

    def __init__(self, package: Any) -> None:
        self._package = package

    @classmethod
    def found(cls) -> Zstd | None:
        try:
            import zstandard
        except ImportError:
            return None
        return cls(zstandard)

    def pack(self, data: bytes) -> bytes:
        packed: bytes = self._package.ZstdCompressor(level=_LEVEL).compress(data)
        return packed

    def packed(self, pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
        """The pieces of `size` bytes, compressed as one, in other pieces, none of them empty."""
        packing = self._package.ZstdCompressor(level=_LEVEL).compressobj(size=size)
        for piece in pieces:
            if packed := packing.compress(piece):
                yield packed
        if packed := packing.flush():
            yield packed

    def unpacked(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """What was compressed, in pieces of CHUNK at most: more is not made at once, whatever the pieces blow up to.

        Raises BrokenPackageError.
        """
        unpacking = self._package.ZstdDecompressor(max_window_size=_WINDOW)
        try:
            with unpacking.stream_reader(_Source(pieces), read_across_frames=True) as reader:
                while piece := reader.read(CHUNK):
                    yield piece
        except self._package.ZstdError as error:
            raise BrokenPackageError(str(error)) from error


class _Source(io.RawIOBase):
    """Pieces as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
