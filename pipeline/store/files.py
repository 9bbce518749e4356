"""How a file comes to be in the store: written under a name of its own, synced, then renamed. Never half visible."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_HOST = socket.gethostname().replace(os.sep, "-")
_LEFTOVER_SECONDS = 24 * 60 * 60


@dataclass
class StoreCounts:
    """What happened to one Store object since it was made."""

    corrupt: int = 0  # files that did not have the bytes their name or check promised; set aside
    torn: int = 0  # the same among the members of sets, and what is no member at all


def scratch_name() -> str:
    """A file name that no other process on any machine that shares the disk will choose."""
    return f"{_HOST}-{os.getpid()}-{secrets.token_hex(8)}"


@contextlib.contextmanager
def written_atomically(final: Path, scratch: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """Opens a new file in the folder `scratch`; at the end of the block it stands at `final`, whole, or not at all.

    With `sync` it outlives a power failure. Safe for any number of writers of one name: the last rename wins. A process
    that is killed leaves only a file in `scratch`. Raises OSError as the system gives it, with nothing left behind.
    """
    temporary = scratch / scratch_name()
    try:
        with _new(temporary) as stream:
            yield stream
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        os.chmod(temporary, 0o444)
        move(temporary, final)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def move(temporary: Path, final: Path) -> None:
    """Gives a whole file its name, in place of what had it; makes the folder that it is to lie in."""
    try:
        os.replace(temporary, final)
    except FileNotFoundError:
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, final)


def _new(path: Path) -> BinaryIO:
    try:
        return open(path, "xb")
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "xb")


def remove_leftovers(scratch: Path) -> None:
    """Removes files that processes which died left in `scratch`: those that nobody wrote to for a day. Never fails."""
    latest = time.time() - _LEFTOVER_SECONDS
    with contextlib.suppress(OSError), os.scandir(scratch) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_mtime < latest:
                    os.unlink(entry)


def set_aside(path: Path, inode: int, quarantine: Path) -> None:
    """Moves a file that failed out of the way, unless another process has put another in its place. Never fails."""
    with contextlib.suppress(OSError):
        if path.lstat().st_ino == inode:
            quarantine.mkdir(exist_ok=True)
            os.replace(path, quarantine / f"{path.name}-{scratch_name()}")


def sync_folder(folder: Path) -> None:
    """Has the disk know the names in a folder. Where a file system refuses that, it has a way of its own."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
