"""`doit tune` from end to end: what it finds and what a build makes of it, what it never does twice, what it says."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from conftest import Done, WorkspaceFolder
from tuning_runs import (
    RELU,
    SIGMOID,
    TANH,
    Night,
    fill,
    idle,
    implementations,
    operator_of,
    plain,
    records,
    relu,
    require_nothing_timed_twice,
    right,
    sigmoid,
    standings,
    tune,
)


@dataclass(frozen=True)
class Story:
    """A workspace whose operators were tuned little by little, and built in between."""

    workspace: WorkspaceFolder
    some: Night
    built: Done
    rest: Night
    rebuilt: Done


@pytest.fixture(scope="module")
def story(new_workspace: Callable[[], WorkspaceFolder]) -> Story:
    workspace = new_workspace()
    fill(workspace, "Relu", "Sigmoid")
    some = tune(workspace, "*relu*", "--trials", "2")
    built = workspace.build()
    return Story(workspace, some, built, tune(workspace), workspace.build())


# What it does, and never does twice.


def test_what_is_not_built_is_built_and_only_what_is_asked_for_is_tuned(story: Story) -> None:
    story.some.done.good()
    assert story.some.trials == {RELU: 2}
    assert story.some.ended["gained"]
    assert story.built.good().subjects("compiled") == [f"native:{name_of(story, RELU)}"]
    assert story.built.compiled == 1


def name_of(story: Story, operator: str) -> str:
    (found,) = [
        each["name"] for each in story.workspace.manifest("net")["operators"] if plain(each["name"]) == operator
    ]
    return str(found)


def test_more_trials_go_on_where_fewer_ended(story: Story) -> None:
    story.rest.done.good()
    assert story.rest.trials == {RELU: 2, SIGMOID: 4}
    assert all(len(each.trials) == 4 and each.best for each in standings(story.workspace).values())
    require_nothing_timed_twice(story.workspace)


def test_a_build_compiles_what_changed_and_then_nothing(story: Story) -> None:
    story.rebuilt.good()
    assert f"native:{name_of(story, SIGMOID)}" in story.rebuilt.subjects("compiled")
    assert implementations(story.workspace) == {RELU: "tuned", SIGMOID: "tuned"}
    right(story.workspace, relu, sigmoid)
    story.workspace.idle_build()


def test_again_it_does_nothing_in_no_time(story: Story) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    idle(story.workspace)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    idle(story.workspace, "--budget", "8h")
    idle(story.workspace, "--trials", "2", "*relu*")


def test_the_operators_of_another_model_in_another_workspace_are_tuned_already(
    story: Story, new_workspace: Callable[[], WorkspaceFolder]
) -> None:
    other = new_workspace()
    other.cache = story.workspace.cache
    fill(other, "Relu", "Relu", "Sigmoid")
    other.dodo('Model.onnx("other", "net.onnx")')
    assert other.build().good().compiled == 0
    assert set(implementations(other, "other").values()) == {"tuned"}
    idle(other)


def test_where_one_layer_is_changed_its_operator_alone_is_tuned(
    story: Story, new_workspace: Callable[[], WorkspaceFolder]
) -> None:
    other = new_workspace()
    other.cache = story.workspace.cache
    fill(other, "Relu", "Tanh")
    night = tune(other)
    night.done.good()
    assert night.trials == {TANH: 4}
    assert other.build().good().subjects("compiled") == [
        f"native:{each['name']}" for each in other.manifest("net")["operators"] if plain(each["name"]) == TANH
    ]


# What one sees and says.


def test_a_plan_says_what_would_be_done_and_does_nothing(story: Story) -> None:
    before = records(story.workspace)
    done = story.workspace.doit("tune", "--plan", forbid_tvm=True).good()
    assert done.out.count("every search space is exhausted") == 2
    assert "2 operators, nothing to tune" in done.out
    assert records(story.workspace) == before


def test_events_are_lines_of_json_that_tell_of_the_whole_night(story: Story) -> None:
    kinds = [event["event"] for event in story.rest.events]
    assert kinds[0] == "begun"
    assert kinds[-1] == "ended"
    assert {"phase", "batch", "retest", "operator-ended"} <= set(kinds)
    begun, ended = story.rest.events[0], story.rest.ended
    assert begun["at"] <= ended["at"]
    assert ended["end"] == "done"
    assert ended["trials"] == ended["timed"] == 6
    (was, before, now) = ended["models"]["net"]
    assert was >= before > now


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "soon"], "--budget is 'soon'"),
        (["--budget", "0h"], "--budget is '0h'"),
        (["--trials", "-1"], "--trials wants a number of 1 or more"),
        (["--top", "-1"], "--top wants a number of 1 or more"),
        (["--trials", "many"], "many"),
        (["nothing*"], "no operator is named nothing*"),
        (["-m", "nobody"], "nobody"),
        (["-t", "nowhere"], "nowhere"),
        (["--events", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
    ids=lambda given: given[1] if isinstance(given, list) and len(given) > 1 else "",
)
def test_bad_arguments(story: Story, arguments: list[str], said: str) -> None:
    done = story.workspace.doit("tune", *arguments, forbid_tvm=True)
    assert done.code == 2, done.err
    assert said in done.err
    assert "Traceback" not in done.err
    assert len(done.err.strip().splitlines()) <= 2


def test_help(story: Story) -> None:
    said = story.workspace.doit("help", "tune", forbid_tvm=True).good().out
    for option in ("--budget", "--trials", "--model", "--top", "--plan", "--events", "--target"):
        assert option in said


def test_nothing_but_tune_tunes_and_an_operator_is_a_task(
    story: Story, new_workspace: Callable[[], WorkspaceFolder]
) -> None:
    other = new_workspace()
    other.cache = story.workspace.cache
    fill(other, "Relu", "Exp", "LeakyRelu")
    kept = records(other)
    other.doit().good()
    other.build().good()
    assert records(other) == kept
    listed = other.doit("list", "--all", forbid_tvm=True).good().out.split()
    (task,) = [word for word in listed if word.startswith("tune:native:fused_matmul_exp-")]
    other.doit(task).good()
    assert [operator_of(other, key) for key in records(other).keys() - kept.keys()] == ["fused_matmul_exp"]
    assert other.build().good().compiled == 1
    assert "1 of 3 operators to tune" in other.doit("tune", "--plan", forbid_tvm=True).good().out
    some = other.doit("tune", "--plan", "--top", "2", "-m", "net", forbid_tvm=True).good()
    assert "2 operators" in some.out or "of 2 operators" in some.out


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('order = ["tuned", "default"]', 'order = ["default"]', '"tuned" is not in the order of targets/native.toml'),
        ('target = "native"', 'target = {kind = "llvm", mtriple = "aarch64-linux-gnu"}', "device is not here"),
    ],
)
def test_operators_that_are_left_are_named_with_the_reason(
    story: Story, new_workspace: Callable[[], WorkspaceFolder], before: str, after: str, said: str
) -> None:
    other = new_workspace()
    other.cache = story.workspace.cache
    fill(other, "Relu", "Sigmoid")
    other.edit(before, after, "targets/native.toml")
    other.build().good()
    done = other.doit("tune", forbid_tvm=True).good()
    assert said in done.err
    assert "left as they are: " in done.err
    assert said in other.doit("tune", "--plan", forbid_tvm=True).good().out


# Whose records they are.


def test_records_of_another_target_or_device_are_not_used(
    story: Story, new_workspace: Callable[[], WorkspaceFolder]
) -> None:
    other = new_workspace()
    other.cache = story.workspace.cache
    fill(other, "Relu", "Sigmoid")
    other.edit('target = "native"', 'target = {kind = "llvm", mcpu = "x86-64-v2"}', "targets/native.toml")
    other.build().good()
    assert implementations(other) == {RELU: "default", SIGMOID: "default"}
    assert "2 of 2 operators to tune" in other.doit("tune", "--plan", forbid_tvm=True).good().out

    assert "2 of 2 operators to tune" in story.workspace.doit("tune", "--plan", OMP_NUM_THREADS="1").good().out
    story.workspace.build().good()
    idle(story.workspace)
