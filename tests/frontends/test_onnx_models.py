"""ONNX models from end to end: every way in which one may be given and written."""

from __future__ import annotations

from collections.abc import Callable

import models
import numpy as np
import onnx
import pytest
from conftest import WorkspaceFolder
from onnx import TensorProto, helper, numpy_helper

X = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)

FUNCTIONS = """
def proto():
    import onnx

    return onnx.load("dense.onnx")

def path():
    return "dense.onnx"

def whole_path():
    from pathlib import Path

    return Path("dense.onnx").resolve()
"""

DECLARATIONS = """
Model.onnx("file", "dense.onnx"),
Model.onnx("below", "zoo/dense.onnx"),
Model.onnx("proto", proto),
Model.onnx("path", path),
Model.onnx("whole_path", whole_path),
Model.onnx("unnamed", lambda: "dense.onnx"),
Model.onnx("external", "external.onnx"),
Model.onnx("fixed", "open.onnx", shapes={"x": (2, 4)}),
Model.onnx("constants", "constants.onnx"),
Model.onnx("old", "old.onnx"),
Model.onnx("recorded", "dense.onnx", cases=["case", "other_case"]),
"""
NAMES = [line.split('"')[1] for line in DECLARATIONS.strip().splitlines()]


def with_constant_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights as nodes of their own, as some exporters write them."""
    for tensor in list(model.graph.initializer):
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    del model.graph.initializer[:]
    return model


def with_declared_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights declared as inputs too, as before IR version 4."""
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.insert(0, helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tensor.dims))
    return model


@pytest.fixture(scope="module")
def built(new_workspace: Callable[[], WorkspaceFolder]) -> WorkspaceFolder:
    place = new_workspace()
    place.onnx("dense.onnx", models.dense())
    place.onnx("zoo/dense.onnx", models.dense())
    place.onnx("open.onnx", models.dense(rows="batch"))
    place.onnx("constants.onnx", with_constant_nodes(models.dense()))
    place.onnx("old.onnx", with_declared_weights(models.dense()))
    save_external(place, models.dense())
    models.save_case(place.folder / "case", [X], [models.dense_of(X)])
    models.save_case(place.folder / "other_case", [X + 1], [models.dense_of(X + 1)])
    place.dodo(DECLARATIONS, FUNCTIONS)
    done = place.build().good()
    assert done.compiled == 1, "it is one and the same operator"
    return place


def save_external(place: WorkspaceFolder, model: onnx.ModelProto) -> None:
    for name in ("external.onnx", "external.data"):
        (place.folder / name).unlink(missing_ok=True)
    path = str(place.folder / "external.onnx")
    onnx.save_model(model, path, save_as_external_data=True, location="external.data", size_threshold=0)


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_numpy(built: WorkspaceFolder, name: str) -> None:
    outputs = built.run(name, x=X)
    np.testing.assert_allclose(outputs["y"], models.dense_of(X), rtol=1e-5, atol=1e-6)
    reference = built.manifest(name)["reference"]
    assert reference["state"] == "passed"
    assert reference["cases"] == (2 if name == "recorded" else 0)


def test_nothing_to_do_afterwards(built: WorkspaceFolder) -> None:
    built.idle_build()


def test_equal_models_give_equal_libraries(built: WorkspaceFolder) -> None:
    assert len({built.artifact_bytes(name)["lib.so"] for name in ("file", "proto", "path", "external", "fixed")}) == 1


def test_other_external_weights_are_noticed(workspace: WorkspaceFolder) -> None:
    """The file that names them does not change."""
    save_external(workspace, models.dense())
    workspace.dodo('Model.onnx("external", "external.onnx"),')
    workspace.build().good()
    before = (workspace.folder / "external.onnx").read_bytes()
    save_external(workspace, models.dense(seed=2))
    assert (workspace.folder / "external.onnx").read_bytes() == before
    assert workspace.build().good().ran == {"read": 1, "checked": 1}
    np.testing.assert_allclose(workspace.run("external", x=X)["y"], models.dense_of(X, 2), rtol=1e-5, atol=1e-6)
    workspace.idle_build()


def test_missing_or_short_external_weights_fail_by_name(workspace: WorkspaceFolder) -> None:
    save_external(workspace, models.dense())
    workspace.dodo('Model.onnx("external", "external.onnx"),')
    data = (workspace.folder / "external.data").read_bytes()
    workspace.write("external.data", data[:20])
    short = workspace.build()
    (workspace.folder / "external.data").unlink()
    missing = workspace.build()
    for done, said in ((short, "which has 20"), (missing, "cannot be read")):
        assert done.code == 1
        assert list(done.failures) == ["read:external"]
        assert "external.data" in done.failures["read:external"]
        assert said in done.failures["read:external"]


def test_a_changed_recorded_case_is_checked_again(workspace: WorkspaceFolder) -> None:
    workspace.onnx("dense.onnx", models.dense())
    models.save_case(workspace.folder / "case", [X], [models.dense_of(X)])
    workspace.dodo('Model.onnx("dense", "dense.onnx", cases=["case"]),')
    workspace.build().good()
    workspace.write("case/output_0.pb", numpy_helper.from_array(models.dense_of(X) + 1).SerializeToString())
    done = workspace.build()
    assert done.code == 1
    assert list(done.failures) == ["check:native:dense"]
    models.save_case(workspace.folder / "case", [X], [models.dense_of(X)])
    assert not workspace.build().good().ran
