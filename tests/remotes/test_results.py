"""Action entries as remotes hold them."""

from __future__ import annotations

import pytest

from pipeline.hashing import Digest, key_of
from pipeline.remotes import messages, results
from pipeline.remotes.results import GarbledError, Result, Signature
from pipeline.store import ActionEntry

KEY, OTHER = key_of({"a": 1}), key_of({"a": 2})
OUTPUTS = {"object": Digest.of(b"code"), "kernels.cl": Digest.of(b"kernels")}
ENTRY = ActionEntry("codegen", {"stage": "codegen", "version": 2}, OUTPUTS, 1.5)
SIGNED = Result(ENTRY, ENTRY.to_bytes(KEY), (Signature("ed25519:AAAA", "BBBB"),))


def test_a_result_comes_back() -> None:
    assert results.from_document(KEY, results.to_document(SIGNED)) == SIGNED


def test_servers_see_the_files_of_an_action() -> None:
    """bazel-remote and others keep a result only as long as they have its files."""
    message = messages.ActionResult.FromString(results.to_document(SIGNED))
    seen = {file.path: Digest(file.digest.hash, file.digest.size_bytes) for file in message.output_files}
    assert seen == OUTPUTS
    assert message.exit_code == 0
    assert list(seen) == sorted(seen), "same entry, same bytes"


def test_a_server_may_put_the_text_into_a_blob() -> None:
    message = messages.ActionResult.FromString(results.to_document(SIGNED))
    text = Digest.of(message.stdout_raw)
    message.stdout_digest.hash, message.stdout_digest.size_bytes = text.hash, text.size
    message.ClearField("stdout_raw")
    assert results.from_document(KEY, message.SerializeToString()) == text
    assert results.from_said(KEY, SIGNED.said) == SIGNED


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"<html><body>504 Gateway Time-out</body></html>",
        messages.ActionResult(exit_code=1).SerializeToString(),
        messages.ActionResult(stdout_raw=b"hello from a compiler of somebody else's\n").SerializeToString(),
        messages.ActionResult(stdout_raw=b"\xff\xfe").SerializeToString(),
        messages.ActionResult(stdout_raw=SIGNED.said[:-20]).SerializeToString(),
        messages.ActionResult(stdout_raw=SIGNED.said + b"signature one two three\n").SerializeToString(),
        messages.ActionResult(stdout_raw=SIGNED.said + b"and more\n").SerializeToString(),
        messages.ActionResult(stdout_raw=SIGNED.said.replace(b"codegen", b"codeges")).SerializeToString(),
        results.to_document(SIGNED)[:-1],
    ],
)
def test_what_is_no_result_is_refused(document: bytes) -> None:
    with pytest.raises(GarbledError):
        results.from_document(KEY, document)


@pytest.mark.parametrize(
    "digest",
    [Digest("/tmp/x", 1), Digest("../" * 20 + "etc/passwd", 1), Digest("A" * 64, 1), Digest("0" * 64, -1)],
)
def test_what_an_entry_names_must_be_digests(digest: Digest) -> None:
    """Whoever can write to a remote can make a check that holds."""
    entry = ActionEntry("codegen", {}, {"object": digest}, 1.0)
    with pytest.raises(GarbledError, match="no digest"):
        results.from_document(KEY, results.to_document(Result(entry, entry.to_bytes(KEY))))


def test_a_result_proves_nothing_under_another_key() -> None:
    with pytest.raises(GarbledError, match="check"):
        results.from_document(OTHER, results.to_document(SIGNED))


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../../x", "a//b", "", ".", "a\\b", "a\0b", "a\nb", "\ud800", "kernels/../../x"]
)
def test_outputs_whose_names_lead_elsewhere_are_refused(name: str) -> None:
    entry = ActionEntry("dump", {}, {name: Digest.of(b"x")}, 1.0)
    with pytest.raises(GarbledError):
        results.from_said(KEY, entry.to_bytes(KEY))


def test_outputs_may_lie_in_folders() -> None:
    entry = ActionEntry("dump", {}, {"01 import/main.py": Digest.of(b"x"), "größe.txt": Digest.of(b"y")}, 1.0)
    assert results.from_said(KEY, entry.to_bytes(KEY)).entry == entry


def test_signatures_without_end_are_not_looked_at() -> None:
    line = b"signature ed25519:AAAA BBBB\n"
    assert len(results.from_said(KEY, ENTRY.to_bytes(KEY) + line * 64).signatures) == 64
    with pytest.raises(GarbledError, match="65 signatures"):
        results.from_said(KEY, ENTRY.to_bytes(KEY) + line * 65)
