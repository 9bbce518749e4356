"""Remotes behind `file://`: a folder that several machines see, such as one on NFS or SMB.

    TVMAKE_REMOTE   says the format
    cas/<sha256>    blobs
    ac/<key>        documents
    tmp/            files being written, under names that no two machines choose

The two are flat, so that a web server over the folder serves Bazel's HTTP cache protocol, and what such a server wrote
is read here. A file is written beside, synced and renamed: it is seen whole or not at all. On shared disks a name that
another machine just made may not be seen at once, so what is not there is looked for twice; a file that is replaced
while it is opened (ESTALE) counts as not there.

How long it may take. A disk that hangs holds every system call for as long as it hangs, and none can be called off. So
each goes on in a thread of its own, and is given up when nothing moved for `connect` (the first look at the folder) or
`stall` seconds; what such a thread holds, it holds until the disk answers. Not bounded are the end of the process,
where the disk was mounted so that nothing interrupts it, and how slowly a disk may read that gives some bytes in each
`stall`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from pipeline.errors import ConfigError, RemoteError, Trouble
from pipeline.hashing import Digest
from pipeline.remotes.address import Address
from pipeline.remotes.blobs import is_digest, opened, pieces_of, plain
from pipeline.remotes.contract import CHUNK, LARGEST_DOCUMENT, Remote, Terms
from pipeline.remotes.waiting import Beat, StalledError, within
from pipeline.store.files import remove_leftovers, sync_folder, written_atomically

T = TypeVar("T")

FORMAT = "tvmake remote, format 1\n"
_MARKER = "TVMAKE_REMOTE"
_FOLDERS = ("cas", "ac", "tmp")
_SYSTEMS = ("lost+found",)  # beside names with a dot in front: what file systems put there on their own
_SYNC_EVERY = 64 << 20  # bytes after which they must be on the disk, so that no sync takes long
_SKEW = 60 * 60  # seconds by which clocks may differ for files to be removed by their age

_GONE = {errno.ENOENT, errno.ESTALE}
_TROUBLES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), Trouble.FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), Trouble.REFUSED),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG), Trouble.GARBLED),
}
_HINTS = {
    Trouble.FULL: "free some space there, or raise the quota",
    Trouble.REFUSED: "check who owns the folder and its permissions; a machine that only reads can say so: "
    "policy read-only",
    Trouble.AWAY: "is the disk mounted?",
}


def open_url(url: str, terms: Terms) -> Remote:
    """The folder at a URL. Nothing is looked at yet."""
    address = Address.of(url)
    if address.host not in ("", "localhost") or address.port or address.user:
        hint = f"mount it and write file:///…; for a path of this machine: file:///{address.host}{address.path}"
        raise ConfigError(f"the remote {address.name} names a machine, {address.host}", hint=hint)
    if not address.path.startswith("/"):
        raise ConfigError(f"the remote {address.name!r} names no folder from the root on", hint="write file:///path")
    return FolderRemote(address, terms)


class FolderRemote:
    """A folder. See pipeline.remotes.contract for what each method promises.

    Any method raises ConfigError where the folder is none, has something else in it, or another format.
    """

    def __init__(self, address: Address, terms: Terms) -> None:
        self.name = f"file://{address.path}"
        self._address = address
        self._root = Path(os.path.normpath(address.path))
        self._terms = terms
        self._lock = threading.Lock()
        self._is_ours = False  # the folder was seen with its marker
        self._is_swept = False

    def action(self, key: str) -> bytes | None:
        path = self._root / "ac" / plain(key)

        def read(beat: Beat) -> bytes | None:
            stream = self._found(path)
            if stream is None:
                return None
            with stream:
                self._refuse_more_than(LARGEST_DOCUMENT, stream, path)
                return b"".join(_each(pieces_of(stream, CHUNK), beat))

        return self._bounded(read, "reading")

    def put_action(self, key: str, document: bytes) -> None:
        path = self._root / "ac" / plain(key)
        self._bounded(lambda beat: self._put(path, iter([document]), beat), "writing")

    def blob(self, digest: Digest) -> Iterator[bytes] | None:
        if not is_digest(digest):
            return None
        path = self._root / "cas" / plain(digest)
        stream = self._bounded(lambda _: self._found(path), "reading")
        return None if stream is None else self._pieces(stream, digest)

    def put_blob(self, digest: Digest, path: Path) -> None:
        final = self._root / "cas" / plain(digest)
        with opened(path, digest) as stream:
            pieces = pieces_of(stream, CHUNK)
            self._bounded(lambda beat: self._put(final, pieces, beat), "writing")

    def missing(self, digests: Collection[Digest]) -> set[Digest]:
        paths = {digest: self._root / "cas" / plain(digest) for digest in digests if is_digest(digest)}

        def look(beat: Beat) -> set[Digest]:
            return {digest for digest, path in _each(iter(paths.items()), beat) if _size(path) == digest.size}

        return set(digests) - self._bounded(look, "looking")

    def close(self) -> None:
        """There is nothing to end."""

    # reading

    def _found(self, path: Path) -> BinaryIO | None:
        """A file, opened; None where there is none."""
        for is_last in (False, True):
            try:
                # Without O_NONBLOCK, a pipe that somebody put there would hold us until somebody writes into it.
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                if is_last:
                    return None
                _refresh(path.parent)
                continue
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise self._address.error(Trouble.GARBLED, f"has something that is no file: {path}")
            return open(descriptor, "rb")
        raise AssertionError("the second time ends it")

    def _pieces(self, stream: BinaryIO, digest: Digest) -> Iterator[bytes]:
        """A file in pieces, each read within the terms."""
        with stream:
            self._refuse_more_than(digest.size, stream, stream.name)
            while piece := self._bounded(lambda _: stream.read(CHUNK), "reading"):
                yield piece

    def _refuse_more_than(self, most: int, stream: BinaryIO, path: object) -> None:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise self._address.error(Trouble.GARBLED, f"has {size:,} bytes where {most:,} belong: {path}")

    # writing

    def _put(self, final: Path, pieces: Iterator[bytes], beat: Beat) -> None:
        self._look_at(for_writing=True)
        with written_atomically(final, self._root / "tmp") as out:
            unsynced = 0
            for piece in _each(pieces, beat):
                out.write(piece)
                unsynced += len(piece)
                if unsynced >= _SYNC_EVERY:
                    out.flush()
                    os.fdatasync(out.fileno())
                    unsynced = 0
        self._sweep(final)

    def _sweep(self, written: Path) -> None:
        """Once, removes what machines that died left in tmp/, unless clocks disagree on what is old."""
        with self._lock:
            if self._is_swept:
                return
            self._is_swept = True
        with contextlib.suppress(OSError):
            if abs(written.stat().st_mtime - time.time()) < _SKEW:
                remove_leftovers(self._root / "tmp")

    # the folder

    def _look_at(self, *, for_writing: bool) -> None:
        """Makes sure that the folder is a remote, or, for reading, that it may become one. See the exceptions above."""
        was_ours = self._is_ours  # before looking: meanwhile another thread may make it so
        if was_ours and not for_writing:
            return
        try:
            found = (self._root / _MARKER).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if was_ours:
                raise self._address.error(Trouble.AWAY, "has lost its folder", _HINTS[Trouble.AWAY]) from None
            self._refuse_other()
            if for_writing:
                self._make()
            return
        if found != FORMAT.encode():
            raise ConfigError(
                f"the remote {self.name} has another format: {found[:60].decode(errors='replace').strip()!r}; "
                f"this tvmake has {FORMAT.strip()!r}",
                hint="use a folder of its own for each format, or the same release of tvmake on all machines",
            )
        self._is_ours = True

    def _refuse_other(self) -> None:
        """Raises ConfigError where something lies at the path, and neither a remote nor the beginning of one."""
        try:
            names = os.listdir(self._root)
        except FileNotFoundError:
            return
        except NotADirectoryError as error:
            raise ConfigError(f"the remote {self.name}, or a part of that path, is not a folder") from error
        others = [name for name in names if name not in (*_FOLDERS, _MARKER, *_SYSTEMS) and not name.startswith(".")]
        if others:
            raise ConfigError(
                f"the remote {self.name} has other things in it, such as {min(others)[:60]!r}",
                hint="name an empty folder, or one that does not exist yet",
            )

    def _make(self) -> None:
        """Makes an empty or absent folder a remote. Whoever may write into the folder may write into its parts."""
        is_shared = self._root.exists()
        for name in _FOLDERS:
            part = self._root / name
            try:
                part.mkdir(parents=True)
            except FileExistsError:
                continue
            if is_shared:
                with contextlib.suppress(OSError):
                    part.chmod(stat.S_IMODE(self._root.stat().st_mode))
        with written_atomically(self._root / _MARKER, self._root / "tmp") as out:
            out.write(FORMAT.encode())
        sync_folder(self._root)
        self._is_ours = True

    def _bounded(self, job: Callable[[Beat], T], doing: str) -> T:
        """What a job on the disk returns, within the terms. Raises RemoteError for what the system answers it."""
        try:
            if not self._is_ours:
                within(self._terms.connect, lambda _: self._look_at(for_writing=False))
            return within(self._terms.stall, job)
        except StalledError as error:
            raise self._address.error(Trouble.AWAY, "does not answer in time", _HINTS[Trouble.AWAY]) from error
        except OSError as error:
            raise self._told(error, doing) from error

    def _told(self, error: OSError, doing: str) -> RemoteError:
        trouble = _TROUBLES.get(error.errno or 0, Trouble.AWAY)
        return self._address.error(trouble, f"fails at {doing}: {error.strerror or error}", _HINTS.get(trouble, ""))


def _each(items: Iterator[T], beat: Beat) -> Iterator[T]:
    """The items, with a beat after each."""
    for item in items:
        yield item
        beat()


def _size(path: Path) -> int | None:
    """A file's size, None where there is none. Looked for twice."""
    for is_last in (False, True):
        try:
            found = path.stat()
        except OSError as error:
            if error.errno not in _GONE:
                raise
            if not is_last:
                _refresh(path.parent)
        else:
            return found.st_size if stat.S_ISREG(found.st_mode) else None
    return None


def _refresh(folder: Path) -> None:
    """Has a client of a network file system ask again what is in a folder, which it does when it is opened."""
    with contextlib.suppress(OSError):
        os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
