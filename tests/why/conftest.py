"""The workspaces of this folder's tests: all share one store and its workers, so that only what changed is made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import models
import pytest
from conftest import WorkspaceFolder

from pipeline.store import Store
from pipeline.toolchain import detect
from pipeline.workers import Workers
from tests.why.bench import Bench


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Workers]]:
    root = tmp_path_factory.mktemp("common") / "store"
    Store(root, durable=False)
    workers = Workers(root, 1, durable=False)
    yield root, workers
    workers.stop()


@pytest.fixture
def bench(tmp_path: Path, common: tuple[Path, Workers], no_tvm: Path) -> Bench:
    place = WorkspaceFolder(tmp_path / "workspace", common[0], no_tvm)
    place.dodo('Model.onnx("net", "net.onnx"),')
    made = Bench(place, common[1], dict(detect().identities))
    made.target(["default"])
    made.model(models.dense())
    return made
