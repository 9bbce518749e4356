"""What a model that a function makes depends on: when it changes the function is called again, otherwise it is not."""

from __future__ import annotations

import os

import models
import numpy as np
import pytest
from conftest import WorkspaceFolder

X = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)

# y = x * SCALE, from a module beside dodo.py.
SCALED = """
SCALE = 2.0

def scaled():
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    value = numpy_helper.from_array(np.full(4, SCALE, "float32"), "scale")
    infos = [helper.make_tensor_value_info(name, 1, (2, 4)) for name in "xy"]
    nodes = [helper.make_node("Mul", ["x", "scale"], ["y"])]
    graph = helper.make_graph(nodes, "scaled", infos[:1], infos[1:], [value])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
"""


def scale(place: WorkspaceFolder, model: str = "model") -> float:
    return float((place.run(model, x=X)["y"] / X).mean())


FROM_MODULES = """
import nets_module
from nets_function import scaled
from nets_called import scaled as made_there

def called():
    return made_there()

def inside():
    import nets_inside

    return nets_inside.scaled()

def packaged():
    from nets.deep import scaled

    return scaled()
"""


def test_modules_beside_dodo(workspace: WorkspaceFolder) -> None:
    """However they are imported."""
    sources = {
        "nets_module.py": "nets_module.scaled",
        "nets_function.py": "scaled",
        "nets_called.py": "called",
        "nets_inside.py": "inside",
        "nets/deep.py": "packaged",
    }
    for file in sources:
        workspace.write(file, SCALED)
    made = {f"model{i}": source for i, source in enumerate(sources.values())}
    workspace.dodo("\n".join(f'Model.onnx("{name}", {source}),' for name, source in made.items()), FROM_MODULES)
    workspace.build().good()
    workspace.idle_build()
    for file in sources:
        workspace.edit("SCALE = 2.0", "SCALE = 3.0", file)
    assert workspace.build().good().ran["read"] == len(sources)
    assert [scale(workspace, name) for name in made] == pytest.approx([3] * len(sources))
    workspace.idle_build()


def test_a_module_that_two_madeimport_in_their_functions(workspace: WorkspaceFolder) -> None:
    """One worker reads both: the second finds the module imported already."""
    workspace.write("nets.py", SCALED)
    made = "def {0}():\n    import nets\n    return nets.scaled()"
    workspace.dodo(
        'Model.onnx("first", first),\nModel.onnx("second", second),', made.format("first"), made.format("second")
    )
    workspace.build(TVMAKE_JOBS="1").good()
    workspace.edit("SCALE = 2.0", "SCALE = 3.0", "nets.py")
    assert workspace.build(TVMAKE_JOBS="1").good().ran["read"] == 2
    assert scale(workspace, "first") == scale(workspace, "second") == pytest.approx(3)


FROM_ENVIRONMENT = """
import functools, os

GIVEN = float(os.environ["SCALE"])

def of_module():
    return scaled(GIVEN)

def with_scale(scale):
    def closure():
        return scaled(scale)

    return closure

def default(scale=float(os.environ["SCALE"])):
    return scaled(scale)
"""


def test_values_from_the_environment(workspace: WorkspaceFolder) -> None:
    """Read when dodo.py is, whichever way they reach the function."""
    sources = ("of_module", "with_scale(GIVEN)", "default", "functools.partial(scaled, GIVEN)", "lambda: scaled(GIVEN)")
    names = [f"model{i}" for i in range(len(sources))]
    declarations = [f'Model.onnx("{name}", {source}),' for name, source in zip(names, sources, strict=True)]
    workspace.dodo("\n".join(declarations), SCALED.replace("scaled()", "scaled(SCALE)"), FROM_ENVIRONMENT)
    workspace.build(SCALE="2").good()
    assert workspace.build(SCALE="2", forbid_tvm=True).good().idle
    assert workspace.build(SCALE="5").good().ran == {"read": len(sources), "checked": 1}
    assert [scale(workspace, name) for name in names] == pytest.approx([5] * len(sources))


def test_a_file_that_the_function_reads(workspace: WorkspaceFolder) -> None:
    workspace.write("scale.txt", "2")
    dodo = 'def made():\n    global SCALE\n    SCALE = float(open("scale.txt").read())\n    return scaled()'
    workspace.dodo('Model.onnx("model", made, depends=["scale.txt"]),', SCALED, dodo)
    workspace.build().good()
    workspace.write("unrelated.txt", "new")
    workspace.idle_build()
    workspace.write("scale.txt", "3")
    assert workspace.build().good().ran == {"read": 1, "checked": 1}
    assert scale(workspace) == pytest.approx(3)
    workspace.idle_build()


def test_what_does_not_matter_is_not_read_again(workspace: WorkspaceFolder) -> None:
    workspace.onnx("dense.onnx", models.dense())
    workspace.dodo('Model.onnx("dense", "dense.onnx"),')
    workspace.build().good()
    for path in workspace.folder.rglob("*"):
        os.utime(path)
    workspace.idle_build()
    workspace.write("dense.onnx", (workspace.folder / "dense.onnx").read_bytes())  # another inode, the same bytes
    assert workspace.build(TVMAKE_JOBS="1", UNRELATED="1", forbid_tvm=True).good().idle
