"""Models made in Python with TVM's own front end, from end to end."""

from __future__ import annotations

from collections.abc import Callable

import models
import numpy as np
import pytest
from conftest import WorkspaceFolder

X = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)

DECLARATIONS = """
Model.relax("net", net),
Model.relax("module", module),
Model.relax("module_and_weights", module_and_weights),
"""


@pytest.fixture(scope="module")
def built(new_workspace: Callable[[], WorkspaceFolder]) -> WorkspaceFolder:
    place = new_workspace()
    place.dodo(DECLARATIONS, models.net, models.module, models.module_and_weights)
    place.build().good()
    return place


@pytest.mark.parametrize(
    ("name", "expected", "weights"),
    [("net", models.net_of, 2), ("module", models.module_of, 1), ("module_and_weights", models.module_of, 1)],
)
def test_agrees_with_numpy(
    built: WorkspaceFolder, name: str, expected: Callable[[np.ndarray], np.ndarray], weights: int
) -> None:
    outputs = built.run(name, x=X)
    assert list(outputs) == ["output_0"]
    np.testing.assert_allclose(outputs["output_0"], expected(X), rtol=1e-5, atol=1e-6)
    manifest = built.manifest(name)
    assert [spec["name"] for spec in manifest["inputs"]] == ["x"]
    assert len(manifest["weights"]) == weights


def test_constants_and_weights_are_one_operator(built: WorkspaceFolder) -> None:
    """What a training would change is no part of the code, however it is written."""
    first, second = (
        {operator["workload"] for operator in built.manifest(name)["operators"]}
        for name in ("module", "module_and_weights")
    )
    assert first == second


def test_nothing_to_do_afterwards(built: WorkspaceFolder) -> None:
    built.idle_build()


def test_other_constants_compile_nothing(workspace: WorkspaceFolder) -> None:
    workspace.dodo('Model.relax("module", module),', models.module)
    workspace.build().good()
    workspace.edit("default_rng(0)", "default_rng(3)")
    assert workspace.build().good().compiled == 0
    np.testing.assert_allclose(
        workspace.run("module", x=X)["output_0"], X @ models.weights((4, 8), 3) + 1, rtol=1e-5, atol=1e-6
    )
