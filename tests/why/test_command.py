"""`doit why` as a command: its names and options, and that it reads without TVM."""

from __future__ import annotations

import json

import models
from conftest import WorkspaceFolder

from pipeline.journal import Journal
from tests.why.bench import Bench


def test_one_of_several_and_for_programs(bench: Bench) -> None:
    bench.model(models.chain("Relu", "Sigmoid"))
    bench.build()
    bench.model(models.chain("Relu", "Tanh"))
    bench.build()
    (told,) = json.loads(bench.why("fused_matmul_tanh", "--json"))
    (label,) = [label for label in bench.builds()[-1].state.operators if "tanh" in label]
    assert (told["operator"], told["implementation"], told["fresh"]) == (label, "default", False)
    (news,) = told["news"]
    assert news["fate"] == "new"
    assert [each["kind"] for each in news["causes"]] == ["model file"]
    assert news["was"]["label"].startswith("fused_matmul_sigmoid-")
    assert news["ir"].startswith("--- fused_matmul_sigmoid")
    assert news["ways"]["apply:default"] in ("run", "found")
    (whole,) = json.loads(bench.why("net", "--json", "--builds", "2"))
    assert [each["build"] for each in whole["news"]] == [2, 1]
    digest = bench.builds()[-1].state.operators[label].workload.hash
    for name in (label, label.rpartition("-")[2], digest, digest[:10]):
        assert label in bench.why(name)
    assert len(bench.why("fused_*").split("\n\n")) == 2


def test_what_there_is_not(bench: Bench) -> None:
    assert "native:net is not built" in bench.why(code=1)
    bench.build()
    assert "there is no operator or model 'conv2d*'" in bench.why("conv2d*", code=1)
    assert "wants the name of one operator" in bench.place.doit("why").err
    assert "there is no target 'x'" in bench.why("net", "-t", "x", code=2)
    assert "option -n wants a number of 1 or more" in bench.why("net", "-n", "0", code=2)
    Journal(bench.place.folder, "native", "net").remove()
    said = bench.why()
    assert "no build of it is noted here yet" in said
    assert "runs on     default" in said


def test_a_real_build_is_told_of_and_costs_no_tvm(workspace: WorkspaceFolder) -> None:
    workspace.onnx("net.onnx", models.dense())
    workspace.dodo('Model.onnx("net", "net.onnx"),')
    workspace.build().good()
    done = workspace.doit("why", "fused_*", forbid_tvm=True).good()
    assert "in one inference" in done.out
    assert "something has changed since" not in done.out
    workspace.write("targets/native.toml", 'target = "native"\norder = ["rules", "default"]\n')
    assert "something has changed since" in workspace.doit("why", "fused_*", forbid_tvm=True).good().out
    workspace.build().good()
    done = workspace.doit("why", "net", forbid_tvm=True).good()
    assert "the order of strategies changed: default → rules, default" in done.out
    assert "default → rules" in done.out
