"""What a person gets wrong, and what a machine does: one clear error each, the rest built, nothing lost."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import models
import numpy as np
import pytest
from conftest import NATIVE, Done, WorkspaceFolder
from onnx import helper

X = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
DENSE = 'Model.onnx("dense", "dense.onnx"),\n'

NewWorkspace = Callable[[], WorkspaceFolder]

# One workspace with everything that can be wrong with one model: name → declaration, the task that says so, and what
# its message must hold.
FUNCTIONS = """
import os, threading

LOCK = threading.Lock()

def raises():
    shape = (2, 4)
    return shape[7]

def returns_nonsense():
    return 42

def returns_nothing():
    return None

def cannot_be_sent():
    with LOCK:
        return None

def kills_itself():
    os.kill(os.getpid(), 9)

def exits():
    raise SystemExit(3)

def has_no_weights():
    from tvm.relax.frontend import nn

    return nn.Linear(4, 8), {"forward": {"x": nn.spec.Tensor([2, 4], "float32")}}

def is_open():
    from tvm.relax.frontend import nn

    class Net(nn.Module):
        def forward(self, x: nn.Tensor):
            return nn.op.relu(x)

    return Net(), {"forward": {"x": nn.spec.Tensor(["n", 4], "float32")}}
"""

BAD = {
    "missing": ('onnx("missing", "nowhere.onnx")', "read:missing", ["no file", "nowhere.onnx", "dodo.py"]),
    "empty_file": ('onnx("empty_file", "empty_file.onnx")', "read:empty_file", ["empty_file.onnx is empty"]),
    "truncated": ('onnx("truncated", "truncated.onnx")', "read:truncated", ["truncated.onnx is truncated"]),
    "text": ('onnx("text", "text.onnx")', "read:text", ["text.onnx", "no ONNX model"]),
    "folder": ('onnx("folder", "targets")', "read:folder", ["targets cannot be read", "directory"]),
    "no_nodes": ('onnx("no_nodes", "no_nodes.onnx")', "read:no_nodes", ["the model is empty", "no nodes"]),
    "unsupported": (
        'onnx("unsupported", "unsupported.onnx")',
        "extract:native:unsupported",
        ["Det", "'the_determinant'", "replace the operator"],
    ),
    "open": ('onnx("open", "open.onnx")', "read:open", ["'x' (batch, 4)", "shapes={'x': (…)}"]),
    "unknown_input": (
        'onnx("unknown_input", "open.onnx", shapes={"z": (2, 4)})',
        "read:unknown_input",
        ["shapes names 'z'", "'x'"],
    ),
    "wrong_rank": (
        'onnx("wrong_rank", "open.onnx", shapes={"x": (2, 4, 1)})',
        "read:wrong_rank",
        ["(2, 4, 1)", "(batch, 4)"],
    ),
    "wrong_extent": (
        'onnx("wrong_extent", "open.onnx", shapes={"x": (2, 5)})',
        "read:wrong_extent",
        ["(2, 5)", "(batch, 4)"],
    ),
    "raises": ('onnx("raises", raises)', "read:raises", ["IndexError", "line RAISE_LINE of dodo.py"]),
    "nonsense": ('onnx("nonsense", returns_nonsense)', "read:nonsense", ["returned a int", "onnx.ModelProto"]),
    "nothing": ('relax("nothing", returns_nothing)', "read:nothing", ["returned NoneType", "IRModule"]),
    "unsendable": ('relax("unsendable", cannot_be_sent)', "read:unsendable", ["'cannot_be_sent'", "lock", "inside"]),
    "killed": ('onnx("killed", kills_itself)', "read:killed", ["read of killed", "SIGKILL"]),
    "exits": ('onnx("exits", exits)', "read:exits", ["read of exits", "exit code 3"]),
    "no_data": ('relax("no_data", has_no_weights)', "read:no_data", ["weight", "no data", "parameter.data"]),
    "symbolic": ('relax("symbolic", is_open)', "extract:native:symbolic", ["input 'x'", "open shape"]),
    "no_case": ('onnx("no_case", "dense.onnx", cases=["nowhere"])', "read:no_case", ["nowhere", "input_0.pb"]),
    "planted": (
        'onnx("planted", "dense.onnx", cases=["planted"])',
        "check:native:planted",
        ["check of native:planted", "'y'", "planted", "not replaced", "targets/native.toml"],
    ),
}
if importlib.util.find_spec("torch") is None:
    BAD["no_torch"] = ('torch("no_torch", returns_nothing)', "read:no_torch", ["needs torch", "'tvmake[torch]'"])


@pytest.fixture(scope="module")
def spoiled(new_workspace: NewWorkspace) -> tuple[WorkspaceFolder, dict[str, bytes], Done]:
    """A workspace in which `planted` and `truncated` were built while they were right; its build, now."""
    place = new_workspace()
    whole = models.dense().SerializeToString()
    place.onnx("dense.onnx", models.dense())
    place.write("truncated.onnx", whole)
    models.save_case(place.folder / "planted", [X], [models.dense_of(X)])
    place.dodo('Model.onnx("truncated", "truncated.onnx"),\nModel.onnx("planted", "dense.onnx", cases=["planted"]),')
    place.build().good()
    before = place.artifact_bytes("truncated"), place.artifact_bytes("planted")

    place.write("truncated.onnx", whole[: len(whole) // 2])
    place.write("empty_file.onnx", b"")
    place.write("text.onnx", "this is not a model\n" * 10)
    place.onnx("no_nodes.onnx", models.graph([], outputs={"x": (2, 4)}))
    determinant = helper.make_node("Det", ["x"], ["y"], name="the_determinant")
    place.onnx("unsupported.onnx", models.graph([determinant], inputs={"x": (4, 4)}, outputs={"y": ()}))
    place.onnx("open.onnx", models.dense(rows="batch"))
    models.save_case(place.folder / "planted", [X], [models.dense_of(X) + 1])
    place.onnx("good.onnx", models.dense(activation="Tanh"))
    declarations = [f"Model.{declaration}," for declaration, _, _ in BAD.values()]
    place.dodo("\n".join([*declarations, 'Model.onnx("good", "good.onnx"),']), FUNCTIONS)
    return place, {**before[0], **{f"planted {name}": data for name, data in before[1].items()}}, place.build()


Spoiled = tuple[WorkspaceFolder, dict[str, bytes], Done]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_model_fails_by_name_in_one_clear_sentence(spoiled: Spoiled, name: str) -> None:
    place, _, done = spoiled
    _, task, expected = BAD[name]
    mine = [failed for failed in done.failures if failed.split(":")[-1] == name]
    assert mine == [task], done.err
    line = (place.folder / "dodo.py").read_text().splitlines().index("    return shape[7]") + 1
    for part in expected:
        assert part.replace("RAISE_LINE", str(line)) in done.failures[task], done.failures[task]


def test_bad_models_do_not_keep_others_from_being_built(spoiled: Spoiled) -> None:
    place, _, done = spoiled
    assert done.code == 1
    assert "Traceback" not in done.err
    assert done.tasks_failed == len(BAD) == len(done.failures)
    built = sorted(path.name for path in (place.folder / "artifacts/native").iterdir())
    assert built == ["good", "planted", "truncated"]
    assert place.run("good", x=X)["y"].shape == (2, 8)


def test_earlier_artifacts_of_bad_models_stay(spoiled: Spoiled) -> None:
    place, before, _ = spoiled
    kept = {**place.artifact_bytes("truncated")}
    kept |= {f"planted {name}": data for name, data in place.artifact_bytes("planted").items()}
    assert kept == before


def test_what_failed_fails_again_until_it_is_mended(spoiled: Spoiled) -> None:
    place, _, _ = spoiled
    again = place.build("planted", "good")
    assert again.code == 1
    assert list(again.failures) == ["check:native:planted"]
    place.idle_build("good")


# dodo.py and the command line


def refused(done: Done, *parts: str) -> None:
    """One error, exit code 2, no traceback."""
    assert done.code == 2, done.out + done.err
    assert done.err.count("ERROR") == 1, done.err
    assert "Traceback" not in done.err
    for part in parts:
        assert part in done.err, done.err


@pytest.fixture
def dense(workspace: WorkspaceFolder) -> WorkspaceFolder:
    workspace.onnx("dense.onnx", models.dense())
    workspace.dodo(DENSE)
    return workspace


@pytest.mark.parametrize(
    ("declarations", "parts"),
    [
        (DENSE * 2, ["two models are called 'dense'", "a name of its own"]),
        ('Model.onnx("a/b", "dense.onnx"),', ["'a/b' cannot name a model", "letters"]),
        ('Model.onnx("", "dense.onnx"),', ["'' cannot name a model"]),
        ('Model.onnx("..", "dense.onnx"),', ["'..' cannot name a model"]),
        ('Model.onnx("dense", 7),', ["'dense'", "int", "a path or a function"]),
        ('Model.relax("dense", "dense.onnx"),', ["'dense'", "function"]),
        ('Model.onnx("dense", "dense.onnx", shapes={"x": (2, -1)}),', ["'dense'", "'x'", "(2, -1)", "extents"]),
        ('Model.onnx("dense", "dense.onnx", shapes={"x": 4}),', ["'dense'", "'x'", "4", "extents"]),
        ('Model.onnx("dense", "dense.onnx", depends="a.py"),', ["'dense'", "depends", "list"]),
        ('"dense.onnx",', ["str", "Model."]),
    ],
)
def test_a_bad_declaration_is_refused(dense: WorkspaceFolder, declarations: str, parts: list[str]) -> None:
    dense.dodo(declarations)
    refused(dense.build(), *parts)
    assert not (dense.folder / "artifacts").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import json\nworkspace = (\n", "SyntaxError: '(' was never closed (line 2 of dodo.py)"),
        ("import json\nnames = json.load(\n    open('nowhere.json'))", "(line 3 of dodo.py)"),
        ("import json\njson.loads('{')\n", "JSONDecodeError"),
        ("import nosuch\n", "ModuleNotFoundError: No module named 'nosuch' (line 1 of dodo.py)"),
        ("import own\n", "NameError: name 'undefined' is not defined (line 2 of own.py)"),
        ("from pipeline import Model\nModel.nonsense('net')\n", "AttributeError"),
    ],
)
@pytest.mark.parametrize("command", ["build", "status", "tune"])
def test_a_dodo_that_python_cannot_run(dense: WorkspaceFolder, text: str, said: str, command: str) -> None:
    dense.write("own.py", "\nundefined\n")
    dense.write("dodo.py", text)
    done = dense.doit(command)
    refused(done, "ERROR: dodo.py: ", said)
    assert len(done.err.splitlines()) == 1


def test_a_dodo_without_a_workspace(dense: WorkspaceFolder) -> None:
    dense.write("dodo.py", "from pipeline import DOIT_CONFIG\n")
    refused(dense.build(), "no Workspace", "workspace = Workspace(")


def test_a_workspace_without_models(dense: WorkspaceFolder) -> None:
    dense.dodo("")
    refused(dense.build(), "no model", "Model.onnx(")


def test_unknown_names_on_the_command_line(dense: WorkspaceFolder) -> None:
    refused(dense.build("dens"), "there is no model 'dens'", "models in dodo.py: dense")
    refused(dense.build("-t", "nativ"), "there is no target 'nativ'", "targets: native")
    refused(dense.build("--tarjet", "native"), "option --tarjet not recognized", "doit help build")
    assert dense.doit("nosuch").code == 3


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_bad_number_of_jobs(dense: WorkspaceFolder, value: str) -> None:
    refused(dense.build(TVMAKE_JOBS=value), "TVMAKE_JOBS", value)


# targets


def test_no_targets(dense: WorkspaceFolder) -> None:
    shutil.rmtree(dense.folder / "targets")
    refused(dense.build(), "targets has no target", 'target = "native"')


BAD_TARGETS = {
    "unknown_key": (NATIVE + 'wieghts = "inside"\n', ["unknown key `wieghts`", "weights", "timeout"]),
    "wrong_type": ("target = 5\n", ["target", "str", "int"]),
    "wrong_number": (NATIVE + 'timeout = "long"\n', ["timeout", "float", "str"]),
    "wrong_choice": (NATIVE + 'weights = "outside"\n', ["weights", "outside", "beside", "inside"]),
    "wrong_order": ('target = "native"\norder = ["fastest"]\n', ["'fastest'", "default"]),
    "unknown_below": (NATIVE + "[check]\ntolerence = 1\n", ["check", "tolerence", "tolerance"]),
    "no_toml": ("target = native\n", ["is not TOML", "line 1"]),
    "nothing": ("", ["target", "missing"]),
    "old_string": ('target = "llvm -mcpu"\n', ["target: TVM refuses", "llvm -mcpu"]),
    "unknown_tag": ('target = "nvidia/no-such-tag"\n', ["target: TVM refuses", "nvidia/no-such-tag"]),
    "unknown_kind": ('target = {kind = "lvm"}\n', ["target: TVM refuses", "lvm", "kinds that this TVM knows", "llvm"]),
    "unknown_cpu": ('target = {kind = "llvm", mcpu = "i486dx9"}\n', ["no processor 'i486dx9'", "x86-64-v3"]),
    "no_cpu_at_all": ('target = "cuda"\n', ["target: the CUDA target names no architecture", "arch"]),
}


@pytest.fixture(scope="module")
def mistargeted(new_workspace: NewWorkspace) -> tuple[WorkspaceFolder, Done]:
    """A workspace with one good target and all the bad ones."""
    place = new_workspace()
    place.onnx("dense.onnx", models.dense())
    place.dodo(DENSE)
    for name, (text, _) in BAD_TARGETS.items():
        place.write(f"targets/{name}.toml", text)
    return place, place.build()


@pytest.mark.parametrize("name", BAD_TARGETS)
def test_a_bad_target_fails_by_file_and_key(mistargeted: tuple[WorkspaceFolder, Done], name: str) -> None:
    _, done = mistargeted
    mine = [failed for failed in done.failures if name in failed]
    assert mine == [f"resolve:{name}"], done.err
    for part in (f"targets/{name}.toml", *BAD_TARGETS[name][1]):
        assert part in done.failures[f"resolve:{name}"]


def test_bad_targets_do_not_keep_others_from_being_built(mistargeted: tuple[WorkspaceFolder, Done]) -> None:
    place, done = mistargeted
    assert done.code == 1, done.err
    assert "Traceback" not in done.err
    assert [path.name for path in (place.folder / "artifacts").iterdir()] == ["native"]


def test_a_target_for_an_unknown_model(dense: WorkspaceFolder) -> None:
    dense.write("targets/native.toml", NATIVE + 'models = ["dens"]\n')
    refused(dense.build(), "targets/native.toml", "'dens'", "models in dodo.py: dense")


# The machine


def test_a_store_of_another_format(dense: WorkspaceFolder) -> None:
    dense.build().good()
    made = dense.artifact_bytes("dense")
    (dense.cache / "TVMAKE_STORE").chmod(0o644)
    (dense.cache / "TVMAKE_STORE").write_text("tvmake store, format 99\n")
    dense.idle_build()  # what is fresh needs no store
    dense.onnx("dense.onnx", models.dense(activation="Tanh"))
    refused(dense.build(), "format 99", "TVMAKE_CACHE")
    assert dense.artifact_bytes("dense") == made


def test_a_cache_folder_that_is_none(dense: WorkspaceFolder) -> None:
    dense.cache.mkdir()
    (dense.cache / "letter.txt").write_text("dear diary")
    refused(dense.build(), "neither empty nor a store", "TVMAKE_CACHE")
    assert (dense.cache / "letter.txt").read_text() == "dear diary"
    shutil.rmtree(dense.cache)
    dense.cache.write_text("a file")
    refused(dense.build(), "not a folder")


def test_a_file_in_the_place_of_the_artifacts(dense: WorkspaceFolder) -> None:
    dense.write("artifacts", "mine")
    done = dense.build()
    assert done.code == 1
    assert list(done.failures) == ["artifact:native:dense"]
    assert "artifacts/native/dense" in done.failures["artifact:native:dense"]
    assert (dense.folder / "artifacts").read_text() == "mine"


@contextmanager
def unwritable(folder: Path) -> Iterator[None]:
    """Root may write anywhere but where a file system says no."""
    if os.geteuid() != 0:
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
        return
    if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", folder], capture_output=True).returncode:
        pytest.skip("root cannot make a folder read-only here")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)


def test_a_read_only_artifacts_folder(dense: WorkspaceFolder) -> None:
    dense.build().good()
    made = dense.artifact_bytes("dense")
    dense.onnx("dense.onnx", models.dense(seed=1))
    with unwritable(dense.folder / "artifacts/native"):
        done = dense.build()
    assert done.code == 1
    assert list(done.failures) == ["artifact:native:dense"]
    assert "writing artifacts/native/dense" in done.failures["artifact:native:dense"]
    assert "permissions" in done.failures["artifact:native:dense"]
    assert dense.artifact_bytes("dense") == made
    assert "compiled" not in dense.build().good().ran
    np.testing.assert_allclose(dense.run("dense", x=X)["y"], models.dense_of(X, 1), rtol=1e-5, atol=1e-6)


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_under_the_artifacts(dense: WorkspaceFolder) -> None:
    with small_disk(dense.folder / "artifacts", 8):
        done = dense.build()
        assert done.code == 1
        assert list(done.failures) == ["artifact:native:dense"]
        assert "No space left" in done.failures["artifact:native:dense"]
        assert "free some space" in done.failures["artifact:native:dense"]
        assert not dense.artifact("dense").exists()
        assert not list((dense.folder / "artifacts/native").iterdir())
    assert dense.build().good().compiled == 0


def test_a_full_disk_under_the_store(dense: WorkspaceFolder) -> None:
    with small_disk(dense.cache, 64):
        done = dense.build()
        assert done.code in (1, 2), done.err
        assert "Traceback" not in done.err
        assert "No space left" in done.err
        assert "TVMAKE_CACHE" in done.err
        assert not dense.artifact("dense").exists()
    dense.build().good()
    np.testing.assert_allclose(dense.run("dense", x=X)["y"], models.dense_of(X), rtol=1e-5, atol=1e-6)
