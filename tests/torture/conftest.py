"""Lets these tests find bench/, and gives each a folder for workspaces with one store."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .workspaces import ROOT, WIDTHS, Place, Undisturbed

if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A workspace and a store of its own. After the test no process that was started in it is left."""
    here = Place(tmp_path / "workspace", tmp_path / "store")
    yield here
    here.require_nobody_left()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Each version of the convolutional network, built alone with a store of its own."""
    pytest.importorskip("onnx")
    from . import networks

    right, begun = {}, time.monotonic()
    for width in WIDTHS:
        folder = tmp_path_factory.mktemp(f"undisturbed-{width}")
        place = Place(folder / "workspace", folder / "store")
        networks.convolutional(place.folder / "net.onnx", width)
        assert place.build().summary["compiled"] == networks.OPERATORS
        right[width] = place.artifacts()
    assert right[WIDTHS[0]] != right[WIDTHS[1]]
    return Undisturbed(right, (time.monotonic() - begun) / len(WIDTHS))
