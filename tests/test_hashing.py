from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_doubles import Double

from pipeline.hashing import RACY_NS, Digest, Encoded, Stamp, encode, key_of
from pipeline.memoizer import Action
from pipeline.stages import Home, Kind, Stage
from pipeline.toolchain import Toolchain

# Digests


def test_digest_is_sha256_and_size() -> None:
    # FIPS 180-2, appendix B.1
    expected = Digest("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", 3)
    assert Digest.of(b"abc") == expected
    assert Digest.of(memoryview(b"abc")) == expected
    assert str(expected) == "ba7816bf8f01"


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    (tmp_path / "f").write_bytes(data)
    assert Digest.of_file(tmp_path / "f") == Digest.of(data)


def test_digest_counts_bytes_not_elements() -> None:
    assert Digest.of(memoryview(bytes(12)).cast("i")) == Digest.of(bytes(12))


# Encoding. Whoever changes a line below makes every store on every machine start anew.

GOLDEN = {
    "str": ("ab", b"s2:ab"),
    "bytes": (b"ab", b"b2:ab"),
    "int": (-12, b"i3:-12"),
    "bool": (True, b"t4:True"),
    "none": (None, b"n4:None"),
    "float": (0.1, b"f20:0x1.999999999999ap-4"),
    "negative zero": (-0.0, b"f9:-0x0.0p+0"),
    "list": (["ab", "c"], b"l9:s2:abs1:c"),
    "other list": (["a", "bc"], b"l9:s1:as2:bc"),
    "nested": ([[], [[]]], b"l9:l0:l3:l0:"),
    "mapping": ({"b": 1, "a": None}, b"m19:s1:an4:Nones1:bi1:1"),
    "digest": (Digest("00" * 31 + "ff", 3), b"d33:" + bytes(31) + b"\xff" + b"3"),
    "text": ("ä", b"s2:\xc3\xa4"),
    "not UTF-8": (os.fsdecode(b"\xff"), b"s3:\xed\xb3\xbf"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_encoding_is_pinned(name: str) -> None:
    value, encoded = GOLDEN[name]
    assert encode(value) == encoded


def test_keys_are_pinned() -> None:
    assert key_of({}) == "b031601b41e2aea50c7aeabade325ef35f9d51ed280bc6ce0490e0895315ac44"
    components = {
        "stage": "codegen",
        "version": 1,
        "inputs": {"function": "00" * 32},
        "options": {
            "symbol": "f",
            "target": {"kind": "llvm", "num-cores": 4},
            "scale": 0.5,
            "list": [1, True, "1", None],
        },
        "tools": {"tvm": "0.27.0"},
    }
    assert key_of(components) == "1017d3950a1dbf11640c34f438582235270a611574e871a1c4e288080109709a"


scalars = st.one_of(
    st.text(max_size=3),
    st.text("0123:ls", max_size=3),
    st.binary(max_size=3),
    st.integers(-2, 12),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False),
    st.builds(Digest.of, st.binary(max_size=1)),
)
values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=8,
)


def tagged(value: object) -> object:
    """A form in which Python's own equality tells apart what must be told apart: 1, True and 1.0; 0.0 and -0.0."""
    if isinstance(value, list | tuple):
        return ("list", tuple(tagged(item) for item in value))
    if isinstance(value, dict):
        return ("dict", frozenset((name, tagged(item)) for name, item in value.items()))
    return (type(value).__name__, repr(value))


def decoded(data: bytes) -> object:
    """Reads one encoded value back into the form of `tagged`: what can be read back is unambiguous."""
    value, rest = _decoded(data)
    assert rest == b""
    return value


def _decoded(data: bytes) -> tuple[object, bytes]:
    length, _, rest = data[1:].partition(b":")
    body, rest = rest[: int(length)], rest[int(length) :]
    assert len(body) == int(length)
    parts = []
    match data[:1]:
        case b"l":
            while body:
                part, body = _decoded(body)
                parts.append(part)
            return ("list", tuple(parts)), rest
        case b"m":
            while body:
                name, body = _decoded(body)
                part, body = _decoded(body)
                assert isinstance(name, tuple)
                parts.append((eval(name[1]), part))
            return ("dict", frozenset(parts)), rest
        case b"d":
            return tagged(Digest(body[:32].hex(), int(body[32:]))), rest
        case b"s":
            return tagged(body.decode()), rest
        case b"b":
            return tagged(body), rest
        case b"f":
            return tagged(float.fromhex(body.decode())), rest
        case _:
            return tagged(eval(body)), rest


@given(values)
def test_an_encoding_can_be_read_back(value: object) -> None:
    assert decoded(encode(value)) == tagged(value)


@given(values, values)
def test_distinct_values_have_distinct_encodings(one: object, other: object) -> None:
    assert (encode(one) == encode(other)) == (tagged(one) == tagged(other))


@given(st.dictionaries(st.text(max_size=3), values, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_a_mapping_does_not_matter(mapping: dict[str, object], chance: random.Random) -> None:
    items = list(mapping.items())
    chance.shuffle(items)
    assert key_of(dict(items)) == key_of(mapping)


@pytest.mark.parametrize("name", GOLDEN)
def test_what_was_encoded_before_stands_for_its_value(name: str) -> None:
    value, encoded = GOLDEN[name]
    assert encode(Encoded.of(value)) == encoded
    assert key_of({"a": Encoded.of(value), "b": [Encoded.of(value)]}) == key_of({"a": value, "b": [value]})
    assert encode(bytes(Encoded.of(value))) != encoded


def test_tuples_count_as_lists() -> None:
    assert encode((1, (2,))) == encode([1, [2]])


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, {1: "a"}, {"a": {None: 1}}, bytearray(b"a"), 1j, Path("a")],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_encoding_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="a key cannot hold a"):
        encode(value)


def test_keys_are_the_same_in_another_process_and_hash_seed() -> None:
    program = "from pipeline.hashing import key_of; print(key_of({'b': {'x': 1, 'y': [2.5, None]}, 'a': b'z'}))"
    keys = {
        subprocess.check_output(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, cwd=_root()
        )
        for seed in ("0", "1")
    }
    assert keys == {key_of({"a": b"z", "b": {"y": [2.5, None], "x": 1}}).encode() + b"\n"}


def _root() -> Path:
    return Path(__file__).resolve().parent.parent


# Keys of actions: what must change them, what must not. Every field of Action and of Stage is named here.

TOOLS = Toolchain({"tvm": "1", "cc": "2"})
STAGE = Double("echo", 1, Kind.BINARY, Home.COMPILER, ("tvm",))
ACTION = Action(STAGE, "a person's name", {"x": Digest.of(b"x")}, {"o": 1}, 10.0)
ENTERS = {
    "stage": [dataclasses.replace(STAGE, name="other")],
    "inputs": [{}, {"y": Digest.of(b"x")}, {"x": Digest.of(b"y")}, {"x": Digest.of(b"x"), "y": Digest.of(b"x")}],
    "options": [{}, {"o": 2}, {"o": True}, {"o": "1"}, {"o": 1.0}, {"p": 1}, {"o": 1, "p": None}],
}
STAYS_OUT: dict[str, list[Any]] = {
    "subject": ["another name", ""],
    "timeout": [11.0],
    "places": [{"path": "elsewhere"}],
    "needs": [("llvm-znver5",)],
    "post": ["tcp://10.0.0.1:40000"],
}
STAGE_ENTERS = {"name": ["other"], "version": [2], "kind": [Kind.DECISION], "tools": [(), ("cc",), ("tvm", "cc")]}
STAGE_STAYS_OUT: dict[str, list[Any]] = {"home": [Home.FRESH, Home.INLINE], "alone": [True], "makes": [("object",)]}


def key(action: Action, toolchain: Toolchain = TOOLS) -> str:
    return key_of(action.components(toolchain))


def test_every_field_of_an_action_is_in_its_key_or_known_not_to_be() -> None:
    assert {field.name for field in dataclasses.fields(Action)} == {*ENTERS, *STAYS_OUT}
    assert {field.name for field in dataclasses.fields(Stage)} == {*STAGE_ENTERS, *STAGE_STAYS_OUT}


def test_what_changes_a_result_changes_the_key() -> None:
    changed = [dataclasses.replace(ACTION, **{name: value}) for name, them in ENTERS.items() for value in them]
    for name, them in STAGE_ENTERS.items():
        changed += [dataclasses.replace(ACTION, stage=dataclasses.replace(STAGE, **{name: value})) for value in them]
    keys = [key(action) for action in changed]
    assert key(ACTION) not in keys
    assert len(set(keys)) == len(keys) - 1  # the name of the stage was changed twice, in the same way


def test_what_does_not_change_a_result_leaves_the_key() -> None:
    for name, them in STAYS_OUT.items():
        for value in them:
            assert key(dataclasses.replace(ACTION, **{name: value})) == key(ACTION)
    for name, them in STAGE_STAYS_OUT.items():
        for value in them:
            assert key(dataclasses.replace(ACTION, stage=dataclasses.replace(STAGE, **{name: value}))) == key(ACTION)


def test_only_the_tools_that_a_stage_names_enter_its_key() -> None:
    assert key(ACTION, Toolchain({"tvm": "1.1", "cc": "2"})) != key(ACTION)
    assert key(ACTION, Toolchain({"cc": "2"})) != key(ACTION)
    assert key(ACTION, Toolchain({"tvm": "1", "cc": "3", "onnx": "4"})) == key(ACTION)


@given(
    st.dictionaries(st.text(max_size=2), scalars, max_size=3), st.dictionaries(st.text(max_size=2), scalars, max_size=3)
)
def test_options_decide_the_key(one: dict[str, object], other: dict[str, object]) -> None:
    keys = [key(dataclasses.replace(ACTION, options=options)) for options in (one, other)]
    assert (keys[0] == keys[1]) == (tagged(one) == tagged(other))


# Stamps

LATER = 10**18  # ns after the file's time: long enough for its time to be trusted


def stamped(path: Path, data: bytes = b"0123456789") -> Stamp:
    path.write_bytes(data)
    stamp = Stamp.of(path)
    assert stamp is not None
    return stamp


def rewrite(path: Path, data: bytes, mtime_ns: int) -> None:
    """Writes into the same inode and gives the file the time that a coarse clock would have given it."""
    with open(path, "r+b") as stream:
        stream.write(data)
    os.utime(path, ns=(mtime_ns, mtime_ns))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


def test_a_stamp_holds_while_nothing_happens(path: Path) -> None:
    stamp = stamped(path)
    assert stamp.still_holds(path, stamp.mtime_ns)
    assert stamp.still_holds(path, stamp.mtime_ns + LATER)


def test_an_old_file_is_not_read(path: Path) -> None:
    stamp = dataclasses.replace(stamped(path), content="not what the file has")
    assert stamp.still_holds(path, stamp.mtime_ns + LATER)
    assert stamp.still_holds(path, stamp.mtime_ns + RACY_NS + 1)
    assert not stamp.still_holds(path, stamp.mtime_ns + RACY_NS)


def test_a_rewrite_within_the_tick_of_the_clock_is_seen(path: Path) -> None:
    stamp = stamped(path)
    rewrite(path, b"9876543210", stamp.mtime_ns)
    assert not stamp.still_holds(path, stamp.mtime_ns + RACY_NS // 2)


def test_a_file_from_the_future_is_read(path: Path) -> None:
    stamp = stamped(path)
    rewrite(path, b"9876543210", stamp.mtime_ns)
    assert not stamp.still_holds(path, stamp.mtime_ns - LATER)


def test_a_touched_file_with_equal_bytes_holds(path: Path) -> None:
    stamp = stamped(path)
    os.utime(path, ns=(1, 1))
    assert stamp.still_holds(path, stamp.mtime_ns + LATER)


def test_a_touched_file_with_other_bytes_does_not(path: Path) -> None:
    stamp = stamped(path)
    rewrite(path, b"9876543210", stamp.mtime_ns + 1)
    assert not stamp.still_holds(path, stamp.mtime_ns + LATER)


@pytest.mark.parametrize(("data", "holds"), [(b"0123456789", True), (b"9876543210", False)])
def test_a_replaced_inode_is_read(path: Path, data: bytes, holds: bool) -> None:
    stamp = stamped(path)
    other = path.with_name("other")
    other.write_bytes(data)
    os.utime(other, ns=(stamp.mtime_ns, stamp.mtime_ns))
    other.replace(path)
    assert stamp.still_holds(path, stamp.mtime_ns + LATER) is holds


def test_another_size_does_not_hold(path: Path) -> None:
    stamp = stamped(path)
    path.write_bytes(b"0123456789+")
    os.utime(path, ns=(stamp.mtime_ns, stamp.mtime_ns))
    assert not stamp.still_holds(path, stamp.mtime_ns + LATER)


def test_what_is_no_file_any_more_does_not_hold(path: Path) -> None:
    stamp = stamped(path, b"")
    path.unlink()
    assert not stamp.still_holds(path, stamp.mtime_ns + LATER)
    path.mkdir()
    folder = dataclasses.replace(stamp, size=path.stat().st_size)
    assert not folder.still_holds(path, stamp.mtime_ns)
    assert not stamp.still_holds(path / "below" / "it", stamp.mtime_ns)


def test_what_is_no_file_has_no_stamp(path: Path) -> None:
    assert Stamp.of(path) is None
    path.write_bytes(b"")
    assert Stamp.of(path / "below") is None
    assert Stamp.of(path.parent) is None


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=20), st.binary(max_size=20))
def test_a_new_stamp_holds_exactly_for_equal_bytes(
    tmp_path_factory: pytest.TempPathFactory, one: bytes, other: bytes
) -> None:
    path = tmp_path_factory.mktemp("stamp") / "file"
    stamp = stamped(path, one)
    path.write_bytes(other)
    assert stamp.still_holds(path, stamp.mtime_ns) == (one == other)
