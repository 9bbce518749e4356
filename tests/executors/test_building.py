"""`doit build --executor` and `doit cluster`, as they are typed."""

from __future__ import annotations

import json
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import models
import psutil
import pytest
from conftest import NATIVE, Done, WorkspaceFolder

from tests.executors.places import Hands, cluster
from tests.servers import free_port

needs_dask = pytest.mark.skipif(find_spec("distributed") is None, reason="dask.distributed is not installed")


@pytest.fixture
def net(workspace: WorkspaceFolder) -> WorkspaceFolder:
    """A model whose weights need preparation, made by a function of the user's."""
    workspace.dodo('Model.relax("net", net),', models.net)
    return workspace


@needs_dask
def test_a_build_on_a_cluster_of_this_machine_gives_the_same_bytes(net: WorkspaceFolder) -> None:
    first = net.build().good()
    made = net.artifact_bytes("net")
    net.cache = net.cache.with_name("other")
    done = net.build("net", "--executor", "dask-local:2").good()
    assert done.ran == {}, "nothing to do: the artifact is what it would be"
    (net.folder / ".doit.db").unlink()
    done = net.build("--executor", "dask-local:2").good()
    assert done.ran == first.ran
    assert net.artifact_bytes("net") == made
    net.idle_build("--executor", "dask-local:2")


@needs_dask
def test_a_build_on_other_machines_gives_the_same_bytes(net: WorkspaceFolder, hands: Hands) -> None:
    first = net.build().good()
    made = net.artifact_bytes("net")
    net.cache = net.cache.with_name("other")
    (net.folder / ".doit.db").unlink()
    done = net.build(TVMAKE_EXECUTOR=hands.address.replace("tcp", "dask"), TVMAKE_REMOTE=hands.url).good()
    assert done.ran == first.ran
    assert net.artifact_bytes("net") == made
    seen = json.loads(net.doit("cluster", "status", hands.address, "--json").good().out)
    assert {each["name"] for each in seen} == {"a", "b"}
    assert sum(each["done"] for each in seen) >= 3


@needs_dask
@pytest.mark.slow
def test_a_worker_that_is_killed_in_the_middle_costs_nothing_but_its_time(net: WorkspaceFolder) -> None:
    net.build().good()  # what this machine is as a target is known from here on
    net.write("targets/other.toml", NATIVE + "[check]\nseeds = [7]\n")
    net.write("targets/native.toml", 'target = {kind = "llvm", mcpu = "x86-64-v2"}\norder = ["default"]\n')
    command = net.command("build", "--executor", "dask-local:2")
    log = net.folder / "log"
    with open(log, "w") as stream:
        build = subprocess.Popen(command, cwd=net.folder, env=net.environment(), stderr=stream, stdout=stream)
    killed = _kill_one_that_works(build.pid)
    assert build.wait(60) == 0, log.read_text()
    assert killed
    done = Done(0, "", log.read_text())
    assert done.tasks_failed == 0
    made = net.artifact_bytes("net", "native")
    net.cache = net.cache.with_name("another")
    (net.folder / ".doit.db").unlink()
    net.build().good()
    assert net.artifact_bytes("net", "native") == made


def _kill_one_that_works(driver: int) -> bool:
    """Kills a worker of dask's that has a process run a stage."""
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline and psutil.pid_exists(driver):
        for child in _children(driver):
            if "spawn_main" in child[1] and any("pipeline.workers" in each[1] for each in _children(child[0])):
                psutil.Process(child[0]).kill()
                return True
        time.sleep(0.005)
    return False


def _children(pid: int) -> list[tuple[int, str]]:
    try:
        return [(child.pid, " ".join(child.cmdline())) for child in psutil.Process(pid).children()]
    except psutil.Error:
        return []


def test_without_the_extra_it_is_said_what_to_install(net: WorkspaceFolder, tmp_path: Path) -> None:
    stub = tmp_path / "without" / "distributed.py"
    stub.parent.mkdir()
    stub.write_text("raise ImportError('no such package')\n")
    (stub.parent / "dask.py").write_text("raise ImportError('no such package')\n")
    for arguments in (("build", "--executor", "dask-local:2"), ("cluster", "scheduler")):
        done = net.doit(*arguments, PYTHONPATH=str(stub.parent))
        assert done.code == 2, done.err
        assert "pip install 'tvmake[cluster]'" in done.err
        assert "Traceback" not in done.err
    assert net.doit("build", PYTHONPATH=str(stub.parent)).good().ran["compiled"], "nothing else asks for it"


@needs_dask
def test_a_wrong_address_ends_a_build_at_once_and_in_words(net: WorkspaceFolder) -> None:
    port = free_port()
    began = time.monotonic()
    done = net.build("--executor", f"dask://127.0.0.1:{port}", TVMAKE_REMOTE=f"file://{net.cache}-remote")
    assert done.code == 2
    assert done.err.startswith(f"ERROR: no scheduler answers at tcp://127.0.0.1:{port}")
    assert time.monotonic() - began < 8  # with the start of Python and what a wrong address itself takes


@needs_dask
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cluster",), "wants to know what to do"),
        (("cluster", "walrus"), "`doit cluster walrus` is unknown"),
        (("cluster", "worker"), "wants the address of a scheduler"),
        (("cluster", "status", "nowhere"), "is no address of a scheduler"),
        (("cluster", "scheduler", "tcp://here:1"), "`doit cluster scheduler` has no use for tcp://here:1"),
        (("cluster", "status", "tcp://here:1", "-p", "5"), "`doit cluster status` takes no -p"),
        (("cluster", "worker", "tcp://127.0.0.1:1", "--label", "two words"), "'two words' is no label"),
        (("cluster", "worker", "tcp://127.0.0.1:1", "--label", "a:b"), "'a:b' is no label"),
        (("cluster", "worker", "tcp://127.0.0.1:1"), "no scheduler answers at tcp://127.0.0.1:1"),
    ],
)
def test_what_cannot_be_meant_is_said(workspace: WorkspaceFolder, arguments: tuple[str, ...], words: str) -> None:
    workspace.folder.mkdir(exist_ok=True)
    done = workspace.doit(*arguments)
    assert done.code == 2
    assert words in done.err
    assert "→" in done.err


@needs_dask
@pytest.mark.slow
def test_a_worker_waits_for_its_scheduler_to_come_back(workspace: WorkspaceFolder, tmp_path: Path) -> None:
    with cluster(tmp_path / "cluster", "patient") as hands:
        port = hands.address.rpartition(":")[2]
        hands.scheduler.kill()
        hands.scheduler.wait()
        time.sleep(3)
        hands._start("scheduler", "--host", "127.0.0.1", "--port", port, until=r"scheduler is at (tcp://\S+);")
        deadline = time.monotonic() + 30
        while "1 worker" not in (done := workspace.doit("cluster", "status", hands.address)).out:
            assert time.monotonic() < deadline, done
            time.sleep(1)
