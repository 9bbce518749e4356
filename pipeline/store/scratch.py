"""The folder of one run of `doit tune`, for what is made of candidates and not wanted again; workers of a cluster have
one for each run that they work for.

store/   a store of its own
tmp/     the workers' temporary files: what they leave when they are killed
owner    locked while the run lives: what a run that was killed left behind, the next one removes
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Collection
from pathlib import Path


class Scratch:
    """A folder for what is made of candidates. What a run that was killed left behind is removed by the next one."""

    _PREFIX = "tvmake-tune-"

    def __init__(self) -> None:
        from filelock import FileLock

        for old in Path(tempfile.gettempdir()).glob(f"{self._PREFIX}*"):
            self._remove_if_left(old)
        self._root = Path(tempfile.mkdtemp(prefix=self._PREFIX))
        self.folder = self._root / "store"
        self.temporary = self._root / "tmp"  # of the workers: what they leave when they are killed goes as well
        self.temporary.mkdir()
        self._lock = FileLock(self._root / "owner", thread_local=False)
        self._lock.acquire()
        self.tidied = time.time()

    def remove_old(self, kept: Collection[str], seconds: float) -> None:
        """Removes files of the store that are older than so many seconds, but for those of these names."""
        self.tidied = time.time()
        latest = self.tidied - seconds
        for part in ("cas", "ac"):
            for path in (self.folder / part).glob("*/*"):
                with contextlib.suppress(OSError):
                    if path.name not in kept and path.stat().st_mtime < latest:
                        path.unlink()

    def close(self) -> None:
        self._lock.release()
        shutil.rmtree(self._root, ignore_errors=True)

    def _remove_if_left(self, old: Path) -> None:
        from filelock import FileLock, Timeout

        with contextlib.suppress(OSError, Timeout):
            if old.stat().st_uid == os.getuid() and time.time() - old.stat().st_mtime > 60:
                with FileLock(old / "owner").acquire(blocking=False):
                    shutil.rmtree(old, ignore_errors=True)
