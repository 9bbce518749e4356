from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.hashing import Digest
from pipeline.store import ActionEntry

KEY = "ab" * 32
ENTRY = ActionEntry("link", {"stage": "link", "tools": {"cc": "g++ 13"}}, {"library": Digest.of(b"l")}, 1.25)

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
entries = st.builds(
    ActionEntry,
    st.text(max_size=5),
    st.dictionaries(st.text(max_size=5), plain, max_size=4),
    st.dictionaries(st.text(max_size=5), st.builds(Digest.of, st.binary(max_size=3)), max_size=3),
    st.integers(0, 10**9).map(lambda n: n / 10**6),
)


def test_an_entry_is_two_lines_that_anyone_can_read() -> None:
    check, text, end = ENTRY.to_bytes(KEY).split(b"\n")
    assert check.decode() == "8cdb77c25b8bff2e9aa3d3553fc566ac5da2eaab0495d2bd5d0447d21ff59f83"
    assert json.loads(text) == {
        "format": 1,
        "stage": "link",
        "components": {"stage": "link", "tools": {"cc": "g++ 13"}},
        "outputs": {"library": ["acac86c0e609ca906f632b0e2dacccb2b77d22b0621f20ebece1a4835b93f6f0", 1]},
        "seconds": 1.25,
    }
    assert end == b""


@given(entries)
def test_an_entry_is_read_back(entry: ActionEntry) -> None:
    assert ActionEntry.from_bytes(KEY, entry.to_bytes(KEY)) == entry


@given(entries, st.data())
def test_any_changed_byte_is_refused(entry: ActionEntry, data: st.DataObject) -> None:
    written = entry.to_bytes(KEY)
    at = data.draw(st.integers(0, len(written) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda value: value != written[at]))
    with pytest.raises(ValueError):  # noqa: PT011 - a decoder's error is one too
        ActionEntry.from_bytes(KEY, written[:at] + bytes([other]) + written[at + 1 :])
    with pytest.raises(ValueError, match="check"):
        ActionEntry.from_bytes(KEY, written[:at])


def test_an_entry_proves_nothing_under_another_key() -> None:
    with pytest.raises(ValueError, match="check"):
        ActionEntry.from_bytes("cd" * 32, ENTRY.to_bytes(KEY))


def test_what_json_cannot_hold_is_kept_by_its_digest() -> None:
    entry = ActionEntry("read", {"function": b"l", "input": Digest.of(b"l")}, {}, 0)
    found = ActionEntry.from_bytes(KEY, entry.to_bytes(KEY))
    assert found.components == {"function": Digest.of(b"l").hash, "input": Digest.of(b"l").hash}
    with pytest.raises(TypeError, match="cannot hold a set"):
        ActionEntry("read", {"bad": {1}}, {}, 0).to_bytes(KEY)
