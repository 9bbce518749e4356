"""What every remote does with names and files before they go anywhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import StoreError, explain_os_error
from pipeline.hashing import Digest, is_sha256

_LARGEST = (1 << 63) - 1  # size of a blob that protocols can say


def is_digest(digest: Digest) -> bool:
    """Whether a digest is one. What an entry from elsewhere calls a blob may be anything, even a path."""
    hash_, size = digest.hash, digest.size
    return isinstance(hash_, str) and bool(is_sha256(hash_)) and isinstance(size, int) and 0 <= size <= _LARGEST


def plain(name: str | Digest) -> str:
    """A key or a digest's hash, as it stands in paths and URLs. Raises ValueError on anything else, such as `../x`."""
    text = name.hash if isinstance(name, Digest) else name
    if not is_sha256(text):
        raise ValueError(f"{text[:80]!r} is no SHA-256 in lower-case hexadecimal")
    return text


@contextlib.contextmanager
def opened(path: Path, digest: Digest) -> Iterator[BinaryIO]:
    """A file of this machine that is to be sent as a blob. Raises StoreError, no RemoteError, where it is not so."""
    try:
        stream = path.open("rb")
    except OSError as error:
        raise explain_os_error(error, f"reading the blob {digest} to send it") from error
    with stream:
        size = os.fstat(stream.fileno()).st_size
        if size != digest.size:
            raise StoreError(f"the blob {digest} is to be sent and has {size} bytes, not {digest.size}")
        yield stream


def pieces_of(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """A file's bytes from its beginning, `size` at once."""
    stream.seek(0)
    while piece := stream.read(size):
        yield piece
