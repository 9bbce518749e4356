"""`doit build` from end to end: what is built, what is left alone, what is compiled again and what is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import models
import numpy as np
import pytest
from conftest import NATIVE, Done, WorkspaceFolder

X = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)

DENSE = 'Model.onnx("dense", "dense.onnx"),'
NET = 'Model.relax("net", net),'


@pytest.fixture
def dense(workspace: WorkspaceFolder) -> WorkspaceFolder:
    """One ONNX model, of one operator; nothing is built yet."""
    workspace.onnx("dense.onnx", models.dense())
    workspace.dodo(DENSE)
    return workspace


@pytest.fixture
def both(workspace: WorkspaceFolder) -> WorkspaceFolder:
    """An ONNX model, and one in Python whose weights need preparation; nothing is built yet."""
    workspace.onnx("dense.onnx", models.dense())
    workspace.dodo(DENSE + NET, models.net)
    return workspace


def close(outputs: dict[str, np.ndarray], expected: np.ndarray) -> None:
    (output,) = outputs.values()
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def compiled_nothing(done: Done) -> Done:
    done.good()
    assert done.compiled == 0
    assert "compiled" not in done.ran
    return done


# First and second build


def test_first_build_runs_and_second_does_nothing(both: WorkspaceFolder) -> None:
    first = both.build().good()
    assert first.ran == {"read": 2, "extracted": 2, "compiled": 2, "packed": 1, "linked": 2, "checked": 2}
    assert (first.compiled, first.cached, first.linked) == (2, 0, 2)
    close(both.run("dense", x=X), models.dense_of(X))
    close(both.run("net", x=X), models.net_of(X))
    made = both.artifact_bytes("net")
    assert both.idle_build().code == 0
    assert both.artifact_bytes("net") == made


def test_a_build_in_another_folder_with_another_store_gives_the_same_bytes(
    both: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]
) -> None:
    other = new_workspace()
    shutil.copytree(both.folder, other.folder, dirs_exist_ok=True)
    for place in (both, other):
        place.build().good()
    for model in ("dense", "net"):
        assert both.artifact_bytes(model) == other.artifact_bytes(model)
        for name, data in both.artifact_bytes(model).items():
            assert str(both.folder).encode() not in data, name
            assert str(both.cache).encode() not in data, name


def test_one_model_or_one_target(both: WorkspaceFolder) -> None:
    both.write("targets/second.toml", NATIVE)
    both.build("net", "-t", "second").good()
    assert both.artifact("net", "second").is_dir()
    assert not both.artifact("net", "native").exists()
    assert not both.artifact("dense", "second").exists()
    both.idle_build("net", "-t", "second")
    compiled_nothing(both.build("net"))
    assert both.artifact("net", "native").is_dir()
    assert not both.artifact("dense", "native").exists()


def test_models_of_a_target(both: WorkspaceFolder) -> None:
    both.write("targets/native.toml", NATIVE + 'models = ["net"]\n')
    both.build().good()
    assert not both.artifact("dense").exists()
    both.idle_build()


# What was lost comes back


def test_a_lost_database_compiles_nothing(both: WorkspaceFolder) -> None:
    both.build().good()
    made = both.artifact_bytes("net")
    for path in both.folder.glob(".doit.db*"):
        path.unlink()
    done = compiled_nothing(both.build())
    assert done.cached == 2
    assert done.ran == {"read": 1}, "a file is known by what is in it; what a function makes is made again"
    assert both.artifact_bytes("net") == made
    both.idle_build()


def test_a_lost_store_gives_the_same_bytes_again(dense: WorkspaceFolder) -> None:
    dense.build().good()
    made = dense.artifact_bytes("dense")
    shutil.rmtree(dense.cache)
    shutil.rmtree(dense.folder / "artifacts")
    done = dense.build().good()
    assert done.compiled == 1
    assert dense.artifact_bytes("dense") == made
    shutil.rmtree(dense.cache)
    dense.idle_build()  # what is there is right: nothing to do


def test_a_lost_or_changed_file_of_an_artifact_is_restored(dense: WorkspaceFolder) -> None:
    dense.build().good()
    made = dense.artifact_bytes("dense")
    folder = dense.artifact("dense")

    def damage_library() -> None:
        dense.write(f"{folder}/lib.so", b"\0" * len(made["lib.so"]))

    def damage_manifest() -> None:
        dense.write(f"{folder}/manifest.json", "{}")
        dense.write(f"{folder}/notes.txt", "what is foreign does not stay")

    for damage in (
        damage_library,
        damage_manifest,
        (folder / "lib.so").unlink,
        (folder / "weights.safetensors").unlink,
        lambda: shutil.rmtree(folder),
    ):
        damage()
        done = compiled_nothing(dense.build())
        assert "linked" not in done.ran
        assert dense.artifact_bytes("dense") == made
    assert not list(folder.parent.glob(".*")), "scratch folders were left behind"
    dense.idle_build()


# Early cut-off


def test_a_comment_or_another_name_in_a_python_model_compiles_nothing(workspace: WorkspaceFolder) -> None:
    workspace.dodo(NET, models.net)
    workspace.build().good()
    made = workspace.artifact_bytes("net")
    workspace.edit("    made = Net()", "    # one layer is enough\n\n    made = Net()")
    done = compiled_nothing(workspace.build())
    assert done.ran == {"read": 1}
    assert workspace.artifact_bytes("net") == made
    workspace.idle_build()

    workspace.edit("self.layer", "self.renamed")
    compiled_nothing(workspace.build())
    close(workspace.run("net", x=X), models.net_of(X))
    workspace.idle_build()

    workspace.edit("def net()", "def other()")
    workspace.edit('"net", net', '"net", other')
    compiled_nothing(workspace.build())
    workspace.idle_build()


def test_other_weights_are_only_published(dense: WorkspaceFolder) -> None:
    dense.build().good()
    dense.onnx("dense.onnx", models.dense(seed=1))
    done = compiled_nothing(dense.build())
    assert done.ran == {"read": 1, "checked": 1}
    close(dense.run("dense", x=X), models.dense_of(X, seed=1))
    dense.idle_build()


def test_other_weights_that_need_preparation_are_only_packed(workspace: WorkspaceFolder) -> None:
    workspace.dodo(NET, models.net)
    workspace.build().good()
    workspace.edit("default_rng(0)", "default_rng(5)")
    done = compiled_nothing(workspace.build())
    assert done.ran == {"read": 1, "packed": 1, "checked": 1}
    close(workspace.run("net", x=X), models.net_of(X, seed=5))


def test_a_changed_layer_compiles_only_what_is_new_and_going_back_nothing(workspace: WorkspaceFolder) -> None:
    workspace.onnx("chain.onnx", models.chain("Relu", "Tanh", "Sigmoid"))
    workspace.dodo('Model.onnx("chain", "chain.onnx"),')
    first = workspace.build().good()
    assert first.compiled == 3
    made = workspace.artifact_bytes("chain")

    workspace.onnx("chain.onnx", models.chain("Relu", "Exp", "Sigmoid"))
    second = workspace.build().good()
    assert second.compiled == 1
    assert [name.rpartition("-")[0] for name in second.subjects("compiled")] == ["native:fused_matmul_exp"]
    assert workspace.artifact_bytes("chain") != made

    workspace.onnx("chain.onnx", models.chain("Relu", "Tanh", "Sigmoid"))
    third = compiled_nothing(workspace.build())
    assert not third.ran
    assert workspace.artifact_bytes("chain") == made
    workspace.idle_build()


def test_one_layer_in_two_models_is_compiled_once(workspace: WorkspaceFolder) -> None:
    workspace.onnx("first.onnx", models.chain("Relu", "Tanh", "Tanh"))
    workspace.onnx("second.onnx", models.chain("Tanh", "Exp"))
    workspace.dodo('Model.onnx("first", "first.onnx"),\nModel.onnx("second", "second.onnx"),')
    done = workspace.build().good()
    assert done.compiled == 3
    operators = workspace.manifest("first")["operators"]
    calls = {operator["name"].rpartition("-")[0]: operator["calls"] for operator in operators}
    assert calls == {"fused_matmul_relu": 1, "fused_matmul_tanh": 2}
    first, second = (
        {operator["object"] for operator in workspace.manifest(name)["operators"]} for name in ("first", "second")
    )
    assert len(first & second) == 1


def test_a_new_model_leaves_the_others_alone(dense: WorkspaceFolder) -> None:
    dense.build().good()
    before = (dense.artifact("dense") / "lib.so").stat()
    dense.onnx("more.onnx", models.dense(activation="Tanh"))
    dense.dodo(DENSE + '\nModel.onnx("more", "more.onnx"),')
    done = dense.build().good()
    assert done.compiled == 1
    assert dense.artifact("more").is_dir()
    after = (dense.artifact("dense") / "lib.so").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


# Targets


def test_equal_targets_compile_once(dense: WorkspaceFolder) -> None:
    dense.write("targets/again.toml", NATIVE)
    done = dense.build().good()
    assert len(set(done.subjects("compiled"))) == 1
    assert done.ran["compiled"] == done.ran["linked"] == done.ran["checked"] == 1
    assert dense.artifact_bytes("dense", "again")["lib.so"] == dense.artifact_bytes("dense", "native")["lib.so"]
    dense.idle_build()


def test_another_tolerance_checks_again_and_compiles_nothing(dense: WorkspaceFolder) -> None:
    dense.build().good()
    dense.write("targets/native.toml", NATIVE + "[check]\ntolerance = 1e-4\nseeds = [3, 4]\n")
    done = compiled_nothing(dense.build())
    assert done.ran == {"checked": 1}
    reference = dense.manifest("dense")["reference"]
    assert (reference["state"], reference["tolerance"], reference["seeds"]) == ("passed", 1e-4, [3, 4])
    dense.idle_build()
    dense.write("targets/native.toml", NATIVE + "[check]\nenabled = false\n")
    assert not compiled_nothing(dense.build()).ran
    assert dense.manifest("dense")["reference"]["state"] == "skipped"


def test_another_processor_compiles_again(dense: WorkspaceFolder) -> None:
    dense.build().good()
    dense.write("targets/native.toml", NATIVE.replace('"native"', '{kind = "llvm", mcpu = "x86-64-v2"}'))
    assert dense.build().good().compiled == 1
    close(dense.run("dense", x=X), models.dense_of(X))


def test_weights_inside_make_one_file_that_runs_anywhere(both: WorkspaceFolder) -> None:
    both.build().good()
    both.write("targets/native.toml", NATIVE + 'weights = "inside"\n')
    done = compiled_nothing(both.build())
    assert done.linked == 2
    assert set(both.artifact_bytes("net")) == {"lib.so", "manifest.json"}
    moved = both.cache.parent / "elsewhere"
    shutil.copytree(both.folder / "artifacts" / "native", moved)
    shutil.rmtree(both.folder)
    shutil.rmtree(both.cache)
    close(both.run(moved / "dense", x=X), models.dense_of(X))
    close(both.run(moved / "net", x=X), models.net_of(X))


# The artifact


def test_an_artifact_says_what_is_in_it_and_runs_anywhere(dense: WorkspaceFolder) -> None:
    dense.build().good()
    manifest = dense.manifest("dense")
    assert manifest["model"] == "dense"
    assert manifest["target"] == "native"
    assert manifest["inputs"] == [{"name": "x", "shape": [2, 4], "dtype": "float32"}]
    assert manifest["outputs"] == [{"name": "y", "shape": [2, 8], "dtype": "float32"}]
    assert {weight["name"] for weight in manifest["weights"]} == {"w", "b"}
    assert manifest["reference"]["state"] == "passed"
    assert manifest["reference"]["errors"]["y"] < 1e-5
    (operator,) = manifest["operators"]
    assert operator["name"] == f"fused_matmul_add_relu-{operator['workload'][:8]}"
    assert operator["calls"] == 1
    assert operator["implementation"] == "default"
    assert operator["reason"]

    moved = dense.cache.parent / "elsewhere"
    shutil.copytree(dense.artifact("dense"), moved)
    shutil.rmtree(dense.folder)
    shutil.rmtree(dense.cache)
    close(dense.run(moved, x=X), models.dense_of(X))
