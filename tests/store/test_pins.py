"""Pins: what is written is read, names are names, and a file that cannot be read is told of."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.hashing import key_of
from pipeline.store import Store
from pipeline.store.pins import Pins

KEYS = [key_of({"n": n}) for n in range(5)]


@pytest.fixture
def pins(tmp_path: Path) -> Pins:
    return Pins(Store(tmp_path / "store").root)


def test_what_was_pinned_is_found_by_everybody(pins: Pins, tmp_path: Path) -> None:
    assert pins.names() == []
    pins.add("release-1.0", KEYS[:3], "what was shipped in May")
    pins.add("lock", KEYS[2:4])
    for reader in (pins, Pins(tmp_path / "store")):
        assert reader.names() == ["lock", "release-1.0"]
        assert reader.keys() == set(KEYS[:4])
        assert reader.broken() == []
        pin = reader.read("release-1.0")
        assert pin is not None
        assert (pin.name, pin.about, pin.keys) == ("release-1.0", "what was shipped in May", sorted(KEYS[:3]))
    assert not list((tmp_path / "store" / "tmp").iterdir())


def test_the_file_is_as_documented(pins: Pins, tmp_path: Path) -> None:
    pins.add("a", [KEYS[1], KEYS[0], KEYS[1]], "why")
    said = json.loads((tmp_path / "store" / "pins" / "a.json").read_bytes())
    assert said == {"format": 1, "name": "a", "about": "why", "keys": sorted(KEYS[:2])}


def test_a_pin_is_replaced_and_removed(pins: Pins) -> None:
    pins.add("a", KEYS[:2])
    pins.add("a", KEYS[3:])
    assert pins.keys() == set(KEYS[3:])
    assert pins.remove("a")
    assert not pins.remove("a")
    assert pins.names() == []
    assert pins.keys() == set()


@pytest.mark.parametrize("name", ["a", "A-b_c.1", "x" * 80, ".", "..", "-"])
def test_names(pins: Pins, name: str, tmp_path: Path) -> None:
    pins.add(name, KEYS)
    assert pins.names() == [name]
    assert pins.keys() == set(KEYS)
    assert [path.parent for path in (tmp_path / "store").rglob("*.json")] == [tmp_path / "store" / "pins"]
    assert pins.remove(name)


@pytest.mark.parametrize("name", ["", "x" * 81, "a/b", "../a", "a b", "a\n", "ä", "a\0"])
def test_no_names(pins: Pins, name: str) -> None:
    for attempt in (lambda: pins.add(name, KEYS), lambda: pins.remove(name)):
        with pytest.raises(ConfigError, match="cannot be the name of a pin") as caught:
            attempt()
        assert "letters" in caught.value.hint


@pytest.mark.parametrize("key", ["", "ab", KEYS[0].upper(), KEYS[0] + "\n"])
def test_no_keys(pins: Pins, key: str) -> None:
    with pytest.raises(ConfigError, match="no key"):
        pins.add("a", [KEYS[0], key])
    assert pins.names() == []


BROKEN = {
    "empty": b"",
    "half": b'{"format":1,"name":"b","ab',
    "no JSON": b"<html>",
    "no object": b"[]",
    "later": b'{"format":2,"name":"b","about":"","keys":[]}',
    "no keys": b'{"format":1,"name":"b","about":""}',
    "wrong keys": b'{"format":1,"name":"b","about":"","keys":["x"]}',
    "no text": b"\xff\xfe",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_told_of_and_the_others_are_read(pins: Pins, tmp_path: Path, content: bytes) -> None:
    pins.add("a", KEYS[:2])
    path = tmp_path / "store" / "pins" / "b.json"
    path.write_bytes(content)
    assert pins.keys() == set(KEYS[:2])
    assert pins.broken() == [path]
    assert pins.names() == ["a", "b"]
    assert pins.remove("b")
    assert pins.broken() == []


def test_the_stamp_tells_of_every_change(pins: Pins, tmp_path: Path) -> None:
    stamps = [pins.stamp()]
    pins.add("a", KEYS)
    stamps.append(pins.stamp())
    pins.add("a", KEYS[1:])
    stamps.append(pins.stamp())
    pins.remove("a")
    assert all(one != other for one, other in pairwise(stamps))
    assert pins.stamp() == []


def test_a_store_of_a_version_without_pins(pins: Pins, tmp_path: Path) -> None:
    (tmp_path / "store" / "pins").rmdir()
    assert pins.survey() == (set(), [])
    pins.add("a", KEYS)
    assert pins.keys() == set(KEYS)
