"""The remote behind a local store: what is not here is fetched, what was made here is sent on behind the work.

    find      a document by key → believed? → blobs that are not here, each verified as it comes in → the local store
    publish   later, in the background: blobs that the remote lacks, then the document
    finish    waits until all is sent

An entry from a remote becomes one of the local store only when it is whole, so that everything above sees a hit or a
miss and nothing in between. What a remote does wrong costs time: it is counted, told of once, and taken for a miss.

    calls      questions to the remote, and what it does wrong      receiving  blobs, into the local store
    sending    entries with their blobs, behind the work
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from pipeline.hashing import Digest, is_sha256
from pipeline.remotes import open_remote, results
from pipeline.remotes.availability import Way
from pipeline.remotes.bundles import Bundle
from pipeline.remotes.calls import Calls, RemoteCounts
from pipeline.remotes.contract import Remote, Terms
from pipeline.remotes.receiving import Receiver
from pipeline.remotes.results import GarbledError, Result
from pipeline.remotes.sending import Entry, Sender
from pipeline.remotes.settings import Policy, Settings
from pipeline.remotes.trust import Trust, signer, trusting
from pipeline.store import ActionEntry, Store

if TYPE_CHECKING:
    from pipeline.remotes.signatures import Signer

T = TypeVar("T")

_NOTED = 1 << 16  # entries of which it is remembered where they came from, or why they were refused


@dataclass(frozen=True)
class Origin:
    """Where an entry came from: the remote's name, and the public key whose signature it carries, "" where there is
    none. `checked`: that signature was required, and holds."""

    remote: str
    signer: str = ""
    checked: bool = False


class RemoteCache:
    """One remote behind one store. Every method may be called from any thread; none raises what the remote does wrong.

    store, remote, policy  between whom, and which way
    counts                 what happened so far
    origins                by key, where entries that came are from
    refused                by key, why an entry that is there was not taken
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
        self.policy = policy
        self.origins: dict[str, Origin] = {}
        self.refused: dict[str, str] = {}
        self._calls = Calls(remote, say)
        self._receiver = Receiver(store, self._calls)
        self._sender = Sender(store, self._calls, self.signed)
        self._trust = trust or Trust()
        self._signer = signer
        self._lock = threading.Lock()
        self._expected: Mapping[str, bytes] = {}

    @property
    def remote(self) -> Remote:
        return self._calls.remote

    @property
    def counts(self) -> RemoteCounts:
        return self._calls.counts

    def show(self, say: Callable[[str], None], tell: Callable[[str], None]) -> None:
        """From now on `say` is told, in sentences, what a person should know, and `tell`, again and again, how far it
        is with what may take long."""
        self._calls.say = say
        self._calls.tell = tell

    # reading

    def find(self, key: str, keep: bool = True) -> ActionEntry | None:
        """The entry of an action, now with all its blobs in the local store; None where the remote does not give it.

        `keep`: the store has the entry as well, for good; not so for what another machine may put another in place of.
        """
        if not self.policy.reads:
            return None
        result = self._result(key)
        if result is None and keep:
            self._calls.count(misses=1)
        if result is None:
            return None
        if not self._receiver.blobs(result.entry.outputs.values()):
            self._refuse(key, "not all that it made is there")
            return None
        if keep:
            self._keep(key, result)
        return result.entry

    def _keep(self, key: str, result: Result) -> None:
        self.store.commit(key, result.entry, sync=False)
        origin = self._origin(key, result)
        self._calls.count_fetched(result.entry.stage)
        with self._lock:
            _note(self.origins, key, origin)
            self.refused.pop(key, None)

    def _origin(self, key: str, result: Result) -> Origin:
        """Where an entry that is believed came from. Of several signatures the one counts that it is believed for."""
        signers = [each.by for each in result.signatures if not self._trust.required or each.by in self._trust.keys]
        if len(signers) > 1 and self._trust.required:
            signers = [by for by in signers if Trust(frozenset({by}), True).believes(key, result)]
        return Origin(self.remote.name, next(iter(signers), ""), self._trust.required and bool(signers))

    def _refuse(self, key: str, why: str) -> None:
        with self._lock:
            _note(self.refused, key, why)

    def look(self, key: str) -> ActionEntry | None:
        """The entry of an action as the remote has it, believed, without its blobs."""
        result = self._result(key) if self.policy.reads else None
        return result.entry if result is not None else None

    def look_all(self, keys: Iterable[str]) -> dict[str, ActionEntry]:
        """Those of many entries that the remote has, asked for in parallel."""
        asked = list(keys)
        found = zip(asked, self._calls.map(self.look, asked), strict=True)
        return {key: entry for key, entry in found if entry is not None}

    def lacks(self, digests: Collection[Digest]) -> set[Digest]:
        """Which of these blobs the remote does not have; all of them where it does not answer."""
        missing = self._calls.ask(Way.READ, lambda: self.remote.missing(digests))
        return set(digests) if missing is None else missing

    def expect(self, entries: Mapping[str, bytes], bundled: Iterable[Bundle] = ()) -> None:
        """Texts of entries that the remote is known to have, and bundles of their blobs: what was told of need not be
        asked for one by one."""
        with self._lock:
            self._expected = {**self._expected, **entries}
        self._receiver.expect(bundled)

    def fetch(self, entries: Mapping[str, bytes]) -> int:
        """Brings many entries into the local store, their blobs in parallel; returns how many came.

        Keys may be what a remote told: what is none is passed over.
        """
        wanted = {key: said for key, said in entries.items() if is_sha256(key) and self.store.lookup(key) is None}
        results = {key: result for key, said in wanted.items() if (result := self._read(key, said)) is not None}
        self._receiver.blobs({digest for result in results.values() for digest in result.entry.outputs.values()})
        came = 0
        for key, result in results.items():
            if all(map(self.store.has, result.entry.outputs.values())):
                self._keep(key, result)
                came += 1
        return came

    def blobs(self, digests: Iterable[Digest]) -> bool:
        """Has the local store hold these blobs; whether it does."""
        return self._receiver.blobs(digests)

    def _result(self, key: str) -> Result | None:
        said = self._expected.get(key)
        if said is not None and (result := self._read(key, said)) is not None:
            return result
        document = self._calls.ask(Way.READ, lambda: self.remote.action(key))
        if document is None:
            return None
        try:
            found = results.from_document(key, document)
        except GarbledError as error:
            self._refuse(key, str(error))
            self._calls.garbled(f"the entry {key[:12]}: {error}")
            return None
        if isinstance(found, Result):
            return self._believed(key, found)
        if not self.store.has(found) and not self._receiver.blob(found):
            return None
        text = self.store.get(found)
        return self._read(key, text) if text is not None else None

    def _read(self, key: str, said: bytes) -> Result | None:
        try:
            return self._believed(key, results.from_said(key, said))
        except GarbledError as error:
            self._refuse(key, str(error))
            self._calls.garbled(f"the entry {key[:12]}: {error}")
            return None

    def _believed(self, key: str, result: Result) -> Result | None:
        self._calls.made_sense()
        if self._trust.believes(key, result):
            return result
        self._calls.count(unsigned=1)
        self._refuse(key, "not signed by a trusted key")
        self._calls.say_once(
            f"entries of {self.remote.name} are not signed by a key that this machine trusts: they are not used"
        )
        return None

    # writing

    def publish(self, key: str, entry: Entry) -> None:
        """Has an entry, whose blobs the local store has, sent with them while the work goes on."""
        if self.policy.writes:
            self._sender.publish(key, entry)

    def send(self, key: str, entry: ActionEntry) -> bool:
        """Sends an entry with its blobs now; whether it is there."""
        return self.policy.writes and self._sender.send([(key, entry)]) == 1

    def waiting(self) -> int:
        """How many entries are not sent yet."""
        return self._sender.waiting()

    def drain(self, progress: Callable[[int], None] | None = None) -> None:
        """Waits until what was published is sent, or the remote is given up; tells what is left from time to time."""
        self._sender.drain(progress)

    def finish(self, progress: Callable[[int], None] | None = None) -> None:
        """As `drain`, and says what could not be sent."""
        self.drain(progress)
        dropped = self.counts.dropped
        if dropped and not self._calls.is_given_up(Way.WRITE):  # else it was told that nothing is sent any more
            self._calls.say_once(
                f"{dropped} {'entry was' if dropped == 1 else 'entries were'} not sent to {self.remote.name}"
                "\n  → type `doit cache push` when it answers again"
            )

    def signed(self, key: str, entry: ActionEntry) -> Result:
        """An entry as it is sent: signed, where this machine has a key."""
        entry_bytes = entry.to_bytes(key)
        signatures = (self._signer.sign(key, entry_bytes),) if self._signer is not None else ()
        return Result(entry, entry_bytes, signatures)

    def close(self) -> None:
        """Drops what was not sent, and ends connections."""
        self._calls.quieten()  # before anything ends
        self._sender.close()
        self._calls.close()


def _note(notes: dict[str, T], key: str, what: T) -> None:
    """Notes one of the latest, of which only so many are kept."""
    notes.pop(key, None)
    notes[key] = what
    while len(notes) > _NOTED:
        notes.pop(next(iter(notes)))


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
