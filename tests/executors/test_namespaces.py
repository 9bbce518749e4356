"""Tuning on machines that see each other over a network alone: each worker in a network namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import tuning_runs
from conftest import WorkspaceFolder
from tuning_runs import event, finish, running, tune

from tests.executors.places import Hands
from tests.executors.test_tuning import THREE, at, fill, frozen, require_timed_once, worker_process
from tests.servers import nginx

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("distributed") is None, reason="dask.distributed is not installed"),
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="it takes root to make namespaces"),
]
BRIDGE, NET = "tvmake-test", "10.213.7"
HOST = f"{NET}.254"
BATCH = 4  # candidates


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def network() -> Iterator[list[str]]:
    """The names of two network namespaces, which see this machine at HOST, and each other."""
    names = [f"{BRIDGE}{i}" for i in (1, 2)]
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("address", "add", f"{HOST}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for i, name in enumerate(names, 1):
            ip("netns", "add", name)
            ip("link", "add", f"tvmt{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"tvmt{i}", "master", BRIDGE, "up")
            ip("-n", name, "address", "add", f"{NET}.{i}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no namespaces can be made here: {error.stderr.decode().strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", BRIDGE], check=False, capture_output=True)


@pytest.fixture
def two(tmp_path: Path, network: list[str], _doubles_can_be_imported: None) -> Iterator[Hands]:
    with nginx(tmp_path / "nginx", host=HOST) as server:
        hands = Hands(tmp_path / "cluster", host=HOST, url=server.url)
        try:
            hands.begin()
            for name, namespace in zip("ab", network, strict=True):
                hands.work(name, within=["ip", "netns", "exec", namespace])
            yield hands
        finally:
            hands.end()


def test_whatever_is_lost_the_next_night_goes_on(workspace: WorkspaceFolder, two: Hands) -> None:
    """A worker killed while it measures, another frozen, the scheduler killed, then the driver: of what was timed
    nothing is timed again, and only what was at a post was lost."""
    in_all = len(THREE) * len(tuning_runs.MANY)
    fill(workspace, *THREE, many=True).build(TVMAKE_REMOTE=two.url).good()
    with running(workspace, **at(two)) as process:
        event(process, "phase", phase="measuring", post="a")
        worker_process(two, "a").kill()
        assert event(process, "post", change="lost")["post"] == "a"
        event(process, "post", change="back", post="a")
        with frozen(worker_process(two, "b")):
            assert event(process, "post", change="lost")["post"] == "b"
        event(process, "batch")
        before = tuning_runs.timed_in_all(workspace)
        two.scheduler.kill()
        night = finish(process)
    assert night.done.code == 2
    assert "ERROR: the scheduler of" in night.done.err
    kept = tuning_runs.timed_in_all(workspace)
    assert before <= kept <= before + 2 * BATCH
    two.again()
    if kept < in_all:
        with running(workspace, **at(two)) as process:
            event(process, "phase", phase="measuring")
            process.kill()
    kept = tuning_runs.timed_in_all(workspace)
    last = tune(workspace, **at(two))
    last.done.good()
    assert sum(last.trials.values()) == in_all - kept
    require_timed_once([workspace], len(tuning_runs.MANY))
    workspace.build(TVMAKE_REMOTE=two.url).good()
    assert set(tuning_runs.implementations(workspace).values()) == {"tuned"}
