"""PyTorch's exported programs, from end to end."""

from __future__ import annotations

import models
import numpy as np
import pytest
from conftest import WorkspaceFolder

torch = pytest.importorskip("torch")

X = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)


def program():
    import torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()).eval()
    return torch.export.export(module, (torch.zeros(2, 4),))


def test_a_function_and_a_file_agree_with_torch(workspace: WorkspaceFolder) -> None:
    made = program()
    workspace.folder.mkdir(exist_ok=True)
    torch.export.save(made, workspace.folder / "program.pt2")
    workspace.dodo('Model.torch("function", program),\nModel.torch("file", "program.pt2"),', program)
    done = workspace.build().good()
    assert done.compiled == len(set(done.subjects("compiled")))
    with torch.no_grad():
        expected = made.module()(torch.from_numpy(X)).numpy()
    for name in ("function", "file"):
        (given,) = workspace.manifest(name)["inputs"]
        (result,) = workspace.run(name, **{given["name"]: X}).values()
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
        assert workspace.manifest(name)["reference"]["state"] == "passed"
    assert workspace.artifact_bytes("function")["lib.so"] == workspace.artifact_bytes("file")["lib.so"]
    workspace.idle_build()


def test_what_is_no_program_is_refused(workspace: WorkspaceFolder) -> None:
    workspace.write("text.pt2", "this is not a program")
    workspace.dodo(
        'Model.torch("text", "text.pt2"),\nModel.torch("missing", "nowhere.pt2"),\nModel.torch("net", net),', models.net
    )
    done = workspace.build()
    assert done.code == 1
    assert set(done.failures) == {"read:text", "read:missing", "read:net"}
    assert "no exported program" in done.failures["read:text"]
    assert "there is no file" in done.failures["read:missing"]
    assert "torch.export.export" in done.failures["read:net"]
