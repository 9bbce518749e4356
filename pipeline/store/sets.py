"""Sets in the store: immutable members that only ever come in, so that the union of two sets is their merge.

    sets/CHANGED                    other bytes whenever something came into any set
    sets/ab/<key>/<sha256>          members, each named by the SHA-256 of its bytes
    sets/ab/<key>/about.json        what the set is, for people and for other tools; nothing here rests on it
    locks/set-<key>                 who works on a set; see `try_locked`

A member lies under its name whole or not at all, so that any number of processes, on one disk or on a shared folder,
write at once and lose nothing; whoever copies members from one store into another by rename (rsync does) merges the
sets. What is no member is set aside when it is read, and counted; names that begin with a dot are other tools' files on
their way and are passed over.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from pipeline.errors import explain_os_error
from pipeline.hashing import is_sha256, key_of
from pipeline.store.files import StoreCounts, set_aside, sync_folder, written_atomically

_ABOUT = "about.json"
_MOST = 1 << 16  # bytes that are read at once: of nearly every member all


class Sets:
    """The sets of one store. Every method may be called from any thread, by any number of processes at once.

    Raises StoreError where the folder cannot be read or written at all. Nothing that lies in it is fatal.
    """

    def __init__(self, root: Path, counts: StoreCounts) -> None:
        self._root = root
        self._counts = counts
        self._scratch = root / "tmp"
        self._above = f"{root / 'sets'}{os.sep}"

    @property
    def changed(self) -> Path:
        """The file whose bytes tell that something came into a set: what is stamped to know that nothing did."""
        return self._root / "sets" / "CHANGED"

    def add(self, key: str, members: Iterable[bytes], about: Mapping[str, object]) -> list[str]:
        """Puts members into a set, and returns their digests in order. When it returns they outlive a power failure.

        What is there already is not written again. Killed halfway, it leaves some of the members, each of them whole.
        """
        folder = self._folder(key)
        listed = [(hashlib.sha256(data).hexdigest(), data) for data in members]
        with self._explained(f"writing to the set {key[:12]}"):
            new = {name: data for name, data in listed if not _holds(folder / name, data)}
            if new:
                self._describe(folder, about)
                # Told before and after: whoever looked between the two, or outlives a writer that was killed, knows.
                self._tell()
                for name, data in new.items():
                    with written_atomically(folder / name, self._scratch) as stream:
                        stream.write(data)
                sync_folder(folder)
                self._tell()
        return [name for name, _ in listed]

    def all_keys(self) -> list[str]:
        """The keys of all sets that there are, in alphabetical order."""
        with self._explained("listing the sets"):
            return sorted(
                path.name
                for above in (self._root / "sets").glob("[0-9a-f][0-9a-f]")
                for path in above.iterdir()
                if is_sha256(path.name)
            )

    def names(self, key: str) -> frozenset[str]:
        """The digests of the members, as the folder lists them: nothing is read."""
        return frozenset(self._listed(key)[0])

    def read(self, key: str, but: Collection[str] = ()) -> Iterator[tuple[str, bytes]]:
        """The members with their digests, in the order of digests, less those in `but`, which are not read.

        What is torn and what is no member is set aside, counted and left out.
        """
        members, others = self._listed(key)
        folder = f"{self._above}{key[:2]}{os.sep}{key}{os.sep}"  # a Path for each of many costs more than to read it
        for name in others:
            self._set_aside(Path(folder, name))
        for name in sorted(members):
            if name not in but:
                data = self._member(folder, name)
                if data is not None:
                    yield name, data

    def about(self, key: str) -> dict[str, object]:
        """What the first writer said of the set; nothing where nothing can be read."""
        try:
            said = json.loads((self._folder(key) / _ABOUT).read_bytes())
        except (OSError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}

    def snapshot(self, key: str) -> str:
        """One digest over the names of the members: equal where the sets are."""
        return key_of({"members": sorted(self.names(key))})

    @contextlib.contextmanager
    def try_locked(self, key: str) -> Iterator[bool]:
        """Holds the lock of a set if nobody has it, without waiting: whether it is held is what the block is given.

        The system releases it when the process dies. It keeps others from doing the same work, not from adding: where
        the disk cannot lock, it is always given.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self._root / "locks" / f"set-{key}", thread_local=False, is_singleton=False)
        with contextlib.ExitStack() as stack:
            with self._explained(f"locking the set {key[:12]}"):
                try:
                    stack.enter_context(lock.acquire(blocking=False))
                    free = True
                except Timeout:
                    free = False
                except NotImplementedError:
                    free = True
            yield free

    # the folder

    def _folder(self, key: str) -> Path:
        return self._root / "sets" / key[:2] / key

    def _listed(self, key: str) -> tuple[list[str], list[str]]:
        """Names of members, and of what else lies there; both are empty for a set that was never written."""
        with self._explained(f"listing the set {key[:12]}"):
            try:
                with os.scandir(f"{self._above}{key[:2]}{os.sep}{key}") as entries:
                    visible = [entry for entry in entries if entry.name != _ABOUT and not entry.name.startswith(".")]
            except FileNotFoundError:
                return [], []
            members = [each.name for each in visible if is_sha256(each.name) and each.is_file(follow_symlinks=False)]
        return members, [] if len(members) == len(visible) else sorted(
            {each.name for each in visible}.difference(members)
        )

    def _member(self, folder: str, name: str) -> bytes | None:
        """The bytes of a member, or None where they are not what its name promises."""
        try:
            descriptor = os.open(folder + name, os.O_RDONLY)
            try:
                data = os.read(descriptor, _MOST)
                if len(data) < _MOST and hashlib.sha256(data).hexdigest() == name:
                    return data
                # It is larger, or torn. One byte more than there should be tells of a file that has grown.
                stat = os.fstat(descriptor)
                data += os.read(descriptor, max(0, stat.st_size + 1 - len(data)))
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):  # somebody set it aside
                self._counts.torn += 1
            return None
        if hashlib.sha256(data).hexdigest() == name:
            return data
        self._counts.torn += 1
        set_aside(Path(folder, name), stat.st_ino, self._root / "quarantine")
        return None

    def _set_aside(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            inode = path.lstat().st_ino
            self._counts.torn += 1
            set_aside(path, inode, self._root / "quarantine")

    def _describe(self, folder: Path, about: Mapping[str, object]) -> None:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            for above in (folder.parent, folder.parent.parent, self._root):
                sync_folder(above)
        if not (folder / _ABOUT).exists():
            with written_atomically(folder / _ABOUT, self._scratch) as stream:
                stream.write(json.dumps(about, sort_keys=True, indent=1, default=str).encode() + b"\n")

    def _tell(self) -> None:
        with written_atomically(self.changed, self._scratch) as stream:
            stream.write(secrets.token_hex(16).encode() + b"\n")

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise explain_os_error(error, doing) from error


def _holds(path: Path, data: bytes) -> bool:
    """Whether a file has these very bytes. One that has others is written anew."""
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False
