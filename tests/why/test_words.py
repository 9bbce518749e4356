"""The words of `doit why`: every place where two builds differ has some, and each cause is told once."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.store import Store
from pipeline.tuning.ledger import Ledger
from pipeline.why.causes import _once
from pipeline.why.changes import ABSENT, Change, changes
from pipeline.why.words import TABLE, About, Cause, cause
from tests.why.bench import Bench


def test_every_place_where_two_trees_differ() -> None:
    before = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": {"f": 1}}
    after = {"a": {"b": 2, "c": [1, 3]}, "g": True, "e": 5}
    assert list(changes(before, after)) == [
        Change(("a", "b"), 1, 2),
        Change(("a", "c"), [1, 2], [1, 3]),
        Change(("d",), None, ABSENT),
        Change(("e",), {"f": 1}, 5),
        Change(("g",), ABSENT, True),
    ]
    assert list(changes(before, before)) == []


def about(bench: Bench) -> About:
    from pipeline.why.evidence import Evidence

    bench.build()
    store = Store(bench.place.cache)
    build = bench.builds()[-1]
    (operator,) = build.state.operators.values()
    return About(Evidence(store, Ledger.here(store, 0.03)), build, build, operator, "apply:mine")


SAID: list[tuple[tuple[str, ...], object, object, str]] = [
    (("embed", "options", "what nobody knew"), 1, 2, "option what nobody knew of stage embed: 1 → 2"),
    (("embed", "inputs", "d"), ABSENT, "a" * 64, "stage embed gets d"),
    (("embed", "inputs", "d"), "b" * 64, "a" * 64, "d, which stage embed gets, changed"),
    (("what", "ever"), {"a": 1}, [1, 2], 'what.ever: {"a": 1} → [1, 2]'),
    (("codegen", "tools", "cc"), "g++ 12", "g++ 13", "the C++ compiler: g++ 12 → g++ 13"),
    (("apply", "options", "library"), "2023.2.0; 1; a.so x", "2024.1; 1; a.so y", "library mine: 2023.2.0 → 2024.1"),
    (("apply", "options", "library"), "1; 1; a x", "1; 2; a x", "how library mine is called: version 1 → 2"),
    (
        ("apply", "options", "library"),
        "1; 1; a x",
        "1; 1; a y",
        "library mine 1 is another build of the same version",
    ),
    (
        ("extract", "options", "patterns"),
        [["a", "1; 1"]],
        [["a", "2; 1"], ["b", "1"]],
        "library a: 1 → 2; library b, which groups operators of its own, came",
    ),
    (("settings", "measure", "noise"), 0.03, 0.1, "measure.noise of the target's file: 0.03 → 0.1"),
    (
        ("settings", "device"),
        "one",
        "other",
        "the processor that candidates are timed on, or its threads: one → other",
    ),
    (("tvmake",), "0.1", "0.2", "tvmake 0.1 → 0.2"),
    (("measure", "inputs", "x"), ABSENT, "y", ""),
]


def test_words_for_each_kind_of_change_and_for_those_that_nobody_knew(bench: Bench) -> None:
    told = about(bench)
    for path, before, after, expected in SAID:
        said = cause(Change(path, before, after), told)
        assert (said.said if said is not None else "") == expected
    assert TABLE[-1][0] == ("**",), "the last line matches everything"


def test_a_cause_is_told_once() -> None:
    made: Callable[[str], Cause] = lambda said: Cause("", said, (), None, None)  # noqa: E731
    assert [each.said for each in _once(map(made, "abacb"))] == ["a", "b", "c"]
