"""Looking at a whole store: `verify` reads everything and sets aside what is corrupt, `sizes` says what lies there."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import explain_os_error
from pipeline.hashing import is_sha256
from pipeline.store.actions import ActionEntry
from pipeline.store.files import set_aside
from pipeline.store.inventory import Inventory, Progress, take_inventory
from pipeline.store.local import Store
from pipeline.store.pins import Pins

_AT_ONCE = 128  # blobs for one thread, or
_BYTES_AT_ONCE = 64 << 20


@dataclass
class Incomplete:
    """An entry some of whose blobs are not here, or were corrupt: a miss."""

    key: str
    stage: str
    missing: tuple[str, ...]  # SHA-256 of each


@dataclass
class Verified:
    """What was found when everything was read. Corrupt things were set aside: the next build makes them again.

    bytes   of blobs that were read; members are those of sets
    torn    members of sets that are not what they say, and what is no member at all
    """

    entries: int = 0
    blobs: int = 0
    members: int = 0
    bytes: int = 0
    corrupt_entries: tuple[str, ...] = ()
    corrupt_blobs: tuple[str, ...] = ()
    torn: int = 0
    incomplete: tuple[Incomplete, ...] = ()
    unreadable_pins: tuple[Path, ...] = ()

    @property
    def good(self) -> bool:
        wrong = (self.corrupt_entries, self.corrupt_blobs, self.torn, self.incomplete, self.unreadable_pins)
        return not any(wrong)


def verify(store: Store, progress: Progress | None = None, threads: int | None = None) -> Verified:
    """Reads every blob, entry and member of a set, and sets aside what has other bytes than it says.

    `progress` is told bytes of blobs done, and of how many. Raises StoreError where the system refuses.
    """
    inventory = take_inventory(store.root)
    set_aside_corrupt(store, inventory)
    verified = Verified(corrupt_entries=tuple(path.name for path, _ in inventory.corrupt))
    lost = _read_blobs(store, inventory, verified, progress, threads or min(8, os.cpu_count() or 1))
    suspects = set(inventory.incomplete)
    if lost:
        whole = range(len(inventory))
        suspects.update(entry for entry in whole if not lost.isdisjoint(inventory.outputs_of(entry)))
    found = (_lacks(store, inventory, inventory.key(entry).hex()) for entry in sorted(suspects))
    verified.incomplete = tuple(each for each in found if each is not None)
    verified.entries = len(inventory)
    _read_sets(store, verified)
    verified.unreadable_pins = tuple(Pins(store.root).broken())
    return verified


def _read_blobs(
    store: Store, inventory: Inventory, verified: Verified, progress: Progress | None, threads: int
) -> set[int]:
    """Reads all blobs; the numbers of those that are not whole, or no longer there."""
    total, corrupt = sum(inventory.blob_sizes), []
    lost: set[int] = set()
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        running: deque[tuple[list[tuple[str, int]], Future[list[bool | None]]]] = deque()

        def taken() -> None:
            blobs, future = running.popleft()
            for (name, blob), right in zip(blobs, future.result(), strict=True):
                size = inventory.blob_sizes[blob]
                verified.blobs, verified.bytes = verified.blobs + 1, verified.bytes + size
                if not right:
                    lost.add(blob)
                if right is False:
                    corrupt.append(name)
            if progress is not None:
                progress(verified.bytes, total)

        for blobs in _portions(inventory):
            running.append((blobs, pool.submit(_reread, store, blobs)))
            if len(running) > 2 * threads:  # no more than that lies in memory
                taken()
        while running:
            taken()
    verified.corrupt_blobs = tuple(sorted(corrupt))
    return lost


def _reread(store: Store, blobs: list[tuple[str, int]]) -> list[bool | None]:
    return [store.reread(name) for name, _ in blobs]


def _portions(inventory: Inventory) -> Iterator[list[tuple[str, int]]]:
    """Names and numbers of blobs, some at a time: neither very many nor much more than _BYTES_AT_ONCE bytes."""
    portion: list[tuple[str, int]] = []
    weight = 0
    for name, blob in inventory.blobs.items():
        portion.append((name.hex(), blob))
        weight += inventory.blob_sizes[blob]
        if weight >= _BYTES_AT_ONCE or len(portion) >= _AT_ONCE:
            yield portion
            portion, weight = [], 0
    if portion:
        yield portion


def _lacks(store: Store, inventory: Inventory, key: str) -> Incomplete | None:
    """What an entry lacks, asked of the disk again: it may have been put, or the entry removed, meanwhile."""
    document = store.document(key)
    if document is None:
        return None
    entry = ActionEntry.from_bytes(key, document)
    missing = sorted({digest.hash for digest in entry.outputs.values() if not store.has(digest)})
    return Incomplete(key, entry.stage, tuple(missing)) if missing else None


def _read_sets(store: Store, verified: Verified) -> None:
    before = store.counts.torn
    for key in set_keys(store.root):
        verified.members += sum(1 for _ in store.sets.read(key))
    verified.torn = store.counts.torn - before


# sizes


@dataclass
class StageSizes:
    """What one stage has in a store: entries, bytes of them and of their blobs, and how long it ran to make them.

    A blob that several stages name counts for the first by name.
    """

    entries: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass
class Sizes:
    """What lies in a store; bytes are those of files.

    unnamed, unnamed_bytes      blobs that no entry names
    set_aside, set_aside_bytes  corrupt files, which nothing reads
    """

    entries: int = 0
    blobs: int = 0
    bytes: int = 0
    by_stage: dict[str, StageSizes] = field(default_factory=dict)
    unnamed: int = 0
    unnamed_bytes: int = 0
    sets: int = 0
    members: int = 0
    member_bytes: int = 0
    corrupt: int = 0
    set_aside: int = 0
    set_aside_bytes: int = 0


def sizes(store: Store, progress: Progress | None = None) -> Sizes:
    """Counts what lies in a store; `progress` is told folders done, and of how many. Raises StoreError."""
    inventory = take_inventory(store.root, progress)
    found = Sizes(entries=len(inventory), blobs=len(inventory.blobs), corrupt=len(inventory.corrupt))
    stages = [StageSizes() for _ in inventory.stages]
    columns = zip(inventory.entry_stages, inventory.entry_sizes, inventory.seconds, strict=True)
    for stage, size, seconds in columns:
        stages[stage].entries += 1
        stages[stage].bytes += size
        stages[stage].seconds += seconds
    for stage, size in zip(inventory.owners(), inventory.blob_sizes, strict=True):
        if stage < 0:
            found.unnamed, found.unnamed_bytes = found.unnamed + 1, found.unnamed_bytes + size
        else:
            stages[stage].bytes += size
    found.by_stage = dict(sorted(zip(inventory.stages, stages, strict=True), key=lambda each: each[0]))
    found.bytes = sum(each.bytes for each in stages) + found.unnamed_bytes
    for _, members, bytes_ in _sets(store.root):
        found.sets, found.members = found.sets + 1, found.members + members
        found.member_bytes += bytes_
    found.set_aside, found.set_aside_bytes = _files(store.root / "quarantine")
    return found


# what both need


def set_aside_corrupt(store: Store, inventory: Inventory) -> None:
    """Moves the entries out of the way that an inventory found to be none, and counts them."""
    for path, inode in inventory.corrupt:
        store.counts.corrupt += 1
        set_aside(path, inode, store.root / "quarantine")


def set_keys(root: Path) -> list[str]:
    """The keys of all sets in a store, in order."""
    return sorted(key for key, _, _ in _sets(root))


def _sets(root: Path) -> Iterator[tuple[str, int, int]]:
    """Every set: its key, how many members its folder lists, and their bytes."""
    for prefix in _listed(root / "sets"):
        for key in _listed(root / "sets" / prefix):
            if key.startswith(prefix) and is_sha256(key):
                yield key, *_files(root / "sets" / prefix / key, is_sha256)


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise explain_os_error(error, f"reading {folder}") from error


def _files(folder: Path, named: Callable[[str], object] = bool) -> tuple[int, int]:
    """How many files lie in a folder, and their bytes. One that cannot be seen is not counted."""
    files, bytes_ = 0, 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if named(entry.name) and entry.is_file(follow_symlinks=False):
                    bytes_ += entry.stat(follow_symlinks=False).st_size
                    files += 1
    return files, bytes_
