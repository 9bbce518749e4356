"""The store on this machine's disk. See the package's docstring for its layout."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import StoreError, explain_os_error
from pipeline.hashing import Digest
from pipeline.store.actions import ActionEntry
from pipeline.store.files import StoreCounts, remove_leftovers, scratch_name, set_aside, written_atomically
from pipeline.store.sets import Sets

FORMAT = "tvmake store, format 1\n"
_MARKER = "TVMAKE_STORE"
_CHUNK = 1 << 20
_LOCK_SLOTS_DIGITS = 3  # 4096 files at most, however many actions are ever run


def default_root() -> Path:
    """The folder of the store: TVMAKE_CACHE where it is set, otherwise the user's cache folder."""
    if chosen := os.environ.get("TVMAKE_CACHE"):
        return Path(chosen).expanduser().resolve()
    import platformdirs

    return Path(platformdirs.user_cache_dir("tvmake", appauthor=False))


class Store:
    """Blobs by digest, action entries by key, and sets (`sets`) that only grow.

    Safe for any number of processes at once. A blob or entry is visible whole or not at all, is verified on every
    read, and is set aside and counted when it fails, which the caller sees as a miss.

    `durable`: what it holds outlives a power failure; not so where all is thrown away soon.

    Raises StoreError when the folder cannot be used at all: not a store, another format, no permission, no space.
    """

    def __init__(self, root: Path, *, durable: bool = True) -> None:
        self.root = root
        self.durable = durable
        self.counts = StoreCounts()
        self.sets = Sets(root, self.counts)
        self._scratch = root / "tmp"
        self._verified: set[str] = set()
        self._open()

    # blobs

    def put(self, data: bytes | memoryview) -> Digest:
        digest = Digest.of(data)
        if not self.has(digest):
            path = self._blob(digest)
            with self._explained(f"writing blob {digest}"), self._written(path) as stream:
                stream.write(data)
        self._verified.add(digest.hash)
        return digest

    def put_file(self, source: Path) -> Digest:
        """Copies a file into the store, however large, with one pass over its bytes."""
        with open(source, "rb") as stream:
            return self.put_stream(lambda: stream.read(_CHUNK))

    def put_stream(self, read: Callable[[], bytes | memoryview]) -> Digest:
        """Stores what `read` returns until it returns nothing. Hashes while it writes."""
        hasher, size = hashlib.sha256(), 0
        temporary = self._scratch / scratch_name()
        with self._explained("writing a blob"):
            with self._written(temporary) as out:
                while chunk := read():
                    hasher.update(chunk)
                    size += len(chunk) if isinstance(chunk, bytes) else chunk.nbytes
                    out.write(chunk)
            digest = Digest(hasher.hexdigest(), size)
            path = self._blob(digest)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary, path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
        self._verified.add(digest.hash)
        return digest

    def get(self, digest: Digest) -> bytes | None:
        """The bytes of a blob, verified, or None where the store does not have them."""
        path = self._blob(digest)
        with self._explained(f"reading blob {digest}"):
            try:
                with open(path, "rb") as stream:
                    data = stream.read()
                    inode = os.fstat(stream.fileno()).st_ino
            except FileNotFoundError:
                return None
        if Digest.of(data) != digest:
            self._verified.discard(digest.hash)
            self._set_aside(path, inode)
            return None
        self._verified.add(digest.hash)
        return data

    def path(self, digest: Digest) -> Path | None:
        """Where a verified blob lies, to be read or mapped and never written; None where the store has none."""
        path = self._blob(digest)
        return path if self.has(digest) else None

    def has(self, digest: Digest) -> bool:
        """Whether the store holds the blob's very bytes. They are read once by each Store object, then remembered."""
        path = self._blob(digest)
        with self._explained(f"reading blob {digest}"):
            try:
                stat = path.stat()
                right = stat.st_size == digest.size
                if right and digest.hash not in self._verified:
                    right = Digest.of_file(path) == digest
            except FileNotFoundError:
                return False
        if right:
            self._verified.add(digest.hash)
        else:
            self._verified.discard(digest.hash)
            self._set_aside(path, stat.st_ino)
        return right

    # action entries

    def commit(self, key: str, entry: ActionEntry) -> None:
        """Records what an action made. Its blobs must be in the store already."""
        with self._explained(f"writing entry {key[:12]}"), self._written(self._entry(key)) as out:
            out.write(entry.to_bytes(key))

    def lookup(self, key: str) -> ActionEntry | None:
        """The entry of an action, if every blob that it names is here and whole; otherwise None."""
        path = self._entry(key)
        with self._explained(f"reading entry {key[:12]}"):
            try:
                with open(path, "rb") as stream:
                    data = stream.read()
                    inode = os.fstat(stream.fileno()).st_ino
            except FileNotFoundError:
                return None
        try:
            entry = ActionEntry.from_bytes(key, data)
        except (ValueError, KeyError, TypeError):
            self._set_aside(path, inode)
            return None
        missing = [digest for digest in entry.outputs.values() if not self.has(digest)]
        return None if missing else entry

    # locks

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Holds the lock under which an action is run, so that no other process runs it meanwhile.

        The system releases it when the process dies. Where the disk cannot lock, work may be done twice, never wrong.
        A thread that holds one lock must not ask for another: keys share slots.
        """
        from filelock import FileLock

        lock = FileLock(self.root / "locks" / key[:_LOCK_SLOTS_DIGITS], thread_local=False)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(NotImplementedError), self._explained(f"locking {key[:12]}"):
                stack.enter_context(lock)
            yield

    # the folder

    def _open(self) -> None:
        marker = self.root / _MARKER
        try:
            found = marker.read_text()
        except FileNotFoundError:
            self._create(marker)
            return
        except NotADirectoryError as error:
            raise self._not_a_folder() from error
        except OSError as error:
            raise explain_os_error(error, f"opening the store {self.root}") from error
        except UnicodeDecodeError:
            found = ""
        if found != FORMAT:
            raise StoreError(
                f"{self.root} has another format: {found.strip()[:60]!r}; this tvmake reads {FORMAT.strip()!r}",
                hint="set TVMAKE_CACHE to another folder, or delete this one: it holds only what can be built again",
            )
        remove_leftovers(self._scratch)

    def _create(self, marker: Path) -> None:
        try:
            if self.root.is_dir() and any(entry.name not in (*_OWN_FOLDERS, _MARKER) for entry in self.root.iterdir()):
                raise StoreError(
                    f"{self.root} is neither empty nor a store",
                    hint="set TVMAKE_CACHE to an empty folder, or to one that does not exist yet",
                )
            for name in _OWN_FOLDERS:
                (self.root / name).mkdir(parents=True, exist_ok=True)
            with written_atomically(marker, self._scratch) as stream:
                stream.write(FORMAT.encode())
        except OSError as error:
            if error.errno == errno.ENOTDIR or isinstance(error, FileExistsError):
                raise self._not_a_folder() from error
            raise explain_os_error(error, f"making the store {self.root}") from error

    def _not_a_folder(self) -> StoreError:
        return StoreError(f"{self.root}, or a part of it, is not a folder", hint="set TVMAKE_CACHE to a folder")

    def _written(self, final: Path) -> contextlib.AbstractContextManager[BinaryIO]:
        return written_atomically(final, self._scratch, self.durable)

    def _blob(self, digest: Digest) -> Path:
        return self.root / "cas" / digest.hash[:2] / digest.hash

    def _entry(self, key: str) -> Path:
        return self.root / "ac" / key[:2] / key

    def _set_aside(self, path: Path, inode: int) -> None:
        """Moves a file that failed out of the way, unless another process has put a whole one in its place."""
        self.counts.corrupt += 1
        set_aside(path, inode, self.root / "quarantine")

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise explain_os_error(error, doing) from error


_OWN_FOLDERS = ("cas", "ac", "sets", "locks", "quarantine", "tmp")
