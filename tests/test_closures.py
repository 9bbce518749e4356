"""Closures: all that an artifact is made of, as one small document."""

from __future__ import annotations

import zlib

import msgspec
import pytest

from pipeline import closures
from pipeline.closures import Closure, Part
from pipeline.hashing import key_of

PARTS = tuple(Part(key_of({"i": i}), f"native:conv-{i}", f"check\n{{{i}}}\n") for i in range(50))


def test_a_closure_comes_back_and_its_order_does_not_matter() -> None:
    data = Closure(PARTS).to_bytes()
    assert Closure(tuple(reversed(PARTS))).to_bytes() == data
    assert set(Closure.from_bytes(data).parts) == set(PARTS)
    assert Closure.from_bytes(data).said[PARTS[3].key] == PARTS[3].said.encode()
    assert len(data) < len(msgspec.json.encode(PARTS))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>",
        Closure(PARTS).to_bytes()[:-1],
        zlib.compress(b"[]")[:-1],
        zlib.compress(b"{}"),
        zlib.compress(b'[["key"]]'),
        zlib.compress(b"not json"),
    ],
)
def test_what_is_no_closure_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="closure"):
        Closure.from_bytes(data)


def test_what_unpacks_to_more_than_it_should_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closures, "_LARGEST", 1000)
    with pytest.raises(ValueError, match="too large"):
        Closure.from_bytes(zlib.compress(b" " * 10_000_000))


@pytest.mark.parametrize("key", ["../../../home/user/.profile", "a" * 63, "A" * 64, "a" * 64 + "\n", "a\0b", ""])
def test_a_closure_with_keys_that_are_none_is_refused(key: str) -> None:
    """A key is where an entry lies in the store."""
    with pytest.raises(ValueError, match="closure"):
        Closure.from_bytes(Closure((*PARTS, Part(key, "evil", "said"))).to_bytes())
