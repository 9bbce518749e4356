"""Models that are files: named by what is in them, wherever they lie and whatever they are called."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import onnx
import pytest
from conftest import WorkspaceFolder

from pipeline.errors import ModelError
from pipeline.modelfiles import ModelFile, is_within, require_unchanged


@pytest.fixture
def files(tmp_path: Path) -> ModelFile:
    case = tmp_path / "case0"
    case.mkdir()
    (tmp_path / "net.onnx").write_bytes(b"model")
    (tmp_path / "w.bin").write_bytes(b"weights")
    (case / "input_0.pb").write_bytes(b"in")
    (case / "output_0.pb").write_bytes(b"out")
    return ModelFile(tmp_path / "net.onnx", (case,), ("w.bin",))


def test_what_is_in_the_files_names_them(files: ModelFile, tmp_path: Path) -> None:
    before = files.content()
    shutil.copytree(tmp_path, tmp_path.parent / "elsewhere")
    moved = tmp_path.parent / "elsewhere"
    (moved / "net.onnx").rename(moved / "other.onnx")
    assert ModelFile(moved / "other.onnx", (moved / "case0",), ("w.bin",)).content() == before
    shutil.rmtree(moved)


@pytest.mark.parametrize("name", ["net.onnx", "w.bin", "case0/input_0.pb", "case0/output_0.pb"])
def test_any_other_byte_is_another_model(files: ModelFile, tmp_path: Path, name: str) -> None:
    before = files.content()
    with open(tmp_path / name, "ab") as stream:
        stream.write(b"!")
    assert files.content() != before


def test_another_case_is_another_model(files: ModelFile, tmp_path: Path) -> None:
    before = files.content()
    (tmp_path / "case0" / "input_1.pb").write_bytes(b"in")
    assert files.content() != before


def test_a_file_that_is_written_meanwhile_is_told(files: ModelFile, tmp_path: Path) -> None:
    looks = json.loads(json.dumps(files.looks()))
    require_unchanged(looks)
    (tmp_path / "w.bin").write_bytes(b"changed")
    os.utime(tmp_path / "w.bin", ns=(1, 1))
    with pytest.raises(ModelError, match=r"w\.bin was written while it was read"):
        require_unchanged(looks)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match=r"w\.bin"):
        require_unchanged(looks)


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("w.bin", True),
        ("sub/w.bin", True),
        ("../w.bin", False),
        ("/etc/passwd", False),
        ("a/../../b", False),
        ("", False),
    ],
)
def test_weights_lie_beside_the_model(name: str, inside: bool) -> None:
    assert is_within(name) == inside


@pytest.fixture
def large(workspace: WorkspaceFolder) -> WorkspaceFolder:
    """A model whose weights lie in a file beside it."""
    save(workspace, models.dense())
    workspace.dodo('Model.onnx("net", "net.onnx"),')
    return workspace


def save(workspace: WorkspaceFolder, model: onnx.ModelProto) -> None:
    workspace.folder.mkdir(parents=True, exist_ok=True)
    for name in ("net.onnx", "net.bin"):
        (workspace.folder / name).unlink(missing_ok=True)
    onnx.save_model(
        model,
        str(workspace.folder / "net.onnx"),
        save_as_external_data=True,
        location="net.bin",
        size_threshold=0,
        convert_attribute=False,
    )


def test_weights_beside_a_model_are_a_part_of_it(
    large: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]
) -> None:
    assert large.build().good().compiled
    other = new_workspace()
    other.cache = large.cache
    save(other, models.dense())
    other.dodo('Model.onnx("called_otherwise", "net.onnx"),')
    done = other.build().good()
    assert done.compiled == 0
    assert not done.ran["read"], "what another workspace has read is not read again"
    save(other, models.dense(seed=1))
    assert other.build().good().ran["read"], "only the weights are others"
    x = models.weights((2, 4), 9)
    (ours,), (theirs,) = large.run("net", x=x).values(), other.run("called_otherwise", x=x).values()
    assert not np.allclose(ours, theirs)


def test_what_was_read_in_another_folder_is_found(
    workspace: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]
) -> None:
    workspace.onnx("net.onnx", models.dense())
    workspace.dodo('Model.onnx("net", "net.onnx"),')
    assert workspace.build().good().ran["read"] == 1
    other = new_workspace()
    other.cache = workspace.cache
    other.onnx("renamed.onnx", models.dense())
    other.dodo('Model.onnx("net", "renamed.onnx"),')
    assert not other.build(forbid_tvm=True).good().ran
    assert other.artifact_bytes("net") == workspace.artifact_bytes("net")


def test_a_model_that_is_gone_is_told(workspace: WorkspaceFolder) -> None:
    workspace.dodo('Model.onnx("net", "net.onnx"),')
    done = workspace.build()
    assert done.code == 1
    assert "there is no file" in done.failures["read:net"]
