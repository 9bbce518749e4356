"""The Remote Execution API: what is asked of a server, and servers that answer as none should."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from pipeline.errors import RemoteError, SetupError, Trouble
from pipeline.hashing import Digest
from pipeline.remotes import Remote, Terms, messages, open_remote
from tests import servers
from tests.remotes.doubles import Reapi, crooked, reapi
from tests.remotes.places import document, new_key

Code = grpc.StatusCode
QUICK = Terms(connect=0.5, stall=0.6)
SMALL, LARGE = os.urandom(1000), os.urandom(700_000) + bytes(2_000_000)


@pytest.fixture
def double() -> Iterator[tuple[Reapi, str]]:
    with reapi() as made:
        yield made


@pytest.fixture
def put(tmp_path: Path) -> Callable[[Remote, bytes], Digest]:
    def put_blob(remote: Remote, data: bytes) -> Digest:
        path = tmp_path / "blob"
        path.write_bytes(data)
        digest = Digest.of(data)
        remote.put_blob(digest, path)
        return digest

    return put_blob


def all_of(remote: Remote, digest: Digest) -> bytes | None:
    pieces = remote.blob(digest)
    return None if pieces is None else b"".join(pieces)


def trouble(call: Callable[[], object]) -> Trouble:
    with pytest.raises(RemoteError) as caught:
        call()
    return caught.value.trouble


def test_small_ones_go_together_and_large_ones_as_streams(double: Any, put: Any) -> None:
    server, url = double
    remote = open_remote(f"{url}/some/instance")
    for data in (SMALL, LARGE):
        digest = put(remote, data)
        assert all_of(remote, digest) == data
    assert [name for name in server.seen if "/" not in name] == [
        "capabilities", "put_small", "read_small", "write", "read",
    ]  # fmt: skip
    upload, download = (name for name in server.seen if "/" in name)
    assert upload.startswith("some/instance/uploads/")
    assert upload.endswith(f"/blobs/{digest.hash}/{digest.size}")
    assert download == f"some/instance/blobs/{digest.hash}/{digest.size}"


def test_a_server_that_takes_less_at_once_gets_less(double: Any, put: Any) -> None:
    server, url = double
    server.small = 16_500
    remote = open_remote(url)
    put(remote, SMALL)
    assert "put_small" not in server.seen
    assert "write" in server.seen


def test_blobs_are_compressed_where_the_server_says_so(double: Any, put: Any) -> None:
    server, url = double
    server.zstd = True
    remote = open_remote(url)
    for data in (SMALL, bytes(10_000), LARGE):
        assert all_of(remote, put(remote, data)) == data
        assert all_of(remote, put(remote, data)) == data  # the second upload ends early, with -1
    streams = [name for name in server.seen if "/" in name]
    assert streams
    assert all("compressed-blobs/zstd/" in name for name in streams)


def test_without_the_package_nothing_is_compressed(double: Any, put: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server, url = double
    server.zstd = True
    monkeypatch.setitem(sys.modules, "zstandard", None)
    remote = open_remote(url)
    for data in (SMALL, LARGE):
        assert all_of(remote, put(remote, data)) == data
    assert not [name for name in server.seen if "zstd" in name]


@pytest.mark.parametrize("zstd", [False, True])
def test_an_upload_that_somebody_else_has_ended_is_one(double: Any, put: Any, zstd: bool) -> None:
    server, url = double
    server.zstd = zstd
    put(open_remote(url), LARGE)
    put(open_remote(url), LARGE)
    assert server.seen.count("write") == 2


def test_an_upload_of_which_a_part_was_taken_is_none(double: Any, put: Any) -> None:
    server, url = double
    server.trick["write"] = "half"
    assert trouble(lambda: put(open_remote(url), LARGE)) is Trouble.GARBLED


def test_nothing_is_always_there_and_never_sent(double: Any, put: Any) -> None:
    server, url = double
    remote = open_remote(url)
    nothing = put(remote, b"")
    assert all_of(remote, nothing) == b""
    assert remote.missing([nothing]) == set()
    assert server.seen == []


def test_many_questions_go_in_messages_that_servers_take(double: Any) -> None:
    server, url = double
    absent = {Digest.of(b"%d" % number) for number in range(9000)}
    assert open_remote(url).missing(absent) == absent
    assert server.seen.count("find_missing") == 3


def test_documents_are_found_by_key_and_a_size_that_is_always_the_same(double: Any) -> None:
    server, url = double
    key, entry = new_key(), document(Digest.of(SMALL), text=b"text")
    open_remote(url).put_action(key, entry)
    assert open_remote(url).action(key) == entry
    ((hash_, size),) = server.actions
    assert hash_ == key
    assert size > 0


def test_what_is_no_document_is_not_sent(double: Any) -> None:
    server, url = double
    with pytest.raises(ValueError, match="ActionResult"):
        open_remote(url).put_action(new_key(), b"<html>")
    assert server.seen == []


def test_who_asks_is_said_and_never_shown(double: Any) -> None:
    server, url = double
    server.trick["get_action"] = Code.PERMISSION_DENIED  # whose message repeats what it was sent
    for given, secrets, said in (
        (url, {"token": "abc.def"}, "Bearer abc.def"),
        (url.replace("//", "//me:hush@"), {}, "Basic bWU6aHVzaA=="),
    ):
        with pytest.raises(RemoteError) as caught:
            open_remote(given, Terms(secrets=secrets)).action(new_key())
        assert server.metadata["authorization"] == said
        assert caught.value.trouble is Trouble.REFUSED
        assert not any(secret in str(caught.value) for secret in ("abc.def", "hush", "bWU6aHVzaA=="))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (Code.UNAVAILABLE, Trouble.AWAY),
        (Code.DEADLINE_EXCEEDED, Trouble.AWAY),
        (Code.ABORTED, Trouble.AWAY),
        (Code.UNAUTHENTICATED, Trouble.REFUSED),
        (Code.PERMISSION_DENIED, Trouble.REFUSED),
        (Code.RESOURCE_EXHAUSTED, Trouble.FULL),
        (Code.INVALID_ARGUMENT, Trouble.GARBLED),
        (Code.UNIMPLEMENTED, Trouble.GARBLED),
        (Code.INTERNAL, Trouble.GARBLED),
        (Code.DATA_LOSS, Trouble.GARBLED),
    ],
)
def test_codes(double: Any, put: Any, code: Any, expected: Trouble) -> None:
    server, url = double
    for name in ("get_action", "put_action", "find_missing", "read_small", "put_small", "read", "write"):
        server.trick[name] = code
    remote = open_remote(url)
    digest = Digest.of(SMALL)
    calls: tuple[Callable[[], object], ...] = (
        lambda: remote.action(new_key()),
        lambda: remote.put_action(new_key(), document()),
        lambda: remote.missing([digest]),
        lambda: remote.blob(digest),
        lambda: put(remote, SMALL),
        lambda: remote.blob(Digest(digest.hash, 5_000_000)),
        lambda: put(remote, LARGE),
    )
    assert [trouble(call) for call in calls] == [expected] * 7


def test_a_status_within_an_answer_counts(double: Any, put: Any) -> None:
    server, url = double
    server.trick["status"] = Code.RESOURCE_EXHAUSTED
    assert trouble(lambda: put(open_remote(url), SMALL)) is Trouble.FULL


def test_a_server_without_capabilities_is_taken_for_one_that_can_little(double: Any, put: Any) -> None:
    server, url = double
    server.trick["capabilities"] = Code.UNIMPLEMENTED
    remote = open_remote(url)
    for data in (SMALL, LARGE):
        assert all_of(remote, put(remote, data)) == data


def test_a_server_of_another_digest(double: Any) -> None:
    server, url = double
    server.trick["functions"] = [2]
    assert trouble(lambda: open_remote(url).action(new_key())) is Trouble.GARBLED


@pytest.mark.parametrize(("zstd", "trick"), [(False, "longer"), (True, "garbage"), (True, "bomb")])
def test_blobs_that_are_none(double: Any, put: Any, zstd: bool, trick: str) -> None:
    server, url = double
    server.zstd = zstd
    remote = open_remote(url)
    small, large = put(remote, SMALL), put(remote, LARGE)
    server.trick.update(read_small=trick, read=trick)
    assert trouble(lambda: all_of(remote, small)) is Trouble.GARBLED
    assert trouble(lambda: all_of(remote, large)) is Trouble.GARBLED


def test_a_server_that_stalls(double: Any, put: Any) -> None:
    server, url = double
    remote = open_remote(url, QUICK)
    large = put(remote, LARGE)
    server.trick.update(dict.fromkeys(("get_action", "write"), "stall"), read="hang")
    for call in (lambda: remote.action(new_key()), lambda: all_of(remote, large), lambda: put(remote, LARGE + b"x")):
        began = time.monotonic()
        assert trouble(call) is Trouble.AWAY
        assert time.monotonic() - began < QUICK.stall + 1.0


def test_a_stream_that_breaks(double: Any, put: Any) -> None:
    server, url = double
    remote = open_remote(url, QUICK)
    large = put(remote, LARGE)
    server.trick["read"] = "break"
    assert trouble(lambda: all_of(remote, large)) is Trouble.AWAY
    server.trick.clear()
    assert all_of(remote, large) == LARGE


def test_a_reader_that_stops_early_leaves_nothing_behind(double: Any, put: Any) -> None:
    remote = open_remote(double[1], QUICK)
    pieces = remote.blob(put(remote, LARGE))
    assert pieces is not None
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert all_of(remote, put(remote, SMALL)) == SMALL


def test_a_web_server_is_no_server_of_this_api() -> None:
    with crooked() as web:
        remote = open_remote(web.url.replace("http", "grpc"), QUICK)
        assert trouble(lambda: remote.action(new_key())) in (Trouble.GARBLED, Trouble.AWAY)


def test_a_server_that_speaks_no_tls(double: Any) -> None:
    began = time.monotonic()
    remote = open_remote(double[1].replace("grpc", "grpcs"), QUICK)
    assert trouble(lambda: remote.action(new_key())) is Trouble.AWAY
    assert time.monotonic() - began < 2.5


def test_without_grpc_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(SetupError, match="grpcio") as caught:
        open_remote("grpc://cache.example:1")
    assert "pip install" in caught.value.hint


def test_grpc_is_loaded_only_where_it_is_used() -> None:
    code = """
import sys
from pipeline.remotes import open_remote
for url in ("http://host/x", "file:///nowhere", "s3://bucket/x"):
    open_remote(url)
sys.exit("grpc" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_over_tls(tmp_path: Path, put: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = servers.certificate(tmp_path)
    with reapi(tls=(key, certificate)) as (_, url):
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        trusting = open_remote(url)
        assert all_of(trusting, put(trusting, LARGE)) == LARGE
        monkeypatch.delenv("REQUESTS_CA_BUNDLE")
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        assert trouble(lambda: open_remote(url, QUICK).action(new_key())) is Trouble.REFUSED


# buildbox-casd


def test_casd_needs_no_instance_and_knows_no_other(tmp_path: Path, put: Any) -> None:
    with servers.casd(tmp_path / "casd") as server:
        assert open_remote(server.url).action(new_key()) is None
        assert trouble(lambda: open_remote(f"{server.url}/main").action(new_key())) is Trouble.GARBLED


def test_casd_gives_back_what_is_inline_and_no_document_whose_blobs_it_lacks(tmp_path: Path, put: Any) -> None:
    with servers.casd(tmp_path / "casd") as server:
        remote = open_remote(server.url)
        digest, key = put(remote, SMALL), new_key()
        result = messages.ActionResult.FromString(document(digest, text=b"text" * 1000))
        result.output_files[0].contents = SMALL[:10]
        result.stderr_raw = b"more"
        entry = result.SerializeToString(deterministic=True)
        remote.put_action(key, entry)
        assert remote.action(key) == entry
        remote.put_action(key, document(Digest.of(b"nobody put this")))
        assert remote.action(key) is None


def test_casd_refuses_bytes_under_another_digest(tmp_path: Path) -> None:
    with servers.casd(tmp_path / "casd") as server:
        remote = open_remote(server.url)
        for data in (SMALL, LARGE):
            path = tmp_path / "blob"
            path.write_bytes(data)
            wrong = Digest(new_key(), len(data))
            assert trouble(lambda: remote.put_blob(wrong, path)) is Trouble.GARBLED  # noqa: B023
            assert remote.missing([wrong]) == {wrong}


def test_a_document_larger_than_a_message_is_too_large(tmp_path: Path) -> None:
    with servers.casd(tmp_path / "casd") as server:
        remote = open_remote(server.url)
        assert trouble(lambda: remote.put_action(new_key(), document(text=bytes(5_000_000)))) is Trouble.FULL
