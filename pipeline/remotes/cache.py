"""The remote behind a local store: what is not here is fetched, what was made here is sent on behind the work.

    find      a document by key → believed? → blobs that are not here, each verified as it comes in → the local store
    publish   later, in the background: blobs that the remote lacks, then the document
    finish    waits until all is sent

An entry from a remote becomes one of the local store only when it is whole, so that everything above sees a hit or a
miss and nothing in between. What a remote does wrong costs time: it is counted, told of once, and taken for a miss.
"""

from __future__ import annotations

import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from pipeline.errors import ConfigError, RemoteError, StoreError, Trouble, first_line
from pipeline.hashing import Digest, is_sha256
from pipeline.remotes import bundles, open_remote, results
from pipeline.remotes.availability import Availability, Way
from pipeline.remotes.bundles import Bundle
from pipeline.remotes.contract import Remote, Terms
from pipeline.remotes.hands import Hands
from pipeline.remotes.results import GarbledError, Result
from pipeline.remotes.settings import Policy, Settings
from pipeline.remotes.trust import Trust, signer, trusting
from pipeline.store import ActionEntry, Store

if TYPE_CHECKING:
    from pipeline.remotes.signatures import Signer

T = TypeVar("T")
Entry = ActionEntry | Callable[[], ActionEntry]  # what is yet to be made is made when it is sent

_TRANSFERS = 16  # at once
_TOGETHER = 64  # actions whose blobs are asked about in one question
_NOTED = 1 << 16  # entries of which it is remembered where they came from, or why they were refused
_WORTH = 4  # a bundle is fetched where at least one of so many of its blobs is not here
_SHARE_OF_DISK = 0.5  # of what is free: a blob that says to be larger is not fetched


@dataclass(frozen=True)
class Origin:
    """Where an entry came from: the remote's name, and the public key whose signature it carries, "" where there is
    none. `checked`: that signature was required, and holds."""

    remote: str
    signer: str = ""
    checked: bool = False


@dataclass
class RemoteCounts:
    """What happened between one store and its remote.

    fetched                                       entries that came, whole, by stage
    misses                                        entries of actions that did not come
    unsigned, garbled, incomplete                 documents that were not believed, made no sense, or lack blobs
    errors                                        questions and transfers that the remote failed at
    received, sent                                bytes of blobs
    published, dropped                            entries that were sent, and that were not as the remote was away
    """

    fetched: Counter[str] = field(default_factory=Counter)
    misses: int = 0
    unsigned: int = 0
    garbled: int = 0
    incomplete: int = 0
    errors: int = 0
    received: int = 0
    sent: int = 0
    published: int = 0
    dropped: int = 0

    @property
    def hits(self) -> int:
        return self.fetched.total()


@dataclass
class _Sending:
    """What waits to be sent."""

    queue: list[tuple[str, Entry]] = field(default_factory=list)
    active: int = 0


class RemoteCache:
    """One remote behind one store. Every method may be called from any thread; none raises what the remote does wrong.

    `say` is told, in sentences, what a person should know, and `tell`, again and again, how far it is with what may
    take long; whoever shows them may put others in their place.
    """

    def __init__(
        self,
        store: Store,
        remote: Remote,
        policy: Policy,
        say: Callable[[str], None],
        trust: Trust | None = None,
        signer: Signer | None = None,
    ) -> None:
        self.store = store
        self.remote = remote
        self.policy = policy
        self.counts = RemoteCounts()
        self.say = say
        self.tell: Callable[[str], None] = lambda sentence: None
        self._trust = trust or Trust()
        self._signer = signer
        self._available = Availability(remote.name, self._tell)
        self._pool = Hands(_TRANSFERS, "remote")
        self._changed = threading.Condition()
        self._sending = _Sending()
        self._sender: threading.Thread | None = None
        self._ends = False
        self._expected: Mapping[str, bytes] = {}
        self._bundles: dict[Digest, Bundle] = {}  # by what lies in them
        self._unbundling = threading.Lock()
        self._told: set[str] = set()
        self.origins: dict[str, Origin] = {}  # by key, of entries that came
        self.refused: dict[str, str] = {}  # by key, why an entry that is there was not taken

    # reading

    def find(self, key: str, keep: bool = True) -> ActionEntry | None:
        """The entry of an action, now with all its blobs in the local store; None where the remote does not give it.

        `keep`: the store has the entry as well, for good; not so for what another machine may put another in place of.
        """
        if not self.policy.reads:
            return None
        result = self._result(key)
        if result is None and keep:
            self._count(misses=1)
        if result is None:
            return None
        if not self._fetched(result.entry.outputs.values()):
            self._refuse(key, "not all that it made is there")
            return None
        if keep:
            self._keep(key, result)
        return result.entry

    def _keep(self, key: str, result: Result) -> None:
        self.store.commit(key, result.entry, sync=False)
        origin = self._origin(key, result)
        with self._changed:
            self.counts.fetched[result.entry.stage] += 1
            _note(self.origins, key, origin)
            self.refused.pop(key, None)

    def _origin(self, key: str, result: Result) -> Origin:
        """Where an entry that is believed came from. Of several signatures the one counts that it is believed for."""
        signers = [each.by for each in result.signatures if not self._trust.required or each.by in self._trust.keys]
        if len(signers) > 1 and self._trust.required:
            signers = [by for by in signers if Trust(frozenset({by}), True).believes(key, result)]
        return Origin(self.remote.name, next(iter(signers), ""), self._trust.required and bool(signers))

    def _refuse(self, key: str, why: str) -> None:
        with self._changed:
            _note(self.refused, key, why)

    def look(self, key: str) -> ActionEntry | None:
        """The entry of an action as the remote has it, believed, without its blobs."""
        result = self._result(key) if self.policy.reads else None
        return result.entry if result is not None else None

    def look_all(self, keys: Iterable[str]) -> dict[str, ActionEntry]:
        """Those of many entries that the remote has, asked for in parallel."""
        asked = list(keys)
        found = zip(asked, self._pool.map(self.look, asked), strict=True)
        return {key: entry for key, entry in found if entry is not None}

    def lacks(self, digests: Collection[Digest]) -> set[Digest]:
        """Which of these blobs the remote does not have; all of them where it does not answer."""
        missing = self._asked(Way.READ, lambda: self.remote.missing(digests))
        return set(digests) if missing is None else missing

    def expect(self, entries: Mapping[str, bytes], bundled: Iterable[Bundle] = ()) -> None:
        """Texts of entries that the remote is known to have, and bundles of their blobs: what was told of need not be
        asked for one by one."""
        with self._changed:
            self._expected = {**self._expected, **entries}
        with self._unbundling:
            for bundle in bundled:
                self._bundles.update(dict.fromkeys(bundle.members, bundle) if bundle.is_sound else {})

    def fetch(self, entries: Mapping[str, bytes]) -> int:
        """Brings many entries into the local store, their blobs in parallel; returns how many came.

        Keys may be what a remote told: what is none is passed over.
        """
        wanted = {key: said for key, said in entries.items() if is_sha256(key) and self.store.lookup(key) is None}
        results = {key: result for key, said in wanted.items() if (result := self._read(key, said)) is not None}
        self._fetched({digest for result in results.values() for digest in result.entry.outputs.values()})
        came = 0
        for key, result in results.items():
            if all(map(self.store.has, result.entry.outputs.values())):
                self._keep(key, result)
                came += 1
        return came

    def blobs(self, digests: Iterable[Digest]) -> bool:
        """Has the local store hold these blobs; whether it does."""
        return self._fetched(digests)

    def _result(self, key: str) -> Result | None:
        said = self._expected.get(key)
        if said is not None and (result := self._read(key, said)) is not None:
            return result
        document = self._asked(Way.READ, lambda: self.remote.action(key))
        if document is None:
            return None
        try:
            found = results.from_document(key, document)
        except GarbledError as error:
            self._refuse(key, str(error))
            self._garbled(f"the entry {key[:12]}: {error}")
            return None
        if isinstance(found, Result):
            return self._believed(key, found)
        if not self.store.has(found) and not self._receive(found):
            return None
        text = self.store.get(found)
        return self._read(key, text) if text is not None else None

    def _read(self, key: str, said: bytes) -> Result | None:
        try:
            return self._believed(key, results.from_said(key, said))
        except GarbledError as error:
            self._refuse(key, str(error))
            self._garbled(f"the entry {key[:12]}: {error}")
            return None

    def _believed(self, key: str, result: Result) -> Result | None:
        self._available.made_sense()
        if self._trust.believes(key, result):
            return result
        self._count(unsigned=1)
        self._refuse(key, "not signed by a trusted key")
        self._tell_once(
            f"entries of {self.remote.name} are not signed by a key that this machine trusts: they are not used"
        )
        return None

    def _garbled(self, what: str) -> None:
        self._count(garbled=1)
        error = RemoteError(f"{self.remote.name} answers with what is none: {what}", trouble=Trouble.GARBLED)
        self._available.failed(Way.READ, error)

    def _fetched(self, digests: Iterable[Digest]) -> bool:
        """Whether the local store has all these blobs, after those that it lacked were fetched, in parallel."""
        lacking = [digest for digest in dict.fromkeys(digests) if not self.store.has(digest)]
        if any(digest in self._bundles for digest in lacking):
            self._unbundle(lacking)
            lacking = [digest for digest in lacking if not self.store.has(digest)]
        if len(lacking) <= 1:
            came = [self._receive(digest) for digest in lacking]
        else:
            came = []
            for each in self._pool.map(self._receive, lacking):
                came.append(each)
                self.tell(f"fetching from {self.remote.name}: {len(came)} of {len(lacking)} blobs")
        if not all(came):
            self._count(incomplete=1)
        return all(came)

    def _unbundle(self, wanted: Iterable[Digest]) -> None:
        """Fetches the bundles that some blobs lie in, each once, where enough of what lies there is not here."""
        with self._unbundling:  # who wants another blob of them waits until it is here
            chosen = list({id(bundle): bundle for each in wanted if (bundle := self._bundles.get(each))}.values())
            try:
                self._receive_bundles([bundle for bundle in chosen if self._is_worth(bundle)])
            finally:  # not before: who finds nothing here does not wait
                for bundle in chosen:
                    for member in bundle.members:
                        self._bundles.pop(member, None)

    def _is_worth(self, bundle: Bundle) -> bool:
        """Whether enough of what lies in a bundle is not here."""
        lacking = sum(not self.store.has(member) for member in bundle.members)
        return lacking * _WORTH >= len(bundle.members)

    def _receive_bundles(self, chosen: Sequence[Bundle]) -> None:
        taken = map(self._receive_bundle, chosen) if len(chosen) <= 1 else self._pool.map(self._receive_bundle, chosen)
        for number, _ in enumerate(taken, 1):
            self.tell(f"fetching from {self.remote.name}: {number} of {len(chosen)} bundles of small blobs")

    def _receive_bundle(self, bundle: Bundle) -> None:
        """Takes what it can of a bundle. One that is wrong is not of the answers in a row after which a remote is left
        alone: what lies in it is asked for one by one next."""

        def received() -> bytes | None:
            try:
                pieces = self.remote.blob(bundle.blob)
                return None if pieces is None else _bounded(pieces, bundle.blob.size)
            except RemoteError as error:
                if error.trouble is Trouble.GARBLED:
                    return b""  # which is no bundle
                raise

        data = self._asked(Way.READ, received)
        if data is None:
            return
        try:
            for digest, blob in bundles.unpack(data, bundle.members):
                if self.store.has(digest):
                    continue
                if not self.store.receive(digest, [blob]):
                    raise ValueError(f"the blob {digest} has other bytes")
                self._count(received=digest.size)
        except ValueError:
            self._count(garbled=1)

    def _receive(self, digest: Digest) -> bool:
        """Fetches one blob; whether it came, whole and right."""
        if digest.size > shutil.disk_usage(self.store.root).free * _SHARE_OF_DISK:
            self._tell_once(f"a blob of {digest.size:,} bytes is more than this disk has room for: it is not fetched")
            return False

        def received() -> bool | None:
            pieces = self.remote.blob(digest)
            return None if pieces is None else self.store.receive(digest, pieces)

        came = self._asked(Way.READ, received)
        if came is False:
            self._garbled(f"the blob {digest} has other bytes")
        if came:
            self._available.made_sense()
            self._count(received=digest.size)
        return bool(came)

    # writing

    def publish(self, key: str, entry: Entry) -> None:
        """Has an entry, whose blobs the local store has, sent with them while the work goes on."""
        if not self.policy.writes:
            return
        with self._changed:
            if self._ends:
                return
            self._sending.queue.append((key, entry))
            if self._sender is None:
                self._sender = threading.Thread(target=self._send_all, name="remote-sender", daemon=True)
                self._sender.start()
            self._changed.notify_all()

    def send(self, key: str, entry: ActionEntry) -> bool:
        """Sends an entry with its blobs now; whether it is there."""
        return self.policy.writes and self._send([(key, entry)]) == 1

    def waiting(self) -> int:
        """How many entries are not sent yet."""
        with self._changed:
            return len(self._sending.queue) + self._sending.active

    def drain(self, progress: Callable[[int], None] | None = None) -> None:
        """Waits until what was published is sent, or the remote is given up; tells what is left from time to time."""
        with self._changed:
            while self._sending.queue or self._sending.active:
                self._changed.wait(0.25)
                if progress is not None:
                    progress(len(self._sending.queue) + self._sending.active)

    def finish(self, progress: Callable[[int], None] | None = None) -> None:
        """As `drain`, and says what could not be sent."""
        self.drain(progress)
        dropped = self.counts.dropped
        if dropped and not self._available.is_closed(Way.WRITE):  # else it was told that nothing is sent any more
            self._tell_once(
                f"{dropped} {'entry was' if dropped == 1 else 'entries were'} not sent to {self.remote.name}"
                "\n  → type `doit cache push` when it answers again"
            )

    def close(self) -> None:
        """Drops what was not sent, and ends connections."""
        with self._changed:
            self._ends = True
            self._sending.queue.clear()
            self._changed.notify_all()
        self._pool.close()
        with suppress(RemoteError):
            self.remote.close()

    def _send_all(self) -> None:
        while True:
            with self._changed:
                while not self._sending.queue and not self._ends:
                    self._changed.wait()
                if self._ends:
                    return
                taken = self._sending.queue[:_TOGETHER]
                del self._sending.queue[: len(taken)]
                self._sending.active = len(taken)
            try:
                if not self._sent(taken) and len(taken) > 1:  # one that cannot be sent keeps no other from it
                    for each in taken:
                        self._sent([each])
            finally:
                with self._changed:
                    self._sending.active = 0
                    self._changed.notify_all()

    def _sent(self, taken: Sequence[tuple[str, Entry]]) -> bool:
        """Sends entries, and counts those that the remote does not take; False where this side has none to send."""
        try:
            self._send([(key, entry() if callable(entry) else entry) for key, entry in taken])
        except Exception as error:
            if len(taken) == 1:
                self._count(dropped=1)
                if not isinstance(error, StoreError):
                    self._tell_once(f"what cannot be sent to {self.remote.name} stays here: {first_line(error)}")
            return False
        return True

    def _send(self, entries: Sequence[tuple[str, ActionEntry]]) -> int:
        """How many of the entries are there, now."""
        digests = {digest for _, entry in entries for digest in entry.outputs.values()}
        missing = self._asked(Way.WRITE, lambda: self.remote.missing(digests)) if digests else set()
        if missing is None:
            self._count(dropped=len(entries))
            return 0
        sent = dict(zip(missing, self._pool.map(self._send_blob, missing), strict=True))
        whole = [each for each in entries if all(sent.get(digest, True) for digest in each[1].outputs.values())]
        done = sum(self._pool.map(lambda each: self._send_entry(*each), whole))
        self._count(published=done, dropped=len(entries) - done)
        return done

    def _send_blob(self, digest: Digest) -> bool:
        path = self.store.path(digest)
        if path is None:
            return False  # somebody removed it meanwhile: the entry stays here
        sent = self._put(lambda: self.remote.put_blob(digest, path))
        if sent:
            self._count(sent=digest.size)
        return sent

    def _send_entry(self, key: str, entry: ActionEntry) -> bool:
        document = results.to_document(self.signed(key, entry))
        return self._put(lambda: self.remote.put_action(key, document))

    def signed(self, key: str, entry: ActionEntry) -> Result:
        """An entry as it is sent: signed, where this machine has a key."""
        entry_bytes = entry.to_bytes(key)
        signatures = (self._signer.sign(key, entry_bytes),) if self._signer is not None else ()
        return Result(entry, entry_bytes, signatures)

    def _put(self, call: Callable[[], None]) -> bool:
        def put() -> bool:
            call()
            return True

        return bool(self._asked(Way.WRITE, put))

    # what both need

    def _asked(self, way: Way, call: Callable[[], T]) -> T | None:
        """What a remote answers; None where it may not be asked now, or fails."""
        if not self._available.may(way):
            return None
        try:
            answer = call()
        except RemoteError as error:
            self._count(errors=1)
            self._available.failed(way, error)
            return None
        except ConfigError as error:  # what lies there is no remote
            self._count(errors=1)
            refused = RemoteError(error.message, trouble=Trouble.REFUSED, hint=error.hint)
            for each in Way:
                self._available.failed(each, refused)
            return None
        except BaseException:
            self._available.answered()  # the fault is on this side
            raise
        self._available.answered()
        return answer

    def _count(self, **more: int) -> None:
        with self._changed:
            for name, number in more.items():
                setattr(self.counts, name, getattr(self.counts, name) + number)

    def _tell(self, sentence: str) -> None:
        if not self._ends:  # what ends as it was closed is no news
            self.say(sentence)

    def _tell_once(self, sentence: str) -> None:
        with self._changed:
            if sentence in self._told:
                return
            self._told.add(sentence)
        self._tell(sentence)


def _note(notes: dict[str, T], key: str, what: T) -> None:
    """Notes one of the latest, of which only so many are kept."""
    notes.pop(key, None)
    notes[key] = what
    while len(notes) > _NOTED:
        notes.pop(next(iter(notes)))


def _bounded(pieces: Iterable[bytes], size: int) -> bytes:
    """Pieces as one, cut off where they are more than they said."""
    data = bytearray()
    for piece in pieces:
        data += piece
        if len(data) > size:
            break
    return bytes(data)


def opened(store: Store, settings: Settings) -> RemoteCache:
    """The remote that the settings name. Nothing is asked of it yet.

    Raises ConfigError for a URL or a key that cannot be meant, SetupError where a package is missing.
    """
    assert settings.url is not None
    terms = Terms(settings.connect, settings.stall, settings.secrets or {})
    signs = signer(settings.sign_with)
    trust = trusting(settings.trusted, settings.signature_required, signs)
    return RemoteCache(store, open_remote(settings.url, terms), settings.policy, _printed, trust, signs)


def _printed(sentence: str) -> None:
    print(f"WARNING {sentence}", file=sys.stderr)
