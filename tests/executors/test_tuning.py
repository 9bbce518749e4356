"""`doit tune --executor`: a night whose posts are the workers of a cluster."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import test_tune
from conftest import WorkspaceFolder

from tests.executors.places import Hands

pytestmark = pytest.mark.skipif(find_spec("distributed") is None, reason="dask.distributed is not installed")


def test_x(workspace: WorkspaceFolder, hands: Hands) -> None:
    test_tune.fill(workspace, "Relu", "Tanh", "Sigmoid")
    done = workspace.doit("tune", "--executor", hands.address, "--events", "e.jsonl", TVMAKE_REMOTE=hands.url)
    print(done.out, done.err)
    print((workspace.folder / "e.jsonl").read_text())
    assert done.code == 0
    assert 0
