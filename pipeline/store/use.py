"""Who uses a store, and when what lies in it was last used: what must be known to remove nothing under anybody.

    the time of an entry or blob   when it was last used, or up to MARK_SECONDS before that
    locks/use-<name>               one for each run that uses the store, locked while it lasts; its time: when it began
                                   or puts. The first who removes makes it: where nobody ever did, nobody is waited for

Times are those that the disk gives, so that machines whose clocks differ agree on them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.store.files import scratch_name

MARK_SECONDS = 180
_USE = "use-"
_UNLOCKABLE_SECONDS = 24 * 60 * 60


class Use:
    """The marks and locks of one store. Every method may be called from any thread, by any number of processes."""

    def __init__(self, root: Path) -> None:
        self._locks = root / "locks"
        self._scratch = root / "tmp"
        self._removing = f"{self._locks}{os.sep}removing"

    def mark(self, path: str, mtime: float) -> bool:
        """Notes that a file is used, where its time `mtime` (seconds) says otherwise; whether it is still there.

        When it returns True, nobody who decided before to remove the file will. Where the time cannot be changed (a
        disk that is read-only, a file of another user) use is not remembered.
        """
        if abs(time.time() - mtime) < MARK_SECONDS:
            return True
        with self.placing():
            try:
                os.utime(path)
            except FileNotFoundError:
                return False
            except OSError:
                pass
        return True

    @contextlib.contextmanager
    def placing(self) -> Iterator[None]:
        """While this lasts nothing is removed. For moments: who wants to remove waits."""
        try:
            descriptor = os.open(self._removing, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            descriptor = None
        if descriptor is None:
            yield
            return
        with _locked(descriptor, fcntl.LOCK_SH):
            yield

    @contextlib.contextmanager
    def removing(self) -> Iterator[None]:
        """While this lasts nobody marks or puts. For moments: builds wait. Raises OSError where it cannot be had."""
        self._locks.mkdir(exist_ok=True)
        with _locked(os.open(self._removing, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), fcntl.LOCK_EX):
            yield

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Tells others, while it lasts, that the store is in use. The system ends it when the process dies.

        Where nothing can be written nothing can be removed either, and nobody is told.
        """
        path = self._locks / f"{_USE}{scratch_name()}"
        try:
            descriptor = self._begin(path)
        except OSError:
            descriptor = None
        if descriptor is None:
            yield
            return
        with _locked(descriptor, fcntl.LOCK_EX):
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _begin(self, path: Path) -> int:
        """The file that says so, locked before it can be seen: one that is seen and not locked has ended."""
        for folder in (self._locks, self._scratch):
            folder.mkdir(exist_ok=True)
        temporary = self._scratch / path.name
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.rename(temporary, path)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def earliest(self) -> int | None:
        """When the first of those that use the store now began, in ns; None where nobody does. Sweeps what ended."""
        try:
            with os.scandir(self._locks) as entries:
                found = [entry.path for entry in entries if entry.name.startswith(_USE)]
        except FileNotFoundError:
            return None
        return min((begun for path in found if (begun := _begun(path)) is not None), default=None)

    def now(self) -> int:
        """The time in ns that the disk gives to a file written now."""
        temporary = self._scratch / scratch_name()
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except OSError:
            return time.time_ns()
        try:
            return os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                temporary.unlink()


def _begun(path: str) -> int | None:
    """When the run began that holds this file, in ns; None where it has ended, and the file is removed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError:
        return os.stat(path).st_mtime_ns
    try:
        begun = os.fstat(descriptor).st_mtime_ns
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return begun
        except OSError:  # a disk that cannot lock: nothing tells whether it has ended but its age
            if time.time_ns() - begun < _UNLOCKABLE_SECONDS * 10**9:
                return begun
        with contextlib.suppress(OSError):
            os.unlink(path)
        return None
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(descriptor: int, how: int) -> Iterator[None]:
    """Holds a lock, then closes its file. A disk that cannot lock is no reason to stop."""
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, how)
        yield
    finally:
        # Not left to the closing: a process that was forked meanwhile has the file open as well.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
