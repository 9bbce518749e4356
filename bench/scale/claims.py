"""What claims of operators cost with lanes on a remote that is a folder: requests, and seconds of the driver."""

from __future__ import annotations

import functools
import itertools
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.hashing import Digest
from pipeline.store import Store
from pipeline.tuning.claims import Claims
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.records import Outcome, TrialRecord

HEADS = (
    "sets",
    "other writers",
    "reads",
    "writes",
    "blobs read",
    "blobs written",
    "begin, ms",
    "end, ms",
    "16 begin, ms",
)
_KINDS = ("action", "put_action", "blob", "put_blob")  # a remote's calls, in the order of the heads


def claims(counts: Sequence[int], others: Sequence[int], times: int = 10) -> list[tuple[object, ...]]:
    """A line for each number of sets in the store and of stores that share the remote: of one claim with a batch of 16
    records, the requests by kind, and milliseconds until it is taken, until it ends, and until 16 are taken that are
    asked for side by side."""
    rows: list[tuple[object, ...]] = []
    for sets, writers in itertools.product(counts, others):
        with tempfile.TemporaryDirectory() as folder:
            ledger, remote = _filled(Path(folder), sets, writers)
            remote.asked.clear()
            begin, end = _claimed(ledger, sets, times)
            asked = {name: count / times for name, count in remote.asked.items()}
            together = _claimed_together(ledger)
        requests = [asked.pop(kind, 0.0) for kind in _KINDS]
        print(f"  {sets} sets, {writers} others: beside these {asked}", flush=True)
        rows.append((sets, writers, *requests, begin, end, together))
    return rows


def _filled(folder: Path, sets: int, writers: int) -> tuple[Ledger, CountedRemote]:
    """A ledger with so many sets, all of them published, on a remote that so many others have written to."""
    ledger, remote = _ledger(folder / "own", folder / "remote")
    for i in range(writers):
        other, _ = _ledger(folder / f"other{i}", folder / "remote")
        with other.claim(_key(f"other{i}")):
            other.add(_key(f"other{i}"), {}, _records(1))
    for i in range(sets):
        ledger.add(_key(f"op{i}"), {}, _records(1))
    with ledger.claim(_key("first")):  # publishes all of them
        ledger.add(_key("first"), {}, _records(1))
    return ledger, remote


def _claimed(ledger: Ledger, sets: int, times: int) -> tuple[float, float]:
    """Milliseconds until a claim is taken, and from the batch's last record until it is given back."""
    begin = end = 0.0
    for i in range(times):
        key = _key(f"op{i % max(1, sets)}")
        asked = time.perf_counter()
        with ledger.claim(key) as is_free:
            assert is_free
            taken = time.perf_counter()
            ledger.add(key, {}, _records(16))
            added = time.perf_counter()
        begin, end = begin + taken - asked, end + time.perf_counter() - added
    return 1e3 * begin / times, 1e3 * end / times


def _claimed_together(ledger: Ledger) -> float:
    """Milliseconds until a night has 16 operators that it had not."""
    claims, begun = Claims(ledger.claim), time.perf_counter()
    try:
        assert all(claims.take_all([_key(f"together{i}") for i in range(16)]))
        return 1e3 * (time.perf_counter() - begun)
    finally:
        claims.release_all()


def _key(name: str) -> str:
    return Digest.of(name.encode()).hash


def _ledger(folder: Path, shared: Path) -> tuple[Ledger, CountedRemote]:
    from pipeline.remotes import open_remote
    from pipeline.remotes.cache import RemoteCache
    from pipeline.remotes.lanes import Lanes
    from pipeline.remotes.settings import Policy

    shared.mkdir(exist_ok=True)
    store = Store(folder, durable=False)
    remote: Any = CountedRemote(open_remote(f"file://{shared}"))
    cache = RemoteCache(store, remote, Policy.READ_WRITE, print)
    return Ledger(store, 0.02, shared=Lanes(cache, store)), remote


def _records(count: int) -> list[TrialRecord]:
    """As large as real ones."""
    draw = {"trace": random.randbytes(200).hex()}
    named = (random.randbytes(32).hex() for _ in range(count))
    made = functools.partial(TrialRecord, space="fake", space_version=1, decisions=draw, outcome=Outcome.TIMED)
    return [made(candidate=name, seconds=1e-3, baseline=2e-3) for name in named]


class CountedRemote:
    """A remote that counts what is asked of it, by the name of the call."""

    def __init__(self, remote: Any) -> None:
        self._remote = remote
        self._lock = threading.Lock()
        self.asked: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._remote, name)
        if not callable(found):
            return found

        def asked(*arguments: Any) -> Any:
            with self._lock:
                self.asked[name] += 1
            return found(*arguments)

        return asked
