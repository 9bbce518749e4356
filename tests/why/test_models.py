"""`doit why` tells what changed of a model: each test changes one thing, builds it in earnest, and reads."""

from __future__ import annotations

import models
from conftest import WorkspaceFolder
from test_tracking import SCALED

from pipeline.journal import Journal
from pipeline.store import Store
from tests.why.bench import DENSE, Bench


def test_a_layers_shape(bench: Bench) -> None:
    bench.build()
    bench.model(models.dense(rows=3))
    bench.build()
    said = bench.last()
    assert "the operator is new" in said
    assert "net.onnx changed" in said
    assert "shape of parameter 0: 2x4:float32 → 3x4:float32" in said
    assert "shape of parameter 3: 2x8:float32 → 3x8:float32" in said
    assert f"most likely it was {DENSE}-" in said
    assert "\n                -" in said
    assert "T.int64(3)" in said
    assert bench.why("net").count("new: ") == 1


def test_an_epilogue(bench: Bench) -> None:
    bench.model(models.chain("Relu", "Sigmoid", "Relu"))
    bench.build()
    bench.model(models.chain("Relu", "Tanh", "Relu"))
    bench.build()
    said = bench.last("fused_matmul_tanh")
    assert "operators in it: fused_matmul_sigmoid → fused_matmul_tanh" in said
    assert "+            b2[v8, v9] = T.tanh(b3[v8, v9])" in said
    assert "nothing changed since the build of" in bench.last("fused_matmul_relu")
    model = bench.why("net")
    assert "most likely fused_matmul_sigmoid-" in model
    assert "unchanged: 1 operator\n" in model


def test_a_layer_more_that_is_the_same_operator(bench: Bench) -> None:
    bench.model(models.chain("Relu"))
    bench.build()
    bench.model(models.chain("Relu", "Relu"))
    bench.build()
    assert "calls in one inference: 1 → 2" in bench.last()
    assert "calls in one inference: 1 → 2" in bench.why("net")


def test_the_difference_of_ir_without_the_blob(bench: Bench) -> None:
    bench.build()
    bench.model(models.dense(activation="Tanh"))
    bench.build()
    Journal(bench.place.folder, "native", "net")
    store = Store(bench.place.cache)
    (old,) = bench.builds()[0].state.operators.values()
    path = store.path(old.workload)
    assert path is not None
    aside = path.with_name("aside")
    path.rename(aside)
    try:
        assert f"cannot be shown: the store has no blob {old.workload} any more" in bench.last()
    finally:
        aside.rename(path)


def test_a_models_file_edited_without_effect(bench: Bench) -> None:
    bench.build()
    made = models.dense()
    made.doc_string = "for people"
    bench.model(made)
    bench.build()
    assert "net.onnx changed, but what it says is the same: nothing was made again for it" in bench.why("net")
    assert "nothing changed since" in bench.last()
    made.graph.node[0].name = "another"
    bench.model(made)
    bench.build()
    said = bench.why("net")
    assert "net.onnx changed, but its operators and weights are the same\n" in said
    assert "unchanged: 1 operator\n" in said


def test_a_file_that_a_function_of_the_users_reads(workspace: WorkspaceFolder) -> None:
    workspace.write("nets.py", SCALED)
    workspace.dodo('Model.onnx("model", nets.scaled),', "import nets")
    workspace.build().good()
    workspace.edit("SCALE = 2.0", "SCALE = 3.0", "nets.py")
    workspace.build().good()
    said = workspace.doit("why", "model", forbid_tvm=True).good().out
    assert "nets.py changed\n" in said
    assert "unchanged: 1 operator\n" in said
    workspace.edit('"Mul"', '"Div"', "nets.py")
    workspace.build().good()
    said = workspace.doit("why", "divide").good().out
    assert "the operator is new" in said
    assert "nets.py changed\n" in said
    assert "operators in it: multiply → divide" in said


def test_other_weights(bench: Bench) -> None:
    bench.build()
    bench.model(models.dense(seed=7))
    bench.build()
    said = bench.why("net")
    assert "net.onnx changed\n" in said
    assert "weight w of the model changed" in said
    assert "nothing changed since" in bench.last()
