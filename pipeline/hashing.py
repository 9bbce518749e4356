"""The only vocabulary for hashing: digests of bytes, keys of actions, stamps of local files.

- A *digest* identifies bytes: SHA-256 and a size, as in the Remote Execution API, so that one store speaks to all.
- A *key* identifies an action by its inputs: SHA-256 over named, typed, length-prefixed components. The components
  are kept beside the key, so that two keys can be compared and a rebuild explained in words.
- A *stamp* says cheaply whether a local file may have changed. It never leaves the machine and is never a key.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

_CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}").fullmatch


def is_sha256(text: str) -> bool:
    """Whether a text is a SHA-256 as keys and digests are written: 64 digits in lower-case hexadecimal."""
    return _SHA256(text) is not None


@dataclass(frozen=True, order=True, slots=True)
class Digest:
    """What identifies a blob: its SHA-256 in lower-case hexadecimal and its size in bytes."""

    hash: str
    size: int

    @classmethod
    def of(cls, data: bytes | memoryview) -> Digest:
        return cls(hashlib.sha256(data).hexdigest(), memoryview(data).nbytes)

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> Digest:
        hasher, size = hashlib.sha256(), 0
        with open(path, "rb") as stream:
            while chunk := stream.read(_CHUNK):
                hasher.update(chunk)
                size += len(chunk)
        return cls(hasher.hexdigest(), size)

    def __str__(self) -> str:
        return self.hash[:12]


class Encoded(bytes):
    """What `encode` made of a value: it stands for that value in another one. Encodes once what goes into many keys."""

    @classmethod
    def of(cls, value: object) -> Encoded:
        return cls(encode(value))


_TAGS: dict[type, bytes] = {bytes: b"b", int: b"i", bool: b"t", type(None): b"n", float: b"f"}


def encode(value: object) -> bytes:
    """One unambiguous byte string for a value made of str, bytes, int, bool, float, None, digests, lists and mappings.

    Every part is tagged with its type and prefixed with its length, so that no two values share an encoding: not
    ("ab", "c") and ("a", "bc"), not 1 and True and "1". Mappings are sorted by key; tuples count as lists. Raises
    TypeError on anything else, and on a mapping whose keys are not all str: 1 and "1" would be one key.
    """
    if type(value) is str:  # what most parts are
        # A file's name that is no UTF-8 reaches Python with lone surrogates in it.
        return _framed(b"s", value.encode(errors="surrogatepass"))
    if isinstance(value, Encoded):
        return value
    if isinstance(value, Digest):
        return _framed(b"d", bytes.fromhex(value.hash) + b"%d" % value.size)
    if isinstance(value, list | tuple):
        return _framed(b"l", b"".join(encode(item) for item in value))
    if isinstance(value, Mapping):
        if not all(type(name) is str for name in value):
            raise TypeError("a key cannot hold a mapping whose names are not all str")
        items = sorted((encode(name), encode(item)) for name, item in value.items())
        return _framed(b"m", b"".join(name + item for name, item in items))
    tag = _TAGS.get(type(value))
    if tag is None:
        raise TypeError(f"a key cannot hold a {type(value).__name__}")
    if isinstance(value, bytes):
        return _framed(tag, value)
    return _framed(tag, (value.hex() if isinstance(value, float) else str(value)).encode())


def _framed(tag: bytes, body: bytes) -> bytes:
    return tag + b"%d:" % len(body) + body


def key_of(components: Mapping[str, object]) -> str:
    """The key of an action: SHA-256 of the encoding of its named components."""
    return hashlib.sha256(encode(components)).hexdigest()


# A file whose clock stands this close to the moment of stamping may change again without its time showing it.
RACY_NS = 20_000_000


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a local file looked like: size, modification time in ns, inode, and XXH3-128 of its bytes."""

    size: int
    mtime_ns: int
    inode: int
    content: str

    @classmethod
    def of(cls, path: Path) -> Stamp | None:
        """The stamp of a file, or None where there is no such file."""
        try:
            stat = path.stat()
            return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino, _xxh3(path))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def still_holds(self, path: Path, stamped_ns: int) -> bool:
        """Whether the file has the bytes it had when it was stamped at `stamped_ns`.

        Size, time and inode answer without reading, unless the file was modified so shortly before the stamp that a
        later change could carry the same time; then, and where only the time differs, the bytes are compared.
        """
        try:
            stat = path.stat()
            if stat.st_size != self.size:
                return False
            same = stat.st_mtime_ns == self.mtime_ns and stat.st_ino == self.inode
            if same and self.mtime_ns < stamped_ns - RACY_NS:
                return True
            return _xxh3(path) == self.content
        except OSError:
            return False


def _xxh3(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()
