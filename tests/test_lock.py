"""tuning.lock: the file itself, and what it is to follow it. Builds that do are in tests/lock/."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError, StageError
from pipeline.hashing import Digest
from pipeline.lock import FILE, Entry, Following, Lock, read, write
from pipeline.types import Workload
from tests.lock.machines import digest


def entry(name: str = "conv", **more: object) -> Entry:
    made = Entry("tuned", digest(name + "f"), digest(name), digest(name + "c"), 211e-6, 1.42)
    return dataclasses.replace(made, **more)  # type: ignore[arg-type]


def workload(name: str = "conv", calls: int = 1) -> Workload:
    return Workload(name, Digest(digest(name), 1), "h", (), calls, False)


# the file


def test_the_text_is_this() -> None:
    lock = Lock({"native": {"conv-1": entry(), "add-2": Entry("rules", digest("g"), digest("add"))}, "empty": {}})
    lines = lock.text().splitlines()
    assert (
        'use = "onednn", version = "2023.2", function'
        in Lock({"native": {"conv-1": Entry("onednn", digest("f"), digest("w"), version="2023.2")}}).text()
    )
    body = [line for line in lines if line and not line.startswith("#")]
    assert all(line.startswith("#") for line in lines[:2])
    assert "doit lock" in "".join(lines[:2])
    assert body == [
        "format = 1",
        "[native]",
        f'"add-2" = {{ use = "rules", function = "{digest("g")}", workload = "{digest("add")}" }}',
        f'"conv-1" = {{ use = "tuned", us = 211.0, gain = 1.42, function = "{digest("convf")}", '
        f'candidate = "{digest("convc")}", workload = "{digest("conv")}" }}',
    ]


NAMES = st.text(min_size=1, max_size=12).filter(lambda text: text != "format")
HEX = st.text(alphabet="0123456789abcdef", min_size=64, max_size=64)
TIMES = st.none() | st.floats(min_value=1e-9, max_value=1e3)
GAINS = st.none() | st.floats(0.01, 1e6)
ENTRIES = st.builds(Entry, NAMES, HEX, HEX, st.just("") | HEX, TIMES, GAINS, st.just("") | NAMES)
LOCKS = st.builds(Lock, st.dictionaries(NAMES, st.dictionaries(NAMES, ENTRIES, min_size=1, max_size=3), max_size=3))


@given(LOCKS)
def test_what_was_written_is_read_and_written_the_same(lock: Lock) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        assert write(path, lock)
        found = read(path)
        assert found is not None
        assert found.text() == lock.text()
        assert {t: set(of) for t, of in found.targets.items()} == {t: set(of) for t, of in lock.targets.items()}
        for target, entries in lock.targets.items():
            assert all(each.same(found.targets[target][label]) for label, each in entries.items())
        assert not write(path, found), "it says so already"
        assert os.listdir(folder) == [FILE]


def test_one_decision_is_one_line() -> None:
    before = Lock({"native": {f"conv-{i}": entry(str(i)) for i in range(9)}})
    after = Lock({"native": {**before.targets["native"], "conv-4": entry("4", candidate=digest("other"))}})
    changed = set(before.text().splitlines()) ^ set(after.text().splitlines())
    assert [line.partition(" ")[0] for line in changed] == ['"conv-4"'] * 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "does not say its format"),
        ("format = 0\n", "does not say its format"),
        ('format = "1"\n', "does not say its format"),
        ("format = 2\n[native]\n", "reads format 1"),
        ("format = 1\n[native\n", "is broken"),
        ("format = 1\nnative = 3\n", "is broken"),
        ('format = 1\n[native]\n"a" = { use = "rules" }\n', "is broken"),
        ('format = 1\n[native]\n"a" = { use = "rules", function = "12", workload = "34" }\n', "64 digits"),
        (
            f'format = 1\n[n]\na = {{ use = "r", us = -1.0, function = "{"0" * 64}", workload = "{"0" * 64}" }}\n',
            "broken",
        ),
        ("format = 1\n<<<<<<< HEAD\n[native]\n=======\n[other]\n>>>>>>> branch\n", "merge"),
        (b"\xff\xfe", "no text"),
        (None, "Is a directory"),
    ],
)
def test_what_is_no_lock_is_told_in_one_sentence_and_stays(tmp_path: Path, text: str | bytes | None, said: str) -> None:
    path = tmp_path / FILE
    if text is None:
        path.mkdir()
    else:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as failed:
        read(path)
    assert said in str(failed.value)
    assert failed.value.hint
    assert path.is_dir() if text is None else path.read_bytes() == (text.encode() if isinstance(text, str) else text)


def test_a_target_of_a_name_that_the_file_needs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a target called format"):
        write(tmp_path / FILE, Lock({"format": {"conv-1": entry()}}))
    assert not list(tmp_path.iterdir())


def test_there_may_be_none(tmp_path: Path) -> None:
    assert read(tmp_path / FILE) is None
    assert not Following.of(tmp_path).is_followed
    with pytest.raises(ConfigError, match=r"no tuning\.lock"):
        Following.of(tmp_path, strict=True)


# following it


def test_what_it_has_is_followed_and_what_it_has_not_is_told() -> None:
    lock = Lock({"native": {"conv-1": entry()}})
    following = Following(lock)
    assert following.entry("native", workload()) == entry()
    assert following.entry("other", workload()) is None, "each target has its own"
    assert following.is_whole("native", [digest("conv")])
    assert following.entry("native", workload("add")) is None
    assert following.entry("native", workload("layout", calls=0)) is None
    assert not following.is_whole("native", [digest("conv"), digest("add")])
    known = {digest(name): workload(name) for name in ("conv", "add", "layout")}
    assert following.problems("native", known) == [f"{workload('add').label} is not in tuning.lock: doit lock"]
    assert following.problems("native", {}) == []
    with pytest.raises(StageError, match=r"dispatch of native:add-\w+ failed: it is not in tuning\.lock"):
        Following(lock, strict=True).entry("native", workload("add"))


def test_what_cannot_be_followed_is_grouped_by_why() -> None:
    known = {digest(str(i)): workload(str(i)) for i in range(9)}
    following = Following(Lock())
    for each in known.values():
        following.cannot("native", each, ConfigError("the library is not installed", hint="install it"))
    (said,) = following.problems("native", known)
    assert "and 4 more" in said
    assert "the library is not installed" in said
    assert said.endswith("doit lock")
    strict = Following(Lock(), strict=True)
    with pytest.raises(StageError, match="not installed") as failed:
        strict.cannot("native", workload(), ConfigError("the library is not installed"))
    assert "doit lock 'conv-" in failed.value.hint


def test_while_a_lock_is_written_what_is_meant_is_free() -> None:
    following = Following(Lock({"native": {"a": entry("a"), "b": entry("b")}}), anew=lambda each: each.name == "a")
    assert following.entry("native", workload("a")) is None
    assert following.entry("native", workload("b")) == entry("b")
    assert following.entry("native", workload("c")) is None
    assert following.problems("native", {digest(name): workload(name) for name in "abc"}) == []


def test_what_is_held_back_is_told_in_one_line() -> None:
    following = Following(Lock({}))
    known = {digest(name): workload(name) for name in "abc"}
    for name, ratio in (("a", 1.3), ("b", 1.1), ("c", 1.0)):
        following.better("native", known[digest(name)], ratio)
    assert following.problems("native", known) == [
        "tuning.lock holds back 2 better winners (up to 1.3 times): doit lock"
    ]
