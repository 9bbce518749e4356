"""Whatever happens to the bytes of a store: never wrong ones, counted, set aside, and put right by putting again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import StoreError
from pipeline.hashing import Digest, key_of
from pipeline.store import ActionEntry, Store

BLOBS = [b"", b"a", b"several bytes", bytes(range(256)) * 20]
KEYS = {key_of({"n": n}): n for n in range(3)}


def fill(store: Store) -> None:
    for data in BLOBS:
        store.put(data)
    for key, n in KEYS.items():
        store.commit(key, ActionEntry("link", {"n": n}, {"out": store.put(BLOBS[n]), "big": store.put(BLOBS[3])}, 1.5))


def read_all(store: Store) -> tuple[list[bytes | None], list[ActionEntry | None]]:
    entries = [store.lookup(key) for key in KEYS]
    return [store.get(Digest.of(data)) for data in BLOBS], entries


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole") / "store"
    fill(Store(root))
    return root


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "first byte": lambda data: flipped(data, 0) if data else b"x",
    "middle byte": lambda data: flipped(data, len(data) // 2) if data else b"x",
    "last byte": lambda data: flipped(data, len(data) - 1) if data else b"x",
    "one byte short": lambda data: data[:-1],
    "one byte long": lambda data: data + b"\n",
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_every_damaged_file_is_seen_set_aside_and_put_right(
    whole: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    names = sorted(
        path.relative_to(whole) for folder in ("cas", "ac") for path in (whole / folder).rglob("*") if path.is_file()
    )
    assert len(names) == len(BLOBS) + len(KEYS)
    right = read_all(Store(whole))
    assert None not in right[0] + right[1]
    for name in names:
        root = tmp_path / name.name
        shutil.copytree(whole, root)
        before = (root / name).read_bytes()
        after = damage(before)
        if after == before:
            continue
        (root / name).chmod(0o600)
        (root / name).write_bytes(after)

        store = Store(root)
        blobs, entries = read_all(store)
        assert all(got in (expected, None) for got, expected in zip(blobs, right[0], strict=True))
        assert all(got in (expected, None) for got, expected in zip(entries, right[1], strict=True))
        assert None in blobs + entries
        assert store.counts.corrupt == 1
        assert not (root / name).exists()
        assert [path.read_bytes() for path in (root / "quarantine").iterdir()] == [after]

        fill(store)
        for reader in (store, Store(root)):
            assert read_all(reader) == right
        assert store.counts.corrupt == 1


def test_putting_over_a_damaged_blob_puts_it_right_without_reading_it_first(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, root := tmp_path / "store")
    for data in BLOBS[1:]:
        path = Store(root).path(Digest.of(data))
        assert path is not None
        path.chmod(0o600)
        path.write_bytes(flipped(data, 0))
    (tmp_path / "source").write_bytes(BLOBS[3])
    store = Store(root)
    store.put(BLOBS[1])
    store.put_stream(iter([BLOBS[2], b""]).__next__)
    store.put_file(tmp_path / "source")
    assert read_all(Store(root)) == read_all(Store(whole))


def test_a_blob_damaged_while_the_store_is_in_use_is_never_read(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, root := tmp_path / "store")
    store, digest = Store(root), Digest.of(BLOBS[3])
    assert store.get(digest) == BLOBS[3]
    path = store.path(digest)
    assert path is not None
    path.chmod(0o600)
    path.write_bytes(flipped(BLOBS[3], 7))
    assert store.get(digest) is None
    assert not store.has(digest)
    store.put(BLOBS[3])
    assert store.get(digest) == BLOBS[3]


def test_a_whole_file_that_took_the_place_of_a_damaged_one_stays(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, root := tmp_path / "store")
    digest = Digest.of(BLOBS[3])
    path = root / "cas" / digest.hash[:2] / digest.hash
    path.chmod(0o600)
    path.write_bytes(flipped(BLOBS[3], 7))
    real = Digest.of_file

    def of_file_while_another_process_repairs(damaged: Path) -> Digest:
        found = real(damaged)
        Store(root).put_stream(iter([BLOBS[3], b""]).__next__)
        return found

    store = Store(root)
    monkeypatch.setattr(Digest, "of_file", of_file_while_another_process_repairs)
    assert not store.has(digest)
    monkeypatch.undo()
    assert store.has(digest)
    assert store.get(digest) == BLOBS[3]


@pytest.mark.parametrize("at", range(23))
def test_a_damaged_marker_is_an_error(whole: Path, tmp_path: Path, at: int) -> None:
    shutil.copytree(whole, root := tmp_path / "store")
    marker = root / "TVMAKE_STORE"
    marker.chmod(0o600)
    marker.write_bytes(flipped(marker.read_bytes(), at))
    with pytest.raises(StoreError, match="another format"):
        Store(root)


def test_a_lost_marker_is_written_again(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, root := tmp_path / "store")
    (root / "TVMAKE_STORE").unlink()
    assert read_all(Store(root)) == read_all(Store(whole))
    assert (root / "TVMAKE_STORE").read_bytes() == (whole / "TVMAKE_STORE").read_bytes()
