"""`doit status`: where each operator stands, what needs doing first, on one screen, without TVM, also of thousands."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import made_up
import pytest
from conftest import Done, WorkspaceFolder
from made_up import Made, trial, won

from pipeline.commands.status import _widths, line
from pipeline.config import TargetFile
from pipeline.lock import Entry, Lock, write
from pipeline.tuning.records import BEST, NONE, Outcome, PreferredRecord, WithdrawnRecord
from pipeline.tuning.status import Row, Standing, State, by_urgency
from pipeline.types import Trial

NOW = time.time()
HOUR = 3600.0
TARGET = """\
target = "native"
order = ["library", "tuned", "rules", "default"]
[stale]
days = 30
"""
BEFORE = {**made_up.today(), "tvm": "0.26.0"}
FASTEST = (Trial("default", 4e-3), Trial("tuned", 2e-3), Trial("onednn", 1e-3))

OPERATORS = (
    Made("fresh", "tuned", 9e-3, won("a", 2.0, NOW - 5 * HOUR), calls=3),
    Made("nothing", "rules", 8e-3, [trial("b", 1.0, NOW - HOUR)]),
    Made("old", "tuned", 2e-3, won("c", 4.0, NOW - 40 * 24 * HOUR)),
    Made("upgraded", "tuned", 1e-3, won("d", 1.5, NOW - HOUR, BEFORE)),
    Made("new", "default", 3e-3),
    Made("withdrawn", "rules", 1e-4, [WithdrawnRecord(records=(), at=NOW)]),
    Made("refused", "rules", 1e-3, won("e", 2.0, NOW - 9 * HOUR), candidates=(Trial("tuned", refused="crashed"),)),
    Made("wrong", "rules", 1e-3, [trial("f", None, NOW - HOUR, Outcome.WRONG)]),
    Made("found", "rules", 1e-3, won("g", 5.0, NOW)),
    Made("newer", "tuned", 1e-3, won("h", 1.1, NOW)),
    Made("back", "tuned", 5e-4, [*won("i", 1.1, NOW - HOUR), PreferredRecord(candidate=NONE, at=NOW)]),
    Made("again", "tuned", 4e-4, [*won("j", 1.1, NOW - HOUR), PreferredRecord(candidate=BEST, at=NOW)]),
    Made("copy", "default", 3e-4, copies=True),
    Made("open", "default", 3e-4, shapes=("?x4:float32", "?x4:float32")),
    Made("library", "onednn", 2e-4, candidates=FASTEST),
    Made("elsewhere", "default", 1e-4, won("k", 2.0, NOW), device="another machine"),
    Made("unknown", "rules", None),
)
DODO = 'Model.onnx("net", "net.onnx"),'


def fill(workspace: WorkspaceFolder, operators: Sequence[Made] = OPERATORS, **given: Any) -> WorkspaceFolder:
    workspace.dodo(DODO)
    workspace.write("targets/native.toml", TARGET)
    made_up.build(workspace.folder, workspace.cache, operators, at=NOW - 3 * HOUR, **given)
    return workspace


@pytest.fixture(scope="module")
def story(new_workspace: Callable[[], WorkspaceFolder]) -> WorkspaceFolder:
    return fill(new_workspace())


def status(workspace: WorkspaceFolder, *arguments: str, **environment: Any) -> Done:
    return workspace.doit("status", *arguments, forbid_tvm=True, **environment)


def rows(workspace: WorkspaceFolder, *arguments: str) -> dict[str, dict[str, Any]]:
    (model,) = json.loads(status(workspace, "--json", *arguments).good().out)
    return {row["operator"].rpartition("-")[0]: row for row in model["operators"]}


@pytest.fixture(scope="module")
def told(story: WorkspaceFolder) -> dict[str, dict[str, Any]]:
    return rows(story)


STATES = {
    "fresh": ("fresh", "", ""),
    "nothing": ("fresh", "nothing faster was found", ""),
    "old": ("stale", "last measured 40 days ago, the limit is 30", "doit tune {}"),
    "upgraded": ("stale", f"validated with TVM 0.26.0, this is {made_up.today()['tvm']}", "doit tune {}"),
    "new": ("never tuned", "", "doit tune {}"),
    "withdrawn": ("never tuned", "what was found was thrown away", "doit tune {}"),
    "refused": ("failed", "put aside: crashed", "doit why {}"),
    "wrong": ("failed", "every candidate gave another result than the default", "doit why {}"),
    "found": ("not built in", "5.00 times as fast", "doit build net"),
    "newer": ("not built in", "1.10 times as fast", "doit build net"),
    "back": ("rolled back", "no tuned function", "doit rollback {} --to best"),
    "again": ("not built in", "1.10 times as fast", "doit build net"),
    "copy": ("left", "it only copies", ""),
    "open": ("left", "its shapes are open", ""),
    "library": (
        "left",
        'onednn comes before tuned in the order (select = "fastest" would compare them)',
        "",
    ),
    "elsewhere": ("stale", "tuned on another device only: another machine", "doit tune {}"),
    "unknown": ("never tuned", "", "doit tune {}"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_with_its_reason_and_what_to_type(told: dict[str, dict[str, Any]], name: str) -> None:
    row = told[name]
    state, why, command = STATES[name]
    meant = f"'*-{row['workload'][:8]}'"
    assert (row["state"], row["why"], row["next"]) == (state, why, command.format(meant))


def test_every_state_is_tried() -> None:
    assert {state for state, _, _ in STATES.values()} | {State.LOCKED} == set(State)
    assert set(STATES) == {each.name for each in OPERATORS}


def test_figures(told: dict[str, dict[str, Any]]) -> None:
    total = sum(each.seconds or 0.0 for each in OPERATORS)
    row = told["fresh"]
    assert row["share"] == pytest.approx(9e-3 / total)
    assert (row["calls"], row["seconds"], row["gain"], row["trials"], row["spent"]) == (3, 9e-3, 2.0, 1, 1.5)
    assert row["per_call"] == pytest.approx(1e-3), "as its winner was timed alone"
    assert row["age"] == pytest.approx(5 / 24, rel=0.1)
    assert row["shapes"] == ["1x64x56x56:float32", "1x64x56x56:float32"]
    validated = {name: row["validated"] for name, row in told.items()}
    assert [validated[name] for name in ("fresh", "upgraded", "back", "library", "new")] == [
        True,
        False,
        False,
        None,
        None,
    ]
    assert told["library"]["gain"] == 4.0, "over the default, where both were timed"
    assert told["new"]["gain"] == 1.0
    assert (told["unknown"]["seconds"], told["unknown"]["share"], told["unknown"]["gain"]) == (None, None, None)


def test_a_lock_is_told_where_nothing_else_is(new_workspace: Callable[[], WorkspaceFolder]) -> None:
    made = {each.name: each for each in OPERATORS}
    workspace = fill(new_workspace())
    named = ("fresh", "found", "old", "new", "copy")
    entries = {made[name].label: Entry("tuned", "a" * 64, made[name].digest) for name in named}
    write(workspace.folder / "tuning.lock", Lock({"native": entries}))
    found = {name: (row["state"], row["why"], row["next"].partition(" '")[0]) for name, row in rows(workspace).items()}
    assert found["fresh"] == ("locked", "tuning.lock says tuned", "")
    assert found["found"] == ("locked", "tuning.lock holds back what is 5.00 times as fast", "doit lock")
    assert [found[name][0] for name in ("old", "new", "copy")] == ["stale", "never tuned", "left"]
    assert found["nothing"][0] == "fresh"
    assert found["newer"][0] == "not built in"


# Order and size.


def row(name: str, state: State, seconds: float | None = 1e-3, found: float = 1.0) -> Row:
    return Row(
        operator=name, workload="", shapes=(), calls=1, seconds=seconds, share=None, per_call=None,
        implementation="tuned", gain=found, found=found, trials=1, spent=0.0, validated=True, age=None,
        state=state, why="", next="",
    )  # fmt: skip


def test_what_needs_doing_is_first_by_the_time_that_it_is_about() -> None:
    expected = [
        row("stale and much faster", State.STALE, 1e-3, found=5.0),
        row("never, large", State.NEVER, 4e-3),
        row("not built in", State.READY, 2e-3, found=4.0),
        row("stale", State.STALE, 1e-3, found=1.1),
        row("failed", State.FAILED, 0.9e-3),
        row("fresh, large", State.FRESH, 9e-3),
        row("left", State.LEFT, 5e-3),
        row("fresh", State.FRESH, 1e-3),
        row("never, and nobody knows how long it takes", State.NEVER, None),
    ]
    assert [each.operator for each in by_urgency(reversed(expected))] == [each.operator for each in expected]


def test_one_screen(new_workspace: Callable[[], WorkspaceFolder]) -> None:
    many = [Made(f"op{i}", "tuned", 1e-4, won("a", 1.5, NOW - 9 * HOUR)) for i in range(200)]
    workspace = fill(new_workspace(), [*many, Made("odd", "default", 1e-5)])
    shown = status(workspace).good().out.splitlines()
    assert len(shown) <= 40
    assert shown[2].startswith("odd-"), "what needs doing is first, however small"
    (rest,) = [text for text in shown if " more " in text]
    assert "fresh" in rest
    assert "doit status --all" in rest
    assert shown[-1].startswith("native:net: ")
    assert "201 operators; tuned 100%" in shown[-1]
    assert "1 never tuned (10 µs)" in shown[-1]
    assert len(status(workspace, "--all").good().out.splitlines()) == 201 + 3
    assert max(map(len, shown[:-1])) <= 200


@pytest.mark.parametrize("width", [60, 80, 100, 140, 200, 400])
def test_a_row_is_as_wide_as_the_screen_at_most(width: int) -> None:
    cells = {"operator": "o" * 60, "shapes": "1x2 " * 30, "calls": "12", "share": "12.5%", "time": "12.5 ms"}
    cells |= {"runs on": "openblas", "gain": "12.25", "trials": "512", "valid": "yes", "age": "12 min"}
    cells |= {"state": "s" * 130, "next": "doit tune '*-12345678'"}
    widths = _widths([cells], width)
    assert sum(wide + 2 for wide in widths.values() if wide) <= max(width, 80)
    assert all(widths[name] for name in ("operator", "share", "time", "runs on", "next"))
    if width >= 100:
        assert widths["state"] >= 18
    if width >= 200:
        assert all(widths.values())


def test_the_line_of_a_model() -> None:
    rows = [row("a", State.FRESH, 6e-3), row("b", State.STALE, 4e-3)]
    made = Standing("cpu", "net", TargetFile(target="native"), seconds=0.011, rows=rows)
    assert line(made) == (
        "cpu:net: 11 ms an inference; 2 operators; tuned 100%; 2 of 2 tuned functions validated; 1 stale (4 ms)"
    )
    quiet = Standing("cpu", "net", TargetFile(target="native"), rows=[row("a", State.FRESH, None)])
    assert line(quiet) == "cpu:net: not timed; 1 operator; 1 of 1 tuned functions validated; nothing to do"


# What is asked for, and what is not there.


def test_operators_and_models_are_chosen_by_name(story: WorkspaceFolder) -> None:
    assert set(rows(story, "n*")) == {"nothing", "new", "newer"}
    assert set(rows(story, "net")) == set(STATES)
    assert set(rows(story, "net", OPERATORS[0].label, "native:old-*")) == {"fresh", "old"}
    done = status(story, "nonesuch")
    assert done.code == 2
    assert "no model or operator is named nonesuch" in done.err
    assert "doit status --all" in done.err


def test_before_the_first_build_it_says_what_to_type(workspace: WorkspaceFolder) -> None:
    workspace.dodo(DODO)
    done = status(workspace)
    assert done.code == 1
    assert "native:net: it is not built\n  → type `doit build net`" in done.err
    assert not workspace.cache.exists()
    assert json.loads(status(workspace, "--json").out)[0]["problem"] == "it is not built"
    workspace.write("artifacts/native/net/manifest.json", "{")
    assert "is broken" in status(workspace).err


def test_two_targets_are_named_in_commands(workspace: WorkspaceFolder) -> None:
    fill(workspace, [Made("new")])
    workspace.write("targets/other.toml", TARGET)
    made_up.build(workspace.folder, workspace.cache, [Made("new")], target="other")
    both = json.loads(status(workspace, "--json").good().out)
    assert [each["target"] for each in both] == ["native", "other"]
    assert [each["operators"][0]["next"].rpartition(" -t ")[2] for each in both] == ["native", "other"]
    (one,) = json.loads(status(workspace, "--json", "-t", "other").good().out)
    assert one["target"] == "other"
    assert status(workspace, "-t", "nowhere").code == 2


def test_without_a_plan_and_without_a_store_it_still_tells(workspace: WorkspaceFolder) -> None:
    fill(workspace, OPERATORS[:5])
    (workspace.folder / ".doit.db").unlink()
    found = rows(workspace)
    assert found["fresh"]["seconds"] is None
    assert found["fresh"]["state"] == "fresh"
    assert found["new"]["state"] == "never tuned"


def test_a_target_whose_order_has_no_tuned_is_left(workspace: WorkspaceFolder) -> None:
    fill(workspace, OPERATORS[1:2])
    workspace.write("targets/native.toml", 'target = "native"\norder = ["rules", "default"]\n')
    assert rows(workspace)["nothing"]["why"] == '"tuned" is not in the order of targets/native.toml'


def test_help_tells_every_state(story: WorkspaceFolder) -> None:
    said = story.doit("help", "status", forbid_tvm=True).good().out
    assert all(str(state) in said for state in State)


# Speed. The bound is of processor time, which others on the machine take nothing of.


def seconds_of(workspace: WorkspaceFolder) -> float:
    """Processor time of one call."""
    before = os.times()
    status(workspace).good()
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def require_fast(workspace: WorkspaceFolder, count: int, limit: float) -> None:
    tools = made_up.today()
    made = [Made(f"op{i}", "tuned", 1e-4, won("a", 1.5, NOW - 9 * HOUR, tools)) for i in range(count)]
    fill(workspace, made)
    time.sleep(0.05)
    seconds_of(workspace)
    assert min(seconds_of(workspace) for _ in range(3)) < limit


def test_a_thousand_operators_are_told_at_once(workspace: WorkspaceFolder) -> None:
    require_fast(workspace, 1_000, 1.0)


@pytest.mark.slow
def test_ten_thousand_operators_are_told_within_two_seconds(workspace: WorkspaceFolder) -> None:
    require_fast(workspace, 10_000, 2.0)
