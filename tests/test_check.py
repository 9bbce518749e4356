"""`doit check`: each rule of a policy in both directions, exit codes, and what goes into a pull request."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import made_up
import pytest
from conftest import Done, WorkspaceFolder
from made_up import Made, digest_of, trial, won

from pipeline.config import Policy
from pipeline.lock import Entry, Lock, write
from pipeline.tuning.records import BEST, NONE, PreferredRecord
from pipeline.types import Trial

NOW = time.time()
DAY = 86400.0
BEFORE = {**made_up.today(), "tvm": "0.26.0"}
TUNED = Made("tuned", "tuned", 6e-3, won("a", 2.0, NOW - DAY))  # 1 ms a call, alone
LIBRARY = Made("library", "onednn", 3e-3, candidates=(Trial("onednn", 3e-3),))
PLAIN = Made("plain", "rules", 1e-3, [trial("b", 1.0, NOW - DAY)])
MODEL = (TUNED, LIBRARY, PLAIN)


def fill(workspace: WorkspaceFolder, policy: str, made: Sequence[Made] = MODEL, **given: Any) -> WorkspaceFolder:
    workspace.dodo('Model.onnx("net", "net.onnx"),')
    order = 'order = ["library", "tuned", "rules", "default"]'
    workspace.write("targets/native.toml", f'target = "native"\n{order}\n[policy]\n{policy}\n')
    made_up.build(workspace.folder, workspace.cache, made, **given)
    return workspace


def check(workspace: WorkspaceFolder, *arguments: str) -> Done:
    return workspace.doit("check", *arguments, forbid_tvm=True)


def broken(workspace: WorkspaceFolder) -> dict[str, dict[str, Any]]:
    """The rules that are broken; the exit code is theirs."""
    done = check(workspace, "--json")
    assert "Traceback" not in done.err
    (model,) = json.loads(done.out)
    assert done.code == int(bool(model["broken"]))
    assert model["is_kept"] == (not model["broken"])
    return {each["rule"]: each for each in model["broken"]}


def test_tuned(workspace: WorkspaceFolder) -> None:
    assert broken(fill(workspace, "tuned = 0.9")) == {}, "what a library does counts"
    found = broken(fill(workspace, "tuned = 0.91"))
    assert found["tuned"]["operators"] == [PLAIN.label]
    assert found["tuned"]["is"] == "90.0%"
    assert found["tuned"]["next"] == "doit tune -m net -t native"


def test_tuned_counts_operators_where_nothing_was_timed(workspace: WorkspaceFolder) -> None:
    made = [Made(f"op{i}", "tuned" if i else "rules", None) for i in range(4)]
    assert broken(fill(workspace, "tuned = 0.75", made)) == {}
    assert broken(fill(workspace, "tuned = 0.76", made)).keys() == {"tuned"}


def test_validated(workspace: WorkspaceFolder) -> None:
    assert broken(fill(workspace, "validated = true")) == {}
    upgraded = Made("upgraded", "tuned", 1e-3, won("c", 2.0, NOW - DAY, BEFORE))
    lost = Made("lost", "tuned", 2e-3)
    found = broken(fill(workspace, "validated = true", [*MODEL, upgraded, lost]))
    assert found["validated"]["operators"] == [lost.label, upgraded.label], "those that take longest first"
    assert found["validated"]["next"] == f"doit tune {lost.label} {upgraded.label} -t native"
    not_in_use = Made("upgraded", "rules", 1e-3, won("c", 2.0, NOW - DAY, BEFORE))
    assert broken(fill(workspace, "validated = true", [*MODEL, not_in_use])) == {}


def test_younger(workspace: WorkspaceFolder) -> None:
    old = Made("old", "tuned", 1e-3, won("c", 2.0, NOW - 20 * DAY))
    assert broken(fill(workspace, "younger = 30", [*MODEL, old])) == {}
    found = broken(fill(workspace, "younger = 10", [*MODEL, old]))
    assert found["younger"]["operators"] == [old.label]
    assert found["younger"]["is"] == "1 operator not, the oldest 20 days ago"
    assert "--older-than 10d" in found["younger"]["next"]


def lock(workspace: WorkspaceFolder, seconds: dict[str, float]) -> None:
    entries = {
        each.label: Entry(each.implementation, "a" * 64, each.digest, seconds=seconds[each.name])
        for each in MODEL
        if each.name in seconds
    }
    write(workspace.folder / "tuning.lock", Lock({"native": entries}))


@pytest.mark.parametrize(
    ("locked", "operators", "count"),
    [
        ({"tuned": 1e-3, "library": 3e-3, "plain": 1e-3}, None, 0),
        ({"tuned": 0.98e-3, "library": 3e-3, "plain": 1e-3}, None, 0),
        ({"tuned": 0.9e-3, "library": 3.2e-3, "plain": 1e-3}, ["tuned"], 1),
        ({"tuned": 0.9e-3, "library": 2.5e-3, "plain": 1e-3}, ["tuned", "library"], 2),
        ({"plain": 0.5e-3}, ["plain"], 2),
        ({"tuned": 5e-3, "library": 5e-3}, None, 0),
    ],
    ids=["as it was", "within the noise", "one", "and the model", "timed in the model", "faster, one not locked"],
)
def test_regression(
    workspace: WorkspaceFolder, locked: dict[str, float], operators: list[str] | None, count: int
) -> None:
    fill(workspace, "regression = true")
    lock(workspace, locked)
    (model,) = json.loads(check(workspace, "--json").out)
    found = [each for each in model["broken"] if each["rule"] == "regression"]
    assert len(found) == len(model["broken"]) == count
    named = [name.rpartition("-")[0] for name in found[0]["operators"]] if found else None
    assert named == operators


@pytest.mark.parametrize("decided", [None, NONE, BEST, digest_of("c")], ids=str)
def test_what_a_lock_holds_is_judged_and_not_what_tuning_would_apply(
    workspace: WorkspaceFolder, decided: str | None
) -> None:
    """The lock names the second best, whatever somebody decided since."""
    others = [*won("b", 2.5, NOW - DAY), *won("c", 3.0, NOW - DAY), *won("d", 2.0, NOW - DAY, BEFORE)]
    said = [PreferredRecord(candidate=decided, at=NOW)] if decided is not None else []
    held = Made("held", "tuned", 6e-3, [*won("a", 2.0, NOW - 20 * DAY), *others, *said])

    def holds(candidate: str) -> None:
        entry = Entry("tuned", "a" * 64, held.digest, digest_of(candidate), 0.5 * made_up.BASELINE)
        write(workspace.folder / "tuning.lock", Lock({"native": {held.label: entry}}))

    fill(workspace, "validated = true\nregression = true\nyounger = 30", [held])
    holds("a")
    assert broken(workspace) == {}, "it is as fast as when it was locked, and was validated"
    holds("d")
    assert broken(workspace).keys() == {"validated"}, "by the tools of before only"
    holds("e")
    assert broken(workspace).keys() == {"validated"}, "nobody validated it here"
    fill(workspace, "younger = 10", [held])
    holds("a")
    assert broken(workspace)["younger"]["is"] == "1 operator not, the oldest 20 days ago"


def test_a_regression_without_a_lock_is_told(workspace: WorkspaceFolder) -> None:
    found = broken(fill(workspace, "regression = true"))
    assert found["regression"]["next"] == "doit lock"
    workspace.write("tuning.lock", "format = ")
    done = check(workspace)
    assert done.code == 2
    assert "tuning.lock is broken" in done.err


def test_every_rule_is_tried() -> None:
    assert {f"test_{name}" for name in Policy.__struct_fields__} <= set(globals())


# What is said, and with which exit code.

ALL = "tuned = 0.95\nvalidated = true\nyounger = 90\nregression = true"


def test_what_is_kept_is_said_in_one_line(workspace: WorkspaceFolder) -> None:
    done = check(fill(workspace, "tuned = 0.5")).good()
    assert done.out == "native:net: kept; 90% tuned or of a library, 1 of 1 tuned functions validated\n"


def test_a_line_for_each_rule_that_is_broken(workspace: WorkspaceFolder) -> None:
    done = check(fill(workspace, ALL))
    assert done.code == 1
    told = done.out.splitlines()
    assert told == [
        "native:net: tuned: 90.0%; asked: 95% of the operators' time tuned, written by hand or a library's: "
        + PLAIN.label,
        "  → type `doit tune -m net -t native`",
        "native:net: regression: tuning.lock has nothing of native; asked: nothing slower than in tuning.lock, "
        "3% of noise aside",
        "  → type `doit lock`",
    ]


def test_a_table_for_a_pull_request(workspace: WorkspaceFolder) -> None:
    many = [Made(f"plain{i}", "rules", 1e-3 - i * 1e-6) for i in range(9)]
    done = check(fill(workspace, "tuned = 0.95", [TUNED, *many]), "--markdown")
    assert done.code == 1
    head, rule, row = done.out.splitlines()
    assert head.count("|") == rule.count("|") == row.count("|") == 7
    assert row.startswith("| native:net | ❌ tuned | ")
    assert f"`{many[0].label}`, `{many[1].label}`" in row
    assert "and 4 more" in row
    kept = check(fill(workspace, "tuned = 0.1"), "--markdown").good().out
    assert "| native:net | ✅ all |  | 90% tuned" in kept


def test_what_is_not_built_is_neither_kept_nor_broken(workspace: WorkspaceFolder) -> None:
    fill(workspace, "tuned = 0.5")
    workspace.dodo('Model.onnx("net", "net.onnx"),\nModel.onnx("other", "other.onnx"),')
    done = check(workspace)
    assert done.code == 3
    assert "native:net: kept" in done.out
    assert "native:other: it is not built\n  → type `doit build other`" in done.out
    assert "❌ built" in check(workspace, "--markdown").out
    assert check(workspace, "net").code == 0
    fill(workspace, "tuned = 0.99")
    workspace.dodo('Model.onnx("net", "net.onnx"),\nModel.onnx("other", "other.onnx"),')
    assert check(workspace).code == 1, "what is broken is broken, whatever else there is"


def test_a_workspace_without_a_policy_is_at_fault(workspace: WorkspaceFolder) -> None:
    fill(workspace, "")
    done = check(workspace)
    assert done.code == 2
    assert "no target has a policy to check" in done.err
    assert "[policy]" in done.err
    workspace.write("targets/native.toml", 'target = "native"\n[policy]\ntuned = 90\n')
    assert "policy.tuned is 90" in check(workspace).err


def test_a_target_without_a_policy_is_passed_over(workspace: WorkspaceFolder) -> None:
    fill(workspace, "tuned = 0.5")
    workspace.write("targets/other.toml", 'target = "native"\n')
    assert check(workspace).good().out.count("\n") == 1
    assert check(workspace, "-t", "other").code == 2
    assert check(workspace, "nonesuch").code == 2
