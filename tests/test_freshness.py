from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.freshness import Record, declaration, function_fingerprint, holds, record, user_files
from pipeline.hashing import RACY_NS, Stamp
from pipeline.models import Model

# Records


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("read", "made"):
        (tmp_path / name).write_bytes(b"0123456789")
    return tmp_path


def kept_of(folder: Path, *more: Path) -> Record:
    kept = record("declared", [folder / "read", *more], [folder / "made"], begun_ns=sys.maxsize)
    assert kept is not None
    return kept


def test_a_file_that_changed_after_the_build_began_leaves_no_record(folder: Path) -> None:
    begun = time.time_ns()
    assert record("declared", [], [folder / "made"], begun_ns=begun) is not None
    (folder / "read").write_bytes(b"edited while it was built")
    assert record("declared", [folder / "read"], [folder / "made"], begun_ns=begun) is None
    kept = folder / "kept"
    kept.write_bytes(b"older")
    os.utime(kept, ns=(0, 0))
    kept.rename(folder / "read")  # moved into place: its own time does not tell
    assert record("declared", [folder / "read"], [folder / "made"], begun_ns=begun) is None


def test_a_file_that_the_build_itself_wrote_is_no_change_unless_another_wrote_it_since(folder: Path) -> None:
    begun = time.time_ns()
    (folder / "read").write_bytes(b"written by this build")
    stamp = Stamp.of(folder / "read")
    assert stamp is not None
    own = {str(folder / "read"): stamp.content}
    assert record("declared", [folder / "read"], [], begun) is None
    kept = record("declared", [folder / "read"], [], begun, own)
    assert holds(kept, "declared")
    (folder / "read").write_bytes(b"and then by somebody else")
    assert record("declared", [folder / "read"], [], begun, own) is None
    assert not holds(kept, "declared")


def test_a_record_holds_while_nothing_changes(folder: Path) -> None:
    kept = kept_of(folder)
    assert holds(kept, "declared")
    assert not holds(kept, "declared otherwise")
    assert not holds(None, "declared")
    assert not holds({}, "declared")


def test_a_record_is_plain_enough_for_the_database(folder: Path) -> None:
    import json

    kept = kept_of(folder)
    assert holds(json.loads(json.dumps(kept)), "declared")


@pytest.mark.parametrize("name", ["read", "made"])
@pytest.mark.parametrize("data", [b"9876543210", b"012345678", b""])
def test_a_changed_file_ends_it(folder: Path, name: str, data: bytes) -> None:
    kept = kept_of(folder)
    (folder / name).write_bytes(data)
    assert not holds(kept, "declared")


@pytest.mark.parametrize("name", ["read", "made"])
def test_a_removed_file_ends_it(folder: Path, name: str) -> None:
    kept = kept_of(folder)
    (folder / name).unlink()
    assert not holds(kept, "declared")


def test_a_file_that_was_missing_and_came_ends_it(folder: Path) -> None:
    kept = kept_of(folder, folder / "absent")
    assert holds(kept, "declared")
    (folder / "absent").write_bytes(b"here now")
    assert not holds(kept, "declared")


def test_a_touched_file_does_not_end_it(folder: Path) -> None:
    kept = kept_of(folder)
    os.utime(folder / "read", ns=(1, 1))
    assert holds(kept, "declared")


def test_a_record_is_never_too_new_to_be_told_from_a_later_file(folder: Path) -> None:
    """Of the same size, inode and time, as a coarse clock gives it, only waiting before tells two files apart."""
    for data in (b"9876543210", b"0123456789"):
        (folder / "read").write_bytes(data)
        begun = time.monotonic()
        kept = kept_of(folder)
        assert time.monotonic() - begun < 1
        newest = max((folder / name).stat().st_mtime_ns for name in ("read", "made"))
        assert kept["at"] - newest > RACY_NS


def test_a_file_from_the_future_does_not_hold_up_a_record(folder: Path) -> None:
    future = time.time_ns() + 10**12
    os.utime(folder / "read", ns=(future, future))
    kept = kept_of(folder)
    with open(folder / "read", "r+b") as stream:
        stream.write(b"9")
    os.utime(folder / "read", ns=(future, future))
    assert not holds(kept, "declared")


def test_the_check_reads_no_bytes_of_what_did_not_change(folder: Path) -> None:
    kept = kept_of(folder)
    for stamp in kept["files"].values():
        stamp[3] = "not the content"
    assert holds(kept, "declared")


# Fingerprints of functions. Each pair differs in one value that a build would see.


def closing_over(value: object) -> Callable[[], object]:
    def function() -> object:
        return value

    return function


def closing_over_function(value: object) -> Callable[[], object]:
    inner = closing_over(value)

    def function() -> object:
        return inner()

    return function


def with_default(value: object) -> Callable[..., object]:
    def function(given: object = value) -> object:
        return given

    return function


def with_keyword_default(value: object) -> Callable[..., object]:
    def function(*, given: object = value) -> object:
        return given

    return function


def with_default_of_lambda(value: object) -> Callable[..., object]:
    return lambda given=value: given


def reading_global(value: object) -> Callable[[], object]:
    module = types.ModuleType("a_dodo")
    module.__dict__["VALUE"] = value
    exec(
        "def helper(): return VALUE\ndef function():\n  def inner(): return helper()\n  return inner()", module.__dict__
    )
    function: Callable[[], object] = module.__dict__["function"]
    return function


def takes(*args: object, **kwargs: object) -> object:
    return args, kwargs


def partial_argument(value: object) -> Callable[[], object]:
    return functools.partial(takes, "fixed", value)


def partial_keyword(value: object) -> Callable[[], object]:
    return functools.partial(takes, name=value)


def partial_of_partial(value: object) -> Callable[[], object]:
    return functools.partial(functools.partial(takes, value), a=1, b=2)


class Named:
    def __init__(self, value: object) -> None:
        self.value = value

    def make(self) -> object:
        return self.value


def bound(value: object) -> Callable[[], object]:
    return closing_over(value) if False else Named(value).make


WAYS = [
    closing_over,
    closing_over_function,
    with_default,
    with_keyword_default,
    with_default_of_lambda,
    reading_global,
    partial_argument,
    partial_keyword,
    partial_of_partial,
]
PAIRS: list[tuple[Any, Any]] = [
    (1, 2),
    (1, True),
    (1, "1"),
    ("a", b"a"),
    (None, "None"),
    (0.5, 0.25),
    (Path("a"), Path("b")),
    (Path("a"), "a"),
    ((1, 2), (2, 1)),
    ([[1, 2], [3]], [[1], [2, 3]]),
    ([1, 2], [[1, 2]]),
    ([], [[]]),
    ([1, 1], [1]),
    ({"a": 1}, {"a": 2}),
    ({"a": 1}, {"b": 1}),
    ({"a": {"b": 1}}, {"a": {}, "b": 1}),
    ({"a": [1]}, {"a": 1}),
    (("a\0b",), ("a", "b")),
    (frozenset({1}), frozenset({2})),
]


def shared(twice: bool) -> list[object]:
    row = [1, 2]
    return [row, row] if twice else [row]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(("one", "other"), [*PAIRS, (shared(True), shared(False))], ids=repr)
def test_a_value_that_a_function_sees_is_in_its_fingerprint(
    way: Callable[[object], Callable[[], Any]], one: object, other: object
) -> None:
    assert function_fingerprint(way(one)) != function_fingerprint(way(other))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_same_values_give_the_same_fingerprint(way: Callable[[object], Callable[[], Any]]) -> None:
    value = {"a": [1, (2.5, None)], "b": Path("c")}
    assert function_fingerprint(way(value)) == function_fingerprint(way(eval(repr(value).replace("PosixPath", "Path"))))


def test_a_method_sees_its_object() -> None:
    assert function_fingerprint(Named(1).make) != function_fingerprint(Named(2).make)


def test_equal_lists_and_one_list_twice_are_the_same() -> None:
    assert function_fingerprint(closing_over(shared(True))) == function_fingerprint(closing_over([[1, 2], [1, 2]]))


def test_what_refers_to_itself_has_a_fingerprint() -> None:
    endless: list[object] = [1]
    endless.append(endless)

    def recursive(n: int) -> object:
        return recursive(n - 1) if n else endless

    assert function_fingerprint(recursive) == function_fingerprint(recursive)


def test_what_is_not_yet_bound_has_a_fingerprint() -> None:
    def function() -> object:
        return later

    if not function:
        later = 1
    assert function_fingerprint(function)


def test_many_partials_are_all_seen() -> None:
    """Short-lived objects must not hide one another."""
    makes = [[functools.partial(takes, name=(i, j)) for i in range(50)] for j in range(2)]
    assert function_fingerprint(closing_over(makes[0])) != function_fingerprint(
        closing_over([*makes[0][:-1], makes[1][-1]])
    )


def test_a_fingerprint_is_the_same_in_another_process_and_hash_seed(tmp_path: Path) -> None:
    (tmp_path / "a_dodo.py").write_text(
        "import functools\n"
        "SETTINGS = {'x': [1, 2], 'y': {'z': None}}\nWORDS = ('a', 'b')\nONE_OF = frozenset({'p', 'q', 'r', 's'})\n"
        "def helper(a, b): return SETTINGS, WORDS, ONE_OF\n"
        "def make(depth, *, width=3): return helper(depth, lambda: WORDS)\n"
        "model = functools.partial(make, 4, width=5)\n"
    )
    program = "import a_dodo, pipeline.freshness as f; print(repr(f.function_fingerprint(a_dodo.model)))"
    root = Path(__file__).resolve().parent.parent
    said = set()
    for seed in ("0", "1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
        said.add(subprocess.check_output([sys.executable, "-c", program], env=environment))
    assert len(said) == 1
    assert b"0x" not in said.pop()  # no address


# Declarations


def test_everything_that_is_declared_is_in_the_declaration() -> None:
    def model(**changed: object) -> Model:
        said: dict[str, object] = {"name": "m", "kind": "onnx", "source": Path("m.onnx"), **changed}
        return Model(**said)  # type: ignore[arg-type]

    changes: dict[str, object] = {
        "name": "n",
        "kind": "torch",
        "source": Path("n.onnx"),
        "shapes": {"x": (1, 2)},
        "depends": (Path("a"),),
        "cases": (Path("a"),),
        "high": 7,
    }
    assert set(changes) == set(Model.__dataclass_fields__)
    said = [declaration(model(), "cpu", ""), declaration(model(), "gpu", ""), declaration(model(), "cpu", "library 2")]
    said += [declaration(model(**{name: value}), "cpu", "") for name, value in changes.items()]
    assert len(set(said)) == len(said)
    assert declaration(model(), "cpu", "") == said[0]


# Files of the user's


def loaded(monkeypatch: pytest.MonkeyPatch, name: str, file: Path) -> list[str]:
    module = types.ModuleType(name)
    module.__file__ = str(file)
    monkeypatch.setitem(sys.modules, name, module)
    return user_files([name])


def test_the_files_of_the_user_are_told_from_installed_ones_and_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import hypothesis

    import pipeline.hashing

    names = ["pipeline.hashing", "hypothesis", "functools", "sys", "not loaded"]
    assert {hypothesis.__name__, pipeline.hashing.__name__} < set(names)
    assert user_files(names) == []
    assert loaded(monkeypatch, "a_dodo", tmp_path / "dodo.py") == [str(tmp_path / "dodo.py")]


def test_a_folder_whose_name_begins_as_ours_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline

    ours = Path(str(pipeline.__file__)).parent
    beside = ours.with_name(ours.name + "_of_mine") / "dodo.py"
    assert loaded(monkeypatch, "a_dodo", beside) == [str(beside)]
