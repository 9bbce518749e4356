"""The store on this machine's disk. See the package's docstring for its layout."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import StoreError, explain_os_error
from pipeline.hashing import Digest, is_sha256
from pipeline.store.actions import ActionEntry
from pipeline.store.files import StoreCounts, move, remove_leftovers, scratch_name, set_aside, written_atomically
from pipeline.store.sets import Sets
from pipeline.store.use import Use

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

    What is looked up, asked for or put is marked as used (`use`), so that upkeep removes what was not. Between two such
    calls only `in_use` keeps what nothing names yet.

    `durable`: what it holds outlives a power failure; not so where all is thrown away soon.

    Raises StoreError when the folder cannot be used at all: not a store, another format, no permission, no space.
    """

    def __init__(self, root: Path, *, durable: bool = True) -> None:
        self.root = root
        self.durable = durable
        self.counts = StoreCounts()
        self.sets = Sets(root, self.counts)
        self.use = Use(root)
        self._scratch = root / "tmp"
        self._folder = f"{root}{os.sep}"
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
            with written_atomically(temporary, self._scratch, self.durable) as out:
                while chunk := read():
                    hasher.update(chunk)
                    size += len(chunk) if isinstance(chunk, bytes) else chunk.nbytes
                    out.write(chunk)
            digest = Digest(hasher.hexdigest(), size)
            self._place(temporary, self._blob(digest))
        self._verified.add(digest.hash)
        return digest

    def receive(self, digest: Digest, pieces: Iterable[bytes]) -> bool:
        """Takes in a blob from elsewhere; whether the pieces are its very bytes. Others are not kept, nor read on.

        It need not outlive a power failure: what is torn then is found when it is read, and fetched again.
        """
        hasher, left = hashlib.sha256(), digest.size
        written = self._written(self._blob(digest), sync=False)
        with self._explained(f"writing blob {digest}"), contextlib.suppress(_AlienError), written as out:
            for piece in pieces:
                hasher.update(piece)
                left -= len(piece)
                if left < 0:
                    raise _AlienError
                out.write(piece)
            if left or hasher.hexdigest() != digest.hash:
                raise _AlienError
            self._verified.add(digest.hash)
            return True
        return False

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
        found = Digest.of(data)
        if found != digest:
            self._disprove(found, digest, inode)
            return None
        self._verified.add(digest.hash)
        return data

    def path(self, digest: Digest) -> Path | None:
        """Where a verified blob lies, to be read or mapped and never written; None where the store has none."""
        path = self._blob(digest)
        return path if self.has(digest) else None

    def has(self, digest: Digest) -> bool:
        """Whether the store holds the blob's very bytes. They are read once by each Store object, then remembered."""
        found = self._found(digest)
        return found is not None and self.use.mark(self._blob_name(digest), found.st_mtime)

    def reread(self, name: str) -> bool | None:
        """Reads a blob anew, whatever is remembered of it: whether its bytes are those of its name, a SHA-256.

        None where there is none. What has other bytes is set aside.
        """
        path = self.root / "cas" / name[:2] / name
        with self._explained(f"reading blob {name[:12]}"):
            try:
                inode = path.stat().st_ino
                found = Digest.of_file(path)
            except FileNotFoundError:
                return None
        if found.hash != name:
            self._disprove(found, Digest(name, found.size), inode)
        return found.hash == name

    def _found(self, digest: Digest) -> os.stat_result | None:
        """What the system says of a blob that is here and whole; None of any other."""
        path = self._blob_name(digest)
        try:
            stat = os.stat(path)
            if stat.st_size == digest.size and digest.hash in self._verified:
                return stat
            found = Digest.of_file(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise explain_os_error(error, f"reading blob {digest}") from error
        if found != digest:
            self._disprove(found, digest, stat.st_ino)
            return None
        self._verified.add(digest.hash)
        return stat

    def _disprove(self, found: Digest, asked: Digest, inode: int) -> None:
        """Sets a blob aside that has not the bytes of its name. One that was asked for with a wrong size has them."""
        if found.hash != asked.hash:
            self._verified.discard(asked.hash)
            self._set_aside(self._blob(asked), inode)

    # action entries

    def commit(self, key: str, entry: ActionEntry, sync: bool = True) -> None:
        """Records what an action made. Its blobs must be in the store already. Without `sync` a power failure may lose
        it: for what can be fetched again."""
        with self._explained(f"writing entry {key[:12]}"), self._written(self._entry(key), sync) as out:
            out.write(entry.to_bytes(key))

    def lookup(self, key: str) -> ActionEntry | None:
        """The entry of an action, if every blob that it names is here and whole; otherwise None."""
        found = self._read(key)
        if found is None or any(self._found(digest) is None for digest in found[0].outputs.values()):
            return None
        entry, _, mtime = found
        return entry if self.use.mark(self._entry_name(key), mtime) else None

    def document(self, key: str) -> bytes | None:
        """The document of an action's entry as it lies here, its check verified; its blobs need not be here."""
        found = self._read(key)
        return found[1] if found is not None else None

    def _read(self, key: str) -> tuple[ActionEntry, bytes, float] | None:
        """An entry, its document and its time."""
        try:
            data, stat = small_file(self._entry_name(key))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise explain_os_error(error, f"reading entry {key[:12]}") from error
        try:
            return ActionEntry.from_bytes(key, data), data, stat.st_mtime
        except ValueError:
            self._set_aside(self._entry(key), stat.st_ino)
            return None

    # locks

    def in_use(self) -> contextlib.AbstractContextManager[None]:
        """Held by a run: nothing that it uses is removed while it lasts, and what it put stays though nothing names it.

        It never waits and never fails. The system ends it when the process dies.
        """
        return self.use.running()

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

    @contextlib.contextmanager
    def _written(self, final: Path, sync: bool = True) -> Iterator[BinaryIO]:
        temporary = self._scratch / scratch_name()
        with written_atomically(temporary, self._scratch, self.durable and sync) as out:
            yield out
        self._place(temporary, final)

    def _place(self, temporary: Path, final: Path) -> None:
        """Gives a whole file its name, while nobody removes what had the name before."""
        try:
            with self.use.placing():
                move(temporary, final)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    # Names as str: to make a Path takes longer than to ask the system what lies there, and a build asks of thousands.

    def _blob_name(self, digest: Digest) -> str:
        # What an entry or a remote calls a blob may be anything, even a path: what is no SHA-256 lies nowhere.
        name = digest.hash if is_sha256(digest.hash) else "none"
        return f"{self._folder}cas{os.sep}{name[:2]}{os.sep}{name}"

    def _blob(self, digest: Digest) -> Path:
        return Path(self._blob_name(digest))

    def _entry_name(self, key: str) -> str:
        return f"{self._folder}ac{os.sep}{key[:2]}{os.sep}{key}"

    def _entry(self, key: str) -> Path:
        return Path(self._entry_name(key))

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


def small_file(path: str) -> tuple[bytes, os.stat_result]:
    """A small file's bytes and what the system says of it, with no more calls than that takes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        stat = os.fstat(descriptor)
        # One byte more than there should be: a file that grew meanwhile is no entry.
        return os.read(descriptor, stat.st_size + 1), stat
    finally:
        os.close(descriptor)


class _AlienError(Exception):
    """Bytes that are not those of the blob that was asked for."""


_OWN_FOLDERS = ("cas", "ac", "sets", "summaries", "pins", "usage", "locks", "quarantine", "tmp")
