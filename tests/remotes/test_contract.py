"""What every remote promises, on a folder and on the real servers that are installed: pipeline.remotes.contract."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, RemoteError, Trouble
from pipeline.hashing import Digest
from pipeline.remotes import CHUNK, Remote, Terms, open_remote
from tests.remotes import doubles
from tests.remotes.places import SHORT, Place, document, new_key
from tests.servers import free_port

NOBODYS = Digest.of(b"nobody has this")
SERVED = ("http://127.0.0.1:{}", "grpc://127.0.0.1:{}", "s3://bucket/prefix?endpoint=http://127.0.0.1:{}")


def fetched(remote: Remote, digest: Digest) -> bytes | None:
    pieces = remote.blob(digest)
    if pieces is None:
        return None
    parts = list(pieces)
    assert all(0 < len(part) <= CHUNK for part in parts)
    return b"".join(parts)


def failure(call: Callable[[], object]) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        call()
    return caught.value


def test_what_is_not_there_is_a_miss(place: Place) -> None:
    remote = place.open()
    assert remote.action(new_key()) is None
    assert remote.blob(NOBODYS) is None
    assert remote.blob(Digest(NOBODYS.hash, 5_000_000)) is None
    assert remote.missing([NOBODYS]) == {NOBODYS}
    assert remote.missing([]) == set()


@pytest.mark.parametrize("size", [0, 1, 3_000_000, pytest.param(40_000_000, marks=pytest.mark.slow)])
def test_a_blob_comes_back_and_others_see_it(place: Place, size: int) -> None:
    digest, path = place.file(os.urandom(size))
    remote = place.open()
    remote.put_blob(digest, path)
    assert fetched(remote, digest) == path.read_bytes()
    other = place.open()
    assert fetched(other, digest) == path.read_bytes()
    assert other.missing([digest, NOBODYS]) == {NOBODYS}


def test_a_document_comes_back_and_the_last_writer_wins(place: Place) -> None:
    digest, path = place.file(os.urandom(100))
    first, second = place.open(), place.open()
    first.put_blob(digest, path)
    key, one, other = new_key(), document(digest, text=b"one"), document(digest, text=b"other " * 10_000)
    first.put_action(key, one)
    assert second.action(key) == one
    second.put_action(key, other)
    assert first.action(key) == other
    assert first.action(new_key()) is None


def test_putting_twice_is_no_error(place: Place) -> None:
    remote = place.open()
    for size in (10, 2_000_000):
        digest, path = place.file(os.urandom(size))
        remote.put_blob(digest, path)
        place.open().put_blob(digest, path)
        assert fetched(remote, digest) == path.read_bytes()


def test_many_existence_questions_at_once(place: Place) -> None:
    remote = place.open()
    there = []
    for number in range(3):
        digest, path = place.file(os.urandom(50 + number))
        remote.put_blob(digest, path)
        there.append(digest)
    # Where a protocol asks about one at a time, fewer of them show as much.
    absent = {Digest.of(b"absent %d" % number) for number in range(5000 if place.url[:4] in ("file", "grpc") else 500)}
    assert remote.missing([*there, *absent]) == absent
    assert remote.missing(tuple(there)) == set()


def test_many_threads_at_once(place: Place) -> None:
    remote = place.open()
    files = [place.file(os.urandom(20_000 + number)) for number in range(48)]

    def round_trip(file: tuple[Digest, Path]) -> bool:
        digest, path = file
        remote.put_blob(digest, path)
        key, entry = new_key(), document(digest)
        remote.put_action(key, entry)
        return remote.action(key) == entry and fetched(remote, digest) == path.read_bytes()

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(round_trip, files))


def test_a_document_is_never_seen_torn(place: Place) -> None:
    if place.url.startswith("s3"):
        pytest.skip("juicefs' gateway mixes what it reads with what replaces it, which buckets do not")
    digest, path = place.file(os.urandom(100))
    writer, reader = place.open(), place.open()
    writer.put_blob(digest, path)
    key = new_key()
    versions = [document(digest, text=bytes([letter]) * (30_000 + letter * 1_000)) for letter in b"abc"]
    writer.put_action(key, versions[0])
    # buildbox-casd takes the old one away before it has the new one: a miss for a moment, and never a part of one.
    seen = [*versions, None] if place.url.startswith("grpc") else versions
    ended = threading.Event()

    def write() -> None:
        for number in range(30):
            writer.put_action(key, versions[number % 3])
        ended.set()

    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(write)
        read = 0
        while not ended.is_set() and not writing.done():
            assert reader.action(key) in seen
            read += 1
        writing.result()
    assert read


def test_closing_twice_is_no_error(place: Place) -> None:
    remote = place.open()
    remote.missing([NOBODYS])
    remote.close()
    remote.close()


def test_what_is_no_digest_goes_nowhere(place: Place) -> None:
    remote = place.open()
    calls: list[Callable[[Any], object]] = [
        remote.action,
        lambda name: remote.put_action(name, document()),
        lambda name: remote.put_blob(Digest(name, 5), place.file(b"12345")[1]),
    ]
    for name in ("../../../etc/passwd", "/etc/passwd", "A" * 64, "", "0" * 63, "0" * 64 + "\n"):
        for call in calls:
            with pytest.raises(ValueError, match="no SHA-256"):
                call(name)
        for size in (5, 5_000_000):
            assert remote.blob(Digest(name, size)) is None
            assert remote.missing([Digest(name, size)]) == {Digest(name, size)}
    nonsense: list[Any] = [Digest("0" * 64, size) for size in (-1, 1 << 63, "5", None, 1.0)]  # type: ignore[arg-type]
    nonsense.append(Digest(5, 5))  # type: ignore[arg-type]
    assert [remote.blob(each) for each in nonsense] == [None] * 6
    assert remote.missing(nonsense) == set(nonsense)


# servers that go away


@pytest.mark.parametrize("url", SERVED)
@pytest.mark.parametrize("hears", [True, False], ids=["refuses", "deaf"])
def test_an_absent_server_is_known_as_away_in_time(url: str, hears: bool) -> None:
    terms = Terms(connect=0.3, stall=5.0)
    with doubles.deaf() as deaf:
        remote = open_remote(url.format(free_port() if hears else deaf), terms)
        for call in (lambda: remote.action(new_key()), lambda: remote.missing([NOBODYS])):
            began = time.monotonic()
            assert failure(call).trouble is Trouble.AWAY
            assert time.monotonic() - began < terms.connect + 1.0
        remote.close()


@pytest.mark.parametrize("url", ["http://nobody.invalid/x", "grpc://nobody.invalid:80", SERVED[2].split("=")[0]])
def test_a_name_that_nobody_has_is_away(url: str) -> None:
    remote = open_remote(f"{url}=http://nobody.invalid" if "?" in url else url, SHORT)
    began = time.monotonic()
    assert failure(lambda: remote.action(new_key())).trouble is Trouble.AWAY
    assert time.monotonic() - began < 2.0


def test_threads_that_find_nobody_wait_side_by_side() -> None:
    with doubles.deaf() as deaf:
        for url in SERVED:
            remote = open_remote(url.format(deaf), Terms(connect=0.3, stall=5.0))
            began = time.monotonic()
            with ThreadPoolExecutor(8) as threads:
                asked = [threads.submit(remote.action, new_key()) for _ in range(8)]
            assert {failure(one.result).trouble for one in asked} == {Trouble.AWAY}
            assert time.monotonic() - began < 1.2
            remote.close()


def test_a_server_that_dies_and_comes_back(frail: Place) -> None:
    assert frail.server is not None
    remote = frail.open(SHORT)
    digest, path = frail.file(os.urandom(2_000_000))
    remote.put_blob(digest, path)
    assert fetched(remote, digest) == path.read_bytes()
    frail.server.kill()
    for call in (lambda: remote.action(new_key()), lambda: fetched(remote, digest), lambda: remote.missing([digest])):
        assert failure(call).trouble is Trouble.AWAY
    assert failure(lambda: remote.put_blob(digest, path)).trouble is Trouble.AWAY
    frail.server.start()
    remote.put_blob(digest, path)
    assert fetched(remote, digest) == path.read_bytes()


def test_a_server_that_dies_while_it_is_used(frail: Place) -> None:
    assert frail.server is not None
    remote = frail.open(SHORT)
    files = [frail.file(os.urandom(1_500_000)) for _ in range(4)]
    for digest, path in files:
        remote.put_blob(digest, path)
    troubles: list[Trouble] = []

    def use(file: tuple[Digest, Path]) -> None:
        digest, path = file
        try:
            while True:
                assert fetched(remote, digest) == path.read_bytes()
                remote.put_blob(digest, path)
        except RemoteError as error:
            troubles.append(error.trouble)

    with ThreadPoolExecutor(4) as threads:
        used = [threads.submit(use, file) for file in files]
        time.sleep(0.2)
        frail.server.kill()
    for one in used:
        one.result()
    assert set(troubles) == {Trouble.AWAY}


def test_a_server_that_hangs_is_waited_for_no_longer_than_agreed(frail: Place) -> None:
    assert frail.server is not None
    terms = Terms(connect=1.0, stall=0.3)
    patient, remote = frail.open(), frail.open(terms)
    digest, path = frail.file(os.urandom(1_200_000))
    small, small_path = frail.file(b"small")
    patient.put_blob(digest, path)
    assert remote.action(new_key()) is None
    frail.server.freeze()
    try:
        calls: Iterator[Callable[[], object]] = iter(
            (
                lambda: remote.action(new_key()),
                lambda: fetched(remote, digest),
                lambda: remote.missing([digest, NOBODYS]),
                lambda: remote.put_blob(small, small_path),
            )
        )
        for call in calls:
            began = time.monotonic()
            assert failure(call).trouble is Trouble.AWAY
            assert time.monotonic() - began < terms.stall + 1.0
    finally:
        frail.server.thaw()
    with suppress(RemoteError):  # what was asked before may still be in its way
        remote.action(new_key())
    patient.put_blob(small, small_path)
    assert fetched(patient, small) == b"small"


# names


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://someone:hush%21@cache.example:8080/a/b/", "http://cache.example:8080/a/b"),
        ("grpcs://someone:hush%21@cache.example:443/main", "grpcs://cache.example:443/main"),
        ("s3://bucket/pre/fix?endpoint=https://s3.example&region=eu", "s3://bucket/pre/fix"),
        ("https://someone:hush%21@[::1]:8080/x", "https://[::1]:8080/x"),
    ],
)
def test_no_name_shows_a_secret(url: str, name: str) -> None:
    remote = open_remote(url, Terms(secrets={"token": "hush!"}))
    assert remote.name == name
    for shown in (repr(remote), str(vars(remote).get("_address")), repr(Terms(secrets={"token": "hush!"}))):
        assert "hush" not in shown


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "ftp://host/x",
        "http://",
        "http://[::1",
        "http://host:port/",
        "http://host/a b",
        "http://host/x?key=hush",
        "http://host/x#y",
        "http://me:hush#1@host/x",
        "http://me:hush/1@host/x",
        "http://me:12/hush@host/x",
        "http://me:12?hush@host/x",
        "http://me:12#hush@host/x",
        "grpc://me:hush℀@host:1/x",
        "grpc://host",
        "grpc:///x",
        "s3://",
        "s3://key:hush@bucket/x",
        "s3://bucket:80/x",
        "s3://bucket/x?color=hush",
        "s3://bucket?credentials=hush",
        "file://host/x",
        "file://",
        "file:relative",
        "file:///x?y=hush",
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_remote(url)
    assert "hush" not in str(caught.value)
