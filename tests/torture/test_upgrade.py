"""Records that one version of TVM made, under another: both are real, and both are installed.

TVMAKE_OTHER_PYTHON names the Python of an environment with this project and another TVM than here:

    python -m venv other && other/bin/pip install -e '.[onnx]' && other/bin/pip install --no-deps apache-tvm==0.27.0
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import WorkspaceFolder
from tuning_runs import fill, implementations, records, right, standings, tune

from pipeline.tuning.records import RetestRecord

OTHER = os.environ.get("TVMAKE_OTHER_PYTHON", "")
ACTIVATIONS = ("Relu", "Sigmoid", "Tanh")


def version(python: str) -> str:
    asked = "import importlib.metadata as m; print(m.version('apache-tvm'))"
    return subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="TVMAKE_OTHER_PYTHON names no Python with another TVM")
def test_records_of_one_tvm_are_made_again_and_validated_by_another(
    workspace: WorkspaceFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    before, now = version(OTHER), version(sys.executable)
    assert before != now
    fill(workspace, *ACTIVATIONS)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(sys, "executable", OTHER)
        workspace.build().good()
        tune(workspace).done.good()
        workspace.build().good()
        assert set(implementations(workspace).values()) == {"tuned"}
    kept = {key: {type(each).__name__ for each in found} for key, found in records(workspace).items()}

    done = workspace.build().good()
    assert f"TVM {before} → {now}" in done.err
    assert "3 of 3 tuned functions made again and validated" in done.err
    assert set(implementations(workspace).values()) == {"tuned"}
    right(workspace, lambda x: np.maximum(x, 0), lambda x: 1 / (1 + np.exp(-x)), np.tanh)
    assert {key: {type(each).__name__ for each in found} for key, found in records(workspace).items()} == kept

    night = tune(workspace)
    assert len(night.of("retest")) == 3
    assert night.trials.total() == 0
    retests = [each for found in records(workspace).values() for each in found if isinstance(each, RetestRecord)]
    assert {each.tools["tvm"] for each in retests} == {before, now}
    assert all(each.winners for each in standings(workspace).values())
    assert "made again" not in workspace.build().good().err

    with monkeypatch.context() as elsewhere:  # and back again: nothing is lost on the way
        elsewhere.setattr(sys, "executable", OTHER)
        workspace.build().good()
        assert set(implementations(workspace).values()) == {"tuned"}
        assert tune(workspace).done.good().last.startswith("nothing to tune")
