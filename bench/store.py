"""What looking up, counting, verifying and collecting costs in local stores of many sizes, and the memory it takes.

    python -m bench.store [--blobs 1000,10000,100000] [--index 1000000] [--repeat 3] [--folder DIR]

Each store is made on the disk of DIR (default: the system's folder for temporary files): blobs of some hundred bytes to
some thousand, and two entries for five blobs, as a store of real builds has them, used at times over a month. What is
measured runs in a process of its own; seconds are the least of all runs. `look up 430` is what a build of a large model
asks: in a new process, whose first pass reads every blob, and once more. Collecting removes half of the bytes; that is
done once. The index alone is filled with made-up blobs and entries, which shows what a larger store would take.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.cpu import table
from pipeline.hashing import Digest, key_of
from pipeline.store import ActionEntry, Store
from pipeline.store.inventory import Inventory
from pipeline.store.pins import Pins
from pipeline.store.upkeep import Bounds, collect, decide, sizes, verify

_LOOKED_UP = 430
_MONTH = 30 * 24 * 60 * 60
_STAGES = ("extract", "dispatch", "codegen", "link", "measure")
Measures = dict[str, float]


def key(n: int) -> str:
    return key_of({"n": n})


def entries_of(blobs: int) -> int:
    return blobs * 2 // 5


# making stores


def make(root: Path, blobs: int) -> None:
    """Fills a store past its own functions, which would sync every file."""
    Store(root, durable=False)
    for kind in ("cas", "ac"):
        for n in range(256):
            (root / kind / f"{n:02x}").mkdir()
    chance, digests = random.Random(blobs), list[Digest]()
    for _ in range(blobs):
        data = chance.randbytes(int(chance.lognormvariate(7.2, 0.8)))
        digests.append(Digest.of(data))
        _write(root / "cas", digests[-1].hash, data, chance)
    for n in range(entries_of(blobs)):
        own = digests[n * blobs // entries_of(blobs)], digests[(n * blobs // entries_of(blobs) + 1) % blobs]
        outputs = {"object": own[0], "log": own[1], "shared": digests[chance.randrange(blobs)]}
        options = {"target": {"kind": "llvm", "mcpu": "znver4"}, "constants": list(range(60))}
        entry = ActionEntry(
            _STAGES[n % len(_STAGES)], {"n": n, "inputs": {"a": key(n)}, "options": options}, outputs, 0.5
        )
        _write(root / "ac", key(n), entry.to_bytes(key(n)), chance)


def _write(folder: Path, name: str, data: bytes, chance: random.Random) -> None:
    path = f"{folder}/{name[:2]}/{name}"
    with open(path, "wb") as stream:
        stream.write(data)
    used = time.time() - 3600 - chance.random() * _MONTH
    os.utime(path, (used, used))


# what is measured, each in a process of its own


def look_up(root: Path, blobs: int) -> Measures:
    count = min(_LOOKED_UP, entries_of(blobs))
    keys = [key(n) for n in random.Random(1).sample(range(entries_of(blobs)), count)]
    store = Store(root)
    seconds: list[float] = []
    for _ in range(2):
        with _timed(seconds):
            if any(store.lookup(each) is None for each in keys):
                raise RuntimeError("an entry of the store is no hit")
    return {"look up 430, first": seconds[0], "again": seconds[1]}


def count(root: Path, _: int) -> Measures:
    return _one("sizes", lambda: sizes(Store(root)))


def check(root: Path, _: int) -> Measures:
    return _one("verify", lambda: verify(Store(root)))


def collect_dry(root: Path, _: int) -> Measures:
    return _one("gc, dry", lambda: collect(Store(root), _half(root), Pins(root), dry_run=True))


def collect_half(root: Path, _: int) -> Measures:
    bounds = _half(root)
    return _one("gc, half", lambda: collect(Store(root), bounds, Pins(root)))


def index(_: Path, blobs: int) -> Measures:
    """Fills an inventory with made-up names, and decides over it."""
    chance, inventory, seconds = random.Random(3), Inventory(), list[float]()
    with _timed(seconds):
        for n in range(blobs):
            inventory.add_blob(_name(n), 1000 + n % 4000, chance.randrange(10**9))
    names = list(inventory.blobs)
    with _timed(seconds):
        for n in range(entries_of(blobs)):
            named = [names[(n * 5 // 2 + offset) % blobs] for offset in (0, 1, n % 7)]
            outputs = [(name, 1000 + inventory.blobs[name] % 4000) for name in named]
            inventory.add_entry(_name(n), 500, chance.randrange(10**9), _STAGES[n % 5], 0.5, outputs)
    del names
    half = (sum(inventory.blob_sizes) + sum(inventory.entry_sizes)) // 2
    with _timed(seconds):
        decide(inventory, Bounds(max_bytes=half), set(), 10**9, 10**9)
    with _timed(seconds):
        inventory.owners()
    return {"fill": seconds[0] + seconds[1], "decide": seconds[2], "by stage": seconds[3]}


def _name(n: int) -> bytes:
    return hashlib.sha256(n.to_bytes(8, "big")).digest()


def _half(root: Path) -> Bounds:
    return Bounds(max_bytes=sum(entry.stat().st_size for kind in ("cas", "ac") for entry in _files(root / kind)) // 2)


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    for below in os.scandir(folder):
        yield from os.scandir(below)


def _one(name: str, call: Callable[[], object]) -> Measures:
    seconds: list[float] = []
    with _timed(seconds):
        call()
    return {name: seconds[0]}


@contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - begun)


MEASURED: dict[str, Callable[[Path, int], Measures]] = {
    each.__name__: each for each in (look_up, count, collect_dry, check, collect_half, index)
}


def measured(name: str, root: Path, blobs: int, repeat: int) -> tuple[Measures, float]:
    """The least seconds of several runs, and the most memory in MB that a run held."""
    best: Measures = {}
    most = 0.0
    for _ in range(repeat):
        command = [sys.executable, "-m", "bench.store", "--measure", name, str(root), str(blobs)]
        said = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        most = max(most, said.pop("MB"))
        best = {each: min(seconds, best.get(each, seconds)) for each, seconds in said.items()}
    return best, most


def _measure(name: str, root: str, blobs: str) -> None:
    """Runs in the process between."""
    found = MEASURED[name](Path(root), int(blobs))
    print(json.dumps({**found, "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def compare(stores: list[int], indices: list[int], repeat: int, folder: str | None) -> None:
    rows, columns = [], list[str]()
    for blobs in stores:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            make(Path(place), blobs)
            every: Measures = {}
            memory = []
            for name in ("look_up", "count", "collect_dry", "check", "collect_half"):
                best, most = measured(name, Path(place), blobs, 1 if name == "collect_half" else repeat)
                every |= best
                memory.append(most)
            columns = [f"{each}, s" for each in every]
            seconds = [f"{each:.3f}" for each in every.values()]
            rows.append((f"{blobs:,}", f"{entries_of(blobs):,}", *seconds, f"{max(memory):.0f}"))
    table(f"local stores, least of {repeat}", ("blobs", "entries", *columns, "peak MB"), rows)
    rows = []
    for blobs in indices:
        best, most = measured("index", Path(), blobs, repeat)
        rows.append((f"{blobs:,}", f"{entries_of(blobs):,}", *(f"{each:.2f}" for each in best.values()), f"{most:.0f}"))
    table("the index alone, made up", ("blobs", "entries", "fill, s", "decide, s", "by stage, s", "peak MB"), rows)


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.store", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--blobs", default="1000,10000,100000", help="blobs of each store, with commas between")
    parser.add_argument("--index", default="1000000", help="blobs of each index that is made up")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--folder", help="where the stores are made")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        _measure(*options.measure)
    else:
        stores, indices = ([int(each) for each in text.split(",") if each] for text in (options.blobs, options.index))
        compare(stores, indices, options.repeat, options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
