"""Strategies from end to end: what the order, the workspace's own files and measuring come to in a build."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import models
import numpy as np
import pytest
from conftest import Done, WorkspaceFolder

X = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
DENSE = 'Model.onnx("dense", "dense.onnx"),'

# A strategy of the workspace's: dense (2, 4) x (4, 8) + (8,), relu, with a body to be filled in.
STRATEGY = '''
"""A strategy of this workspace."""


class Mine:
    name = "mine"
    version = 1

    def apply(self, func, target):
        from tvm.script import tirx as T

        if len(func.params) != 4:
            return None

        @T.prim_func(s_tir=True)
        def dense(x: T.Buffer((2, 4), "float32"), w: T.Buffer((4, 8), "float32"),
                  b: T.Buffer((8,), "float32"), y: T.Buffer((2, 8), "float32")):
            T.func_attr({"tirx.noalias": True})
            for i, j in T.grid(2, 8):
                with T.sblock("y"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    y[vi, vj] = T.max(
                        x[vi, 0] * w[0, vj] + x[vi, 1] * w[1, vj] + x[vi, 2] * w[2, vj] + x[vi, 3] * w[3, vj] + b[vj],
                        T.float32(0),
                    )
            {more}

        return dense


strategy = Mine()
'''
RIGHT = STRATEGY.replace("{more}", "")
WRONG = STRATEGY.replace("T.float32(0),", "T.float32(0.5),").replace("{more}", "")
NAN = RIGHT.replace("T.max(", 'T.float32("nan") + T.max(')
CRASH = STRATEGY.replace("{more}", 'T.evaluate(T.call_extern("int32", "abort"))')
LOOP = STRATEGY.replace("{more}", 'T.evaluate(T.call_extern("int32", "pause"))')
MISSING = STRATEGY.replace("{more}", 'T.evaluate(T.call_extern("int32", "no_such_function"))')
RAISES = STRATEGY.replace("from tvm.script import tirx as T", 'raise ValueError("not today")').replace("{more}", "")
BROKEN = "def ("
NOTHING = "x = 1"
OTHER_SHAPE = RIGHT.replace('y: T.Buffer((2, 8), "float32")', 'y: T.Buffer((2, 9), "float32")')


def target(order: list[str], select: str = "first", **more: object) -> str:
    lines = ['target = "native"', f"order = {json.dumps(order)}", f'select = "{select}"']
    lines += [f"{name} = {json.dumps(value)}" for name, value in more.items()]
    return "\n".join([*lines, "[measure]", "seconds = 0.01", "patience = 2", ""])


@pytest.fixture
def dense(workspace: WorkspaceFolder) -> WorkspaceFolder:
    workspace.onnx("dense.onnx", models.dense())
    workspace.dodo(DENSE)
    return workspace


def operator(workspace: WorkspaceFolder, model: str = "dense") -> Any:
    (only,) = workspace.manifest(model)["operators"]
    return only


def trials(workspace: WorkspaceFolder) -> dict[str, Any]:
    return {trial["strategy"]: trial for trial in operator(workspace)["candidates"]}


def right(workspace: WorkspaceFolder) -> None:
    (output,) = workspace.run("dense", x=X).values()
    np.testing.assert_allclose(output, models.dense_of(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("select", ["first", "fastest"])
def test_a_strategy_is_added_as_one_file(dense: WorkspaceFolder, select: str) -> None:
    dense.write("strategies/mine.py", RIGHT)
    dense.write("targets/native.toml", target(["mine", "default"], select))
    dense.build().good()
    right(dense)
    found = trials(dense)
    assert not found["mine"]["refused"]
    assert found["mine"]["error"] <= 1e-4
    if select == "first":
        assert operator(dense)["implementation"] == "mine"
    else:
        assert all(trial["seconds"] > 0 for trial in found.values())
        assert set(found) == {"mine", "default"}
    dense.idle_build()


PLANTED = {
    "another result": (WRONG, "another result"),
    "not a number": (NAN, "not a number"),
    "crash": (CRASH, "SIGABRT"),
    "endless loop": (LOOP, "had not ended after 2 s"),
    "missing symbol": (MISSING, "no_such_function"),
    "raises": (RAISES, "not today"),
    "no Python": (BROKEN, "strategies/mine.py cannot be loaded: SyntaxError"),
    "no strategy": (NOTHING, "has no object 'strategy'"),
}


def _each_planted() -> Iterator[Any]:
    """Each in one way by default, by turns; the other way is slow."""
    for i, planted in enumerate(PLANTED):
        for j, select in enumerate(("first", "fastest")):
            marks = [pytest.mark.slow] if (i + j) % 2 else []
            yield pytest.param(planted, select, marks=marks, id=f"{select}-{planted}")


@pytest.mark.parametrize(("planted", "select"), list(_each_planted()))
def test_what_is_planted_is_refused_by_name_and_never_linked(dense: WorkspaceFolder, planted: str, select: str) -> None:
    source, said = PLANTED[planted]
    dense.write("strategies/mine.py", source)
    dense.write("targets/native.toml", target(["mine", "default"], select))
    done = dense.build().good()
    assert operator(dense)["implementation"] == "default"
    assert said in trials(dense)["mine"]["refused"]
    assert said in done.err
    right(dense)
    again = dense.build().good()
    assert "timed the candidates" not in again.err


def test_all_refused_is_an_error_that_names_them(dense: WorkspaceFolder) -> None:
    dense.write("strategies/mine.py", WRONG)
    dense.write("targets/native.toml", target(["mine"]))
    done = dense.build()
    assert done.code == 1
    assert "no strategy gives a function that can be used: mine gives another result" in done.err
    assert 'add "default"' in done.err
    assert not dense.artifact("dense").exists()


def test_measured_once_and_only_again_where_a_candidate_changed(dense: WorkspaceFolder) -> None:
    dense.write("strategies/mine.py", RIGHT)
    dense.write("targets/native.toml", target(["mine", "default"], "fastest"))
    assert timed(dense.build().good()) == 1
    (dense.folder / ".doit.db").unlink()
    assert timed(dense.build().good()) == 0
    dense.write("strategies/mine.py", RIGHT + "# a comment\n")
    assert timed(dense.build().good()) == 0
    dense.write(
        "strategies/mine.py", RIGHT.replace("+ b[vj],", "+ b[vj] + T.float32(0),").replace("vi, vj = ", "vi, vj = ")
    )
    dense.write(
        "strategies/mine.py",
        RIGHT.replace("T.grid(2, 8)", "T.grid(2, 8)").replace(
            "x[vi, 0] * w[0, vj] + x[vi, 1] * w[1, vj]", "x[vi, 1] * w[1, vj] + x[vi, 0] * w[0, vj]"
        ),
    )
    assert timed(dense.build().good()) == 1


def timed(done: Done) -> int:
    return done.err.count("timed the candidates of")


def test_a_rule_forces_or_forbids_by_name(dense: WorkspaceFolder) -> None:
    dense.write("strategies/mine.py", RIGHT)
    order = target(["mine", "default"])
    dense.write("targets/native.toml", order + '[[operators]]\nmatch = "fused_matmul*"\nforbid = ["mine"]\n')
    dense.build().good()
    assert operator(dense)["implementation"] == "default"
    dense.write(
        "targets/native.toml", target(["default", "mine"]) + '[[operators]]\nmatch = "fused_*"\nonly = ["mine"]\n'
    )
    dense.build().good()
    assert operator(dense)["implementation"] == "mine"
    dense.write("targets/native.toml", order + '[[operators]]\nmatch = "*"\nforbid = ["mine", "default"]\n')
    done = dense.build()
    assert done.code != 0
    assert "leaves no strategy for fused_matmul" in done.err


MANUAL = """
from tvm.script import tirx as T

from pipeline.compiler.strategies import manual


@manual.replaces("{digest}")
@T.prim_func(s_tir=True)
def by_hand(x: T.Buffer((2, 4), "float32"), w: T.Buffer((4, 8), "float32"),
            b: T.Buffer((8,), "float32"), y: T.Buffer((2, 8), "float32")):
    T.func_attr({"tirx.noalias": True})
    for i, j in T.grid(2, 8):
        with T.sblock("y"):
            vi, vj = T.axis.remap("SS", [i, j])
            y[vi, vj] = T.max(
                x[vi, 0] * w[0, vj] + x[vi, 1] * w[1, vj] + x[vi, 2] * w[2, vj] + x[vi, 3] * w[3, vj] + b[vj],
                T.float32(0),
            )
"""
SCHEDULE = """
from pipeline.compiler.strategies import manual


@manual.replaces("{digest}")
def by_schedule(sch):
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        sch.vectorize(sch.get_loops(block)[1]) if len(sch.get_loops(block)) == 2 else None
"""


@pytest.mark.parametrize("source", [MANUAL, SCHEDULE], ids=["function", "schedule"])
def test_a_manual_function_is_bound_by_digest(dense: WorkspaceFolder, source: str) -> None:
    dense.write("targets/native.toml", target(["manual", "default"]))
    dense.build().good()
    assert operator(dense)["implementation"] == "default"
    digest = operator(dense)["workload"]
    dense.write("manual/dense.py", source.replace("{digest}", digest[:12]))
    dense.build().good()
    assert operator(dense)["implementation"] == "manual"
    assert trials(dense)["manual"]["error"] <= 1e-4
    right(dense)


def test_a_manual_function_is_refused_or_reported(dense: WorkspaceFolder) -> None:
    dense.write("targets/native.toml", target(["manual", "default"]))
    dense.build().good()
    digest = operator(dense)["workload"]
    good = MANUAL.replace("{digest}", digest)
    for source, said in {
        good.replace("T.float32(0)", "T.float32(1)"): "gives another result than the default",
        good.replace('y: T.Buffer((2, 8), "float32")', 'y: T.Buffer((2, 9), "float32")'): "'by_hand' takes (",
        good.replace("def by_hand(", "def by_hand[("): "manual/dense.py is left out",
        MANUAL.replace("{digest}", "0123456789ab"): "by_hand is for 0123456789ab, which is no operator",
    }.items():
        dense.write("manual/dense.py", source)
        done = dense.build().good()
        assert said in done.err, source
        assert operator(dense)["implementation"] == "default"
        right(dense)


def test_a_target_that_is_not_here_is_not_timed_and_says_so(dense: WorkspaceFolder) -> None:
    dense.write("strategies/mine.py", RIGHT)
    text = target(["mine", "rules", "default"], "fastest").replace(
        '"native"', '{kind = "llvm", mtriple = "aarch64-linux-gnu"}'
    )
    dense.write("targets/native.toml", text)
    done = dense.build()
    assert "timed" not in done.err.replace("not timed", "")
