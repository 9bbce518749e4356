"""Entries signed with Ed25519 (RFC 8032).

What is signed is a line of purpose, the action's key, and the entry with its check. So a signature holds for one key
and one result: whoever can write to a remote cannot move it to another key, nor another result under it. Blobs need no
signature: an entry names them by digest.

    ed25519:<base64 of the 32 bytes>      a public key, as it is listed and shown
    a file of PKCS #8 in PEM              a private key, as `openssl genpkey -algorithm ed25519` writes it
"""

from __future__ import annotations

import base64
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from pipeline.errors import ConfigError
from pipeline.hashing import Digest
from pipeline.remotes.results import Signature

_PREFIX = "ed25519:"
_ENTRY = b"tvmake action entry, signature 1\n"
_FILE = b"tvmake exported file, signature 1\n"
_MAKE = "`doit cache key FILE` makes one"


class Signer:
    """Signs entries with one private key."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = _shown(private.public_key())

    @classmethod
    def of_file(cls, path: Path) -> Signer:
        """Raises ConfigError where the file holds no such key, or others than its owner may read it."""
        try:
            if path.stat().st_mode & 0o077:
                raise ConfigError(f"others may read the private key {path}", hint=f"chmod 600 {path}")
            private = load_pem_private_key(path.read_bytes(), password=None)
        except OSError as error:
            raise ConfigError(f"the private key {path} cannot be read: {error.strerror}", hint=_MAKE) from error
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"{path} holds no private key that can be read", hint=_MAKE) from error
        if not isinstance(private, Ed25519PrivateKey):
            raise ConfigError(f"the private key {path} is not one of Ed25519", hint=_MAKE)
        return cls(private)

    def sign(self, key: str, entry_bytes: bytes) -> Signature:
        """Signs an entry under its key."""
        return self._signed(_entry(key, entry_bytes))

    def sign_file(self, digest: Digest) -> Signature:
        """Signs a file with these bytes."""
        return self._signed(_file(digest))

    def _signed(self, message: bytes) -> Signature:
        return Signature(self.public, base64.b64encode(self._private.sign(message)).decode())


def new_key(path: Path) -> str:
    """Makes a private key in a new file that its owner alone may read; returns the public key. Raises ConfigError."""
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(f"the key cannot be written to {path}: {error.strerror}", hint="name a new file") from error
    with open(descriptor, "wb") as stream:
        stream.write(pem)
    return _shown(private.public_key())


def holds(signature: Signature, key: str, entry_bytes: bytes) -> bool:
    """Whether it is a signature over this entry under this key, by the key that it names."""
    return _verified(signature, _entry(key, entry_bytes))


def holds_for_file(signature: Signature, digest: Digest) -> bool:
    """Whether it is a signature over a file with these bytes, by the key that it names."""
    return _verified(signature, _file(digest))


def _verified(signature: Signature, message: bytes) -> bool:
    try:
        public_key(signature.by).verify(base64.b64decode(signature.over, validate=True), message)
    except (ValueError, InvalidSignature):
        return False
    return True


def public_key(shown: str) -> Ed25519PublicKey:
    """Raises ValueError for what is no key."""
    if not shown.startswith(_PREFIX):
        raise ValueError(f"it does not begin with {_PREFIX}")
    return Ed25519PublicKey.from_public_bytes(base64.b64decode(shown.removeprefix(_PREFIX), validate=True))


def _entry(key: str, entry_bytes: bytes) -> bytes:
    return b"%s%s\n%s" % (_ENTRY, key.encode(), entry_bytes)


def _file(digest: Digest) -> bytes:
    return b"%s%s\n" % (_FILE, digest.hash.encode())


def _shown(public: Ed25519PublicKey) -> str:
    return _PREFIX + base64.b64encode(public.public_bytes_raw()).decode()
