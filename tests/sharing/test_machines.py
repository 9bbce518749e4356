"""A second machine, with another folder, store and user, has nothing left to do.

The servers are real; what is not installed is skipped.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Done

from tests import servers
from tests.remotes import doubles
from tests.sharing.machines import KINDS, Machine, Machines, bundles_in, found


@pytest.mark.parametrize("remote", KINDS, indirect=True)
def test_another_machine_builds_nothing(remote: dict[str, str], machines: Machines) -> None:
    one, other = machines(remote), machines(remote)
    assert found(one.build().good())[2] > 10
    done = other.build(forbid_tvm=True).good()
    assert not done.ran
    assert found(done)[0] == found(done)[1] > 10
    assert other.artifact() == one.artifact()
    assert other.build(forbid_tvm=True).good().idle


def test_a_shared_folder_needs_no_network(folder: dict[str, str], sender: Machine, machines: Machines) -> None:
    alone = ["unshare", "--net", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("no network namespaces here")
    other = machines(folder)
    done = subprocess.run(
        [*alone, *other.workspace.command("build")],
        cwd=other.workspace.folder,
        env=other.workspace.environment(forbid_tvm=True, **other.environment),
        capture_output=True,
        text=True,
        check=False,
    )
    assert not Done(done.returncode, done.stdout, done.stderr).good().ran
    assert other.artifact() == sender.artifact()


@pytest.mark.parametrize(
    "remote",
    ["folder", "gateway", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("nginx", "casd"))],
    indirect=True,
)
def test_what_differs_is_compiled_and_nothing_else(remote: dict[str, str], machines: Machines) -> None:
    one, other = machines(remote), machines(remote, "Exp")
    one.build().good()
    assert other.build().good().compiled == 1


def test_another_machine_asks_a_few_times_however_much_it_lacks(machines: Machines) -> None:
    with doubles.crooked() as server:
        remote = {"TVMAKE_REMOTE": f"{server.url}/good"}
        one, other, third = machines(remote, more=40), machines(remote, more=40), machines(remote, "Exp", more=40)
        one.build().good()
        held = [name for name in server.held if name.startswith("cas/")]
        assert len(held) > 60
        server.seen.clear()
        assert not other.build(forbid_tvm=True).good().ran
        asked = [path.removeprefix("/good/") for _, path, _ in server.seen]
        assert len(asked) < len(held) / 3, asked
        assert other.artifact() == one.artifact()

        server.seen.clear()
        done = third.build().good()
        assert (done.compiled, done.cached) == (1, 2)
        bundled = {name for name in asked if name in bundles_in(server.held)}
        assert bundled.intersection(path.removeprefix("/good/") for _, path, _ in server.seen), (
            "what is alike comes too"
        )


def test_a_machine_that_reads_only_sends_nothing(folder: dict[str, str], machines: Machines, tmp_path: Path) -> None:
    reader = machines({**folder, "TVMAKE_REMOTE_POLICY": "read-only"})
    reader.build().good()
    assert not (tmp_path / "shared").exists()
    writer = machines({**folder, "TVMAKE_REMOTE_POLICY": "write-only"})
    assert "found" not in writer.build().good().last
    later = machines({**folder, "TVMAKE_REMOTE_POLICY": "read-only"})
    assert not later.build(forbid_tvm=True).good().ran


def test_reading_without_credentials_and_writing_with(machines: Machines, tmp_path: Path) -> None:
    with servers.nginx(tmp_path / "nginx", writer=("ci", "very secret")) as server:
        anonymous = {"TVMAKE_REMOTE": server.url}
        done = machines(anonymous).build().good()
        assert done.err.count("WARNING") == 1, done.err
        assert "no more writing" in done.err
        known = {"TVMAKE_REMOTE": server.url.replace("//", "//ci:very%20secret@")}
        writer = machines(known).build().good()
        assert found(writer)[2] > 10
        assert "secret" not in writer.err + writer.out
        assert not machines(anonymous).build(forbid_tvm=True).good().ran


def test_a_team_names_its_remote_beside_dodo_py(machines: Machines, tmp_path: Path) -> None:
    one, other = machines({}), machines({})
    for machine in (one, other):
        machine.workspace.write("tvmake.toml", f'[remote]\nurl = "{(tmp_path / "shared").as_uri()}"\n')
    one.build().good()
    assert not other.build(forbid_tvm=True).good().ran
    other.workspace.write("tvmake.toml", "[trust]\nrequired = false\n")
    assert "the machine's to say" in other.build().err


@pytest.mark.slow
def test_bazel_and_ours_share_a_server_at_once(machines: Machines, tmp_path: Path) -> None:
    bazel = servers.program("bazel")
    project = tmp_path / "project"
    project.mkdir()
    (project / "WORKSPACE").touch()
    rules = [f'genrule(name = "x{i}", outs = ["x{i}.txt"], cmd = "echo {i} > $@")' for i in range(20)]
    (project / "BUILD").write_text("\n".join(rules))

    def bazel_build(url: str, base: str) -> subprocess.Popen[str]:
        command = [bazel, f"--output_user_root={tmp_path / base}", "--batch", "build", "//:all"]
        command += [f"--remote_cache={url}", "--spawn_strategy=local", "--genrule_strategy=local", "--color=no"]
        return subprocess.Popen(command, cwd=project, stderr=subprocess.PIPE, text=True)

    with servers.nginx(tmp_path / "nginx") as server:
        first = bazel_build(server.url, "first")
        one = machines({"TVMAKE_REMOTE": server.url})
        assert found(one.build().good())[2] > 10
        assert first.wait(timeout=120) == 0
        entries = len(list((tmp_path / "nginx" / "root" / "ac").iterdir()))
        again = bazel_build(server.url, "again")
        other = machines({"TVMAKE_REMOTE": server.url})
        assert not other.build(forbid_tvm=True).good().ran
        _, said = again.communicate(timeout=120)
    assert "20 remote cache hit" in said, said
    assert other.artifact() == one.artifact()
    assert entries > 30, "both have written there"


def test_what_plain_doit_and_tune_build_is_sent_as_well(machines: Machines, tmp_path: Path) -> None:
    for i, command in enumerate(([], ["tune", "--plan"])):
        folder = {"TVMAKE_REMOTE": (tmp_path / f"shared{i}").as_uri()}
        one, other = machines(folder), machines(folder)
        one.workspace.doit(*command, **folder).good()
        done = other.build(forbid_tvm=True).good()
        assert not done.ran, command
