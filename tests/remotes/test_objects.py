"""Buckets: what goes where, who asks, and servers that answer as none should."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, RemoteError, SetupError, Trouble
from pipeline.hashing import Digest
from pipeline.remotes import Remote, Terms, objects, open_remote
from tests import servers
from tests.remotes.doubles import Crooked, crooked, deaf
from tests.remotes.places import document, new_key
from tests.servers import Server

DATA = os.urandom(50_000)
DIGEST = Digest.of(DATA)
KEY = new_key()
QUICK = Terms(connect=0.5, stall=0.4)


@pytest.fixture
def double() -> Iterator[Crooked]:
    with crooked() as server:
        yield server


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "blob"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def gateway(shared: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch) -> Server:
    server = shared("gateway")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


def at(double: Crooked, kind: str, bucket: str = "bucket") -> Remote:
    """A bucket of that name, on a server that answers in some way."""
    return open_remote(f"s3://{bucket}/pre/fix?endpoint={double.url}/{kind}&region=here", QUICK)


def all_of(remote: Remote, digest: Digest = DIGEST) -> bytes | None:
    pieces = remote.blob(digest)
    return None if pieces is None else b"".join(pieces)


def trouble(call: Callable[[], object]) -> Trouble:
    with pytest.raises(RemoteError) as caught:
        call()
    return caught.value.trouble


def test_what_goes_where(double: Crooked, file: Path) -> None:
    remote = at(double, "bucket")
    remote.put_blob(DIGEST, file)
    remote.put_action(KEY, document(DIGEST))
    assert set(double.held) == {f"bucket/pre/fix/cas/{DIGEST.hash}", f"bucket/pre/fix/ac/{KEY}"}
    assert all_of(remote) == DATA
    assert remote.action(KEY) == document(DIGEST)
    absent = Digest.of(b"x")
    assert remote.missing([DIGEST, absent, Digest(DIGEST.hash, 1)]) == {absent, Digest(DIGEST.hash, 1)}


def test_without_credentials_nothing_is_signed_and_nobody_is_asked_for_some(double: Crooked) -> None:
    began = time.monotonic()
    assert at(double, "bucket").action(KEY) is None
    assert time.monotonic() - began < 1.0
    assert "authorization" not in double.seen[0][2]


def test_with_credentials_requests_are_signed(double: Crooked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    assert at(double, "bucket").action(KEY) is None
    assert double.seen[0][2]["authorization"].startswith("AWS4-HMAC-SHA256 Credential=someone/")


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        *[(status, Trouble.REFUSED) for status in (401, 403, 405)],
        *[(status, Trouble.FULL) for status in (413, 507)],
        *[(status, Trouble.AWAY) for status in (409, 429, 500, 503)],
        *[(status, Trouble.GARBLED) for status in (400, 418)],
    ],
)
def test_statuses(double: Crooked, file: Path, status: int, expected: Trouble) -> None:
    remote = at(double, "bucket", f"status-{status}")
    assert trouble(lambda: remote.action(KEY)) is expected
    assert trouble(lambda: remote.put_blob(DIGEST, file)) is expected
    assert trouble(lambda: remote.missing([DIGEST])) is expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("html", Trouble.GARBLED),
        ("longer", Trouble.GARBLED),
        ("half", Trouble.AWAY),
        ("stall", Trouble.AWAY),
        ("hanging", Trouble.AWAY),
        ("trickle", Trouble.AWAY),
        ("noise", Trouble.AWAY),
        ("shut", Trouble.AWAY),
    ],
)
def test_answers_that_are_none(double: Crooked, kind: str, expected: Trouble) -> None:
    double.held[f"bucket/pre/fix/cas/{DIGEST.hash}"] = DATA
    began = time.monotonic()
    assert trouble(lambda: all_of(at(double, kind))) is expected
    assert time.monotonic() - began < 2.5


def test_an_upload_in_parts_that_is_never_taken_ends(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(objects.PART + 1))
    with deaf() as port:
        remote = open_remote(f"s3://bucket?endpoint=http://127.0.0.1:{port}", QUICK)
        began = time.monotonic()
        assert trouble(lambda: remote.put_blob(Digest.of_file(path), path)) is Trouble.AWAY
        assert time.monotonic() - began < 2.5


def test_a_bucket_of_google_and_one_of_azure_are_opened_by_their_urls() -> None:
    assert open_remote("gs://bucket/x").name == "gs://bucket/x"
    assert open_remote("az://container/x?account=someone").name == "az://container/x"
    with pytest.raises(ConfigError, match="az://container/x"):
        open_remote("az://container/x")


def test_a_bucket_of_google_and_one_of_azure_are_used_alike(
    double: Crooked, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_BASE_URL", f"{double.url}/bucket")
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "abc")
    for url in ("gs://bucket/x", f"az://bucket/x?account=someone&endpoint={double.url}/bucket"):
        double.held.clear()
        remote = open_remote(url, QUICK)
        assert remote.blob(DIGEST) is None
        remote.put_blob(DIGEST, file)
        assert list(double.held) == [f"bucket/x/cas/{DIGEST.hash}"]
        assert all_of(remote) == DATA
        assert remote.missing([DIGEST]) == set()


def test_who_is_nobody_writes_nothing_into_a_bucket_of_google(
    double: Crooked, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_BASE_URL", f"{double.url}/bucket")
    remote = open_remote("gs://bucket/x", QUICK)
    assert remote.blob(DIGEST) is None
    assert trouble(lambda: remote.put_blob(DIGEST, file)) is Trouble.REFUSED
    assert len(double.seen) == 1  # and nobody else was asked


def test_over_tls(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = servers.certificate(tmp_path)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with crooked(tls=(key, certificate)) as double:
        assert trouble(lambda: at(double, "bucket").action(KEY)) is Trouble.REFUSED
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        remote = at(double, "bucket")
        remote.put_blob(DIGEST, file)
        assert all_of(remote) == DATA


def test_without_obstore_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(SetupError, match="obstore") as caught:
        open_remote("s3://bucket/x")
    assert "pip install" in caught.value.hint


# juicefs' gateway


def test_credentials_that_are_wrong_or_none(gateway: Server, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guess")
    wrong = open_remote(gateway.url)
    assert trouble(lambda: wrong.action(KEY)) is Trouble.REFUSED
    assert trouble(lambda: wrong.put_blob(DIGEST, file)) is Trouble.REFUSED
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(ConfigError, match="AccessKeyId"):
        open_remote(gateway.url)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    nobody = open_remote(gateway.url)
    with pytest.raises(RemoteError, match="AWS_ACCESS_KEY_ID") as caught:
        nobody.put_blob(DIGEST, file)
    assert caught.value.trouble is Trouble.REFUSED
    assert "guess" not in str(caught.value)


def test_a_bucket_that_nobody_made(gateway: Server, file: Path) -> None:
    remote = open_remote("s3://nobodys/x")
    assert trouble(lambda: remote.action(KEY)) is Trouble.REFUSED
    assert trouble(lambda: remote.put_blob(DIGEST, file)) is Trouble.REFUSED


def test_a_blob_in_parts(gateway: Server, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(objects.PART + 100_000))
    digest = Digest.of_file(path)
    remote = open_remote(gateway.url)
    remote.put_blob(digest, path)
    assert all_of(remote, digest) == path.read_bytes()
    assert remote.missing([digest]) == set()
