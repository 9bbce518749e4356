"""The closure of an artifact: every action that its build asked for, with what each made.

    artifact ── closure ─┬─ action entries ── blobs
                         └─ bundles of the small blobs

It is what a remote must have so that another machine builds nothing, what an export carries, and what a pin keeps. A
machine that knows the model and the target asks a remote for the closure first, which is one small document, and then
fetches all that it lacks at once, instead of asking for one action after the other.

A closure is a hint and proves nothing: each entry in it carries its own check and, where there are any, signatures, and
is found by the key that this machine computed itself. One that is out of date costs a few bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline.hashing import Digest, is_sha256, key_of
from pipeline.remotes import bundles
from pipeline.remotes.bundles import Bundle
from pipeline.store import ActionEntry
from pipeline.types import ModelSource

if TYPE_CHECKING:
    from pipeline.remotes.cache import RemoteCache
    from pipeline.store import Store
    from pipeline.toolchain import Toolchain

STAGE = "closure"
_VERSION = 2
_LARGEST = 256 << 20  # bytes of a closure, unpacked: about 200,000 actions


class Part(msgspec.Struct, frozen=True, array_like=True):
    """One action: its key, what a person calls it, and its entry as a remote holds it, with signatures."""

    key: str
    subject: str
    said: str


class Closure(msgspec.Struct, frozen=True):
    """The actions of one artifact, by key, and bundles of blobs that they made."""

    parts: tuple[Part, ...]
    bundles: tuple[Bundle, ...] = ()

    @property
    def said(self) -> dict[str, bytes]:
        """The entries as a remote holds them, by key."""
        return {part.key: part.said.encode() for part in self.parts}

    def to_bytes(self) -> bytes:
        """Same actions, same bytes."""
        parts = tuple(sorted(self.parts, key=lambda part: part.key))
        return zlib.compress(msgspec.json.encode(Closure(parts, self.bundles)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Closure:
        """Raises ValueError on anything that `to_bytes` did not write, and on what unpacks to more than it should."""
        unpacker = zlib.decompressobj()
        try:
            text = unpacker.decompress(data, _LARGEST)
            if unpacker.unconsumed_tail or not unpacker.eof:
                raise ValueError("the closure is too large or truncated")
            closure = msgspec.json.decode(text, type=cls)
        except (zlib.error, msgspec.DecodeError) as error:
            raise ValueError(f"it is no closure: {error}") from error
        # A key is where an entry lies in the store: what is none could lead out of it.
        if not all(is_sha256(part.key) for part in closure.parts):
            raise ValueError("it is no closure: what it calls a key is none")
        return closure


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


def key_of_one(key: str) -> str:
    """Where the closure of a single action lies, which is worth one where it made many blobs."""
    return key_of({"stage": STAGE, "version": _VERSION, "action": key})


def publish(
    remote: RemoteCache,
    store: Store,
    found: Mapping[str, tuple[str, ActionEntry]],
    under: Iterable[str],
    known: Collection[Digest] = (),
) -> None:
    """Has a remote hold the closure of these actions (by key: subject and entry).

    `known`: blobs that whoever asks for this closure has by then, which are in no bundle.
    """

    @cache
    def entry() -> ActionEntry:
        parts = [Part(key, subject, remote.signed(key, made).said.decode()) for key, (subject, made) in found.items()]
        # In the order of what a person calls them: what one operator's change changes stands together.
        made = [found[part.key][1] for part in sorted(parts, key=lambda part: (part.subject, part.key))]
        small = [digest for each in made for digest in sorted(each.outputs.values()) if digest not in known]
        bundled = [bundle for members in bundles.cut(small) if (bundle := _bundled(store, members)) is not None]
        outputs = {f"bundle{i}": bundle.blob for i, bundle in enumerate(bundled)}
        outputs["entries"] = store.put(Closure(tuple(parts), tuple(bundled)).to_bytes())
        return ActionEntry(STAGE, {}, outputs, 0.0)

    for key in under:
        remote.publish(key, entry)


def _bundled(store: Store, members: tuple[Digest, ...]) -> Bundle | None:
    """Some blobs of the store as one; None where one is gone meanwhile."""
    blobs = [data for member in members if (data := store.get(member)) is not None]
    return Bundle(store.put(bundles.pack(blobs)), members) if len(blobs) == len(members) else None


def ask(remote: RemoteCache, store: Store, key: str) -> Closure | None:
    """The closure that a remote has under a key. Its bundles stay there until somebody wants what lies in them."""
    entry = remote.look(key)
    blob: Digest | None = entry.outputs.get("entries") if entry is not None and entry.stage == STAGE else None
    if blob is None or blob.size > _LARGEST or not remote.blobs([blob]):
        return None
    data = store.get(blob)
    try:
        return Closure.from_bytes(data) if data is not None else None
    except ValueError:
        return None
