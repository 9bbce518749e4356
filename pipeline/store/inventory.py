"""What lies in a store, in columns: a million blobs in some 200 MB, so that one may decide over all of them at once.

Reads folders and entries, never blobs, and changes nothing.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import explain_os_error
from pipeline.hashing import is_sha256
from pipeline.store.actions import ActionEntry
from pipeline.store.local import small_file

Progress = Callable[[int, int], None]

_FOLDERS = tuple(f"{n:02x}" for n in range(256))
_NAME_BYTES = 32


def _integers() -> array[int]:
    return array("q")


@dataclass
class Inventory:
    """Blobs and entries by number, in the order in which they were added. Sizes in bytes, times in ns.

    blobs       the SHA-256 of each, in bytes, and its number; a dict keeps the order
    keys        of the entries, 32 bytes each
    outputs     numbers of the blobs that entries name, each once for an entry; those of entry n begin at starts[n].
                What is not here has no number
    incomplete  numbers of entries that name a blob that is not here, or not of that size
    corrupt     entries that cannot be read as such: path and inode
    """

    blobs: dict[bytes, int] = field(default_factory=dict)
    blob_sizes: array[int] = field(default_factory=_integers)
    blob_times: array[int] = field(default_factory=_integers)
    keys: bytearray = field(default_factory=bytearray)
    entry_sizes: array[int] = field(default_factory=_integers)
    entry_times: array[int] = field(default_factory=_integers)
    stages: list[str] = field(default_factory=list)
    entry_stages: array[int] = field(default_factory=lambda: array("I"))
    seconds: array[float] = field(default_factory=lambda: array("d"))
    starts: array[int] = field(default_factory=lambda: array("I", [0]))
    outputs: array[int] = field(default_factory=lambda: array("I"))
    incomplete: array[int] = field(default_factory=lambda: array("I"))
    corrupt: list[tuple[Path, int]] = field(default_factory=list)
    _stage_numbers: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many entries there are."""
        return len(self.entry_sizes)

    def add_blob(self, name: bytes, size: int, time: int) -> None:
        self.blobs[name] = len(self.blobs)
        self.blob_sizes.append(size)
        self.blob_times.append(time)

    def add_entry(
        self, key: bytes, size: int, time: int, stage: str, seconds: float, outputs: Iterable[tuple[bytes, int]]
    ) -> None:
        """All blobs that are there must have been added before."""
        named = {name: (self.blobs.get(name), size) for name, size in outputs}
        numbers = [number for number, _ in named.values() if number is not None]
        if any(number is None or self.blob_sizes[number] != size for number, size in named.values()):
            self.incomplete.append(len(self))
        self.keys += key
        self.entry_sizes.append(size)
        self.entry_times.append(time)
        if stage not in self._stage_numbers:
            self._stage_numbers[stage] = len(self.stages)
            self.stages.append(stage)
        self.entry_stages.append(self._stage_numbers[stage])
        self.seconds.append(seconds)
        self.outputs.extend(numbers)
        self.starts.append(len(self.outputs))

    def key(self, entry: int) -> bytes:
        return bytes(self.keys[entry * _NAME_BYTES : (entry + 1) * _NAME_BYTES])

    def outputs_of(self, entry: int) -> array[int]:
        return self.outputs[self.starts[entry] : self.starts[entry + 1]]

    def owners(self) -> array[int]:
        """To which stage each blob is counted: of those whose entries name it the first by name; -1 where none does.

        So blobs that entries share are counted once.
        """
        by_rank = sorted(range(len(self.stages)), key=self.stages.__getitem__)
        rank_of = {number: rank for rank, number in enumerate(by_rank)}
        owners = array("l", [-1]) * len(self.blobs)
        for entry in range(len(self)):
            rank = rank_of[self.entry_stages[entry]]
            for blob in self.outputs_of(entry):
                if owners[blob] < 0 or rank < owners[blob]:
                    owners[blob] = rank
        return array("l", [by_rank[rank] if rank >= 0 else -1 for rank in owners])


def take_inventory(root: Path, progress: Progress | None = None) -> Inventory:
    """Reads the folders of blobs and entries, and every entry; `progress` is told folders done, and of how many.

    Blobs first: an entry whose blobs are put while this reads is then seen either not at all, or with what it names of
    what is old. Raises StoreError where the system refuses.
    """
    inventory, done = Inventory(), 0
    for kind, take in (("cas", _take_blobs), ("ac", _take_entries)):
        for prefix in _FOLDERS:
            folder = f"{root}{os.sep}{kind}{os.sep}{prefix}"
            try:
                take(inventory, folder, prefix)
            except OSError as error:
                raise explain_os_error(error, f"reading {folder}") from error
            done += 1
            if progress is not None:
                progress(done, 2 * len(_FOLDERS))
    return inventory


def _take_blobs(inventory: Inventory, folder: str, prefix: str) -> None:
    for found in _files(folder, prefix):
        with contextlib.suppress(FileNotFoundError):
            stat = found.stat(follow_symlinks=False)
            inventory.add_blob(bytes.fromhex(found.name), stat.st_size, stat.st_mtime_ns)


def _take_entries(inventory: Inventory, folder: str, prefix: str) -> None:
    for found in _files(folder, prefix):
        try:
            data, stat = small_file(found.path)
        except FileNotFoundError:
            continue
        try:
            entry = ActionEntry.from_bytes(found.name, data)
            outputs = [(bytes.fromhex(digest.hash), digest.size) for digest in entry.outputs.values()]
            seconds = float(entry.seconds)
        except (ValueError, OverflowError):
            inventory.corrupt.append((Path(found.path), stat.st_ino))
            continue
        key = bytes.fromhex(found.name)
        inventory.add_entry(key, stat.st_size, stat.st_mtime_ns, entry.stage, seconds, outputs)


def _files(folder: str, prefix: str) -> Iterator[os.DirEntry[str]]:
    """What a folder holds under the names of this store, in no order. Other names are other tools' files."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(prefix) and is_sha256(entry.name) and entry.is_file(follow_symlinks=False):
                    yield entry
    except FileNotFoundError:
        return
