"""`doit tune` from end to end: what it finds and what a build makes of it, what it never does twice, and what cannot
stop it.

The operators are tiny and the search spaces lie in the workspaces: a few candidates each, of which some are planted.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import msgspec
import numpy as np
import onnx
import pytest
from conftest import Done, WorkspaceFolder
from onnx import helper

from pipeline.store import Store
from pipeline.tuning.records import Outcome, Record, Standing, TrialRecord, decoded, encoded, standing

Array = np.ndarray[Any, Any]

NOISE = 0.03
SIZE = 48
NET = 'Model.onnx("net", "net.onnx")'
TARGET = """\
target = "native"
order = ["tuned", "default"]
layout = "as-is"
{more}
[measure]
profile = false
noise = 0.03
patience = 2
[tune]
spaces = [{spaces}]
batch = 4
seconds = 0.01
timeout = {timeout}
"""

# Vectorizes products: every candidate is many times as fast as the default.
LANES = '''
"""Products, so many lanes and rows at a time."""


class Lanes:
    name = "lanes"
    version = 1

    def propose(self, func, target, tried, known, count, seed):
        from pipeline.compiler.records import digest_of
        from pipeline.compiler.search import Proposal

        made = [(tile, self.make(func, target, tile)) for tile in TILES]
        return [Proposal(tile, each) for tile, each in made if digest_of(each) not in known][:count]

    def make(self, func, target, tile):
        from tvm import s_tir

        if not isinstance(tile, list):
            raise ValueError(f"{tile!r} is no tile")
        lanes, rows = tile

        schedule = s_tir.Schedule(func)
        for block in schedule.get_child_blocks(schedule.get_sblock("root")):
            loops = schedule.get_loops(block)
            if len(loops) == 3:
                schedule.reorder(loops[0], loops[2], loops[1])
            schedule.vectorize(schedule.split(loops[1], [None, lanes])[1])
            schedule.split(loops[0], [None, rows])
        return schedule.mod["main"]


space = Lanes()
'''

# Functions for `models.dense`, each of a kind that must not win, but for the right one.
PLANTED = '''
"""What must not win, planted."""

SUM = " + ".join(f"x[vi, {k}] * w[{k}, vj]" for k in range(4)) + " + b[vj]"
TEXT = """
@T.prim_func(s_tir=True)
def main(x: T.Buffer((2, 4), "float32"), w: T.Buffer((4, 8), "float32"),
         b: T.Buffer((8,), "float32"), y: T.Buffer((2, 8), "float32")):
    T.func_attr({"tirx.noalias": True})
    for i, j in T.grid(2, 8):
        with T.sblock("y"):
            vi, vj = T.axis.remap("SS", [i, j])
            y[vi, vj] = VALUE
    AFTER
"""
LARGE = """for k in T.unroll(60000):
        with T.sblock("z"):
            vk = T.axis.spatial(60000, k)
            y[0, vk % 8] = y[0, vk % 8] * T.float32(1.5)"""
CALL = 'T.evaluate(T.call_extern("int32", "{}"))'
VALUES = {"wrong": f"T.max({SUM}, T.float32(0.5))", "nan": 'T.float32("nan")'}
AFTER = {
    "crash": CALL.format("abort"),
    "loop": CALL.format("pause"),
    "missing": CALL.format("no_such_function"),
    "refused": 'T.evaluate(T.tvm_storage_sync("shared"))',
    "large": LARGE,
}


class Planted:
    name = "planted"
    version = 1

    def propose(self, func, target, tried, known, count, seed):
        from pipeline.compiler.records import digest_of
        from pipeline.compiler.search import Proposal

        made = [(kind, self.make(func, target, kind)) for kind in KINDS]
        return [Proposal(kind, each) for kind, each in made if digest_of(each) not in known][:count]

    def make(self, func, target, kind):
        import tvm.script
        from tvm.script import tirx as T

        value = VALUES.get(kind, f"T.max({SUM}, T.float32(0))")
        text = TEXT.replace("VALUE", value).replace("AFTER", AFTER.get(kind, ""))
        return tvm.script.from_source(text.strip(), extra_vars={"T": T})


space = Planted()
'''


FEW = [[16, 1], [8, 1], [4, 1], [2, 1]]
MANY = [[lanes, rows] for lanes in (16, 8, 4) for rows in (1, 2, 3, 4, 6, 8, 12, 16)]


def lanes(tiles: Sequence[Sequence[int]] = FEW) -> str:
    return LANES.replace("in TILES]", f"in {tiles}]")


def planted(*kinds: str) -> str:
    return PLANTED.replace("in KINDS]", f"in {list(kinds)}]")


def target(*spaces: str, timeout: float = 60, more: str = "") -> str:
    return TARGET.format(spaces=", ".join(f'"{space}"' for space in spaces), timeout=timeout, more=more)


def products(*activations: str) -> onnx.ModelProto:
    """One product with an activation for each name, large enough to be timed."""
    nodes, arrays, last = [], {}, "x"
    for i, activation in enumerate(activations):
        out = "y" if i == len(activations) - 1 else f"out{i}"
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"product{i}"]))
        nodes.append(helper.make_node(activation, [f"product{i}"], [out]))
        arrays[f"w{i}"] = models.weights((SIZE, SIZE), i) / SIZE
        last = out
    return models.graph(nodes, arrays, {"x": (SIZE, SIZE)}, {"y": (SIZE, SIZE)})


def fill(workspace: WorkspaceFolder, *activations: str, spaces: Sequence[str] = ("lanes",), space: str = "") -> None:
    workspace.onnx("net.onnx", products(*activations))
    workspace.dodo(NET)
    workspace.write("spaces/lanes.py", space or lanes())
    workspace.write("targets/native.toml", target(*spaces))


@dataclass(frozen=True)
class Night:
    """What a run of `doit tune` left: what it said, and its events."""

    done: Done
    events: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def trials(self) -> Counter[str]:
        """Candidates that were tried, by the operator's name without its digest."""
        found: Counter[str] = Counter()
        for batch in self.of("batch"):
            found[plain(batch["operator"]["operator"])] += batch["timed"] + sum(batch["failed"].values())
        return +found

    @property
    def ended(self) -> dict[str, Any]:
        (event,) = self.of("ended")
        return event


def plain(operator: str) -> str:
    return operator.removeprefix("native:").rpartition("-")[0]


def tune(workspace: WorkspaceFolder, *arguments: str, **environment: Any) -> Night:
    events = workspace.cache.parent / f"events-{time.monotonic_ns()}.jsonl"
    done = workspace.doit("tune", "--events", str(events), *arguments, **environment)
    listed = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
    return Night(done, listed)


@contextlib.contextmanager
def running(workspace: WorkspaceFolder, *arguments: str, **environment: Any) -> Iterator[subprocess.Popen[str]]:
    """`doit tune` in a process of its own, with its events on the standard output."""
    process = subprocess.Popen(
        workspace.command("tune", "--events", "-", *arguments),
        cwd=workspace.folder,
        env=workspace.environment(**environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def event(process: subprocess.Popen[str], kind: str, **given: object) -> dict[str, Any]:
    """Waits for an event."""
    for line in process.stdout or ():
        found = json.loads(line)
        if found["event"] == kind and given.items() <= found.items():
            return dict(found)
    raise AssertionError(process.stderr.read() if process.stderr else "")


def finish(process: subprocess.Popen[str]) -> Night:
    out, err = process.communicate(timeout=120)
    return Night(Done(process.returncode, out, err), [json.loads(line) for line in out.splitlines()])


def idle(workspace: WorkspaceFolder, *arguments: str, **environment: Any) -> Night:
    """A run that must make no trial, import no TVM and start no worker."""
    night = tune(workspace, *arguments, forbid_tvm=True, **environment)
    night.done.good()
    assert night.done.last.startswith("nothing to tune"), night.done.err
    assert not night.events
    return night


def records(workspace: WorkspaceFolder) -> dict[str, list[Record]]:
    """Every record of the store, by the key of its set."""
    sets = Store(workspace.cache).sets
    keys = [folder.name for folder in (workspace.cache / "sets").glob("??/*")]
    return {key: [decoded(data) for _, data in sets.read(key)] for key in keys}


def standings(workspace: WorkspaceFolder) -> dict[str, Standing]:
    """Where each operator of the store stands, by its name without its digest."""
    return {operator_of(workspace, key): standing(each, NOISE) for key, each in records(workspace).items()}


def operator_of(workspace: WorkspaceFolder, key: str) -> str:
    """Of which operator a set is, by its name without its digest."""
    return str(Store(workspace.cache).sets.about(key)["operator"])


def require_nothing_timed_twice(workspace: WorkspaceFolder) -> None:
    for each in records(workspace).values():
        counts = Counter(trial.candidate for trial in timed(each))
        assert set(counts.values()) <= {1}, counts


def timed(found: Sequence[Record]) -> list[TrialRecord]:
    return [each for each in found if isinstance(each, TrialRecord) and each.outcome is Outcome.TIMED]


def timed_in_all(workspace: WorkspaceFolder) -> int:
    return sum(len(timed(each)) for each in records(workspace).values())


def implementations(workspace: WorkspaceFolder, model: str = "net") -> dict[str, str]:
    return {plain(each["name"]): each["implementation"] for each in workspace.manifest(model)["operators"]}


def right(workspace: WorkspaceFolder, *activations: Callable[[Array], Array]) -> None:
    x = models.weights((SIZE, SIZE), 99)
    (output,) = workspace.run("net", x=x).values()
    for i, activation in enumerate(activations):
        x = activation(x @ (models.weights((SIZE, SIZE), i) / SIZE))
    np.testing.assert_allclose(output, x, rtol=1e-3, atol=1e-5)


def relu(x: Array) -> Array:
    return np.asarray(np.maximum(x, 0))


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


RELU, SIGMOID, TANH = "fused_matmul_relu", "fused_matmul_sigmoid", "fused_matmul_tanh"


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


# What stops it.


@pytest.fixture
def many(workspace: WorkspaceFolder, tmp_path: Path) -> WorkspaceFolder:
    """A workspace with so much to tune that there is time to stop it."""
    fill(workspace, "Relu", space=lanes(MANY))
    workspace.build().good()
    return workspace


def killed(workspace: WorkspaceFolder, kills: int, seed: int, folder: Path) -> None:
    """Kills so many runs, each after some batches, at a random moment; then one goes to its end."""
    chance = random.Random(seed)
    told = 0
    for _ in range(kills):
        with running(workspace, TMPDIR=str(folder)) as process:
            for _ in range(chance.randint(1, 2)):
                batch = event(process, "batch")
                told += batch["timed"] + sum(batch["failed"].values())
            time.sleep(chance.uniform(0, 0.5))
            process.kill()
        kept = timed_in_all(workspace)
        assert kept >= told, "a batch that was told is lost"
        require_nothing_timed_twice(workspace)
        told = kept
    left = list(folder.glob("tvmake-*"))
    assert left
    for each in left:
        os.utime(each, (time.time() - 120,) * 2)
    night = tune(workspace, TMPDIR=str(folder))
    night.done.good()
    assert night.trials.total() == len(MANY) - told
    assert all(len(each.trials) == len(MANY) for each in standings(workspace).values())
    require_nothing_timed_twice(workspace)
    assert not list(folder.glob("tvmake-*"))
    idle(workspace)


def test_what_is_killed_loses_nothing_that_was_told(many: WorkspaceFolder, tmp_path: Path) -> None:
    killed(many, 3, seed=1, folder=tmp_path)


def test_a_budget_is_kept_a_repeated_one_does_nothing_and_a_larger_one_goes_on(many: WorkspaceFolder) -> None:
    first = tune(many, "--budget", "2s")
    first.done.good()
    assert 0 < first.trials.total() < len(MANY)
    idle(many, "--budget", "2s")
    rest = tune(many, "--budget", "8h")
    rest.done.good()
    assert first.trials.total() + rest.trials.total() == len(MANY)
    require_nothing_timed_twice(many)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_it_after_the_batch_and_the_best_so_far_builds(
    many: WorkspaceFolder, number: signal.Signals
) -> None:
    with running(many) as process:
        event(process, "retest", won=True)
        process.send_signal(number)
        night = finish(process)
    assert night.done.code == 130
    assert night.ended["end"] == "stopped"
    assert "stopped\n" in night.done.err
    assert "goes on from here" in night.done.err
    assert "Traceback" not in night.done.err
    assert 0 < timed_in_all(many) < len(MANY)
    many.build().good()
    assert implementations(many) == {RELU: "tuned"}
    right(many, relu)


def test_a_second_signal_ends_it_at_once(workspace: WorkspaceFolder) -> None:
    dense(workspace, "loop", "right", patience=60)
    with running(workspace) as process:
        event(process, "phase", phase="measuring")
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        night = finish(process)
    assert time.monotonic() - begun < 5
    assert night.done.code == 130
    assert "Traceback" not in night.done.err


def at_once(workspaces: Sequence[WorkspaceFolder], tiles: Sequence[Sequence[int]]) -> None:
    """A run in each of these workspaces, which have one store and the same two operators, all at once."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(running(each)) for each in workspaces]
        nights = [finish(process) for process in processes]
    for night in nights:
        night.done.good()
    assert sum(night.trials.total() for night in nights) == 2 * len(tiles)
    require_nothing_timed_twice(workspaces[0])
    for each in workspaces:
        idle(each)


def test_two_at_once_share_the_work(workspace: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]) -> None:
    other = new_workspace()
    other.cache = workspace.cache
    fill(workspace, "Relu", "Sigmoid")
    fill(other, "Sigmoid", "Relu")
    at_once([workspace, other], FEW)


@pytest.mark.slow
def test_four_at_once_in_two_workspaces_share_the_work(
    workspace: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]
) -> None:
    other = new_workspace()
    other.cache = workspace.cache
    fill(workspace, "Relu", "Sigmoid", space=lanes(MANY))
    fill(other, "Sigmoid", "Relu", space=lanes(MANY))
    at_once([workspace, other, workspace, other], MANY)


# What goes wrong.


def dense(workspace: WorkspaceFolder, *kinds: str, timeout: float = 60, patience: float = 2) -> None:
    workspace.onnx("dense.onnx", models.dense())
    workspace.dodo('Model.onnx("dense", "dense.onnx")')
    workspace.write("spaces/planted.py", planted(*kinds))
    text = target("planted", timeout=timeout).replace("batch = 4", "batch = 8")
    workspace.write("targets/native.toml", text.replace("patience = 2", f"patience = {patience}"))


FAILURES = {
    "wrong": "wrong",
    "nan": "wrong",
    "crash": "crashed",
    "loop": "timed out",
    "missing": "failed",
    "refused": "not built",
    "large": "build timed out",
}


@pytest.mark.parametrize("large", [(), pytest.param(("large",), marks=pytest.mark.slow)], ids=["", "with a large one"])
def test_each_failure_is_named_and_none_wins_or_stops_the_night(
    workspace: WorkspaceFolder, large: tuple[str, ...]
) -> None:
    kinds = [kind for kind in FAILURES if kind != "large"] + [*large]
    dense(workspace, "right", *kinds, timeout=6 if large else 60)
    fails = (
        planted().replace('name = "planted"', 'name = "fails"').replace("made = [", "raise RuntimeError(3)\n        [")
    )
    workspace.write("spaces/fails.py", fails)
    workspace.edit('spaces = ["planted"]', 'spaces = ["fails", "planted"]', "targets/native.toml")
    night = tune(workspace)
    night.done.good()
    assert "the search space fails fails for native:fused_matmul" in night.done.err
    failed = Counter(FAILURES[kind] for kind in kinds)
    (figures,) = night.ended["operators"]
    assert figures["failed"] == failed
    assert figures["timed"] == 1
    for cause in failed:
        assert f"  {cause}, {failed[cause]}: native:fused_matmul" in night.done.err
    workspace.edit('spaces = ["fails", "planted"]', 'spaces = ["planted"]', "targets/native.toml")
    again = tune(workspace)
    again.done.good()
    transient = {"crashed", "timed out", "build timed out"} & failed.keys()  # what may have been the machine's fault
    assert again.ended["failures"].keys() == transient
    assert again.trials.total() == len(transient)
    (found,) = standings(workspace).values()
    assert [trial.decisions for trial in found.trials if trial.seconds is not None] == ["right"]
    assert {winner.trial.decisions for winner in found.winners} <= {"right"}
    idle(workspace)


@pytest.mark.parametrize(
    ("kinds", "code"), [pytest.param(("crash", "missing"), 3, marks=pytest.mark.slow), (("wrong", "nan"), 4)]
)
def test_the_exit_code_says_that_nothing_was_measured_or_all_was_wrong(
    workspace: WorkspaceFolder, kinds: Sequence[str], code: int
) -> None:
    dense(workspace, *kinds)
    night = tune(workspace)
    assert night.done.code == code, night.done.err
    assert not any(each.winners for each in standings(workspace).values())
    assert workspace.build().good().idle or implementations(workspace, "dense").popitem()[1] == "default"


@pytest.mark.parametrize(
    ("space", "code", "said"),
    [
        ("def (", 2, "spaces/planted.py"),
        ("x = 1", 2, "spaces/planted.py"),
        (
            planted("right").replace("made = [", 'raise RuntimeError("no idea today")\n        made = ['),
            3,
            "no idea today",
        ),
    ],
    ids=["syntax", "no space", "raises"],
)
def test_a_space_that_cannot_be_used_is_named(workspace: WorkspaceFolder, space: str, code: int, said: str) -> None:
    dense(workspace, "right")
    workspace.write("spaces/planted.py", space)
    night = tune(workspace)
    assert night.done.code == code
    assert said in night.done.err
    assert "Traceback" not in night.done.err


def test_records_that_make_no_sense_are_named_and_the_best_of_the_others_is_built(workspace: WorkspaceFolder) -> None:
    fill(workspace, "Relu")
    tune(workspace).done.good()
    sets = Store(workspace.cache).sets
    ((key, found),) = records(workspace).items()
    best = standing(found, NOISE).best
    assert best is not None
    trial, retest = best.trial, best.retest
    broken = msgspec.structs.replace(trial, candidate="0" * 64, decisions="broken")
    faster = msgspec.structs.replace(retest, candidate="0" * 64, seconds=retest.seconds / 100)
    claim = msgspec.structs.replace(broken, candidate="1" * 64, outcome=Outcome.CLAIMED)
    newer = msgspec.json.encode({"type": "trial", "format": 99})
    sets.add(key, [encoded(broken), encoded(faster), encoded(claim), b"not a record", newer], {})
    (folder,) = (workspace.cache / "sets").glob("??/*")
    (folder / ("a" * 64)).write_bytes(encoded(trial)[:100])
    (folder / "notes.txt").write_text("of another tool")

    built = workspace.build().good()
    assert re.search(
        rf"WARNING native: 1 better tuning record of {RELU}-\w+ cannot be made again, .*no tile", built.err
    )
    assert implementations(workspace) == {RELU: "tuned"}
    right(workspace, relu)
    assert "unread" in workspace.doit("records", "list").good().out
    night = tune(workspace)
    night.done.good()
    assert f"not built, 1: native:{RELU}" in night.done.err
    assert "'broken' is no tile" in night.done.err
    idle(workspace)


def test_a_model_that_cannot_be_built_keeps_no_other_from_being_tuned(workspace: WorkspaceFolder) -> None:
    fill(workspace, "Relu")
    workspace.write("broken.onnx", b"no model")
    workspace.dodo(f'{NET},\nModel.onnx("broken", "broken.onnx"),')
    night = tune(workspace)
    assert night.done.code == 1
    assert night.trials.total() > 0
    assert "left out, as they could not be built: native:broken" in night.done.err
    only = workspace.doit("tune", "-m", "broken")
    assert only.code == 2
    assert "no model could be built" in only.err


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
        (["--trials", "-1"], "--trials is -1"),
        (["--top", "-1"], "--top is -1"),
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
    assert done.code in (2, 3) if said == "many" else done.code == 2, done.err
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


# Several machines.


@pytest.mark.parametrize("tiles", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_two_machines_tune_through_a_remote_and_never_the_same_candidate(
    new_workspace: Callable[[], WorkspaceFolder], tmp_path: Path, tiles: list[list[int]]
) -> None:
    remote = {"TVMAKE_REMOTE": (tmp_path / "shared").as_uri()}
    one, other, third = (new_workspace() for _ in range(3))
    for workspace in (one, other, third):
        fill(workspace, "Relu", "Sigmoid", space=lanes(tiles))
    with running(one, **remote) as first, running(other, **remote) as second:
        nights = [finish(first), finish(second)]
    for night in nights:
        night.done.good()
    assert third.build(**remote).good().compiled <= 2
    assert set(implementations(third).values()) == {"tuned"}
    right(third, relu, sigmoid)
    require_nothing_timed_twice(third)
    assert timed_in_all(third) == sum(night.ended["timed"] for night in nights) == 2 * len(tiles)
    idle(third, **remote)


def test_what_a_machine_found_before_it_was_killed_is_on_the_remote(
    new_workspace: Callable[[], WorkspaceFolder], tmp_path: Path
) -> None:
    remote = {"TVMAKE_REMOTE": (tmp_path / "shared").as_uri()}
    one, other = new_workspace(), new_workspace()
    for workspace in (one, other):
        fill(workspace, "Relu", space=lanes(MANY))
    with running(one, **remote) as process:
        event(process, "batch")
        event(process, "batch")
        process.send_signal(signal.SIGKILL)
    other.build(**remote).good()
    assert timed_in_all(other) >= 4
    require_nothing_timed_twice(other)


def test_tuning_goes_on_without_its_remote(workspace: WorkspaceFolder) -> None:
    fill(workspace, "Relu")
    night = tune(workspace, TVMAKE_REMOTE="http://127.0.0.1:1")
    night.done.good()
    assert night.trials == {RELU: 4}
    assert night.done.err.count("going on without it") == 1
