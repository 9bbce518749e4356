"""The closure of an artifact: every action that its build asked for, with what each made.

    artifact ── closure ── action entries ── blobs

It is what a remote must have so that another machine builds nothing, what an export carries, and what a pin keeps. A
machine that knows the model and the target asks a remote for the closure first, which is one small document, and then
fetches all that it lacks at once, instead of asking for one action after the other.

A closure is a hint and proves nothing: each entry in it carries its own check and, where there are any, signatures, and
is found by the key that this machine computed itself. One that is out of date costs a few bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline.hashing import Digest, is_sha256, key_of
from pipeline.store import ActionEntry
from pipeline.types import ModelSource

if TYPE_CHECKING:
    from pipeline.remotes.cache import RemoteCache
    from pipeline.store import Store
    from pipeline.toolchain import Toolchain

STAGE = "closure"
_VERSION = 1
_LARGEST = 256 << 20  # bytes of a closure, unpacked: about 200,000 actions


class Part(msgspec.Struct, frozen=True, array_like=True):
    """One action: its key, what a person calls it, and its entry as a remote holds it, with signatures."""

    key: str
    subject: str
    said: str


@dataclass(frozen=True)
class Closure:
    """The actions of one artifact, by key."""

    parts: tuple[Part, ...]

    @property
    def said(self) -> dict[str, bytes]:
        """The entries as a remote holds them, by key."""
        return {part.key: part.said.encode() for part in self.parts}

    def to_bytes(self) -> bytes:
        """Same actions, same bytes."""
        return zlib.compress(msgspec.json.encode(sorted(self.parts, key=lambda part: part.key)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Closure:
        """Raises ValueError on anything that `to_bytes` did not write, and on what unpacks to more than it should."""
        unpacker = zlib.decompressobj()
        try:
            text = unpacker.decompress(data, _LARGEST)
            if unpacker.unconsumed_tail or not unpacker.eof:
                raise ValueError("the closure is too large or truncated")
            parts = tuple(msgspec.json.decode(text, type=list[Part]))
            # A key is where an entry lies in the store: what is none could lead out of it.
            if not all(is_sha256(part.key) for part in parts):
                raise ValueError("it is no closure: what it calls a key is none")
            return cls(parts)
        except (zlib.error, msgspec.DecodeError) as error:
            raise ValueError(f"it is no closure: {error}") from error


def keys(
    source: ModelSource, attributes: Mapping[str, Any], toolchain: Toolchain, model: str, target: str
) -> tuple[str, str]:
    """Where a closure lies: under what the artifact is made of, and under what it is called, for those who have another
    model of that name."""
    shared: dict[str, object] = {"stage": STAGE, "version": _VERSION, "tools": dict(toolchain.identities)}
    content: dict[str, object] = {
        "skeleton": source.skeleton.hash,
        "weights": [weight.blob.hash for weight in source.weights],
        "target": attributes,
    }
    return key_of({**shared, **content}), key_of({**shared, "model": model, "target name": target})


def publish(
    remote: RemoteCache, store: Store, found: Mapping[str, tuple[str, ActionEntry]], under: Iterable[str]
) -> None:
    """Has a remote hold the closure of these actions (by key: subject and entry)."""
    parts = [Part(key, subject, remote.signed(key, entry).said.decode()) for key, (subject, entry) in found.items()]
    blob = store.put(Closure(tuple(parts)).to_bytes())
    for key in under:
        remote.publish(key, ActionEntry(STAGE, {}, {"entries": blob}, 0.0))


def ask(remote: RemoteCache, store: Store, key: str) -> Closure | None:
    """The closure that a remote has under a key."""
    entry = remote.look(key)
    blob: Digest | None = entry.outputs.get("entries") if entry is not None and entry.stage == STAGE else None
    if blob is None or blob.size > _LARGEST or not remote.blobs([blob]):
        return None
    data = store.get(blob)
    try:
        return Closure.from_bytes(data) if data is not None else None
    except ValueError:
        return None
