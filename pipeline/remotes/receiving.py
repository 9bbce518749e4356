"""Blobs from a remote into the local store: alone, or many small ones in a bundle. Each is verified as it comes in."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Sequence

from pipeline.errors import RemoteError, Trouble
from pipeline.hashing import Digest
from pipeline.remotes import bundles
from pipeline.remotes.availability import Way
from pipeline.remotes.bundles import Bundle
from pipeline.remotes.calls import Calls
from pipeline.store import Store

_WORTH = 4  # a bundle is fetched where at least one of so many of its blobs is not here
_SHARE_OF_DISK = 0.5  # of what is free: a blob that says to be larger is not fetched


class Receiver:
    """Has the local store hold what a remote has. Every method may be called from any thread."""

    def __init__(self, store: Store, calls: Calls) -> None:
        self._store = store
        self._calls = calls
        self._bundles: dict[Digest, Bundle] = {}  # by what lies in them
        self._unbundling = threading.Lock()

    def expect(self, bundled: Iterable[Bundle]) -> None:
        """What lies in these bundles is fetched with them."""
        with self._unbundling:
            for bundle in bundled:
                self._bundles.update(dict.fromkeys(bundle.members, bundle) if bundle.is_sound else {})

    def blobs(self, digests: Iterable[Digest]) -> bool:
        """Whether the local store has all these blobs, after those that it lacked were fetched, in parallel."""
        lacking = [digest for digest in dict.fromkeys(digests) if not self._store.has(digest)]
        if any(digest in self._bundles for digest in lacking):
            self._unbundle(lacking)
            lacking = [digest for digest in lacking if not self._store.has(digest)]
        if len(lacking) <= 1:
            came = [self.blob(digest) for digest in lacking]
        else:
            came = []
            for each in self._calls.map(self.blob, lacking):
                came.append(each)
                self._tell(f"{len(came)} of {len(lacking)} blobs")
        if not all(came):
            self._calls.count(incomplete=1)
        return all(came)

    def blob(self, digest: Digest) -> bool:
        """Fetches one blob; whether it came, whole and right."""
        if digest.size > shutil.disk_usage(self._store.root).free * _SHARE_OF_DISK:
            self._calls.say_once(
                f"a blob of {digest.size:,} bytes is more than this disk has room for: it is not fetched"
            )
            return False

        def received() -> bool | None:
            pieces = self._calls.remote.blob(digest)
            return None if pieces is None else self._store.receive(digest, pieces)

        came = self._calls.ask(Way.READ, received)
        if came is False:
            self._calls.garbled(f"the blob {digest} has other bytes")
        if came:
            self._calls.made_sense()
            self._calls.count(received=digest.size)
        return bool(came)

    # bundles

    def _unbundle(self, wanted: Iterable[Digest]) -> None:
        """Fetches the bundles that some blobs lie in, each once, where enough of what lies there is not here."""
        with self._unbundling:  # who wants another blob of them waits until it is here
            chosen = list({id(bundle): bundle for each in wanted if (bundle := self._bundles.get(each))}.values())
            try:
                self._take_all([bundle for bundle in chosen if self._is_worth(bundle)])
            finally:  # not before: who finds nothing here does not wait
                for bundle in chosen:
                    for member in bundle.members:
                        self._bundles.pop(member, None)

    def _is_worth(self, bundle: Bundle) -> bool:
        """Whether enough of what lies in a bundle is not here."""
        lacking = sum(not self._store.has(member) for member in bundle.members)
        return lacking * _WORTH >= len(bundle.members)

    def _take_all(self, chosen: Sequence[Bundle]) -> None:
        taken = map(self._take, chosen) if len(chosen) <= 1 else self._calls.map(self._take, chosen)
        for number, _ in enumerate(taken, 1):
            self._tell(f"{number} of {len(chosen)} bundles of small blobs")

    def _take(self, bundle: Bundle) -> None:
        """Takes what it can of a bundle. One that is wrong is not of the answers in a row after which a remote is left
        alone: what lies in it is asked for one by one next."""

        def received() -> bytes | None:
            try:
                pieces = self._calls.remote.blob(bundle.blob)
                return None if pieces is None else _bounded(pieces, bundle.blob.size)
            except RemoteError as error:
                if error.trouble is Trouble.GARBLED:
                    return b""  # which is no bundle
                raise

        data = self._calls.ask(Way.READ, received)
        if data is None:
            return
        try:
            for digest, blob in bundles.unpack(data, bundle.members):
                if self._store.has(digest):
                    continue
                if not self._store.receive(digest, [blob]):
                    raise ValueError(f"the blob {digest} has other bytes")
                self._calls.count(received=digest.size)
        except ValueError:
            self._calls.count(garbled=1)

    def _tell(self, how_far: str) -> None:
        self._calls.tell(f"fetching from {self._calls.remote.name}: {how_far}")


def _bounded(pieces: Iterable[bytes], size: int) -> bytes:
    """Pieces as one, cut off where they are more than they said."""
    data = bytearray()
    for piece in pieces:
        data += piece
        if len(data) > size:
            break
    return bytes(data)
