"""What tables and rules need to know of an operator's records, kept beside the sets so that few of them are opened.

    <store>/summaries/<context>     the summaries of all sets that were asked about

A night leaves hundreds of records for each operator, and thousands of operators are to be listed in a second. So what
follows from a set is written down with the stamp of the set's folder (its times and inode), and a set whose folder
has that stamp still is not opened. The context is all else that a summary depends on: the noise, the tools, the
versions of what reads records.

It is a cache and nothing more: who decides about an operator asks the ledger. A broken file is thrown away, one that
cannot be written is done without. Needs no TVM.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from pipeline.hashing import RACY_NS, key_of
from pipeline.store import Store
from pipeline.store.files import written_atomically
from pipeline.toolchain import detect
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.records import (
    FORMAT,
    TOOLS,
    VALIDATOR,
    Outcome,
    Record,
    RetestRecord,
    Standing,
    TrialRecord,
    Winner,
    live,
    measurements,
    standing,
)

_VERSION = 1  # raise it when the same records would be summed up in another way
_OLD_SECONDS = 60 * 86400.0  # files of contexts that nobody asked for since are removed
_HASH = 16  # bytes of XXH3-128 before the rest of the file


class Summary(msgspec.Struct, frozen=True, array_like=True):
    """What the records of one operator come to.

    trials, timed, failures, claims, spent, baseline, exhausted   see `Standing`
    measured   Unix time of the last trial or retest, 0 where there is none
    candidate  what a build may apply first, "" where there is nothing; with the seconds of its retest, its gain, when
               it was validated, whether with the tools of today, and with which where not
    preferred  what somebody decided last: a candidate, BEST or NONE; None where nobody did
    withdrawn  Unix time at which somebody last threw records away, 0 where nobody did
    outdated   candidates that won by an older version of the comparison and that were not compared since
    beaten     Unix time at which the last candidate that had won did no longer; 0 where one still wins or none ever did
    since      candidates tried since then
    level      whether the baseline is now as fast as what would be applied, noise aside
    """

    trials: int = 0
    timed: int = 0
    failures: dict[str, int] = {}
    claims: int = 0
    spent: float = 0.0
    measured: float = 0.0
    baseline: float | None = None
    candidate: str = ""
    seconds: float = 0.0
    gain: float = 1.0
    validated: float = 0.0
    is_proven: bool = True
    tools: dict[str, str] = {}
    preferred: str | None = None
    exhausted: tuple[tuple[str, int], ...] = ()
    withdrawn: float = 0.0
    outdated: int = 0
    beaten: float = 0.0
    since: int = 0
    level: bool = False

    @property
    def failed(self) -> int:
        return sum(self.failures.values())

    @property
    def is_empty(self) -> bool:
        """Whether nobody here has tried anything."""
        return not self.trials


EMPTY = Summary()


def summary(members: Mapping[str, Record], noise: float, tools: Mapping[str, str]) -> Summary:
    """What the members of a set come to, by digest, the withdrawn ones included. `noise`, `tools`: see `standing`."""
    left = live(members)
    stands = standing(left, noise, tools)
    applied, is_proven = stands.applied()
    first = applied[0] if applied else None
    beaten, since = (0.0, 0) if stands.winners or stands.unproven else _beaten(stands, left, noise)
    return Summary(
        trials=len(stands.trials),
        timed=stands.timed,
        failures={str(outcome): count for outcome, count in stands.failures.items()},
        claims=len(stands.claims),
        spent=stands.spent,
        measured=max((each.at for each in measurements(left)), default=0.0),
        baseline=stands.baseline,
        preferred=stands.preferred.candidate if stands.preferred else None,
        exhausted=tuple(sorted(stands.exhausted)),
        withdrawn=max((each.at for each in stands.withdrawn), default=0.0),
        outdated=_outdated(left, noise),
        beaten=beaten,
        since=since,
        level=first is not None and _is_level(first, left, noise),
        **_applied(first, is_proven),
    )


def _applied(winner: Winner | None, is_proven: bool) -> dict[str, Any]:
    """What a summary says of the candidate that is applied."""
    if winner is None:
        return {"candidate": "", "seconds": 0.0, "gain": 1.0, "validated": 0.0, "is_proven": is_proven, "tools": {}}
    return {
        "candidate": winner.trial.candidate,
        "seconds": winner.retest.seconds,
        "gain": winner.gain,
        "validated": winner.retest.at,
        "is_proven": is_proven,
        "tools": {} if is_proven else dict(winner.tools),
    }


def _won(retest: RetestRecord, noise: float) -> bool:
    return retest.seconds < retest.baseline * (1 - min(max(noise, retest.noise), 0.5))


def _outdated(records: Iterable[Record], noise: float) -> int:
    """Candidates that only an older version of the comparison let win."""
    retests = [record for record in records if isinstance(record, RetestRecord)]
    compared = {each.candidate for each in retests if each.certificate.holds}
    others = [each for each in retests if each.certificate.validator != VALIDATOR and _won(each, noise)]
    return len({each.candidate for each in others} - compared)


def _beaten(stands: Standing, records: Iterable[Record], noise: float) -> tuple[float, int]:
    """When the last of the candidates that had won did no longer, and how many were tried since; 0 and 0 where none
    ever won, or it turned out to be wrong."""
    right = {trial.candidate for trial in stands.trials if trial.outcome is Outcome.TIMED}
    measured = [each for each in records if isinstance(each, TrialRecord | RetestRecord) and each.candidate in right]
    won = {
        each.candidate
        for each in measured
        if isinstance(each, RetestRecord) and each.certificate.holds and _won(each, noise)
    }
    at = max((each.at for each in measured if each.candidate in won), default=0.0)
    return at, sum(trial.at > at for trial in stands.trials) if won else 0


def _is_level(winner: Winner, records: Iterable[Record], noise: float) -> bool:
    """Whether the baseline, as it was timed after a winner, is as fast as it."""
    later = [each.baseline for each in measurements(records) if each.at > winner.retest.at and each.baseline]
    fastest = min(later, default=None)
    return fastest is not None and winner.retest.seconds >= fastest * (1 - noise)


# --- the file ---------------------------------------------------------------------------------------------------------

_Stamp = tuple[int, int, int]  # of a set's folder: when it and its inode changed, in ns, and the inode's number
_Place = tuple[str, str, str]  # what a set is of: workload, device, and a hash of the target's attributes


class _File(msgspec.Struct, array_like=True):
    """What is kept: each set's stamp and summary, and what sets say that they are of."""

    sets: dict[str, tuple[_Stamp, Summary]] = {}
    places: dict[str, _Place] = {}


class Summaries:
    """The summaries of a store's sets, as one noise and one set of tools make them. Not for several threads."""

    def __init__(self, store: Store, noise: float, tools: Mapping[str, str]) -> None:
        self._store, self._noise, self._tools = store, noise, tools
        self._ledger = Ledger(store, noise, room=0, tools=tools)  # each set is asked for once
        self._folder = f"{store.sets.changed.parent}{os.sep}"
        context = {"version": _VERSION, "format": FORMAT, "validator": VALIDATOR, "noise": noise, "tools": dict(tools)}
        self._path = store.root / "summaries" / key_of(context)[:16]
        self._file = _read(self._path)
        self._is_changed = False
        self.opened = 0  # sets that had to be read

    @classmethod
    def here(cls, store: Store, noise: float) -> Summaries:
        """Those of a store as the tools of this machine see it."""
        return cls(store, noise, detect().pick(TOOLS))

    @property
    def tools(self) -> Mapping[str, str]:
        return self._tools

    def of(self, key: str) -> Summary:
        """The summary of a set; EMPTY where there is none."""
        began = time.time_ns()
        kept = self._file.sets.get(key)
        try:
            stat = os.stat(f"{self._folder}{key[:2]}{os.sep}{key}")
        except OSError:
            if kept is not None:
                del self._file.sets[key]
                self._is_changed = True
            return EMPTY
        stamp = stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
        if kept is not None and kept[0] == stamp:
            return kept[1]
        self.opened += 1
        made = summary(self._ledger.members(key), self._noise, self._tools)
        # What was changed a moment ago may change again within the same tick of the clock.
        if max(stamp[:2]) < began - RACY_NS:
            self._file.sets[key] = stamp, made
            self._is_changed = True
        return made

    def applying(self, key: str, candidate: str) -> Summary:
        """The summary of a set, were a certain candidate applied; nothing is, where no record says that it won."""
        made = self.of(key)
        if made.candidate == candidate:
            return made
        self.opened += 1
        stands = standing(live(self._ledger.members(key)), self._noise, self._tools)
        known = [
            (each, is_proven)
            for is_proven in (True, False)
            for each in (stands.winners if is_proven else stands.unproven)
        ]
        first = next((each for each in known if each[0].trial.candidate == candidate), (None, True))
        return msgspec.structs.replace(made, **_applied(*first))

    def elsewhere(self, attributes: Mapping[str, Any], device: str) -> dict[str, list[str]]:
        """The other devices for which there are sets of a target's workloads, by workload."""
        wanted = _hash_of(attributes)
        found: dict[str, list[str]] = {}
        for key in self._store.sets.all_keys():
            workload, where, target = self._place(key)
            if target == wanted and where not in ("", device):
                found.setdefault(workload, []).append(where)
        return found

    def save(self) -> None:
        """Keeps what was found for whoever asks next, where the store can be written."""
        if not self._is_changed:
            return
        data = msgspec.msgpack.encode(self._file)
        with contextlib.suppress(OSError), written_atomically(self._path, self._store.root / "tmp", sync=False) as out:
            out.write(xxhash.xxh3_128_digest(data))
            out.write(data)
        self._is_changed = False
        _remove_old(self._path)

    def _place(self, key: str) -> _Place:
        """What a set says that it is of. The first who writes to a set says it, and nobody changes it."""
        known = self._file.places.get(key)
        if known is None:
            about = self._store.sets.about(key)
            target = about.get("target")
            known = str(about.get("workload", "")), str(about.get("device", "")), _hash_of(target) if target else ""
            if about:
                self._file.places[key] = known
                self._is_changed = True
        return known


def _hash_of(attributes: object) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(attributes, order="deterministic"))


def _read(path: Path) -> _File:
    """What was kept; nothing where that cannot be read."""
    try:
        data = path.read_bytes()
        if xxhash.xxh3_128_digest(data[_HASH:]) == data[:_HASH]:
            return msgspec.msgpack.decode(data[_HASH:], type=_File)
    except (OSError, ValueError):
        pass
    return _File({}, {})


def _remove_old(written: Path) -> None:
    """Removes what was kept for noises and tools of long ago."""
    latest = time.time() - _OLD_SECONDS
    with contextlib.suppress(OSError):
        for path in written.parent.iterdir():
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < latest:
                    path.unlink()
