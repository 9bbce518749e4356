"""Bazel's HTTP cache protocol: what goes over the wire, and servers that answer as none should."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import RemoteError, StoreError, Trouble
from pipeline.hashing import Digest
from pipeline.remotes import Remote, Terms, open_remote
from tests import servers
from tests.remotes.doubles import Crooked, crooked, deaf
from tests.remotes.places import document, new_key

DATA = os.urandom(50_000)
DIGEST = Digest.of(DATA)
KEY = new_key()
QUICK = Terms(connect=0.5, stall=0.4)


@pytest.fixture
def double() -> Iterator[Crooked]:
    with crooked() as server:
        server.held = {f"cas/{DIGEST.hash}": DATA, f"ac/{KEY}": document(DIGEST)}
        yield server


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "blob"
    path.write_bytes(DATA)
    return path


def all_of(remote: Remote, digest: Digest = DIGEST) -> bytes | None:
    pieces = remote.blob(digest)
    return None if pieces is None else b"".join(pieces)


def trouble(call: Callable[[], object]) -> Trouble:
    with pytest.raises(RemoteError) as caught:
        call()
    return caught.value.trouble


def test_what_goes_over_the_wire(double: Crooked, file: Path) -> None:
    remote = open_remote(f"{double.url}/good/")
    remote.put_blob(DIGEST, file)
    remote.put_action(KEY, b"")
    assert all_of(remote) == DATA
    assert remote.missing([DIGEST]) == set()
    methods = [(method, path) for method, path, _ in double.seen]
    assert methods == [
        ("PUT", f"/good/cas/{DIGEST.hash}"),
        ("PUT", f"/good/ac/{KEY}"),
        ("GET", f"/good/cas/{DIGEST.hash}"),
        ("HEAD", f"/good/cas/{DIGEST.hash}"),
    ]
    assert [headers.get("content-length") for _, _, headers in double.seen[:2]] == ["50000", "0"]
    assert all("transfer-encoding" not in headers and "authorization" not in headers for _, _, headers in double.seen)


def test_connections_are_kept(double: Crooked, file: Path) -> None:
    remote = open_remote(f"{double.url}/good")
    for _ in range(5):
        assert all_of(remote) == DATA
        assert remote.action(KEY) is not None
        assert remote.action(new_key()) is None
        assert remote.missing([DIGEST]) == set()
        remote.put_blob(DIGEST, file)
    assert double.connections == 1


@pytest.mark.parametrize(
    ("url", "token", "said"),
    [
        ("http://me:p%40ss@{}", None, "Basic " + base64.b64encode(b"me:p@ss").decode()),
        ("http://{}", "abc.def", "Bearer abc.def"),
        ("http://me:p%40ss@{}", "abc.def", "Bearer abc.def"),
    ],
)
def test_who_asks_is_said_once_and_never_shown(double: Crooked, url: str, token: str | None, said: str) -> None:
    host = double.url.removeprefix("http://")
    remote = open_remote(url.format(f"{host}/401"), Terms(secrets={"token": token} if token else {}))
    with pytest.raises(RemoteError) as caught:
        remote.action(KEY)
    assert double.seen[0][2]["authorization"] == said
    shown = f"{caught.value!r} {caught.value} {remote.name} {remote!r}"
    assert not any(secret in shown for secret in ("p@ss", "p%40ss", "abc.def", said))


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        *[(status, Trouble.REFUSED) for status in (401, 403, 405, 407, 501)],
        *[(status, Trouble.FULL) for status in (413, 507)],
        *[(status, Trouble.AWAY) for status in (408, 429, 500, 502, 503, 504)],
        *[(status, Trouble.GARBLED) for status in (206, 299, 400, 418)],
    ],
)
def test_statuses(double: Crooked, file: Path, status: int, expected: Trouble) -> None:
    remote = open_remote(f"{double.url}/{status}", QUICK)
    assert trouble(lambda: remote.action(KEY)) is expected
    assert trouble(lambda: remote.blob(DIGEST)) is expected
    assert trouble(lambda: remote.missing([DIGEST, Digest.of(b"x")])) is expected
    assert trouble(lambda: remote.put_blob(DIGEST, file)) is expected


def test_gone_is_a_miss_for_who_reads_and_nonsense_for_who_writes(double: Crooked, file: Path) -> None:
    for status in (404, 410):
        remote = open_remote(f"{double.url}/{status}")
        assert remote.action(KEY) is None
        assert remote.blob(DIGEST) is None
        assert remote.missing([DIGEST]) == {DIGEST}
        assert trouble(lambda: remote.put_blob(DIGEST, file)) is Trouble.GARBLED  # noqa: B023


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("html", Trouble.GARBLED),
        ("half", Trouble.AWAY),
        ("longer", Trouble.GARBLED),
        ("endless", Trouble.GARBLED),
        ("stall", Trouble.AWAY),
        ("hanging", Trouble.AWAY),
        ("trickle", Trouble.AWAY),
        ("drip", Trouble.AWAY),
        ("noise", Trouble.GARBLED),
        ("shut", Trouble.AWAY),
        ("gzip", Trouble.GARBLED),
        ("loop", Trouble.GARBLED),
        ("nowhere", Trouble.GARBLED),
    ],
)
def test_answers_that_are_none(double: Crooked, kind: str, expected: Trouble) -> None:
    remote = open_remote(f"{double.url}/{kind}", QUICK)
    began = time.monotonic()
    assert trouble(lambda: all_of(remote)) is expected
    assert time.monotonic() - began < 2.0


def test_a_page_instead_of_everything_is_stored_by_nobody(double: Crooked, file: Path) -> None:
    remote = open_remote(f"{double.url}/html")
    assert remote.missing([DIGEST]) == {DIGEST}  # what is there has another length
    assert remote.action(KEY) is not None  # its caller finds that it is no document


@pytest.mark.parametrize("kind", ["good", "closing", "chunked", "moved", "dropping"])
def test_answers_that_are_good_in_their_way(double: Crooked, kind: str) -> None:
    remote = open_remote(f"{double.url}/{kind}", QUICK)
    for _ in range(4):
        assert all_of(remote) == DATA
        assert remote.action(KEY) == double.held[f"ac/{KEY}"]


def test_writing_repeats_once_what_a_closed_connection_swallowed(double: Crooked, file: Path) -> None:
    double.held.clear()
    remote = open_remote(f"{double.url}/dropping", QUICK)
    remote.put_blob(DIGEST, file)
    assert double.held[f"cas/{DIGEST.hash}"] == DATA


def test_a_redirect_takes_no_credentials_to_another_server(double: Crooked, file: Path) -> None:
    with crooked() as other:
        other.held = double.held
        double.elsewhere = f"{other.url}/good"
        remote = open_remote(f"{double.url}/away", Terms(secrets={"token": "abc"}))
        assert all_of(remote) == DATA
        assert remote.missing([DIGEST]) == set()
        assert all("authorization" in headers for _, _, headers in double.seen)
        assert other.seen
        assert not any("authorization" in headers for _, _, headers in other.seen)
        assert trouble(lambda: remote.put_blob(DIGEST, file)) is Trouble.GARBLED


def test_a_redirect_on_the_same_server_keeps_them(double: Crooked) -> None:
    remote = open_remote(f"{double.url}/moved", Terms(secrets={"token": "abc"}))
    assert all_of(remote) == DATA
    assert [headers["authorization"] for _, _, headers in double.seen] == ["Bearer abc"] * 2


def test_a_document_without_end_is_not_taken_into_memory(double: Crooked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.remotes.http.LARGEST_DOCUMENT", 1 << 20)
    assert trouble(lambda: open_remote(f"{double.url}/endless").action(KEY)) is Trouble.GARBLED


def test_a_proxy_is_used_as_the_environment_says(double: Crooked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", double.url.replace("//", "//someone:hush@"))
    monkeypatch.setenv("no_proxy", "direct.invalid")
    remote = open_remote("http://cache.invalid/good", QUICK)
    assert remote.action(KEY) == double.held[f"ac/{KEY}"]
    assert double.seen[0][1].startswith("http://cache.invalid/good/ac/")
    assert double.seen[0][2]["proxy-authorization"].startswith("Basic ")
    assert trouble(lambda: open_remote("http://direct.invalid/good", QUICK).action(KEY)) is Trouble.AWAY


def test_a_proxy_that_is_away_is_told_of_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://someone:hush@127.0.0.1:{servers.free_port()}")
    with pytest.raises(RemoteError, match="proxy") as caught:
        open_remote("http://cache.invalid/good", QUICK).action(KEY)
    assert caught.value.trouble is Trouble.AWAY
    assert "hush" not in str(caught.value)


def test_https_to_what_speaks_http(double: Crooked) -> None:
    assert trouble(lambda: open_remote(double.url.replace("http", "https"), QUICK).action(KEY)) is Trouble.GARBLED


def test_a_large_upload_that_is_never_taken_ends_in_time(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(20_000_000))
    with deaf() as port:
        began = time.monotonic()
        assert trouble(lambda: open_remote(f"http://127.0.0.1:{port}", QUICK).put_blob(Digest.of_file(path), path))
        assert time.monotonic() - began < 1.5


def test_a_local_file_that_is_not_what_it_should_be_is_no_fault_of_the_remote(double: Crooked, tmp_path: Path) -> None:
    remote = open_remote(f"{double.url}/good")
    path = tmp_path / "blob"
    for _ in range(2):
        with pytest.raises(StoreError) as caught:
            remote.put_blob(DIGEST, path)
        assert not isinstance(caught.value, RemoteError)
        path.write_bytes(b"short")
    assert not double.seen


# nginx


def test_nginx_where_writing_needs_a_password(tmp_path: Path, file: Path) -> None:
    with servers.nginx(tmp_path / "nginx", writer=("builder", "hush")) as server:
        reader, writer = open_remote(server.url), open_remote(server.url.replace("//", "//builder:hush@"))
        stranger = open_remote(server.url.replace("//", "//builder:guess@"))
        assert reader.blob(DIGEST) is None
        assert trouble(lambda: reader.put_blob(DIGEST, file)) is Trouble.REFUSED
        assert trouble(lambda: stranger.put_blob(DIGEST, file)) is Trouble.REFUSED
        writer.put_blob(DIGEST, file)
        assert all_of(reader) == DATA


def test_nginx_that_only_serves_files(tmp_path: Path, file: Path) -> None:
    with servers.nginx(tmp_path / "nginx", read_only=True) as server:
        remote = open_remote(server.url)
        assert remote.missing([DIGEST]) == {DIGEST}
        assert trouble(lambda: remote.put_blob(DIGEST, file)) is Trouble.REFUSED
        portal = open_remote(f"{server.url}/portal")
        assert trouble(lambda: portal.blob(DIGEST)) is Trouble.GARBLED


def test_a_slow_server_is_waited_for_as_long_as_it_moves(tmp_path: Path, file: Path) -> None:
    with servers.nginx(tmp_path / "nginx", rate="40k") as server:
        remote = open_remote(server.url, Terms(stall=2.0))
        remote.put_blob(DIGEST, file)
        began = time.monotonic()
        assert all_of(remote) == DATA
        assert time.monotonic() - began > 0.5


def test_a_web_server_over_a_shared_folder_serves_what_lies_there(tmp_path: Path, file: Path) -> None:
    with servers.nginx(tmp_path / "nginx") as server:
        folder, web = open_remote(f"file://{server.folder}/root"), open_remote(server.url)
        folder.put_blob(DIGEST, file)
        assert all_of(web) == DATA
        web.put_action(KEY, b"document")
        assert folder.action(KEY) == b"document"
        assert {path.name for path in (server.folder / "root").iterdir()} == {"TVMAKE_REMOTE", "ac", "cas", "tmp"}


def test_over_tls(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = servers.certificate(tmp_path)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with servers.nginx(tmp_path / "nginx", tls=(key, certificate)) as server:
        assert trouble(lambda: open_remote(server.url, QUICK).action(KEY)) is Trouble.REFUSED
        for variable in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
            monkeypatch.setenv(variable, str(certificate))
            remote = open_remote(server.url)
            remote.put_blob(DIGEST, file)
            assert all_of(remote) == DATA
            monkeypatch.delenv(variable)


def test_a_redirect_does_not_lead_out_of_tls(double: Crooked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = servers.certificate(tmp_path)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with crooked(tls=(key, certificate)) as secure:
        secure.elsewhere = f"{double.url}/good"
        assert trouble(lambda: open_remote(f"{secure.url}/away").action(KEY)) is Trouble.GARBLED
        assert not double.seen
        double.elsewhere, secure.held = f"{secure.url}/good", double.held
        assert all_of(open_remote(f"{double.url}/away")) == DATA


def test_nothing_is_told_of_requests_but_what_a_log_may_have(double: Crooked, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    open_remote(double.url.replace("//", "//me:hush@") + "/good", Terms(secrets={"token": "abc.def"})).action(KEY)
    assert "hush" not in caplog.text
    assert "abc.def" not in json.dumps(caplog.text)
