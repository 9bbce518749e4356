"""What the runs that used a store found, made, fetched and sent, added up over time.

    usage/run-<time>-<name>.json    one run; <time> in ns, so that a listing is in order
    usage/merged.json               runs before, by day, and the names of those files that are in it and not yet removed

A run adds one small file. When there are many they are merged: the merged file is written whole, in place of the one
before, and names the files that it holds; only then are these removed. So a run is counted once, wherever a merge was
killed: a file that the merged one names is passed over.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from pipeline.errors import explain_os_error
from pipeline.store.files import scratch_name, written_atomically

FORMAT = 1
_MERGED = "merged.json"
_RUN = "run-"
_END = ".json"
_MANY = 64  # runs, before they are merged
_ATTEMPTS = 20  # at reading while others merge
_DAY = 86_400  # seconds

S = TypeVar("S", bound=msgspec.Struct)


class StageUsage(msgspec.Struct):
    """What became of one stage's actions. Seconds are wall time of the stage, bytes those of blobs.

    hits             found here; remote_hits, found in a remote and fetched
    misses           run; errors, failed
    seconds_spent    on those that were run
    seconds_saved    what those that were found took when they were run
    """

    hits: int = 0
    remote_hits: int = 0
    misses: int = 0
    errors: int = 0
    seconds_spent: float = 0.0
    seconds_saved: float = 0.0
    bytes_received: int = 0
    bytes_sent: int = 0


class RemoteUsage(msgspec.Struct):
    """What was asked of one remote; bytes of blobs."""

    requests: int = 0
    errors: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0


class UsageCounts(msgspec.Struct):
    """Counts of one run, or of many added up.

    stages   by the stage's name
    remotes  by the remote's display name, which has no credentials
    torn     files of runs that could not be read
    """

    stages: dict[str, StageUsage] = {}
    remotes: dict[str, RemoteUsage] = {}
    runs: int = 1
    torn: int = 0

    def add(self, other: UsageCounts) -> None:
        """Adds the counts of other runs to these."""
        _add_all(self.stages, other.stages)
        _add_all(self.remotes, other.remotes)
        self.runs += other.runs
        self.torn += other.torn


def _add_all(mine: dict[str, S], more: Mapping[str, S]) -> None:
    for name, each in more.items():
        if name not in mine:
            mine[name] = type(each)()
        for field in each.__struct_fields__:
            setattr(mine[name], field, getattr(mine[name], field) + getattr(each, field))


class _Run(msgspec.Struct):
    """A run's file. `at`: when it ended, in seconds since 1970."""

    format: int
    at: float
    counts: UsageCounts


class _Merged(msgspec.Struct):
    """The merged file. `days`: counts by days since 1970 (UTC); `holds`: files in it that may be there still."""

    format: int = FORMAT
    days: dict[int, UsageCounts] = {}
    holds: list[str] = []


class _Format(msgspec.Struct):
    format: int


@dataclass(frozen=True)
class _Unreadable:
    """A file that is torn, or of a later version, which must stay as it is."""

    later: bool


F = TypeVar("F", _Run, _Merged)


class Usage:
    """The usage of the store in a folder. Safe for any number of processes, killed at any moment.

    Raises StoreError where the folder cannot be read or written.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / "usage"
        self._scratch = root / "tmp"

    def add(self, counts: UsageCounts, at: float | None = None) -> None:
        """Adds a run, which ended `at` seconds since 1970, or now. A power failure may lose it."""
        run = _Run(FORMAT, time.time() if at is None else at, counts)
        try:
            self._write(f"{_RUN}{int(run.at * 1e9):020d}-{scratch_name()}{_END}", run)
            if len(self._names()) > _MANY:
                self._merge()
        except OSError as error:
            raise explain_os_error(error, "keeping what this run used") from error

    def read(self, since: float | None = None) -> UsageCounts:
        """The counts of all runs that ended at or after `since` (seconds since 1970), added up.

        What was merged is known by the day (UTC): one that had not ended at `since` counts as a whole.
        """
        try:
            merged, runs, torn = self._seen()
        except OSError as error:
            raise explain_os_error(error, "reading what was used") from error
        total = UsageCounts(runs=0, torn=torn)
        for day, counts in merged.days.items():
            if since is None or (day + 1) * _DAY > since:
                total.add(counts)
        for run in runs:
            if since is None or run.at >= since:
                total.add(run.counts)
        return total

    def _seen(self) -> tuple[_Merged, list[_Run], int]:
        """The merged file, the runs that are not in it, and how many files cannot be read.

        Where the merged file is another afterwards, somebody merged meanwhile, and a run may be in neither or in both.
        """
        for _ in range(_ATTEMPTS):
            before = self._stamp()
            merged = self._read(_MERGED, _Merged)
            runs = {name: self._read(name, _Run) for name in self._names()}
            if self._stamp() == before:
                break
        whole = merged if isinstance(merged, _Merged) else _Merged()
        held = set(whole.holds)
        left = [run for name, run in runs.items() if run is not None and name not in held]
        good = [run for run in left if isinstance(run, _Run)]
        return whole, good, len(left) - len(good) + isinstance(merged, _Unreadable)

    def _merge(self) -> None:
        """Merges what lies there, unless another process does so now, or a later version did before."""
        from filelock import FileLock, Timeout

        lock = FileLock(self._root / "locks" / "usage", thread_local=False, is_singleton=False)
        with contextlib.suppress(Timeout, NotImplementedError), lock.acquire(blocking=False):
            merged = self._read(_MERGED, _Merged)
            if isinstance(merged, _Unreadable) and merged.later:
                return
            whole = merged if isinstance(merged, _Merged) else _Merged()
            if isinstance(merged, _Unreadable):
                whole.days[_day(time.time())] = UsageCounts(runs=0, torn=1)
            names = self._names()
            held = set(whole.holds).intersection(names)
            for name in names:
                if name not in held and self._take(name, whole):
                    held.add(name)
            whole.holds = sorted(held)
            self._write(_MERGED, whole)
            for name in held:
                (self._folder / name).unlink(missing_ok=True)

    def _take(self, name: str, whole: _Merged) -> bool:
        """Adds one run's file to the merged one, or that it is torn; whether it can be removed."""
        run = self._read(name, _Run)
        if run is None or (isinstance(run, _Unreadable) and run.later):
            return False
        day, counts = (
            (_day(run.at), run.counts) if isinstance(run, _Run) else (_day(time.time()), UsageCounts(runs=0, torn=1))
        )
        whole.days.setdefault(day, UsageCounts(runs=0)).add(counts)
        return True

    # files

    def _names(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self._folder) if name.startswith(_RUN) and name.endswith(_END))
        except FileNotFoundError:
            return []

    def _stamp(self) -> tuple[int, int] | None:
        try:
            stat = os.stat(self._folder / _MERGED)
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    def _read(self, name: str, kind: type[F]) -> F | _Unreadable | None:
        """A file's content; None where there is no such file."""
        try:
            data = (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None
        try:
            if (found := msgspec.json.decode(data, type=_Format).format) != FORMAT:
                return _Unreadable(later=found > FORMAT)
            return msgspec.json.decode(data, type=kind)
        except (msgspec.MsgspecError, UnicodeError):
            return _Unreadable(later=False)

    def _write(self, name: str, content: msgspec.Struct) -> None:
        with written_atomically(self._folder / name, self._scratch, sync=False) as stream:
            stream.write(msgspec.json.encode(content))


def _day(at: float) -> int:
    return int(at // _DAY)
