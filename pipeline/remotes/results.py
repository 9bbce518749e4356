"""Action entries as remotes hold them: a serialized ActionResult of the Remote Execution API.

    ActionEntry                         ActionResult
    ─────────────────────────────       ──────────────────────────────────────────────────────
    outputs: name → digest              output_files: path → digest, sorted; what servers look at
    the whole entry, with its check     stdout: its text, in the result or as a blob
    signatures                          further lines of that text

Servers may write a result anew as long as it means the same, so nothing rests on its bytes: all that is believed is
the text, which carries its own check and, where somebody signed it, signatures. The list of files is there for servers,
which keep a result only as long as they have its files; people see the entry as what the action said.

    <check>                             SHA-256 of key and text (pipeline.store.actions)
    {"components": …}                   the text
    signature <key> <signature>         any number, each by one key: pipeline.remotes.signatures
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from pipeline.hashing import Digest
from pipeline.remotes.messages import ActionResult
from pipeline.store import ActionEntry

_SIGNATURE = "signature "
_SIGNATURES = 64  # on one entry, at most: to look at each takes time
_LARGEST = 64 << 20  # bytes of an entry's text that are read; the largest that is written has some hundred thousand


class GarbledError(ValueError):
    """What lies under a key is no entry of that key's."""


@dataclass(frozen=True)
class Signature:
    """Somebody's word for an entry: the public key, and the signature over key and entry, both in base64."""

    by: str
    over: str


@dataclass(frozen=True)
class Result:
    """An entry as it is signed. `entry_bytes` are the check and the text, as the local store has them."""

    entry: ActionEntry
    entry_bytes: bytes
    signatures: tuple[Signature, ...] = ()

    @property
    def said(self) -> bytes:
        lines = [f"{_SIGNATURE}{each.by} {each.over}\n" for each in self.signatures]
        return self.entry_bytes + "".join(lines).encode()


def to_document(result: Result) -> bytes:
    """The bytes of an ActionResult. Same entry and signatures, same bytes."""
    message = ActionResult()
    for name, digest in sorted(result.entry.outputs.items()):
        file = message.output_files.add()
        file.path = name
        file.digest.hash, file.digest.size_bytes = digest.hash, digest.size
    message.stdout_raw = result.said
    document: bytes = message.SerializeToString(deterministic=True)
    return document


def from_document(key: str, document: bytes) -> Result | Digest:
    """The result that an ActionResult holds, or the digest of the blob that does, for `from_said`.

    Raises GarbledError where it is none of this key's: a page of HTML, another project's, another key's.
    """
    try:
        message = ActionResult.FromString(document)
    except DecodeError as error:
        raise GarbledError("it is no ActionResult") from error
    if message.stdout_raw:
        return from_said(key, message.stdout_raw)
    if message.HasField("stdout_digest") and 0 < message.stdout_digest.size_bytes <= _LARGEST:
        return Digest(message.stdout_digest.hash, message.stdout_digest.size_bytes)
    raise GarbledError("it is another program's")


def from_said(key: str, said: bytes) -> Result:
    """The result whose text this is. Raises GarbledError where its check does not hold for this key."""
    try:
        check, text, *signed = said.decode().splitlines(keepends=True)
        entry_bytes = (check + text).encode()
        entry = ActionEntry.from_bytes(key, entry_bytes)
        if len(signed) > _SIGNATURES:
            raise ValueError(f"{len(signed)} signatures")
        signatures = tuple(_signature(line) for line in signed)
        _require_plain(entry.outputs)
    except ValueError as error:
        raise GarbledError(f"it is no entry of this key: {error}") from error
    return Result(entry, entry_bytes, signatures)


def _require_plain(names: Iterable[str]) -> None:
    """Outputs may become files somewhere, of these names: none may lead elsewhere, nor be one that cannot be sent."""
    for name in names:
        if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise ValueError(f"an output of the name {ascii(name)[:80]}")


def _signature(line: str) -> Signature:
    if not line.startswith(_SIGNATURE):
        raise ValueError("a line that is no signature")
    by, over = line.removeprefix(_SIGNATURE).split()
    return Signature(by, over)
