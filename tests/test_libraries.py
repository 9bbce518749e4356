"""Libraries from end to end: artifacts that carry them, a workspace's own, and what is said of one that is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import pytest
from conftest import WorkspaceFolder
from onnx import helper

from pipeline.compiler.libraries import by_name

X = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
IMAGE = np.random.default_rng(2).standard_normal((1, 3, 14, 14)).astype(np.float32)
needs_onednn = pytest.mark.skipif(by_name("onednn").find() is None, reason=by_name("onednn").install)


def convolution(seed: int = 0) -> object:
    """y = relu(conv(x, w) + b), x (1, 3, 14, 14), y (1, 16, 14, 14)."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1], name="conv"),
        helper.make_node("Relu", ["c"], ["y"], name="relu"),
    ]
    arrays = {"w": models.weights((16, 3, 3, 3), seed), "b": models.weights((16,), seed + 1)}
    return models.graph(nodes, arrays, {"x": (1, 3, 14, 14)}, {"y": (1, 16, 14, 14)})


@pytest.fixture(scope="module")
def convolved(new_workspace: Callable[[], WorkspaceFolder]) -> WorkspaceFolder:
    """A convolution computed by oneDNN."""
    place = new_workspace()
    place.onnx("conv.onnx", convolution())
    place.dodo('Model.onnx("conv", "conv.onnx"),')
    place.write("targets/native.toml", 'target = "native"\norder = ["onednn", "default"]\n')
    place.build().good()
    return place


def implementations(place: WorkspaceFolder, model: str) -> set[str]:
    return {each["implementation"] for each in place.manifest(model)["operators"]}


@needs_onednn
def test_an_artifact_carries_its_libraries_and_runs_anywhere(convolved: WorkspaceFolder, tmp_path: Path) -> None:
    assert "onednn" in implementations(convolved, "conv")
    manifest = convolved.manifest("conv")
    assert manifest["reference"]["state"] == "passed"
    (used,) = manifest["libraries"]
    assert (used["name"], used["licence"]) == ("onednn", "Apache-2.0")
    assert set(used["files"]) <= set(manifest["files"])
    (there,) = convolved.run("conv", x=IMAGE).values()

    moved = tmp_path / "elsewhere"
    shutil.copytree(convolved.artifact("conv"), moved)
    np.save(tmp_path / "x.npy", IMAGE)
    program = (
        "import numpy as np; from pipeline import load; "
        "y, = load('elsewhere')(x=np.load('x.npy')).values(); np.save('y.npy', y)"
    )
    # No cache, no search path for libraries, nothing of the environment that built it.
    bare = {"PATH": os.defpath, "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=bare, check=True, timeout=60)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), there)

    (moved / used["files"][0]).unlink()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=bare, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert f"{used['files'][0]} is missing" in done.stderr


@needs_onednn
def test_other_weights_compile_nothing(convolved: WorkspaceFolder) -> None:
    convolved.onnx("conv.onnx", convolution(seed=7))
    done = convolved.build().good()
    assert done.compiled == 0
    assert done.ran["packed"] == 1
    assert convolved.manifest("conv")["reference"]["state"] == "passed"
    convolved.onnx("conv.onnx", convolution())
    convolved.build().good()


@needs_onednn
def test_forbidding_a_library_compiles_only_what_it_computed(convolved: WorkspaceFolder) -> None:
    convolved.build().good()
    order = (convolved.folder / "targets" / "native.toml").read_text()
    convolved.write("targets/native.toml", order + '[[operators]]\nmatch = "*conv2d*"\nforbid = ["library"]\n')
    done = convolved.build().good()
    assert done.compiled == 1
    assert "onednn" not in implementations(convolved, "conv")
    assert not (convolved.artifact("conv") / "libdnnl.so.3").exists()
    convolved.write("targets/native.toml", order)
    assert convolved.build().good().compiled == 0
    assert "onednn" in implementations(convolved, "conv")


# A library of a workspace: one file, its C++ inside.
MINE = '''
"""A library of this workspace: the dense layer of one model, in C++."""


class Mine:
    name = "mine"
    version = 1
    licence = "Apache-2.0"
    install = "nothing: it is a part of the workspace"
    threads = "caller"
    shim = """
extern "C" __attribute__((visibility("default")))
int mine_dense(const float* x, const float* w, const float* b, float* y) {
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 8; ++j) {
      float sum = b[j];
      for (int k = 0; k < 4; ++k) sum += x[i * 4 + k] * w[k * 8 + j];
      y[i * 8 + j] = sum > 0 ? sum : 0;
    }
  return 0;
}
"""

    def find(self):
        from pipeline.compiler.libraries import Installed

        return Installed("1", (), {})

    def match(self, func, target, shim):
        from tvm.script import tirx as T

        if [tuple(map(int, param.ty.shape)) for param in func.params] != [(2, 4), (4, 8), (8,), (2, 8)]:
            return None

        @T.prim_func(s_tir=True)
        def dense(x: T.Buffer((2, 4), "float32"), w: T.Buffer((4, 8), "float32"),
                  b: T.Buffer((8,), "float32"), y: T.Buffer((2, 8), "float32")):
            T.func_attr({"tirx.noalias": True})
            with T.sblock("call"):
                T.reads(x[0:2, 0:4], w[0:4, 0:8], b[0:8])
                T.writes(y[0:2, 0:8])
                T.evaluate(T.call_extern("int32", "mine_dense", x.data, w.data, b.data, y.data))

        return dense


library = Mine()
'''


def test_a_library_is_added_as_one_file(workspace: WorkspaceFolder) -> None:
    workspace.onnx("dense.onnx", models.dense())
    workspace.dodo('Model.onnx("dense", "dense.onnx"),')
    workspace.write("libraries/mine.py", MINE)
    workspace.write("targets/native.toml", 'target = "native"\norder = ["library", "default"]\nlibraries = ["mine"]\n')
    workspace.build().good()
    assert implementations(workspace, "dense") == {"mine"}
    (output,) = workspace.run("dense", x=X).values()
    np.testing.assert_allclose(output, models.dense_of(X), rtol=1e-4, atol=1e-5)
    workspace.idle_build()
    workspace.write("libraries/mine.py", MINE.replace("sum = b[j]", "sum = 1 + b[j]"))
    done = workspace.build().good()
    assert implementations(workspace, "dense") == {"default"}
    assert "mine is put aside for fused_matmul" in done.err
    assert "gives another result than the default" in done.err


def test_a_library_that_is_not_installed_is_named_and_the_build_goes_on(workspace: WorkspaceFolder) -> None:
    workspace.onnx("dense.onnx", models.dense())
    workspace.dodo('Model.onnx("dense", "dense.onnx"),')
    order = ["library", "default"]
    workspace.write(
        "targets/native.toml", f'target = "native"\norder = {json.dumps(order)}\nlibraries = ["openblas"]\n'
    )
    done = workspace.build(OPENBLAS_ROOT="/nonexistent").good()
    assert "the library openblas is not installed (pip install scipy-openblas32)" in done.err
    assert implementations(workspace, "dense") == {"default"}
