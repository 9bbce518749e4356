"""Action entries: what an action was made from and what it made, one small JSON document that carries its own check."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.hashing import Digest, is_sha256

FORMAT = 1


@dataclass(frozen=True)
class ActionEntry:
    """One action and its results.

    components  what entered the key, by name: strings, numbers, digests' hashes, or lists and mappings of them
    outputs     the blobs that the action made, by name
    seconds     how long it ran (wall), to say later what the cache saved
    """

    stage: str
    components: Mapping[str, object]
    outputs: Mapping[str, Digest]
    seconds: float

    def to_bytes(self, key: str) -> bytes:
        """The document, with a check over it and the key under which it is stored: it proves nothing under another."""
        body = {
            "format": FORMAT,
            "stage": self.stage,
            "components": self.components,
            "outputs": {name: [digest.hash, digest.size] for name, digest in self.outputs.items()},
            "seconds": round(self.seconds, 6),
        }
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), default=_by_digest)
        return f"{_check(key, text)}\n{text}\n".encode()

    @classmethod
    def from_bytes(cls, key: str, data: bytes) -> ActionEntry:
        """Raises ValueError on anything that `to_bytes` did not write for this key.

        Whoever can write where entries come from can make a check that holds: what stands in one may be anything.
        """
        check, _, text = data.decode().partition("\n")
        if not text.endswith("\n") or _check(key, text[:-1]) != check:
            raise ValueError("the entry's check does not match its text")
        try:
            body = json.loads(text)
            if body["format"] != FORMAT:
                raise ValueError(f"the entry has format {body['format']}, not {FORMAT}")
            outputs = {name: _digest(*given) for name, given in body["outputs"].items()}
            entry = cls(body["stage"], body["components"], outputs, body["seconds"])
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"it is no entry: {type(error).__name__}: {error}") from error
        kinds = isinstance(entry.stage, str), isinstance(entry.components, dict), isinstance(entry.seconds, int | float)
        if not all(kinds) or not 0 <= entry.seconds < math.inf:
            raise ValueError("its stage, components or seconds are none")
        return entry


def _digest(hash_: object, size: object) -> Digest:
    if not (isinstance(hash_, str) and is_sha256(hash_) and type(size) is int and size >= 0):
        raise ValueError("an output that is no digest")
    return Digest(hash_, size)


def _check(key: str, text: str) -> str:
    return hashlib.sha256(f"{key}\n{text}".encode()).hexdigest()


def _by_digest(component: object) -> str:
    """What JSON cannot hold is kept by its digest, which is enough to tell it from another."""
    if isinstance(component, Digest):
        return component.hash
    if isinstance(component, bytes):
        return Digest.of(component).hash
    raise TypeError(f"an entry cannot hold a {type(component).__name__}")
