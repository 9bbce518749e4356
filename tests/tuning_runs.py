"""Workspaces that `doit tune` runs in, its runs, and what their stores hold.

The operators are tiny and the search spaces lie in the workspaces: a few candidates each, of which some are planted.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import models
import numpy as np
import onnx
from conftest import Done, WorkspaceFolder
from onnx import helper

from pipeline.store import Store
from pipeline.tuning.records import Outcome, Record, Standing, TrialRecord, decoded, standing

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

# Vectorizes products: every candidate of more lanes than one is many times as fast as the default, the others are not.
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
            if lanes > 1 and len(loops) == 3:
                schedule.reorder(loops[0], loops[2], loops[1])
            if lanes > 1:
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


def twin(one: WorkspaceFolder, other: WorkspaceFolder, store: bool = True) -> WorkspaceFolder:
    """Has a new workspace be as another is, with a copy of its store or with none."""
    shutil.rmtree(other.folder)
    shutil.copytree(one.folder, other.folder)
    if store:
        shutil.copytree(one.cache, other.cache)
    return other


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


def dense(workspace: WorkspaceFolder, *kinds: str, timeout: float = 60, patience: float = 2) -> None:
    workspace.onnx("dense.onnx", models.dense())
    workspace.dodo('Model.onnx("dense", "dense.onnx")')
    workspace.write("spaces/planted.py", planted(*kinds))
    text = target("planted", timeout=timeout).replace("batch = 4", "batch = 8")
    workspace.write("targets/native.toml", text.replace("patience = 2", f"patience = {patience}"))
