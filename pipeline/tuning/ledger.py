"""The records of operators as a night of tuning uses them: what is known of each, and what comes to be known.

Stands between the sets in the store, which know bytes, and what follows from records (pipeline.tuning.records). What
was read once is remembered, as far as there is room; each question lists the set anew, so that what another process or
another machine added meanwhile counts. Needs no TVM.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.hashing import key_of
from pipeline.store import Store
from pipeline.toolchain import detect
from pipeline.tuning.records import (
    TOOLS,
    NewerFormatError,
    Record,
    Reign,
    Standing,
    WithdrawnRecord,
    encoded,
    filed,
    history,
    live,
    set_key,
    standing,
)
from pipeline.types import Workload

ROOM = 256 << 20  # bytes of records that are remembered


@dataclass
class _Operator:
    """What is remembered of one set: its records by digest, None for those that cannot be read."""

    records: dict[str, Record | None] = field(default_factory=dict)
    newer: set[str] = field(default_factory=set)
    size: int = 0  # bytes of the members
    torn: int = 0
    standing: Standing | None = None

    def whole(self) -> dict[str, Record]:
        """Those that can be read."""
        return {name: record for name, record in self.records.items() if record is not None}


class Shared(Protocol):
    """The sets of other machines: pipeline.remotes.lanes."""

    def gather(self) -> int:
        """Brings in what they found."""

    def publish(self, keys: Iterable[str] | None = None) -> int:
        """Gives them what was found here, of all sets or of these."""

    def lease(self, key: str) -> bool:
        """Whether none of them works on a set, and none will until `release`."""

    def release(self, key: str) -> None: ...


class Ledger:
    """The record sets of a store. Every method may be called from any thread.

    noise   the least share that is taken for noise: see `standing`
    shared  the sets of other machines, where there are any
    tools   those that candidates are compiled with now: see `standing`
    """

    def __init__(
        self,
        store: Store,
        noise: float,
        room: int = ROOM,
        shared: Shared | None = None,
        tools: Mapping[str, str] | None = None,
    ) -> None:
        self._tools = tools
        self._store = store
        self._shared = shared
        self._noise = noise
        self._room = room
        self._lock = threading.Lock()
        self._known: OrderedDict[str, _Operator] = OrderedDict()  # the latest asked for last
        self._size = 0

    @classmethod
    def here(cls, store: Store, noise: float, shared: Shared | None = None) -> Ledger:
        """The ledger of a store as the tools of this machine see it."""
        return cls(store, noise, shared=shared, tools=detect().pick(TOOLS))

    @staticmethod
    def key_of(workload: str, target: Mapping[str, Any], device: str) -> str:
        """The key of the records of a workload (its digest), for a target (its attributes), timed on a device."""
        return set_key(workload, target, device)

    @staticmethod
    def about_of(workload: Workload, target: Mapping[str, Any], device: str) -> dict[str, object]:
        """What such a set says of itself, for people and for who looks for a workload's sets of other devices."""
        return {
            "operator": workload.name,
            "shapes": list(workload.shapes),
            "workload": workload.digest,
            "target": dict(target),
            "device": device,
        }

    def standing(self, key: str) -> Standing:
        """Where an operator stands, with all that anybody wrote until now."""
        with self._lock:
            known = self._read(key)
            if known.standing is None:
                known.standing = standing(live(known.whole()), self._noise, self._tools)
            return known.standing

    def members(self, key: str) -> dict[str, Record]:
        """All records of a set that can be read, by digest, the withdrawn ones as well."""
        with self._lock:
            return self._read(key).whole()

    def history(self, key: str) -> list[Reign]:
        """What was applied one after the other."""
        return history(self.members(key), self._noise)

    def measured_anew(self, key: str) -> str:
        """What tells measurements of an operator from those that were made before somebody withdrew them; "" where
        nobody did."""
        withdrawn = [
            name
            for name, record in self.members(key).items()
            if isinstance(record, WithdrawnRecord) and record.measured
        ]
        return key_of({"withdrawn": sorted(withdrawn)}) if withdrawn else ""

    def add(self, key: str, about: Mapping[str, object], records: Iterable[Record]) -> None:
        """Writes records down: when it returns they are on the disk. `about` says what the set is, to a person.

        Raises ValueError for a record that could not be read back, with none of them written.
        """
        self._store.sets.add(key, [encoded(record) for record in records], about)

    def all_keys(self) -> list[str]:
        """The keys of all sets of the store."""
        return self._store.sets.all_keys()

    def about(self, key: str) -> dict[str, object]:
        """What a set says of itself: nothing rests on it."""
        return self._store.sets.about(key)

    def unread(self, key: str) -> int:
        """How many members were left out: alien, torn or of a newer format. Those of a newer format stay in place."""
        with self._lock:
            known = self._read(key)
            return known.torn + sum(record is None for record in known.records.values())

    def newer(self, key: str) -> int:
        """How many of the unread a newer version of this project wrote."""
        with self._lock:
            return len(self._read(key).newer)

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Takes an operator for the block, unless another process, thread or machine has it: whether it is taken is
        given. What other machines found is there when it begins, and what was found here is theirs when it ends."""
        with contextlib.ExitStack() as held:
            is_free = held.enter_context(self._store.sets.try_locked(key))
            if is_free and self._shared is not None:
                is_free = self._shared.lease(key)
                if is_free:
                    held.callback(self._give_back, self._shared, key)
                    self._shared.gather()
            yield is_free

    @staticmethod
    def _give_back(shared: Shared, key: str) -> None:
        """Others see what was found before they may go on from there."""
        shared.publish([key])
        shared.release(key)

    def _read(self, key: str) -> _Operator:
        known = self._known.setdefault(key, _Operator())
        self._known.move_to_end(key)
        before, torn = len(known.records), self._store.counts.torn
        for name, data in self._store.sets.read(key, but=known.records.keys()):
            known.records[name] = self._record(known, name, data)
            known.size += len(data)
            self._size += len(data)
        known.torn += self._store.counts.torn - torn
        if len(known.records) > before:
            known.standing = None
            self._forget()
        return known

    def _record(self, known: _Operator, name: str, data: bytes) -> Record | None:
        try:
            return filed(data)
        except NewerFormatError:
            known.newer.add(name)
        except ValueError:
            pass
        return None

    def _forget(self) -> None:
        """Makes room: what was asked for longest ago is read again when it is asked for again."""
        while self._size > self._room and len(self._known) > 1:
            _, oldest = self._known.popitem(last=False)
            self._size -= oldest.size
