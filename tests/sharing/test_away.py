"""A remote that is not there, dies, hangs or is none costs time, and little of it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import WorkspaceFolder

from tests import servers
from tests.sharing.machines import BOUND, Machine, Machines


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:1", "going on without it"),
        ("grpc://127.0.0.1:1", "going on without it"),
        pytest.param("http://name.invalid/cache", "going on without it", marks=pytest.mark.slow),
        ("file:///proc/nowhere", "going on without it"),
    ],
)
def test_without_its_remote_a_build_goes_on(machines: Machines, url: str, said: str) -> None:
    one = machines({"TVMAKE_REMOTE": url})
    done = one.build().good()
    assert done.compiled == 3
    assert said in done.err
    assert "type `doit cache push`" in done.err
    assert sum(line.startswith("WARNING") for line in done.err.splitlines()) <= 2, done.err


def test_a_page_that_asks_to_sign_in_is_no_cache(machines: Machines, tmp_path: Path) -> None:
    with servers.nginx(tmp_path / "nginx") as server:
        done = machines({"TVMAKE_REMOTE": f"{server.url}/portal"}).build().good()
    assert done.compiled == 3
    assert "left alone" in done.err or "no more" in done.err, done.err


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"TVMAKE_REMOTE": "ftp://host/x"}, "what is known: file://"),
        ({"TVMAKE_REMOTE": "http://"}, "remote"),
        ({"TVMAKE_REMOTE": "http://h", "TVMAKE_REMOTE_POLICY": "maybe"}, "policies: read-write"),
        ({"TVMAKE_REMOTE": "file:///tmp", "TVMAKE_SIGN_WITH": "/nowhere/key.pem"}, "cannot be read"),
        ({"TVMAKE_REMOTE": "file:///tmp", "TVMAKE_TRUST": "ed25519:oops"}, "no public key"),
    ],
)
def test_settings_that_cannot_be_meant_are_told_before_anything_is_built(
    machines: Machines, environment: dict[str, str], said: str
) -> None:
    done = machines(environment).build()
    assert done.code == 2
    assert said in done.err
    assert len(done.err.strip().splitlines()) <= 3, done.err


def _rounds(remote: dict[str, str], server: servers.Server, built: Machine, machines: Machines, rounds: int) -> None:
    """Builds while a server is killed, frozen and started again, each at another moment."""
    for i in range(rounds):
        machine = machines({**remote, "TVMAKE_CONFIG": str(machine_config(machines, 1.0))})
        process = subprocess.Popen(
            machine.workspace.command("build"),
            cwd=machine.workspace.folder,
            env=machine.workspace.environment(**machine.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        time.sleep(0.2 + 2.6 * i / max(1, rounds - 1))
        if i % 2:
            server.kill()
        else:
            server.freeze()
        begun = time.monotonic()
        said, _ = process.communicate(timeout=BOUND)
        assert process.returncode == 0, said.decode()
        assert time.monotonic() - begun < 20, "what is bounded is how long it waits"
        assert machine.artifact() == built.artifact()
        if i % 2:
            server.start()
        else:
            server.thaw()


def machine_config(machines: Machines, seconds: float) -> Path:
    """The file of a user who waits so long."""
    return machines({}).workspace.write("user.toml", f"[remote]\nconnect = {seconds}\nstall = {seconds}\n")


@pytest.mark.parametrize("rounds", [3, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["nginx", "casd"])
def test_a_server_that_dies_or_hangs_in_the_middle_costs_time_only(
    kind: str, rounds: int, built: Machine, machines: Machines, tmp_path: Path
) -> None:
    with getattr(servers, kind)(tmp_path / kind) as server:
        _rounds({"TVMAKE_REMOTE": server.url, **server.environment}, server, built, machines, rounds)


def interruptible(workspace: WorkspaceFolder, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """A command that heeds SIGINT: what runs in the background of a shell inherits that it does not."""
    return subprocess.Popen(
        workspace.command(*arguments),
        cwd=workspace.folder,
        env=workspace.environment(**environment),
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def await_connection(process: subprocess.Popen[bytes], server: servers.Server) -> None:
    """Until a command has turned to a server, and waits for its answer."""
    of_it, end = psutil.Process(process.pid), time.monotonic() + BOUND
    while not any(each.raddr and each.raddr.port == server.port for each in of_it.net_connections()):
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < end, "it does not turn to the server"
        time.sleep(0.02)


def test_an_interrupted_build_does_not_wait_for_a_remote_that_hangs(machines: Machines, tmp_path: Path) -> None:
    with servers.nginx(tmp_path / "nginx") as server:
        one = machines({"TVMAKE_REMOTE": server.url, "TVMAKE_CONFIG": str(machine_config(machines, 3.0))})
        server.freeze()
        process = interruptible(one.workspace, "build", **one.environment)
        await_connection(process, server)
        os.kill(process.pid, signal.SIGINT)
        begun = time.monotonic()
        _, said = process.communicate(timeout=BOUND)
        assert process.returncode == 130, said
        assert time.monotonic() - begun < 10
        server.thaw()


def test_an_interrupted_push_does_not_wait_for_a_remote_that_hangs(built: Machine, tmp_path: Path) -> None:
    with servers.nginx(tmp_path / "nginx") as server:
        server.freeze()
        process = interruptible(built.workspace, "cache", "push", TVMAKE_REMOTE=server.url)
        await_connection(process, server)
        os.kill(process.pid, signal.SIGINT)
        begun = time.monotonic()
        _, said = process.communicate(timeout=BOUND)
        server.thaw()
    assert process.returncode == 130, said
    assert time.monotonic() - begun < 5, "less than `stall`"
    assert b"Traceback" not in said
