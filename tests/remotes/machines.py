"""Machines behind one shared folder, and faults put in the way of what they ask of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from pipeline.errors import RemoteError, Trouble
from pipeline.hashing import Digest, key_of
from pipeline.remotes import open_remote
from pipeline.remotes.cache import RemoteCache
from pipeline.remotes.contract import Remote
from pipeline.remotes.settings import Policy
from pipeline.store import ActionEntry, Store

KEY = key_of({"stage": "codegen", "of": "matmul"})


def away(what: str) -> None:
    raise RemoteError("the remote does not answer", trouble=Trouble.AWAY)


class Faulty:
    """A real remote with faults put in its way: `fault` is asked before each call, by the call's name."""

    def __init__(self, remote: Remote, fault: Callable[[str], None]) -> None:
        self._remote = remote
        self._fault = fault
        self.name = remote.name

    def action(self, key: str) -> bytes | None:
        self._fault("action")
        return self._remote.action(key)

    def put_action(self, key: str, document: bytes) -> None:
        self._fault("put_action")
        self._remote.put_action(key, document)

    def blob(self, digest: Digest) -> Iterator[bytes] | None:
        self._fault("blob")
        return self._remote.blob(digest)

    def put_blob(self, digest: Digest, path: Path) -> None:
        self._fault("put_blob")
        self._remote.put_blob(digest, path)

    def missing(self, digests: Collection[Digest]) -> set[Digest]:
        self._fault("missing")
        return self._remote.missing(digests)

    def close(self) -> None:
        self._remote.close()


class Machine:
    """A store of its own behind one between folder."""

    def __init__(
        self,
        folder: Path,
        between: Path,
        policy: Policy = Policy.READ_WRITE,
        fault: Callable[[str], None] | None = None,
        **trusting: object,
    ) -> None:
        self.store = Store(folder)
        self.said: list[str] = []
        remote = open_remote(between.as_uri())
        faulty = Faulty(remote, fault) if fault else remote
        self.cache = RemoteCache(self.store, faulty, policy, self.said.append, **trusting)  # type: ignore[arg-type]

    def make(self, key: str = KEY, *contents: bytes) -> ActionEntry:
        outputs = {f"o{i}": self.store.put(data) for i, data in enumerate(contents or (b"code", b"x" * 5000))}
        entry = ActionEntry("codegen", {"stage": "codegen"}, outputs, 1.0)
        self.store.commit(key, entry)
        self.cache.publish(key, entry)
        return entry

    def finish(self) -> Machine:
        self.cache.finish()
        return self
