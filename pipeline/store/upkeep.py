"""Keeping a store small and whole: what lies in it, what may go, and whether all of it is what it says.

    collect   removes what was not used for longest, until the store is within bounds
    verify    reads everything, and sets aside what is corrupt      (pipeline.store.checkup)
    sizes     says what lies there                                  (the same)

All of it runs beside builds. What goes is decided by `decide` over an inventory (pipeline.store.inventory), apart from
the disk; it is removed by `_Removal`, which asks again of each file whether anybody used it since.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from array import array
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pipeline.errors import explain_os_error
from pipeline.store.checkup import Incomplete, Sizes, StageSizes, Verified, set_aside_corrupt, sizes, verify
from pipeline.store.inventory import Inventory, Progress, take_inventory
from pipeline.store.local import Store
from pipeline.store.pins import Pins
from pipeline.store.use import MARK_SECONDS

__all__ = [
    "GRACE_SECONDS",
    "Bounds",
    "Collected",
    "Incomplete",
    "Plan",
    "Share",
    "Sizes",
    "StageSizes",
    "Verified",
    "collect",
    "decide",
    "sizes",
    "verify",
]

T = TypeVar("T")

GRACE_SECONDS = 600  # what was used or put so shortly ago stays, for those who do not say that they run
_LEFTOVER_SECONDS = 24 * 60 * 60
_AT_ONCE = 128  # files that are removed while builds wait
_NS = 10**9

# What became of an entry or blob.
_STAYS, _GOES, _VANISHED = 0, 1, 2


@dataclass(frozen=True)
class Bounds:
    """What a store may hold. None is no bound.

    max_bytes        of entries and blobs together; sets, which only grow, do not count
    max_age_seconds  since an entry was last used
    """

    max_bytes: int | None = None
    max_age_seconds: float | None = None


@dataclass
class Share:
    """What became of one stage's part of a store. A blob that several stages name counts for the first by name."""

    entries_removed: int = 0
    entries_kept: int = 0
    bytes_freed: int = 0
    bytes_kept: int = 0


@dataclass
class Collected:
    """What a collection removed, or would remove. Bytes are those of entries and blobs.

    entries_pinned, entries_in_use   that stay whatever the bounds say
    within                           whether the store is within its bounds now
    leftovers, leftover_bytes        files that were set aside, or left by processes that died, a day ago
    by_stage                         under "", the blobs that no entry names
    unreadable_pins                  pins that cannot be read: nothing at all is removed, or nothing more from then on
    """

    dry_run: bool = False
    entries_removed: int = 0
    entries_kept: int = 0
    entries_pinned: int = 0
    entries_in_use: int = 0
    entries_corrupt: int = 0
    blobs_removed: int = 0
    blobs_kept: int = 0
    bytes_freed: int = 0
    bytes_kept: int = 0
    leftovers: int = 0
    leftover_bytes: int = 0
    within: bool = True
    by_stage: dict[str, Share] = field(default_factory=dict)
    unreadable_pins: tuple[Path, ...] = ()


@dataclass
class Plan:
    """What goes: entries by number, least recently used first, and a flag for each blob."""

    entries: array[int]
    blobs: bytearray


def decide(inventory: Inventory, bounds: Bounds, pinned: Collection[bytes], used_since: int, now: int) -> Plan:
    """What goes, so that the rest is within the bounds; a pure function.

    Blobs that nothing names go, then entries, least recently used first, each with the blobs that no other names. What
    was used at `used_since` (ns) or later stays, as do the entries with `pinned` keys (32 bytes), with their blobs.
    """
    named = array("I", bytes(4 * len(inventory.blobs)))
    for blob in inventory.outputs:
        named[blob] += 1
    plan = Plan(array("I"), bytearray(len(inventory.blobs)))
    left = sum(inventory.entry_sizes) + sum(inventory.blob_sizes)
    for blob, names in enumerate(named):
        if not names and inventory.blob_times[blob] < used_since:
            plan.blobs[blob] = _GOES
            left -= inventory.blob_sizes[blob]
    oldest = None if bounds.max_age_seconds is None else now - int(bounds.max_age_seconds * _NS)
    times = inventory.entry_times
    for entry in sorted(range(len(inventory)), key=times.__getitem__):
        too_much = bounds.max_bytes is not None and left > bounds.max_bytes
        too_old = oldest is not None and times[entry] < oldest
        if times[entry] >= used_since or not (too_much or too_old):
            break  # nor do those that were used later
        if inventory.key(entry) in pinned:
            continue
        plan.entries.append(entry)
        left -= inventory.entry_sizes[entry]
        for blob in inventory.outputs_of(entry):
            named[blob] -= 1
            if not named[blob] and inventory.blob_times[blob] < used_since:
                plan.blobs[blob] = _GOES
                left -= inventory.blob_sizes[blob]
    return plan


def collect(
    store: Store, bounds: Bounds, pins: Pins, dry_run: bool = False, progress: Progress | None = None
) -> Collected:
    """Removes entries, least recently used first, and blobs that nothing names, until the store is within its bounds.

    What is pinned stays, and what was used since the earliest run that still uses the store began, or within
    GRACE_SECONDS; sets are never touched. Corrupt entries are set aside. Safe beside builds and beside itself, and
    killed at any moment: entries go before their blobs. With `dry_run` nothing is removed, and the result is what
    would be.

    `progress` is told steps done, and of how many: first of reading, then of removing. Raises StoreError where the
    system refuses; what was removed until then is gone.
    """
    now, stamp = store.use.now(), pins.stamp()
    used_since = now - GRACE_SECONDS * _NS
    if (earliest := store.use.earliest()) is not None:
        used_since = min(used_since, earliest - MARK_SECONDS * _NS)
    keys, broken = pins.survey()
    inventory = take_inventory(store.root, progress)
    pinned = {bytes.fromhex(key) for key in keys}
    plan = decide(inventory, bounds, pinned, used_since, now)
    if broken:
        plan = Plan(array("I"), bytearray(len(inventory.blobs)))
    fates = _as_planned(inventory, plan)
    leftovers, leftover_bytes = (0, 0) if broken else _leftovers(store.root, now, dry_run)
    if not dry_run and not broken:
        set_aside_corrupt(store, inventory)
        removal = _Removal(store, pins, stamp, inventory, plan, now)
        removal.perform(progress)
        fates, broken = removal.fates, removal.broken
    collected = _account(inventory, fates, bounds, now)
    collected.dry_run, collected.unreadable_pins = dry_run, tuple(broken)
    collected.leftovers, collected.leftover_bytes = leftovers, leftover_bytes
    for entry in range(len(inventory)):
        collected.entries_pinned += inventory.key(entry) in pinned
        collected.entries_in_use += inventory.entry_times[entry] >= used_since
    return collected


@dataclass
class _Fates:
    """What became of each entry and blob: one byte each."""

    entries: bytearray
    blobs: bytearray


def _as_planned(inventory: Inventory, plan: Plan) -> _Fates:
    fates = _Fates(bytearray(len(inventory)), bytearray(plan.blobs))
    for entry in plan.entries:
        fates.entries[entry] = _GOES
    return fates


class _PinsUnreadableError(Exception):
    """Somebody broke a pin while this removes."""


class _Removal:
    """Removes what a plan names, a few files at a time, and none that is no longer as the inventory saw it.

    fates   what became of everything so far
    broken  pins that can no longer be read: with the first, nothing more is removed
    """

    def __init__(
        self, store: Store, pins: Pins, stamp: list[tuple[str, int, int]], inventory: Inventory, plan: Plan, now: int
    ) -> None:
        self.fates = _Fates(bytearray(len(inventory)), bytearray(len(inventory.blobs)))
        self.broken: list[Path] = []
        self._store = store
        self._pins = pins
        self._stamp = stamp
        self._inventory = inventory
        self._plan = plan
        self._ahead = now + MARK_SECONDS * _NS
        self._pinned: set[str] = set()

    def perform(self, progress: Progress | None) -> None:
        """Entries first, so that none is seen whole that is not; then the blobs that no entry which stayed names."""
        total, done = len(self._plan.entries) + self._plan.blobs.count(_GOES), 0
        try:
            for steps in itertools.chain(self._remove_entries(), self._remove_blobs()):
                done += steps
                if progress is not None:
                    progress(done, total)
        except _PinsUnreadableError:
            return
        self._correct_times()

    def _remove_entries(self) -> Iterator[int]:
        for batch in _batches(self._plan.entries):
            with self._alone():
                for entry in batch:
                    self.fates.entries[entry] = self._remove_entry(entry)
            yield len(batch)

    def _remove_blobs(self) -> Iterator[int]:
        inventory, spared = self._inventory, bytearray(self._plan.blobs)
        for entry in self._plan.entries:
            if self.fates.entries[entry] == _STAYS:
                for blob in inventory.outputs_of(entry):
                    spared[blob] = _STAYS
        going = (each for each in zip(inventory.blobs, range(len(spared)), strict=True) if spared[each[1]])
        for batch in _batches(going):
            with self._alone():
                for name, blob in batch:
                    self.fates.blobs[blob] = self._remove("cas", name.hex(), inventory.blob_times[blob])
            yield len(batch)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While this lasts nobody marks what is about to go; and what was pinned meanwhile is known."""
        try:
            with self._store.use.removing():
                if (stamp := self._pins.stamp()) != self._stamp:
                    self._pinned, self.broken = self._pins.survey()
                    if self.broken:
                        raise _PinsUnreadableError
                    self._stamp = stamp
                yield
        except OSError as error:
            raise explain_os_error(error, "removing what was not used for long") from error

    def _remove_entry(self, entry: int) -> int:
        key = self._inventory.key(entry).hex()
        return _STAYS if key in self._pinned else self._remove("ac", key, self._inventory.entry_times[entry])

    def _remove(self, kind: str, name: str, seen: int) -> int:
        path = f"{self._store.root}{os.sep}{kind}{os.sep}{name[:2]}{os.sep}{name}"
        try:
            if os.stat(path).st_mtime_ns != seen:
                return _STAYS
            os.unlink(path)
        except FileNotFoundError:
            return _VANISHED
        return _GOES

    def _correct_times(self) -> None:
        """What was last used in the future, by a clock that was wrong, was used now: in its turn it goes as well."""
        inventory = self._inventory
        for entry, used in enumerate(inventory.entry_times):
            if used > self._ahead:
                self._use_now("ac", inventory.key(entry))
        if any(used > self._ahead for used in inventory.blob_times):
            for name, used in zip(inventory.blobs, inventory.blob_times, strict=True):
                if used > self._ahead:
                    self._use_now("cas", name)

    def _use_now(self, kind: str, name: bytes) -> None:
        with contextlib.suppress(OSError):
            os.utime(self._store.root / kind / name.hex()[:2] / name.hex())


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    left = iter(items)
    while batch := list(itertools.islice(left, _AT_ONCE)):
        yield batch


def _leftovers(root: Path, now: int, dry_run: bool) -> tuple[int, int]:
    """Removes what nobody will read: set aside, or left by those who died, a day ago. Number and bytes; never fails."""
    files, bytes_ = 0, 0
    for name in ("quarantine", "tmp"):
        with contextlib.suppress(OSError), os.scandir(root / name) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    stat = entry.stat(follow_symlinks=False)
                    # A file keeps its time when it is set aside; the time of its inode tells when that was.
                    if max(stat.st_ctime_ns, stat.st_mtime_ns) < now - _LEFTOVER_SECONDS * _NS:
                        if not dry_run:
                            os.unlink(entry)
                        files, bytes_ = files + 1, bytes_ + stat.st_size
    return files, bytes_


def _account(inventory: Inventory, fates: _Fates, bounds: Bounds, now: int) -> Collected:
    """Adds up what became of everything. What somebody else removed meanwhile is neither removed nor kept."""
    collected = Collected(entries_corrupt=len(inventory.corrupt))
    shares = [Share() for _ in inventory.stages] + [Share()]  # the last for blobs that no entry names: stage -1
    latest = None if bounds.max_age_seconds is None else now - int(bounds.max_age_seconds * _NS)
    for entry, fate in enumerate(fates.entries):
        share, size = shares[inventory.entry_stages[entry]], inventory.entry_sizes[entry]
        if fate == _GOES:
            share.entries_removed, share.bytes_freed = share.entries_removed + 1, share.bytes_freed + size
        elif fate == _STAYS:
            share.entries_kept, share.bytes_kept = share.entries_kept + 1, share.bytes_kept + size
            collected.within &= latest is None or inventory.entry_times[entry] >= latest
    for stage, size, fate in zip(inventory.owners(), inventory.blob_sizes, fates.blobs, strict=True):
        if fate == _GOES:
            collected.blobs_removed += 1
            shares[stage].bytes_freed += size
        elif fate == _STAYS:
            collected.blobs_kept += 1
            shares[stage].bytes_kept += size
    collected.entries_removed = sum(share.entries_removed for share in shares)
    collected.entries_kept = sum(share.entries_kept for share in shares)
    collected.bytes_freed = sum(share.bytes_freed for share in shares)
    collected.bytes_kept = sum(share.bytes_kept for share in shares)
    collected.within &= bounds.max_bytes is None or collected.bytes_kept <= bounds.max_bytes
    collected.by_stage = dict(sorted(zip([*inventory.stages, ""], shares, strict=True), key=lambda each: each[0]))
    return collected
