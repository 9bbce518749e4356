"""Sets that only grow, shared through a remote: what one machine put into a set comes to all.

A remote keeps one document under a key, and the last writer of a key wins; so no two machines may write the same key
with different members. Each store therefore writes a lane of its own, and reads those of the others:

    writers           the lanes that there are                        written when a store joins
    lane of a store   its bundles: blobs of members of any sets       written by that store alone
    lease of a set    who works on it, and until when                 so that two machines do not do the same

A bundle holds members that came together. As a lane grows its bundles are joined, so that it has a few however many
members there are: each is at least twice as large as the next.

Two stores that join at the same moment may each leave the other out of the document of writers. Each looks again after
it has written, and whenever it has something to send, so that none stays out.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from pipeline.hashing import Digest, is_sha256, key_of
from pipeline.remotes.cache import RemoteCache
from pipeline.store import ActionEntry, Store

_VERSION = 1
_WRITERS, _LANE, _LEASE = "writers", "lane", "lease"
_TRIES = 5  # at being among the writers
_SETTLED, _TIMES = 0.1, 3.0  # seconds, and times what writing took, until nobody else can still be about to write
_LEASED = 600.0  # seconds for which a lease holds where nobody gives it back
_LARGEST = 512 << 20  # bytes of a bundle, unpacked
_MOST = 4096  # writers and, of one lane, bundles that are looked at
_NAME = 32  # bytes of a member's digest

Members = dict[str, tuple[dict[str, Any], list[bytes]]]  # of each set: what it is, and members


class Lanes:
    """The sets of one store and those of a remote. Methods may be called from any thread; while the remote is away they
    do nothing."""

    def __init__(self, cache: RemoteCache, store: Store, now: Callable[[], float] = time.time) -> None:
        self._cache = cache
        self._store = store
        self._now = now
        self._folder = store.root / "sets" / "remotes" / key_of({"remote": cache.remote.name})[:16]
        self._run = secrets.token_hex(8)
        self._joined = False
        self._naming = threading.Lock()

    def gather(self) -> int:
        """Brings what others put into any set into this store's; returns how many members are new."""
        if not self._cache.policy.reads:
            return 0
        with self._locked():
            bundles = self._bundles_of([writer for writer in self._writers() if writer != self._writer()])
            read = self._read_bundles()
            unread = [digest for digest in bundles if digest.hash not in read]
            self._cache.blobs(unread)
            came = [digest for digest in unread if self._take(digest)]
            if came:
                self._write(
                    "read", msgspec.json.encode([each.hash for each in bundles if each in came or each.hash in read])
                )
                return self._new
        return 0

    def publish(self, keys: Iterable[str] | None = None) -> int:
        """Sends the members that nobody has sent yet, of all sets or of these; returns how many were."""
        if not self._cache.policy.writes:
            return 0
        with self._locked():
            known = self._known()
            fresh = self._unknown(known, self._store.sets.all_keys() if keys is None else keys)
            count = sum(len(members) for _, members in fresh.values())
            if count and not self._extended(fresh):
                return 0
            self._add_known(member for _, members in fresh.values() for member in members)
            if self._has_lane() and not self._joined:
                self._joined = self._join()
        return count

    # leases

    def lease(self, key: str) -> bool:
        """Whether this run may work on a set: nobody else does, as far as the remote tells.

        After writing its name a run waits for longer than another takes to write, and looks whether it still stands
        there (Fischer's algorithm). Without an answer from the remote everybody may. Within one store it is the
        caller's to see that nobody else does: a lease that a killed run of the same store left is nobody's.
        """
        if not (self._cache.policy.reads and self._cache.policy.writes):
            return True
        begun = time.monotonic()
        held = self._look(_LEASE, set=key)
        if held is not None and self._holds(held):
            return False
        lease = {"run": self._run, "writer": self._writer(), "until": self._now() + _LEASED}
        if not self._send(_LEASE, lease, {}, set=key):
            return True
        time.sleep(max(_SETTLED, _TIMES * (time.monotonic() - begun)))
        held = self._look(_LEASE, set=key)
        return held is None or held.components.get("run") == self._run

    def release(self, key: str) -> None:
        """Lets others work on a set."""
        if self._cache.policy.reads and self._cache.policy.writes:
            self._send(_LEASE, {"run": "", "until": 0.0}, {}, set=key)

    def _holds(self, lease: ActionEntry) -> bool:
        """Whether somebody else has a lease now. One that ends later than any does was written by a clock that is
        ahead: to do work twice is better than never to do it."""
        run, until = lease.components.get("run"), lease.components.get("until")
        try:
            left = float(until) - self._now() if isinstance(until, int | float) else 0.0
        except OverflowError:
            return False
        is_ours = run in ("", self._run) or lease.components.get("writer") == self._writer()
        return not is_ours and 0 < left <= 2 * _LEASED

    # this store's lane

    def _has_lane(self) -> bool:
        return (self._folder / "lane").exists()

    def _extended(self, fresh: Members) -> bool:
        """Sends members as a bundle of this store's lane; whether they came there."""
        bundles = [*self._own_bundles(), self._bundle(fresh)]
        while len(bundles) > 1 and bundles[-2].size <= 2 * bundles[-1].size:
            joined = self._joined_members(bundles[-2:])
            if joined is None:
                break
            bundles[-2:] = [self._bundle(joined)]
        if not self._send(_LANE, {}, {f"{i:04}": bundle for i, bundle in enumerate(bundles)}, writer=self._writer()):
            return False
        self._write("lane", msgspec.json.encode([[bundle.hash, bundle.size] for bundle in bundles]))
        return True

    def _own_bundles(self) -> list[Digest]:
        """Those that this store has sent and that are still to be had; a lane that lost one is begun anew."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            bundles = [Digest(*each) for each in msgspec.json.decode((self._folder / "lane").read_bytes())]
            if self._cache.blobs(bundles):
                return bundles
            self._forget_known()
        return []

    def _joined_members(self, bundles: Iterable[Digest]) -> Members | None:
        joined: Members = {}
        for bundle in bundles:
            members = self._members(bundle)
            if members is None:
                return None
            for key, (about, listed) in members.items():
                joined.setdefault(key, (about, []))[1].extend(listed)
        return joined

    def _bundle(self, members: Members) -> Digest:
        return self._store.put(zlib.compress(msgspec.msgpack.encode(members, order="sorted")))

    def _members(self, bundle: Digest) -> Members | None:
        """What is in a bundle, or None where it is none."""
        data = self._store.get(bundle)
        if data is None:
            return None
        unpacker = zlib.decompressobj()
        try:
            text = unpacker.decompress(data, _LARGEST)
            return _checked(msgspec.msgpack.decode(text, type=Members)) if unpacker.eof else None
        except (zlib.error, msgspec.DecodeError, ValueError, TypeError, RecursionError):
            return None

    def _unknown(self, known: set[bytes], keys: Iterable[str]) -> Members:
        """The members of these of the store's sets whose names are not among those."""
        sets, fresh = self._store.sets, {}
        for key in keys:
            but = [name for name in sets.names(key) if bytes.fromhex(name) in known]
            members = [data for _, data in sets.read(key, but)]
            if members:
                fresh[key] = (sets.about(key), members)
        return fresh

    # the lanes of others

    _new = 0

    def _bundles_of(self, writers: list[str]) -> list[Digest]:
        """The bundles of others, as far as they can be believed to be some: what is larger is not even fetched."""
        keys = [_document(_LANE, {"writer": writer}) for writer in writers[:_MOST]]
        found = self._cache.look_all(keys)
        lanes = [found[key] for key in keys if key in found and found[key].stage == _LANE]
        return [each for lane in lanes for each in list(lane.outputs.values())[:_MOST] if each.size <= _LARGEST]

    def _take(self, bundle: Digest) -> bool:
        """Puts a bundle's members into this store's sets; whether it was one."""
        members = self._members(bundle)
        if members is None:
            return False
        for key, (about, listed) in members.items():
            if is_sha256(key):
                before = self._store.sets.names(key)
                self._new += len(set(self._store.sets.add(key, listed, about)) - before)
        self._add_known(member for _, listed in members.values() for member in listed)
        return True

    def _read_bundles(self) -> set[str]:
        with contextlib.suppress(OSError, ValueError):
            return set(msgspec.json.decode((self._folder / "read").read_bytes(), type=list[str]))
        return set()

    # who there is

    def _writers(self) -> list[str]:
        listed = self._look(_WRITERS)
        writers = listed.components.get("writers") if listed is not None else None
        return [each for each in writers if isinstance(each, str)] if isinstance(writers, list) else []

    def _join(self) -> bool:
        """Has this store among the writers; whether it is."""
        for attempt in range(_TRIES):
            writers = self._writers()
            if self._writer() in writers:
                return True
            self._send(_WRITERS, {"writers": sorted({*writers, self._writer()})}, {})
            time.sleep(_SETTLED * (1 + attempt) * (0.5 + secrets.randbelow(100) / 100))
        return False

    def _writer(self) -> str:
        """What this store is called: another on each machine, also where a store was copied from one to the next."""
        with self._naming:
            token = self._token()
        return key_of({"store": token, "machine": socket.gethostname()})[:32]

    def _token(self) -> str:
        """What tells this store from any other: made by the first who asks, also where several do at once."""
        path, own = self._folder / "writer", self._folder / f"writer-{self._run}"
        if not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            own.write_text(secrets.token_hex(16))
            try:
                os.link(own, path)
            except FileExistsError:
                pass
            except OSError:  # a disk without links
                own.replace(path)
            own.unlink(missing_ok=True)
        return path.read_text()

    def _look(self, what: str, **names: str) -> ActionEntry | None:
        entry = self._cache.look(_document(what, names))
        return entry if entry is not None and entry.stage == what else None

    def _send(self, what: str, said: Mapping[str, object], blobs: Mapping[str, Digest], **names: str) -> bool:
        return self._cache.send(_document(what, names), ActionEntry(what, said, blobs, 0.0))

    # what is remembered of the remote, in the store

    def _known(self) -> set[bytes]:
        """The digests of members that the remote is known to have."""
        try:
            data = (self._folder / "known").read_bytes()
        except OSError:
            return set()
        return {data[i : i + _NAME] for i in range(0, len(data) - len(data) % _NAME, _NAME)}

    def _add_known(self, members: Iterable[bytes]) -> None:
        names = b"".join(bytes.fromhex(Digest.of(member).hash) for member in members)
        if names:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / "known", "ab") as stream:
                stream.truncate(stream.tell() - stream.tell() % _NAME)  # a process that was killed here
                stream.write(names)

    def _forget_known(self) -> None:
        (self._folder / "known").unlink(missing_ok=True)

    def _write(self, name: str, data: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{name}-{self._run}"
        path.write_bytes(data)
        path.replace(self._folder / name)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other processes that use this store from this remote's lanes."""
        self._new = 0
        with self._store.locked(f"lane-{self._folder.name}"):
            yield


def _checked(members: Members) -> Members:
    """Raises ValueError, TypeError or RecursionError where what is said of a set could not be written down as JSON."""
    for about, _ in members.values():
        json.dumps(about, sort_keys=True, default=str)
    return members


def _document(what: str, names: Mapping[str, str]) -> str:
    """The key under which the document lies."""
    return key_of({"stage": what, "version": _VERSION, **names})
