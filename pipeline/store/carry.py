"""One file to carry to a machine without a network: entries with their blobs, and sets, out of one store into another.

It is an uncompressed tar archive (POSIX ustar) of regular files. In this order:

    TVMAKE_CARRY                says the format
    cas/<sha256>                blobs
    ac/<key>                    entries, as the store has them
    sets/<key>/about.json       what a set is; then its members
    sets/<key>/<sha256>

Names are in order within each kind, and no member has a time or an owner: same content, same bytes.

Nothing that such a file says is believed. It is read from the front to the end, once; a name only ever tells what the
bytes are said to be, and they are believed where they are that. A name that is none of the above is passed over.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import StoreError, explain_os_error
from pipeline.hashing import Digest
from pipeline.store.actions import ActionEntry
from pipeline.store.files import written_atomically
from pipeline.store.inventory import Progress
from pipeline.store.local import Store

FORMAT = "tvmake carry, format 1\n"
_MARKER = "TVMAKE_CARRY"
_ABOUT = "about.json"
_CHUNK = 1 << 20
_BLOCK = tarfile.BLOCKSIZE
_LARGEST_DOCUMENT = 64 << 20  # bytes of an entry or a member of a set: they are read at once
_LARGEST_ABOUT = 1 << 20
_MEMBERS_AT_ONCE = 256
_NAMED = 100  # things that are wrong and named; the others are counted
_USTAR_SIZE = 8**11  # bytes that a size of ustar cannot tell any more; GNU's way is used from there

_BLOB = re.compile(r"cas/([0-9a-f]{64})").fullmatch
_ENTRY = re.compile(r"ac/([0-9a-f]{64})").fullmatch
_MEMBER = re.compile(r"sets/([0-9a-f]{64})/([0-9a-f]{64}|about\.json)").fullmatch

Accept = Callable[[str, bytes], bool]


@dataclass
class Carried:
    """What was written to a file, or taken in from one.

    entries, blobs, sets, members, bytes  that went over; bytes of all of them
    known                                 entries, blobs and members that were here already
    missing                               keys that were asked for and are not here; entries whose blobs are not
    refused                               entries that the caller did not accept
    wrong, wrongs                         what is not what it says: how many, and the first of them with the reason
    complete                              whether the end of the file was reached
    """

    entries: int = 0
    blobs: int = 0
    sets: int = 0
    members: int = 0
    bytes: int = 0
    known: int = 0
    missing: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    wrong: int = 0
    wrongs: list[tuple[str, str]] = field(default_factory=list)
    complete: bool = True

    def count_wrong(self, name: str, why: str) -> None:
        self.wrong += 1
        if len(self.wrongs) < _NAMED:
            self.wrongs.append((name, why))


# writing


def export(
    store: Store, keys: Iterable[str], set_keys: Iterable[str], path: Path, progress: Progress | None = None
) -> Carried:
    """Writes entries with their blobs, and sets, to one file. Keys that are not here, or not whole, are `missing`.

    The file stands at `path` whole or not at all. `progress` is told bytes done, and of how many: those of blobs.
    Raises StoreError where the system refuses, or a blob goes while it is written.
    """
    carried = Carried()
    with store.in_use():
        wanted, digests = _gathered(store, keys, carried)
        total = sum(digest.size for digest in digests)
        try:
            with written_atomically(path, path.absolute().parent) as out:
                _write_member(out, _MARKER, FORMAT.encode())
                for digest in sorted(digests):
                    _write_blob(out, store, digest)
                    carried.blobs, carried.bytes = carried.blobs + 1, carried.bytes + digest.size
                    if progress is not None:
                        progress(carried.bytes, total)
                _write_entries(out, store, wanted, digests, carried)
                for key in sorted(set(set_keys)):
                    _write_set(out, store, key, carried)
                out.write(bytes(2 * _BLOCK))
        except OSError as error:
            raise explain_os_error(error, f"writing {path}") from error
    return carried


def _gathered(store: Store, keys: Iterable[str], carried: Carried) -> tuple[list[str], set[Digest]]:
    """The keys whose entries are here and whole, in order, and all their blobs."""
    wanted, digests = [], set[Digest]()
    for key in sorted(set(keys)):
        entry = store.lookup(key)
        if entry is None:
            carried.missing.append(key)
        else:
            wanted.append(key)
            digests.update(entry.outputs.values())
    return wanted, digests


def _write_entries(out: BinaryIO, store: Store, keys: Iterable[str], digests: set[Digest], carried: Carried) -> None:
    for key in keys:
        document = store.document(key)
        # Another run may have put another entry in its place, with other blobs.
        if document is None or not digests.issuperset(ActionEntry.from_bytes(key, document).outputs.values()):
            carried.missing.append(key)
        else:
            _write_member(out, f"ac/{key}", document)
            carried.entries, carried.bytes = carried.entries + 1, carried.bytes + len(document)


def _write_set(out: BinaryIO, store: Store, key: str, carried: Carried) -> None:
    members = 0
    for name, data in store.sets.read(key):
        if not members:
            about = json.dumps(store.sets.about(key), sort_keys=True, indent=1).encode() + b"\n"
            _write_member(out, f"sets/{key}/{_ABOUT}", about)
        members += 1
        _write_member(out, f"sets/{key}/{name}", data)
        carried.bytes += len(data)
    if not members:
        carried.missing.append(key)
    carried.sets, carried.members = carried.sets + bool(members), carried.members + members


def _write_blob(out: BinaryIO, store: Store, digest: Digest) -> None:
    path = store.path(digest)
    if path is None:
        raise StoreError(f"blob {digest} is gone from the store", hint="run the same command again")
    out.write(_header(f"cas/{digest.hash}", digest.size))
    left = digest.size
    with open(path, "rb") as stream:
        while left and (chunk := stream.read(min(_CHUNK, left))):
            out.write(chunk)
            left -= len(chunk)
    if left:
        raise StoreError(f"blob {digest} changed while it was read", hint="type `doit cache verify`")
    out.write(bytes(-digest.size % _BLOCK))


def _write_member(out: BinaryIO, name: str, data: bytes) -> None:
    out.write(_header(name, len(data)))
    out.write(data)
    out.write(bytes(-len(data) % _BLOCK))


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf(tarfile.USTAR_FORMAT if size < _USTAR_SIZE else tarfile.GNU_FORMAT)


# reading


def take_in(store: Store, path: Path, progress: Progress | None = None, accept: Accept | None = None) -> Carried:
    """Takes in what `export` wrote. What is here stays as it is; what is wrong is counted, named, and passed over.

    A blob is taken where it has the bytes of its name, an entry where its check holds for its key, all its blobs are
    here and `accept(key, document)`, if given, says so. Where the file ends in its middle, what came before it stays.
    `progress` is told bytes of the file done, and of how many.

    Raises StoreError where the file cannot be read, is none of these, or of a later format; and where the store cannot
    be written.
    """
    with store.in_use():
        try:
            with open(path, "rb", opener=_at_once) as stream:
                status = os.fstat(stream.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise StoreError(f"{path} is no file")
                intake = _Intake(store, accept)
                _Archive(stream, status.st_size, path).feed(intake, progress)
                return intake.carried
        except OSError as error:
            raise explain_os_error(error, f"reading {path}") from error


def _at_once(path: str, flags: int) -> int:
    """Opens without waiting, as the end of a pipe would for the other end."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


class _TornError(Exception):
    """The archive ends, or makes no sense any more."""


class _Archive:
    """A tar archive, read once from its front. Only what this module writes is understood, and nothing is extracted."""

    def __init__(self, stream: BinaryIO, size: int, path: Path) -> None:
        self._stream = stream
        self._size = size
        self._path = path

    def feed(self, intake: _Intake, progress: Progress | None) -> None:
        try:
            self._begin()
            while (info := self._next()) is not None:
                after = self._stream.tell() + info.size + -info.size % _BLOCK
                if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    intake.carried.count_wrong(_shown(info.name), "it is no regular file")
                else:
                    intake.member(info.name, info.size, self._pieces(info.size))
                self._stream.seek(after)
                if progress is not None:
                    progress(min(after, self._size), self._size)
        except _TornError as error:
            intake.carried.complete = False
            intake.carried.count_wrong(str(self._path), str(error))
        intake.end()
        if progress is not None:
            progress(self._size, self._size)

    def _begin(self) -> None:
        """Reads what says the format."""
        try:
            info = self._next()
            says = b"".join(self._pieces(info.size)) if info is not None and info.size <= _BLOCK else b""
            self._stream.seek(-len(says) % _BLOCK, os.SEEK_CUR)
        except _TornError:
            info = None
        if info is None or info.name != _MARKER or not says.startswith(b"tvmake carry, format "):
            raise StoreError(f"{self._path} is no file that `doit cache export` wrote")
        if says != FORMAT.encode():
            raise StoreError(
                f"{self._path} has another format: {says[:60].decode(errors='replace').strip()!r}; "
                f"this tvmake reads {FORMAT.strip()!r}",
                hint="take a tvmake as new as the one that wrote it",
            )

    def _next(self) -> tarfile.TarInfo | None:
        """The next header; None at the end, which is a block of zeros. Raises _TornError where there is neither."""
        block = self._stream.read(_BLOCK)
        if block == bytes(_BLOCK):
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise _TornError("it ends in its middle" if len(block) < _BLOCK else "it is damaged") from error
        if not 0 <= info.size <= self._size - self._stream.tell():
            raise _TornError(f"{_shown(info.name)} says to be larger than the file")
        return info

    def _pieces(self, size: int) -> Iterator[bytes]:
        left = size
        while left:
            piece = self._stream.read(min(_CHUNK, left))
            if not piece:
                raise _TornError("it ends in its middle")
            left -= len(piece)
            yield piece


class _Intake:
    """What is done with each member of an archive."""

    def __init__(self, store: Store, accept: Accept | None) -> None:
        self.carried = Carried()
        self._store = store
        self._accept = accept
        self._sets: set[str] = set()
        self._set_key = ""
        self._about: dict[str, object] = {}
        self._members: list[bytes] = []

    def member(self, name: str, size: int, pieces: Iterator[bytes]) -> None:
        if found := _BLOB(name):
            self._take_blob(name, Digest(found[1], size), pieces)
        elif found := _ENTRY(name):
            self._take_entry(name, found[1], size, pieces)
        elif found := _MEMBER(name):
            self._take_member(name, found[1], found[2], size, pieces)
        else:
            self.carried.count_wrong(_shown(name), "it is nothing that a store has")

    def end(self) -> None:
        self._flush()
        self.carried.sets = len(self._sets)

    def _take_blob(self, name: str, digest: Digest, pieces: Iterator[bytes]) -> None:
        if self._store.has(digest):
            self.carried.known += 1
        elif self._store.receive(digest, pieces):
            self.carried.blobs, self.carried.bytes = self.carried.blobs + 1, self.carried.bytes + digest.size
        else:
            self.carried.count_wrong(name, "it has other bytes")

    def _take_entry(self, name: str, key: str, size: int, pieces: Iterator[bytes]) -> None:
        if size > _LARGEST_DOCUMENT:
            self.carried.count_wrong(name, "it is too large")
            return
        document = b"".join(pieces)
        try:
            entry = ActionEntry.from_bytes(key, document)
        except ValueError:
            self.carried.count_wrong(name, "it is no entry of this key")
            return
        if entry.to_bytes(key) != document:  # what is kept is what the caller accepted
            self.carried.count_wrong(name, "it is written in another way than entries are")
            return
        if self._store.lookup(key) is not None:
            self.carried.known += 1
        elif self._accept is not None and not self._accept(key, document):
            self.carried.refused.append(key)
        elif not all(self._store.has(digest) for digest in entry.outputs.values()):
            self.carried.missing.append(key)
        else:
            self._store.commit(key, entry)
            self.carried.entries, self.carried.bytes = self.carried.entries + 1, self.carried.bytes + size

    def _take_member(self, name: str, key: str, member: str, size: int, pieces: Iterator[bytes]) -> None:
        if size > (_LARGEST_ABOUT if member == _ABOUT else _LARGEST_DOCUMENT):
            self.carried.count_wrong(name, "it is too large")
            return
        if key != self._set_key:
            self._flush()
            self._set_key, self._about = key, {}
        data = b"".join(pieces)
        if member == _ABOUT:
            said = _mapping(data)
            if said is None:
                self.carried.count_wrong(name, "it is no JSON object")
            else:
                self._about = said
        elif Digest.of(data).hash != member:
            self.carried.count_wrong(name, "it has other bytes")
        else:
            self._members.append(data)
            if len(self._members) >= _MEMBERS_AT_ONCE or sum(map(len, self._members)) > _LARGEST_DOCUMENT:
                self._flush()

    def _flush(self) -> None:
        """Puts the members that were gathered into their set."""
        if self._members:
            here = self._store.sets.names(self._set_key)
            names = self._store.sets.add(self._set_key, self._members, self._about)
            new = {name: len(data) for name, data in zip(names, self._members, strict=True) if name not in here}
            self._sets.add(self._set_key)
            self.carried.members, self.carried.bytes = (
                self.carried.members + len(new),
                self.carried.bytes + sum(new.values()),
            )
            self.carried.known += len(names) - len(new)
            self._members = []


def _mapping(data: bytes) -> dict[str, object] | None:
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def _shown(name: str) -> str:
    """A name from elsewhere, as it may be shown: nothing in it moves a cursor."""
    return ascii(name)[1:-1][:200]
