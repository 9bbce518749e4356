"""Blobs between a driver and workers on other machines.

    Carrier   what lasts goes by way of the remote that both have. Workers publish what they made before they answer, so
              that a driver or a scheduler that is lost then costs nothing that was finished
    Passer    what is made for one run of this driver goes along with orders and answers, and never to the remote: that
              is not filled with candidates which nobody wants again. What is large goes as what lasts does
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import ConfigError, ExecutorError, RemoteError, StoreError
from pipeline.hashing import Digest

if TYPE_CHECKING:
    from pipeline.remotes.cache import RemoteCache
    from pipeline.store import ActionEntry, Store


def require_remote(remote: RemoteCache | None, executor: str) -> RemoteCache:
    """Raises ConfigError where there is no remote that can carry anything."""
    if remote is None:
        raise ConfigError(
            f"the workers of {executor} get their inputs through a remote, and none is named",
            hint='write into tvmake.toml beside dodo.py:\n    [remote]\n    url = "https://…"\n'
            "  or set TVMAKE_REMOTE; a folder that all machines have is one: file:///mnt/shared/tvmake",
        )
    if not (remote.policy.reads and remote.policy.writes):
        raise ConfigError(
            f"the workers of {executor} get their inputs through the remote, and its policy here is {remote.policy}",
            hint='set policy = "read-write", or TVMAKE_REMOTE_POLICY=read-write',
        )
    return remote


LARGE = 1 << 20  # bytes; a larger blob does not travel within an order


class Carries(Protocol):
    """The driver's side. Every method may be called from any thread."""

    def send(self, digests: Collection[Digest]) -> Sequence[bytes]:
        """Has these blobs where a worker finds them; returns those that must travel within the order. Raises
        ExecutorError where that cannot be."""
        ...

    def forget(self, hashes: Collection[str]) -> None:
        """These are not there, whatever was known of them."""
        ...

    def fetch(self, entry: ActionEntry, blobs: Sequence[bytes]) -> None:
        """Has the store hold what a worker made: these came within its answer. Raises ExecutorError where it cannot be
        had."""
        ...


class Carrier:
    """Carries by way of the remote."""

    def __init__(self, store: Store, remote: RemoteCache) -> None:
        self._store = store
        self._remote = remote
        self._there: set[str] = set()
        self._sending = threading.Lock()  # two threads do not send the same large blob at once

    def send(self, digests: Collection[Digest]) -> Sequence[bytes]:
        if all(digest.hash in self._there for digest in digests):
            return ()
        with self._sending:
            new = {digest for digest in digests if digest.hash not in self._there}
            for digest in self._remote.lacks(new) if new else ():
                self._put(digest)
            self._there.update(digest.hash for digest in new)
        return ()

    def forget(self, hashes: Collection[str]) -> None:
        with self._sending:
            self._there.difference_update(hashes)

    def fetch(self, entry: ActionEntry, blobs: Sequence[bytes]) -> None:
        outputs = entry.outputs.values()
        if not self._remote.blobs(outputs):
            raise ExecutorError(
                f"what a worker made of {entry.stage} is not on {self._remote.remote.name}, where this machine looks",
                hint="see that the workers' settings name the same remote, and that it does not remove what is new",
            )
        self._there.update(digest.hash for digest in outputs)

    def _put(self, digest: Digest) -> None:
        path = self._store.path(digest)
        if path is None:
            raise StoreError(f"blob {digest} is missing from the store", hint="run the same command again")
        try:
            self._remote.remote.put_blob(digest, path)
        except RemoteError as error:
            raise ExecutorError(
                f"workers get their inputs through {self._remote.remote.name}, which does not take them: "
                f"{error.message}",
                hint=error.hint or "see whether it runs: doit doctor",
            ) from error


class Passer:
    """Passes what is small along, and has another carry the rest."""

    def __init__(self, store: Store, carrier: Carries) -> None:
        self._store = store
        self._carrier = carrier

    def send(self, digests: Collection[Digest]) -> Sequence[bytes]:
        self._carrier.send([digest for digest in digests if digest.size > LARGE])
        return [self._bytes(digest) for digest in digests if digest.size <= LARGE]

    def forget(self, hashes: Collection[str]) -> None:
        self._carrier.forget(hashes)

    def fetch(self, entry: ActionEntry, blobs: Sequence[bytes]) -> None:
        """All outputs come within the answer, however large: nobody else wants them."""
        for data in blobs:
            self._store.put(data)
        if any(not self._store.has(digest) for digest in entry.outputs.values()):
            raise ExecutorError(f"a worker's answer lacks what it made of {entry.stage}", hint="run the same again")

    def _bytes(self, digest: Digest) -> bytes:
        data = self._store.get(digest)
        if data is None:
            raise StoreError(f"blob {digest} is missing from the store", hint="run the same command again")
        return data
