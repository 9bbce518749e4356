"""Who is believed: the keys that a machine trusts, and the key with which it signs.

The package that knows Ed25519 is an extra, loaded where signatures are wanted: see pipeline.remotes.signatures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, SetupError
from pipeline.hashing import Digest
from pipeline.remotes.results import Result, Signature

if TYPE_CHECKING:
    from pipeline.remotes.signatures import Signer


@dataclass(frozen=True)
class Trust:
    """Whose signatures are believed, and whether an entry without one is."""

    keys: frozenset[str] = frozenset()
    required: bool = False

    def believes(self, key: str, result: Result) -> bool:
        """Whether an entry may be used: always where no signature is required; otherwise with one by a trusted key."""
        if not self.required:
            return True
        holds = _signatures().holds
        return any(each.by in self.keys and holds(each, key, result.entry_bytes) for each in result.signatures)

    def believes_file(self, digest: Digest, signatures: Iterable[Signature]) -> bool:
        """Whether a file with these bytes may be taken in: the same of an exported file."""
        if not self.required:
            return True
        holds = _signatures().holds_for_file
        return any(each.by in self.keys and holds(each, digest) for each in signatures)


def trusting(keys: Iterable[str], required: bool, own: Signer | None = None) -> Trust:
    """Whom a machine believes: those keys, and its own where it has one.

    Raises ConfigError for what is no public key, so that a slip of the pen is told and not obeyed; SetupError where
    signatures are required and nothing here can tell them."""
    keys = frozenset(keys) | ({own.public} if own is not None else set())
    if required:
        for key in sorted(keys):
            try:
                _signatures().public_key(key)
            except ValueError as error:
                hint = "`doit cache key FILE` makes a pair and shows its public one"
                raise ConfigError(f"{key[:80]!r} is no public key: {error}", hint=hint) from error
    return Trust(keys, required)


def signer(path: Path | None) -> Signer | None:
    """What signs with the private key of a file, where there is one. Raises ConfigError where it cannot be used."""
    made: Signer | None = _signatures().Signer.of_file(path) if path is not None else None
    return made


def new_key(path: Path) -> str:
    """Makes a private key in a new file that its owner alone may read; returns the public key. Raises ConfigError."""
    public: str = _signatures().new_key(path)
    return public


def _signatures() -> ModuleType:
    try:
        from pipeline.remotes import signatures
    except ImportError as error:
        raise SetupError("signatures need the package cryptography", hint="pip install 'tvmake[signatures]'") from error
    return signatures
