"""One file to carry: what goes out comes in, and whatever else such a file holds does no harm."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import StoreError
from pipeline.hashing import Digest, key_of
from pipeline.store import ActionEntry, Store
from pipeline.store.carry import FORMAT, Carried, export, take_in

ABOUT: dict[str, object] = {"operator": "conv2d"}
BLOBS = [b"", b"one", bytes(range(256)) * 3, bytes(2_500_000)]


def key(n: int) -> str:
    return key_of({"n": n})


KEYS = [key(n) for n in range(len(BLOBS))]
SETS = [key(100), key(101)]
RECORDS = [b"record one", b"", b"record two" * 99]


def fill(store: Store, order: int = 1) -> Store:
    """The same content, put in one order or the other."""
    for n in range(len(BLOBS))[::order]:
        outputs = {"own": store.put(BLOBS[n]), "shared": store.put(b"shared")}
        store.commit(KEYS[n], ActionEntry("link", {"n": n}, outputs, 1.0 + n))
    for name in SETS[::order]:
        store.sets.add(name, RECORDS[::order], ABOUT)
    return store


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return fill(Store(tmp_path_factory.mktemp("source") / "store"))


@pytest.fixture(scope="module")
def archive(source: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("carry") / "a.tar"
    export(source, KEYS, SETS, path)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home" / "store", durable=False)


def holds_only_what_is_right(store: Store) -> None:
    """Every file has the bytes of its name, every entry its blobs, and nothing lies anywhere else."""
    fresh = Store(store.root)
    for path in (store.root / "cas").glob("*/*"):
        assert Digest.of_file(path).hash == path.name
    for path in (store.root / "ac").glob("*/*"):
        assert fresh.lookup(path.name) is not None
    for path in (store.root / "sets").glob("*/*"):
        assert len(dict(fresh.sets.read(path.name))) == len(fresh.sets.names(path.name))
    assert fresh.counts.corrupt == fresh.counts.torn == 0
    assert not list((store.root / "tmp").iterdir())
    assert not list((store.root / "quarantine").iterdir())
    assert [path.name for path in store.root.parent.iterdir()] == ["store"]


def content(store: Store) -> dict[str, bytes]:
    return {
        str(path.relative_to(store.root)): path.read_bytes()
        for kind in ("cas", "ac", "sets")
        for path in (store.root / kind).rglob("*")
        if path.is_file() and path.name != "CHANGED"
    }


# out and in


def test_what_goes_out_comes_in(source: Store, archive: Path, store: Store) -> None:
    carried = take_in(store, archive)
    assert content(store) == content(source)
    assert (carried.entries, carried.blobs, carried.sets, carried.members) == (4, 5, 2, 6)
    assert (carried.known, carried.wrong, carried.missing, carried.refused) == (0, 0, [], [])
    assert carried.complete
    holds_only_what_is_right(store)
    again = take_in(store, archive)
    assert (again.entries, again.blobs, again.members, again.bytes) == (0, 0, 0, 0)
    assert again.known == 4 + 5 + 6


def test_both_sides_count_the_same(source: Store, store: Store, tmp_path: Path) -> None:
    out = export(source, KEYS, SETS, tmp_path / "home" / "a.tar")
    into = take_in(store, tmp_path / "home" / "a.tar")
    assert out == into


def test_same_content_same_bytes(archive: Path, tmp_path: Path) -> None:
    other = fill(Store(tmp_path / "other"), order=-1)
    export(other, KEYS[::-1] + KEYS, SETS[::-1], tmp_path / "b.tar")
    assert (tmp_path / "b.tar").read_bytes() == archive.read_bytes()


def test_any_tar_can_read_it(archive: Path, tmp_path: Path) -> None:
    listed = subprocess.run(["tar", "-tf", archive], capture_output=True, text=True, check=True).stdout.split()
    with tarfile.open(archive) as tar:
        assert tar.getnames() == listed
        assert all(each.isreg() and each.mtime == each.uid == each.gid == 0 and not each.uname for each in tar)
    assert listed[0] == "TVMAKE_CARRY"
    assert [name.partition("/")[0] for name in listed[1:]] == ["cas"] * 5 + ["ac"] * 4 + ["sets"] * 8
    assert listed[1:6] == sorted(listed[1:6])
    assert listed[6:10] == sorted(listed[6:10])
    assert listed[10].endswith("about.json")


def test_what_is_not_here_is_told_and_left_out(source: Store, store: Store, tmp_path: Path) -> None:
    path = tmp_path / "home" / "a.tar"
    carried = export(source, [KEYS[1], key(55)], [key(56)], path)
    assert carried.missing == [key(55), key(56)]
    assert take_in(store, path).entries == 1
    path.unlink()
    assert store.lookup(KEYS[1]) is not None
    assert store.lookup(KEYS[0]) is None


def test_an_export_that_fails_leaves_nothing(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    (tmp_path / "out").mkdir()
    real = Store.path
    left = iter([True, True])
    monkeypatch.setattr(Store, "path", lambda self, digest: real(self, digest) if next(left, None) else None)
    with pytest.raises(StoreError, match="is gone"):
        export(store, KEYS, [], tmp_path / "out" / "a.tar")
    assert not list((tmp_path / "out").iterdir())


def test_an_export_to_where_nothing_can_be_written_says_so(source: Store, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"writing .*file"):
        export(source, KEYS, [], tmp_path / "file" / "a.tar")
    with pytest.raises(StoreError, match="writing"):
        export(source, KEYS, [], tmp_path)


def test_progress_goes_to_the_end(source: Store, store: Store, tmp_path: Path, archive: Path) -> None:
    told: list[tuple[int, int]] = []
    export(source, KEYS, SETS, tmp_path / "a.tar", lambda done, total: told.append((done, total)))
    size = sum(len(blob) for blob in [*BLOBS, b"shared"])
    assert told[-1] == (size, size)
    told.clear()
    take_in(store, archive, lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (archive.stat().st_size,) * 2


# what the caller refuses, and what is here already


def test_the_caller_may_refuse_an_entry(archive: Path, store: Store) -> None:
    asked: dict[str, bytes] = {}

    def accept(name: str, document: bytes) -> bool:
        asked[name] = document
        return name != KEYS[2]

    carried = take_in(store, archive, accept=accept)
    assert carried.refused == [KEYS[2]]
    assert carried.entries == 3
    assert store.lookup(KEYS[2]) is None
    assert asked[KEYS[1]] == store.document(KEYS[1])
    assert set(asked) == set(KEYS)


def test_what_is_here_stays(archive: Path, store: Store) -> None:
    mine = ActionEntry("link", {"n": "mine"}, {"own": store.put(b"mine")}, 9.0)
    store.commit(KEYS[0], mine)
    carried = take_in(store, archive)
    assert store.lookup(KEYS[0]) == mine
    assert carried.entries == 3
    assert carried.known == 1


def test_an_entry_here_without_its_blobs_becomes_whole(source: Store, archive: Path, store: Store) -> None:
    take_in(store, archive)
    for path in (store.root / "cas").glob("*/*"):
        path.unlink()
    store = Store(store.root)
    assert store.lookup(KEYS[3]) is None
    take_in(store, archive)
    assert content(store) == content(source)


# archives that somebody else made

Member = tuple[str, bytes]


def info(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.type, made.linkname = size, kind, link
    return made


def packed(*members: Member | tarfile.TarInfo, marker: bytes = FORMAT.encode(), end: bool = True) -> bytes:
    out = io.BytesIO()
    for each in [("TVMAKE_CARRY", marker), *members]:
        if isinstance(each, tarfile.TarInfo):
            out.write(each.tobuf(tarfile.USTAR_FORMAT if each.size < 8**11 else tarfile.GNU_FORMAT))
        else:
            name, data = each
            header = info(name, len(data)).tobuf(tarfile.USTAR_FORMAT, errors="surrogateescape")
            out.write(header + data + bytes(-len(data) % 512))
    return out.getvalue() + bytes(1024 * end)


def blob(data: bytes) -> Member:
    return f"cas/{Digest.of(data).hash}", data


def entry(n: int, *blobs: bytes) -> Member:
    made = ActionEntry("link", {"n": n}, {f"out{i}": Digest.of(data) for i, data in enumerate(blobs)}, 1.0)
    return f"ac/{key(n)}", made.to_bytes(key(n))


def forged(n: int, text: str) -> Member:
    """A document whose check holds, whatever it says."""
    check = hashlib.sha256(f"{key(n)}\n{text}".encode()).hexdigest()
    return f"ac/{key(n)}", f"{check}\n{text}\n".encode()


def document(**fields: object) -> str:
    right = {"components": {}, "format": 1, "outputs": {}, "seconds": 1.0, "stage": "link"}
    return json.dumps({**right, **fields}, sort_keys=True, separators=(",", ":"))


GOOD = [blob(b"good"), entry(0, b"good")]
HASH = Digest.of(b"good").hash


@pytest.fixture
def take(store: Store) -> Callable[[bytes], Carried]:
    """Takes in an archive of these bytes, into a store that has something already, and sees that it is unharmed."""
    store.commit(key(9), ActionEntry("link", {}, {"out": store.put(b"mine")}, 0.0))
    (store.root.parent.parent / "victim").write_bytes(b"victim")

    def taken(data: bytes) -> Carried:
        path = store.root.parent.parent / "a.tar"
        path.write_bytes(data)
        before = content(store)
        try:
            return take_in(store, path)
        finally:
            after = content(store)
            assert {name: after.get(name) for name in before} == before
            assert (store.root.parent.parent / "victim").read_bytes() == b"victim"
            assert {path.name for path in store.root.parent.parent.iterdir()} == {"home", "a.tar", "victim"}
            holds_only_what_is_right(store)

    return taken


def test_an_archive_made_by_hand(take: Callable[[bytes], Carried], store: Store) -> None:
    carried = take(packed(*GOOD))
    assert (carried.entries, carried.blobs, carried.wrong, carried.complete) == (1, 1, 0, True)
    assert store.get(Digest.of(b"good")) == b"good"


NOT_OURS = {
    "empty": b"",
    "HTML": b"<html>" * 200,
    "zeros": bytes(4096),
    "noise": random.Random(1).randbytes(4000),
    "zip": b"PK\x03\x04" + bytes(600),
    "short": packed()[:100],
    "another tar": packed()[1024:],
    "tar of others": info("README", 0).tobuf() + bytes(1024),
    "no format": packed(marker=b"something else\n"),
    "large format": packed(marker=b"tvmake carry, format 1\n" * 999),
    "format is a link": info("TVMAKE_CARRY", 0, tarfile.SYMTYPE, "/etc/passwd").tobuf() + bytes(1024),
}


@pytest.mark.parametrize("data", NOT_OURS.values(), ids=NOT_OURS)
def test_what_is_no_such_file_is_refused(take: Callable[[bytes], Carried], data: bytes) -> None:
    with pytest.raises(StoreError, match="no file that"):
        take(data)


@pytest.mark.parametrize(
    "marker", [b"tvmake carry, format 2\n", b"tvmake carry, format 1", b"tvmake carry, format \xff"]
)
def test_another_format_is_refused(take: Callable[[bytes], Carried], marker: bytes) -> None:
    with pytest.raises(StoreError, match="another format") as caught:
        take(packed(*GOOD, marker=marker))
    assert "as new as" in caught.value.hint


def test_what_cannot_be_read_is_refused(store: Store, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "nothing" / "below"):
        with pytest.raises(StoreError, match="reading"):
            take_in(store, path)
    with pytest.raises(StoreError, match="no file"):
        take_in(store, tmp_path / "pipe")


HASH_OF_BAD = Digest.of(b"bad").hash
EMPTY = Digest.of(b"").hash  # what a link and its like would be, if they were read
WRONG: dict[str, Member | tarfile.TarInfo] = {
    "path above": ("../victim", b"bad"),
    "path above in cas": ("cas/../../../victim", b"bad"),
    "absolute": ("/victim", b"bad"),
    "the store's marker": ("TVMAKE_STORE", b"bad"),
    "the marker again": ("TVMAKE_CARRY", b"tvmake carry, format 2\n"),
    "upper case": (f"cas/{HASH_OF_BAD.upper()}", b"bad"),
    "a folder of its own": (f"cas/{HASH_OF_BAD[:2]}/{HASH_OF_BAD}", b"bad"),
    "name with a break": (f"cas/{HASH_OF_BAD}\n", b"bad"),
    "pin": ("pins/a.json", b"{}"),
    "other bytes": (f"cas/{HASH_OF_BAD}", b"dab"),
    "other bytes, less of them": (f"cas/{HASH_OF_BAD}", b"ba"),
    "a good blob's name": (f"cas/{HASH}", b"evil"),
    "my blob's name, longer": (f"cas/{Digest.of(b'mine').hash}", b"mine and more"),
    "entry of another key": (f"ac/{key(1)}", entry(2)[1]),
    "entry that is none": (f"ac/{key(1)}", b"<html>"),
    "empty entry": (f"ac/{key(1)}", b""),
    "entry of a list": forged(1, "[]"),
    "entry of nothing": forged(1, "{}"),
    "entry of another format": forged(1, document(format=2)),
    "entry with a list of outputs": forged(1, document(outputs=["x"])),
    "entry with wrong outputs": forged(1, document(outputs={"x": [HASH]})),
    "entry with wrong seconds": forged(1, document(seconds="long")),
    "entry written in another way": forged(1, document() + " "),
    "entry that is deep": forged(1, '{"format":' + "[" * 100_000),
    "entry with a large number": forged(1, document(seconds=10**30).replace("00,", "0" * 9000 + ",")),
    "member with other bytes": (f"sets/{key(1)}/{HASH_OF_BAD}", b"dab"),
    "about that is none": (f"sets/{key(1)}/about.json", b"[]"),
    "about that is deep": (f"sets/{key(1)}/about.json", b"[" * 100_000),
    "large about": (f"sets/{key(1)}/about.json", b"{" + b" " * 1_100_000 + b"}"),
    "set above": (f"sets/../{HASH_OF_BAD}", b"bad"),
    "symbolic link": info(f"cas/{EMPTY}", 0, tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": info(f"cas/{EMPTY}", 0, tarfile.LNKTYPE, "../victim"),
    "device": info(f"cas/{EMPTY}", 0, tarfile.CHRTYPE),
    "pipe": info(f"cas/{EMPTY}", 0, tarfile.FIFOTYPE),
    "folder": info(f"cas/{EMPTY}", 0, tarfile.DIRTYPE),
    "no text": ("cas/\udcff\udcfe", b"bad"),
    "escape": ("cas/\x1b[2J", b"bad"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named_and_passed_over(
    take: Callable[[bytes], Carried], wrong: Member | tarfile.TarInfo
) -> None:
    carried = take(packed(wrong, *GOOD))
    assert (carried.entries, carried.blobs, carried.complete) == (1, 1, True)
    ((name, why),) = carried.wrongs
    assert carried.wrong == 1
    assert why.startswith("it ")
    assert name.isprintable()
    assert name.isascii()


@pytest.mark.parametrize("name", ["../../../victim", "/etc/passwd", HASH.upper(), "", 5])
def test_an_entry_that_names_a_path_is_not_taken(take: Callable[[bytes], Carried], name: object, store: Store) -> None:
    carried = take(packed(forged(1, document(outputs={"out": [name, 6]})), *GOOD))
    assert carried.entries == 1
    assert carried.wrong + len(carried.missing) == 1
    assert store.lookup(key(1)) is None


@pytest.mark.parametrize("size", [3, 5, 10**30])
def test_an_entry_that_names_another_size_is_not_taken(take: Callable[[bytes], Carried], size: int) -> None:
    outputs = {"out": [Digest.of(b"mine").hash, size]}
    carried = take(packed(forged(1, document(outputs=outputs)), *GOOD))
    assert carried.missing == [key(1)]
    assert carried.entries == 1


def test_an_entry_before_its_blobs_is_not_taken(take: Callable[[bytes], Carried]) -> None:
    carried = take(packed(*GOOD[::-1]))
    assert (carried.entries, carried.blobs, carried.missing) == (0, 1, [key(0)])


@pytest.mark.parametrize("size", [1, 10**6, 8**11 - 1, 8**11, 2**62, 2**80])
def test_a_size_that_cannot_be_ends_the_reading(take: Callable[[bytes], Carried], size: int) -> None:
    carried = take(packed(*GOOD, info(f"cas/{HASH_OF_BAD}", size), end=False))
    assert (carried.entries, carried.complete) == (1, False)
    assert "larger than the file" in carried.wrongs[0][1]


def test_a_negative_size_ends_the_reading(take: Callable[[bytes], Carried]) -> None:
    header = bytearray(info("cas/x", 2**40).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 12
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    assert tarfile.TarInfo.frombuf(bytes(header), "utf-8", "strict").size < 0
    carried = take(packed(*GOOD, end=False) + bytes(header) + bytes(1024))
    assert (carried.entries, carried.complete) == (1, False)


def test_many_wrongs_are_counted_and_some_named(take: Callable[[bytes], Carried]) -> None:
    carried = take(packed(*[(f"x{n}", b"") for n in range(500)], *GOOD))
    assert carried.wrong == 500
    assert len(carried.wrongs) == 100


def test_members_without_about_and_in_another_order(take: Callable[[bytes], Carried], store: Store) -> None:
    records = [b"r%d" % n for n in range(600)]
    members = [(f"sets/{key(1)}/{Digest.of(each).hash}", each) for each in records]
    carried = take(packed(*members, (f"sets/{key(1)}/about.json", b'{"late": 1}')))
    assert (carried.members, carried.sets) == (600, 1)
    assert len(store.sets.names(key(1))) == 600


# damage of every kind


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An archive of small things, so that most of it is headers."""
    folder = tmp_path_factory.mktemp("small")
    store = Store(folder / "store")
    for n in range(3):
        outputs = {"own": store.put(b"blob %d" % n), "shared": store.put(b"shared")}
        store.commit(key(n), ActionEntry("link", {"n": n}, outputs, 1.0))
    store.sets.add(key(5), [b"record"], {})
    export(store, [key(n) for n in range(3)], [key(5)], folder / "a.tar")
    return (folder / "a.tar").read_bytes()


def taken_or_refused(take: Callable[[bytes], Carried], data: bytes) -> Carried | None:
    try:
        return take(data)
    except StoreError as error:
        if "no file that" not in error.message and "another format" not in error.message:
            raise
        return None


def test_truncated_anywhere(take: Callable[[bytes], Carried], small: bytes) -> None:
    for length in [*range(0, len(small), 256), *range(len(small) - 1030, len(small), 10)]:
        carried = taken_or_refused(take, small[:length])
        assert carried is None or carried.complete == (length >= len(small) - 512)


def test_mutated_anywhere(take: Callable[[bytes], Carried], small: bytes) -> None:
    chance = random.Random(9)
    for _ in range(250):
        data = bytearray(small)
        for _ in range(chance.choice([1, 1, 2, 8])):
            at = chance.randrange(len(data))
            kind = chance.randrange(5)
            if kind == 0:
                data[at] ^= 1 << chance.randrange(8)
            elif kind == 1:
                data[at : at + 1] = chance.randbytes(chance.randrange(4))
            elif kind == 2:
                data[at : at + 12] = chance.choice([b"7" * 12, b"\xff" * 12, b"\x80" + bytes(11), b"-0000000001\0"])
            elif kind == 3:  # blocks change places
                one, other = (512 * chance.randrange(len(data) // 512) for _ in range(2))
                data[one : one + 512], data[other : other + 512] = data[other : other + 512], data[one : one + 512]
            else:
                _mend(data, at // 512 * 512, chance)
        taken_or_refused(take, bytes(data))


def _mend(data: bytearray, at: int, chance: random.Random) -> None:
    """Changes a header and has its checksum right, as an attacker would."""
    header = data[at : at + 512]
    if len(header) == 512 and any(header):
        field, size = chance.choice([(0, 100), (124, 12), (156, 1), (157, 100), (345, 155)])
        for _ in range(chance.randrange(1, 4)):
            header[field + chance.randrange(size)] = chance.choice(b"\x00\xff./07Lgx5")
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
        data[at : at + 512] = header
