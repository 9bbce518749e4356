"""doit's own commands, what a build prints, and how it ends: before and after the first build."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import psutil
import pytest
from conftest import Done, WorkspaceFolder

X = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
DENSE = 'Model.onnx("dense", "dense.onnx"),\n'

OPERATOR = r"codegen:native:fused_matmul_add_relu-[0-9a-f]{8}"


@pytest.fixture
def dense(workspace: WorkspaceFolder) -> WorkspaceFolder:
    workspace.onnx("dense.onnx", models.dense())
    workspace.dodo(DENSE)
    return workspace


@pytest.fixture(scope="module")
def built(new_workspace: Callable[[], WorkspaceFolder]) -> WorkspaceFolder:
    """The same, built; for tests that leave it as it is."""
    place = new_workspace()
    place.onnx("dense.onnx", models.dense())
    place.dodo(DENSE)
    place.build().good()
    return place


def names(done: Done) -> list[str]:
    """The tasks of a `doit list`."""
    return [line.split()[0] for line in done.good().out.splitlines()]


def operator_of(place: WorkspaceFolder) -> str:
    """The task that compiles the model's one operator."""
    (name,) = [name for name in names(place.doit("list", "--all")) if name.startswith("codegen:")]
    return name


GROUPS = [
    *("apply", "artifact", "check", "codegen", "dispatch", "extract", "link", "pack", "profile", "read", "resolve"),
    "tune",
]


def test_list_before_and_after_the_first_build(dense: WorkspaceFolder) -> None:
    """Neither imports TVM or starts a worker."""
    assert names(dense.doit("list", forbid_tvm=True)) == GROUPS
    before = names(dense.doit("list", "--all", forbid_tvm=True))
    pair = {f"{stage}:native:dense" for stage in ("extract", "pack", "link", "check", "profile", "artifact")}
    assert set(before) == {*GROUPS, *pair, "resolve:native", "read:dense"}
    assert not (dense.folder / "artifacts").exists()
    assert not dense.cache.exists(), "listing makes no store"

    dense.build().good()
    assert names(dense.doit("list", forbid_tvm=True)) == GROUPS
    after = names(dense.doit("list", "--all", forbid_tvm=True))
    operators = sorted(set(after) - set(before))
    assert [name.partition(":")[0] for name in operators] == ["apply", "codegen", "dispatch", "tune"]
    assert re.fullmatch(OPERATOR, operators[1])

    status = dense.doit("list", "--all", "--status", forbid_tvm=True).good().out
    told = {tuple(line.split()[:2]) for line in status.splitlines()}
    stages = {(state, name.partition(":")[0]) for state, name in told if name not in GROUPS}
    assert stages == {("R" if stage == "tune" else "U", stage) for stage in GROUPS}, "whoever names a search wants it"
    shutil.rmtree(dense.cache)
    assert set(names(dense.doit("list", "--all", forbid_tvm=True))) == set(before), "without a store, no operators"


def test_list_tells_the_shapes_of_an_operator(built: WorkspaceFolder) -> None:
    listed = built.doit("list", "--all").good().out
    (line,) = [line for line in listed.splitlines() if line.startswith("codegen:")]
    assert line.split()[1:] == ["fused_matmul_add_relu", "2x4:float32", "4x8:float32", "8:float32", "2x8:float32"]


def test_info_before_and_after_the_first_build(dense: WorkspaceFolder, built: WorkspaceFolder) -> None:
    for task in ("artifact:native:dense", "codegen", "read:dense"):
        assert task in dense.doit("info", task, forbid_tvm=True).out
    assert "run" in dense.doit("info", "artifact:native:dense").out
    for task in ("artifact:native:dense", operator_of(built)):
        shown = built.doit("info", task, forbid_tvm=True).good().out
        assert task in shown
        assert "up-to-date" in shown


def test_clean_before_and_after_the_first_build(dense: WorkspaceFolder) -> None:
    dense.doit("clean", forbid_tvm=True).good()
    dense.build().good()
    made = dense.artifact_bytes("dense")
    dense.doit("clean", "--dry-run", forbid_tvm=True).good()
    assert dense.artifact_bytes("dense") == made
    dense.doit("clean", forbid_tvm=True).good()
    assert not dense.artifact("dense").exists()
    again = dense.build().good()
    assert again.compiled == 0
    assert dense.artifact_bytes("dense") == made


def test_clean_one_model(dense: WorkspaceFolder) -> None:
    dense.onnx("other.onnx", models.dense(activation="Tanh"))
    dense.dodo(DENSE + 'Model.onnx("other", "other.onnx"),')
    dense.build().good()
    dense.doit("clean", "artifact:native:other", forbid_tvm=True).good()
    assert dense.artifact("dense").is_dir()
    assert not dense.artifact("other").exists()
    dense.idle_build("dense")


def test_forget_before_and_after_the_first_build(dense: WorkspaceFolder) -> None:
    dense.doit("forget", "--all", forbid_tvm=True).good()
    dense.doit("forget", "artifact:native:dense", forbid_tvm=True).good()
    assert "pass task name" in dense.doit("forget", forbid_tvm=True).good().out
    dense.build().good()
    made = dense.artifact_bytes("dense")
    dense.doit("forget", "artifact:native:dense", forbid_tvm=True).good()
    assert dense.build().good().compiled == 0
    dense.doit("forget", operator_of(dense), forbid_tvm=True).good()
    dense.idle_build()
    dense.doit("forget", "--all", forbid_tvm=True).good()
    done = dense.build().good()
    assert (done.compiled, done.cached) == (0, 1)
    assert dense.artifact_bytes("dense") == made


@pytest.mark.parametrize("task", ["resolve:native", "extract:native:dense", "artifact:native:dense"])
def test_one_task_by_name_before_the_first_build(dense: WorkspaceFolder, task: str) -> None:
    """It does what it needs, and leaves no process behind."""
    dense.doit(task).good()
    assert dense.artifact("dense").is_dir() == task.startswith("artifact")
    assert gone(dense)


def test_one_task_by_name_after_the_first_build(dense: WorkspaceFolder) -> None:
    dense.build().good()
    operator = operator_of(dense)
    assert f"-- {operator}" in dense.doit(operator, forbid_tvm=True).good().out
    shutil.rmtree(dense.artifact("dense"))
    assert operator in dense.doit(operator).good().out
    assert "artifact:native:dense" in dense.doit("artifact:native:dense").good().out
    assert dense.artifact("dense").is_dir()
    dense.idle_build()


def test_doit_alone_builds_as_well(dense: WorkspaceFolder) -> None:
    ran = dense.doit().good().out
    assert "artifact:native:dense" in ran
    assert "tune" not in ran
    np.testing.assert_allclose(dense.run("dense", x=X)["y"], models.dense_of(X), rtol=1e-5, atol=1e-6)
    dense.idle_build()
    again = dense.doit(forbid_tvm=True).good().out
    assert ".  " not in again
    assert "tune" not in again, "neither when its operators are known"


def test_tasks_of_the_users_own_stand_beside_the_workspace(dense: WorkspaceFolder) -> None:
    own = "def task_summary():\n    return {'actions': ['echo reported'], 'verbosity': 2, 'task_dep': ['artifact']}"
    dense.dodo(DENSE, own)
    dense.build().good()
    assert "summary" in names(dense.doit("list"))
    done = dense.doit("summary", forbid_tvm=True).good()
    assert "reported" in done.out


def test_help(dense: WorkspaceFolder) -> None:
    shown = dense.doit("help", "build").good().out
    for part in ("doit build squeezenet", "--target", "--jobs", "Exit code"):
        assert part in shown
    assert "build" in dense.doit("help").good().out


@pytest.mark.parametrize("command", ["build", "tune", "lock", "status", "cache", "cluster"])
def test_what_is_typed_wrong_is_told_in_a_sentence(dense: WorkspaceFolder, command: str) -> None:
    for help_ in ("--help", "-h"):
        assert "Exit code" in dense.doit(command, help_).good().out
    done = dense.doit(command, "--nope")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines() == [
        f"ERROR: doit {command}: option --nope not recognized",
        f"  → its options: doit help {command}",
    ]


@pytest.mark.parametrize("command", ["build", "tune", "lock"])
@pytest.mark.parametrize("number", ["-1", "0", "many"])
def test_jobs_are_one_or_more(dense: WorkspaceFolder, command: str, number: str) -> None:
    done = dense.doit(command, "-j", number)
    assert done.code == 2
    assert f"ERROR: doit {command}: option -j wants a number of 1 or more, and not {number!r}\n" in done.err


# What one sees


def test_plain_lines_without_a_terminal(dense: WorkspaceFolder) -> None:
    done = dense.build().good()
    assert done.out == ""
    lines = done.err.splitlines()
    told = [re.sub(r"[\d.]+ s\b", "… s", re.sub(r"-[0-9a-f]{8}", "", line)).split("] ")[-1] for line in lines]
    assert [line.strip() for line in told[:7]] == [
        "read dense (… s)",
        "extracted native:dense (… s)",
        "compiled native:fused_matmul_add_relu (… s)",
        "linked native:dense (… s)",
        "checked native:dense (… s)",
        "timed native:dense (… s)",
        "native:dense",
    ]
    assert all(re.match(r"\[\d+/\d+\] ", line) for line in lines[:6])
    assert re.fullmatch(r"native:dense: [\d.]+ [mµ]?s an inference; default 100%; 100% untuned", lines[-2])
    assert re.search(r"1 operators? compiled, 0 cached, 1 librar(y|ies) linked, in [\d.]+ s$", done.last)
    assert "\x1b" not in done.err
    again = dense.build().good()
    assert again.err.count("\n") == 1
    assert "up to date" in again.last


def in_terminal(place: WorkspaceFolder, *arguments: str) -> tuple[int, str]:
    """The exit code of doit in a terminal of its own, and what it wrote there."""
    ours, theirs = pty.openpty()
    environment = place.environment(TERM="xterm-256color", COLUMNS="120", LINES="40")
    with subprocess.Popen(
        place.command(*arguments), cwd=place.folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        written = b""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    read = os.read(ours, 65536)
                except OSError:  # the other end is closed
                    break
                if not read:
                    break
                written += read
        os.close(ours)
        return process.wait(30), written.decode()


def test_a_live_line_in_a_terminal(dense: WorkspaceFolder) -> None:
    code, written = in_terminal(dense, "build")
    assert code == 0
    assert "\x1b[" in written
    assert re.search(r"\d+/\d+", written)
    assert "cached" in written
    assert "compiled native:" not in written, "the live line says it"
    last = written.strip().splitlines()[-1]
    assert re.search(r"1 operators? compiled", last)
    code, written = in_terminal(dense, "build")
    assert (code, "up to date, nothing to do" in written) == (0, True)


def test_a_failure_stands_above_the_live_line_as_it_is(dense: WorkspaceFolder) -> None:
    """Brackets are no markup."""
    dense.dodo(DENSE + 'Model.onnx("missing", "[bold]/[x.onnx"),')
    code, written = in_terminal(dense, "build")
    assert code == 1
    assert "FAILED read:missing: there is no file" in written
    assert "[bold]/[x.onnx" in written
    assert dense.artifact("dense").is_dir()


# How it ends

SLOW = """
def slow():
    import os, time

    open("started", "w").write(str(os.getpid()))
    time.sleep(float(os.environ.get("SLEEP", "60")))
    return "dense.onnx"
"""


def workers_of(place: WorkspaceFolder) -> list[int]:
    """The processes that work for a workspace's store."""
    found = []
    for process in psutil.process_iter():
        try:
            arguments = process.cmdline()  # empty where it is dead and not yet buried
        except psutil.Error:
            continue
        if {"pipeline.workers", str(place.cache)} <= set(arguments):
            found.append(process.pid)
    return found


def gone(place: WorkspaceFolder, seconds: float = 5) -> bool:
    """Whether no worker is left, at once or soon."""
    deadline = time.monotonic() + seconds
    while workers_of(place):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def interrupted(
    place: WorkspaceFolder, begun: Callable[[], bool], number: int = signal.SIGINT, *, group: bool = True
) -> tuple[int, str, float]:
    """Starts a build, signals its process group as a terminal does once it has begun, and waits for its end.

    Returns the exit code, what was printed and the seconds from the signal to the end.
    """
    printed = place.cache.parent / "printed"
    with open(printed, "wb") as stream:
        process = subprocess.Popen(
            place.command("build"),
            cwd=place.folder,
            env=place.environment(),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
        try:
            while not begun():
                assert process.poll() is None, printed.read_text()
                time.sleep(0.005)
            sent = time.monotonic()
            (os.killpg if group else os.kill)(process.pid, number)
            code = process.wait(30)
            return code, printed.read_text(), time.monotonic() - sent
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def has_started(place: WorkspaceFolder) -> Callable[[], bool]:
    mark = place.folder / "started"
    return lambda: mark.exists() and mark.stat().st_size > 0


@pytest.mark.parametrize(
    ("number", "group"),
    [
        pytest.param(signal.SIGINT, True, id="^C"),
        pytest.param(signal.SIGTERM, False, id="SIGTERM"),
        pytest.param(signal.SIGINT, False, id="SIGINT", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_build_ends_at_once_and_the_next_goes_on(
    dense: WorkspaceFolder, number: int, group: bool
) -> None:
    dense.onnx("other.onnx", models.dense(activation="Tanh"))
    dense.dodo('Model.onnx("slow", slow),\nModel.onnx("other", "other.onnx"),', SLOW)
    code, printed, seconds = interrupted(dense, has_started(dense), number, group=group)
    assert code == 130, printed
    assert "interrupted" in printed.strip().splitlines()[-1]
    assert "Traceback" not in printed
    assert seconds < 5
    assert gone(dense, 0.5)
    done = dense.build(SLEEP="0").good()
    assert dense.artifact("slow").is_dir()
    assert dense.artifact("other").is_dir()
    assert done.compiled == 2
    np.testing.assert_allclose(dense.run("slow", x=X)["y"], models.dense_of(X), rtol=1e-5, atol=1e-6)


def test_interrupted_while_operators_are_compiled(
    workspace: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]
) -> None:
    """What was compiled is not compiled again, and the bytes are those of a build that nobody interrupted."""
    places = workspace, new_workspace()
    for place in places:
        place.onnx("chain.onnx", models.chain("Relu", "Tanh", "Sigmoid", "Exp", "Abs", "Neg", "Sqrt", "Erf"))
        place.dodo('Model.onnx("chain", "chain.onnx"),')
    printed = workspace.cache.parent / "printed"
    code, said, seconds = interrupted(workspace, lambda: printed.exists() and "compiled" in printed.read_text())
    assert code == 130, said
    assert seconds < 5
    assert gone(workspace, 0.5)
    before = said.count("compiled native:")
    done = workspace.build().good()
    assert done.compiled <= 8 - before
    assert done.cached >= before
    places[1].build().good()
    assert workspace.artifact_bytes("chain") == places[1].artifact_bytes("chain")


def test_a_killed_build_leaves_no_worker(dense: WorkspaceFolder) -> None:
    dense.dodo('Model.onnx("slow", slow),', SLOW)
    code, _, _ = interrupted(dense, has_started(dense), signal.SIGKILL, group=False)
    assert code == -signal.SIGKILL
    assert gone(dense)
    dense.build(SLEEP="0").good()


def test_exit_codes(dense: WorkspaceFolder) -> None:
    """0 built or nothing to do, 1 a model failed, 2 the workspace is at fault; 130 is tested above."""
    dense.dodo(DENSE + 'Model.onnx("missing", "nowhere.onnx"),')
    assert dense.build().code == 1
    assert dense.build("dense").code == 0
    assert dense.build("nosuch").code == 2


def test_a_build_runs_from_another_folder(dense: WorkspaceFolder, tmp_path: Path) -> None:
    done = subprocess.run(
        dense.command("-f", str(dense.folder / "dodo.py"), "build"),
        cwd=tmp_path,
        env=dense.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert dense.artifact("dense").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_dump_writes_the_ir(dense: WorkspaceFolder) -> None:
    dense.build("--dump", "ir").good()
    written = sorted(path.relative_to(dense.folder / "ir").as_posix() for path in (dense.folder / "ir").rglob("*.py"))
    assert written
    assert all(name.startswith("native/dense/") for name in written)
    operators = [re.sub("-[0-9a-f]{8}", "", name.rpartition("/")[2]) for name in written if "/operators/" in name]
    assert operators == ["fused_matmul_add_relu.default.py", "fused_matmul_add_relu.workload.py"]
    dense.idle_build()
