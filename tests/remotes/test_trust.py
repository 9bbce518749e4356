"""Whose entries are believed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.hashing import Digest, key_of
from pipeline.remotes import signatures, trust
from pipeline.remotes.results import Result, Signature
from pipeline.store import ActionEntry

KEY, OTHER = key_of({"a": 1}), key_of({"a": 2})
ENTRY = ActionEntry("codegen", {"stage": "codegen"}, {"object": Digest.of(b"code")}, 1.0)


@pytest.fixture
def signer(tmp_path: Path) -> signatures.Signer:
    trust.new_key(tmp_path / "mine.pem")
    return trust.signer(tmp_path / "mine.pem")


def signed(signer: signatures.Signer, key: str = KEY, entry: ActionEntry = ENTRY) -> Result:
    return Result(entry, entry.to_bytes(key), (signer.sign(key, entry.to_bytes(key)),))


def test_without_a_demand_everything_is_believed(signer: signatures.Signer) -> None:
    assert trust.Trust().believes(KEY, Result(ENTRY, ENTRY.to_bytes(KEY)))


def test_what_a_trusted_key_signed_is_believed_and_nothing_else(signer: signatures.Signer, tmp_path: Path) -> None:
    believing = trust.trusting([signer.public], required=True)
    good = signed(signer)
    assert believing.believes(KEY, good)
    assert not believing.believes(KEY, replace(good, signatures=()))
    assert not believing.believes(OTHER, replace(good, entry_bytes=ENTRY.to_bytes(OTHER))), "moved to another key"
    changed = replace(ENTRY, outputs={"object": Digest.of(b"evil")})
    assert not believing.believes(KEY, replace(good, entry=changed, entry_bytes=changed.to_bytes(KEY)))
    trust.new_key(tmp_path / "theirs.pem")
    stranger = trust.signer(tmp_path / "theirs.pem")
    assert not believing.believes(KEY, signed(stranger)), "a key that nobody trusts"
    forged = Signature(signer.public, signed(stranger).signatures[0].over)
    assert not believing.believes(KEY, replace(good, signatures=(forged,))), "in the name of another"
    assert believing.believes(KEY, replace(good, signatures=(forged, *good.signatures))), "one good one is enough"


@pytest.mark.parametrize("over", ["", "????", "AAAA", "A" * 88])
def test_a_signature_that_is_none_is_no_error(signer: signatures.Signer, over: str) -> None:
    broken = replace(signed(signer), signatures=(Signature(signer.public, over),))
    assert not trust.trusting([signer.public], required=True).believes(KEY, broken)


@pytest.mark.parametrize("key", ["", "ed25519:", "ed25519:AAAA", "rsa:AAAA", "ed25519:not base64"])
def test_a_slip_in_a_public_key_is_told(key: str) -> None:
    with pytest.raises(ConfigError, match="no public key"):
        trust.trusting([key], required=True)


def test_a_private_key_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    public = trust.new_key(path)
    assert public.startswith("ed25519:")
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="cannot be written"):
        trust.new_key(path)
    assert trust.signer(path).public == public
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read"):
        trust.signer(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_file_without_a_private_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key.pem"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="no private key"):
        trust.signer(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        trust.signer(tmp_path / "absent.pem")
