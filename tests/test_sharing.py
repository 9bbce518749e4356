"""Machines that share what they made: a second one, with another folder, store and user, has nothing left to do; and
whatever a remote does, nothing wrong is built.

The servers are real; what is not installed is skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import models
import psutil
import pytest
from conftest import Done, WorkspaceFolder
from tuning_runs import twin

from pipeline import closures
from pipeline.hashing import Digest
from pipeline.remotes import results
from pipeline.store import ActionEntry
from tests import servers
from tests.remotes import doubles

NET = 'Model.onnx("net", "net.onnx"),'
KINDS = ("folder", "nginx", "casd", "gateway")
BOUND = 60.0  # seconds: many times what these builds take


@dataclass
class Machine:
    """A workspace with a store of its own behind a remote."""

    workspace: WorkspaceFolder
    environment: dict[str, str] = field(default_factory=dict)

    def build(self, *, forbid_tvm: bool = False, **more: str) -> Done:
        begun = time.monotonic()
        done = self.workspace.doit(
            "build", forbid_tvm=forbid_tvm, **{"HOME": str(self.workspace.cache), **self.environment, **more}
        )
        assert time.monotonic() - begun < BOUND
        return done

    def cache(self, *arguments: str, **more: str) -> Done:
        return self.workspace.doit("cache", *arguments, **{**self.environment, **more})

    def artifact(self) -> dict[str, bytes]:
        return self.workspace.artifact_bytes("net")


Machines = Callable[..., Machine]


@pytest.fixture
def machines(new_workspace: Callable[[], WorkspaceFolder]) -> Machines:
    def make(environment: dict[str, str], activation: str = "Relu", more: int = 0) -> Machine:
        """`more` layers of the last kind have weights of their own, and no operator."""
        return Machine(filled(new_workspace(), activation, more), environment)

    return make


def filled(workspace: WorkspaceFolder, activation: str = "Relu", more: int = 0) -> WorkspaceFolder:
    workspace.onnx("net.onnx", models.chain("Sigmoid", activation, "Tanh", *["Tanh"] * more))
    workspace.dodo(NET)
    return workspace


@pytest.fixture
def folder(tmp_path: Path) -> dict[str, str]:
    return {"TVMAKE_REMOTE": (tmp_path / "shared").as_uri()}


@pytest.fixture(scope="module")
def built_once(new_workspace: Callable[[], WorkspaceFolder]) -> WorkspaceFolder:
    workspace = filled(new_workspace())
    Machine(workspace).build().good()
    return workspace


@pytest.fixture
def built(built_once: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]) -> Machine:
    """A machine without a remote that has built everything; a copy for each test."""
    return Machine(twin(built_once, new_workspace()))


@pytest.fixture(scope="module")
def sent_once(
    new_workspace: Callable[[], WorkspaceFolder], tmp_path_factory: pytest.TempPathFactory
) -> tuple[WorkspaceFolder, Path]:
    workspace, shared = filled(new_workspace()), tmp_path_factory.mktemp("sent") / "shared"
    assert found(Machine(workspace, {"TVMAKE_REMOTE": shared.as_uri()}).build().good())[2] > 10
    return workspace, shared


@pytest.fixture
def sender(
    sent_once: tuple[WorkspaceFolder, Path],
    folder: dict[str, str],
    new_workspace: Callable[[], WorkspaceFolder],
    tmp_path: Path,
) -> Machine:
    """A machine that has built everything, and sent it to the folder; a copy of both for each test."""
    workspace, shared = sent_once
    shutil.copytree(shared, tmp_path / "shared")
    return Machine(twin(workspace, new_workspace()), folder)


@pytest.fixture
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a machine that uses a remote of some kind."""
    if request.param == "folder":
        yield {"TVMAKE_REMOTE": (tmp_path / "shared").as_uri()}
        return
    with ExitStack() as stack:
        server = stack.enter_context(getattr(servers, request.param)(tmp_path / request.param))
        yield {"TVMAKE_REMOTE": server.url, **server.environment}


def found(done: Done) -> tuple[int, int, int]:
    """Of how many actions how many were found on the remote, and how many were sent."""
    match = re.search(r"; (\d+) of (\d+) found on the remote(?:, (\d+) sent)?", done.last)
    assert match, done.err
    return int(match[1]), int(match[2]), int(match[3] or 0)


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
        bundled = {name for name in asked if name in _bundles(server.held)}
        assert bundled.intersection(path.removeprefix("/good/") for _, path, _ in server.seen), (
            "what is alike comes too"
        )


def _bundles(held: Mapping[str, bytes]) -> dict[str, bytes]:
    """The bundles among what a remote holds, by their names."""
    found = {}
    for name, document in held.items():
        kind, _, key = name.partition("/")
        result = results.from_document(key, document) if kind == "ac" else None
        if isinstance(result, results.Result) and result.entry.stage == "closure":
            names = (f"cas/{each.hash}" for output, each in result.entry.outputs.items() if output != "entries")
            found |= {name: held[name] for name in names}
    return found


def test_bundles_that_were_tampered_with_give_nothing_wrong(
    folder: dict[str, str], machines: Machines, tmp_path: Path
) -> None:
    one = machines(folder, more=40)
    one.build().good()
    shared = tmp_path / "shared"
    files = {str(path.relative_to(shared)): path for kind in ("ac", "cas") for path in (shared / kind).iterdir()}
    before = _bundles({name: path.read_bytes() for name, path in files.items()})
    assert len(before) >= 2, "of what was read, and of what was made of it"
    names = list(before)
    ways: dict[str, Callable[[str], bytes]] = {
        "flipped": lambda name: before[name][:-9] + bytes([before[name][-9] ^ 1]) + before[name][-8:],
        "truncated": lambda name: before[name][: len(before[name]) // 2],
        "html": lambda name: b"<html><body>please log in</body></html>",
        "swapped": lambda name: before[names[names.index(name) - 1]],
        "other contents": lambda name: zlib.compress(bytes(len(zlib.decompress(before[name])))),
        "one other byte": lambda name: zlib.compress(b"!" + zlib.decompress(before[name])[1:]),
        "turned around": lambda name: zlib.compress(zlib.decompress(before[name])[::-1]),
        "bomb": lambda name: zlib.compress(bytes(50 << 20)),
    }
    for how, changed in ways.items():
        for name in names:
            files[name].unlink()
            files[name].write_bytes(changed(name))
        other = machines({**folder, "TVMAKE_REMOTE_POLICY": "read-only"}, more=40)
        done = other.build(forbid_tvm=True).good()
        assert not done.ran, how
        assert "WARNING" not in done.err, how
        assert other.artifact() == one.artifact(), how


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


@pytest.mark.parametrize(
    "how",
    ["flipped", "swapped", *(pytest.param(how, marks=pytest.mark.slow) for how in ("truncated", "html", "removed"))],
)
def test_a_remote_that_was_tampered_with_gives_nothing_wrong(
    folder: dict[str, str], sender: Machine, machines: Machines, tmp_path: Path, how: str
) -> None:
    for kind in ("ac", "cas"):
        files = sorted((tmp_path / "shared" / kind).iterdir())
        contents = [path.read_bytes() for path in files]
        for i, path in enumerate(files):
            path.unlink()
            if how != "removed":
                changed = {
                    "flipped": bytes([contents[i][0] ^ 1]) + contents[i][1:] if contents[i] else b"!",
                    "truncated": contents[i][: len(contents[i]) // 2],
                    "html": b"<html><body>please log in</body></html>",
                    "swapped": contents[i - 1],
                }[how]
                path.write_bytes(changed)
    other = machines(folder)
    other.build().good()
    assert other.artifact() == sender.artifact()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flipped", "truncated", "html"])
def test_each_file_of_a_remote_tampered_with_in_turn(
    folder: dict[str, str], sender: Machine, machines: Machines, tmp_path: Path, how: str
) -> None:
    other = machines({**folder, "TVMAKE_REMOTE_POLICY": "read-only"})
    for path in sorted(path for kind in ("ac", "cas") for path in (tmp_path / "shared" / kind).iterdir()):
        before = path.read_bytes()
        path.unlink()
        path.write_bytes({"flipped": before[:-1] + b"!", "truncated": before[:-1], "html": b"<html>"}[how])
        shutil.rmtree(other.workspace.cache, ignore_errors=True)
        shutil.rmtree(other.workspace.artifact("net"), ignore_errors=True)
        other.build().good()
        assert other.artifact() == sender.artifact(), path
        path.unlink()
        path.write_bytes(before)


def test_with_signatures_required_nothing_else_is_used(
    folder: dict[str, str], sender: Machine, machines: Machines, tmp_path: Path
) -> None:
    key, foreign = tmp_path / "ci.pem", tmp_path / "foreign.pem"
    public = sender.cache("key", str(key)).good().out.strip()
    sender.cache("key", str(foreign)).good()
    careful = {**folder, "TVMAKE_TRUST": public, "TVMAKE_REMOTE_POLICY": "read-only"}
    unsigned = machines(careful).build().good()
    assert found(unsigned)[0] == 0
    assert unsigned.err.count("not signed by a key that this machine trusts") == 1
    shutil.rmtree(tmp_path / "shared")
    machines({**folder, "TVMAKE_SIGN_WITH": str(foreign)}).build().good()
    assert found(machines(careful).build().good())[0] == 0, "signed by somebody else"
    shutil.rmtree(tmp_path / "shared")
    one = machines({**folder, "TVMAKE_SIGN_WITH": str(key)})
    one.build().good()
    other = machines(careful)
    assert not other.build(forbid_tvm=True).good().ran
    assert other.artifact() == one.artifact()


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


def test_a_team_names_its_remote_beside_dodo_py(machines: Machines, tmp_path: Path) -> None:
    one, other = machines({}), machines({})
    for machine in (one, other):
        machine.workspace.write("tvmake.toml", f'[remote]\nurl = "{(tmp_path / "shared").as_uri()}"\n')
    one.build().good()
    assert not other.build(forbid_tvm=True).good().ran
    other.workspace.write("tvmake.toml", "[trust]\nrequired = false\n")
    assert "the machine's to say" in other.build().err


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


# by hand


def test_what_is_pushed_can_be_pulled(
    folder: dict[str, str], built: Machine, machines: Machines, tmp_path: Path
) -> None:
    one, other, watcher = built, machines(folder), machines(folder)
    assert other.cache("lookup").code == 1
    pushed = one.cache("push", **folder).good()
    assert re.search(r"native:net: (\d+) of \1 entries sent", pushed.out)
    assert "0 of 0 entries sent" in one.cache("push", **folder).good().out, "it is there already"
    assert re.search(r"native:net: (\d+) of \1 entries on the remote", watcher.cache("lookup").good().out)
    assert len(list((watcher.workspace.cache / "ac").glob("*/*"))) <= 3, "to look is not to fetch"
    other.cache("pull").good()
    assert not other.build(forbid_tvm=True, TVMAKE_REMOTE="off").good().ran
    assert other.artifact() == one.artifact()
    victim = next(path for path in (tmp_path / "shared" / "cas").iterdir() if b"\x7fELF" in path.read_bytes()[:4])
    victim.unlink()
    lacking = one.cache("lookup", **folder)
    assert lacking.code == 1
    assert "missing: codegen of native:" in lacking.out or "missing: link of native:net" in lacking.out
    one.cache("push", **folder).good()
    assert one.cache("lookup", **folder).code == 0


def test_what_a_verb_cannot_use_is_refused(built: Machine) -> None:
    assert "usage" in json.loads(built.cache("stats", "--json").good().out)
    for arguments, said in (
        (("verify", "--json"), "`doit cache verify` takes no --json\n  → that is for: stats, lookup, push, pull\n"),
        (("stats", "-n"), "`doit cache stats` takes no -n\n  → that is for: gc\n"),
        (("gc", "-t", "native", "--size", "1GB"), "`doit cache gc` takes no -t\n"),
        (("verify", "net"), "`doit cache verify` has no use for net\n"),
        (("pin",), "`doit cache pin` wants a name for the pin\n"),
    ):
        done = built.cache(*arguments)
        assert (done.code, done.out) == (2, ""), arguments
        assert said in done.err


def test_what_nobody_takes_is_not_pushed(built: Machine) -> None:
    done = built.cache("push", TVMAKE_REMOTE="http://127.0.0.1:9/")
    assert done.code == 1, done.out
    assert re.search(r"native:net: 0 of [1-9]\d* entries sent", done.out)
    assert len(re.findall(r"entries were not sent", done.err)) <= 1


def test_a_target_at_fault_keeps_no_other_from_being_shared(
    folder: dict[str, str], built: Machine, machines: Machines
) -> None:
    one, other = built, machines(folder)
    for machine in (one, other):
        machine.workspace.write("targets/broken.toml", "target = {")
    for machine, verb in ((one, "push"), (other, "pull"), (other, "lookup")):
        done = machine.cache(verb, **folder)
        assert done.code == 1, done.err
        assert re.search(r"native:net: ([1-9]\d*) of \1 entries", done.out), done.out
        assert re.search(r"broken:net: .*is not TOML", done.out), done.out


def test_a_file_carries_everything(built: Machine, machines: Machines, tmp_path: Path) -> None:
    one, other, torn = built, machines({}), machines({})
    file = tmp_path / "net.tar"
    one.cache("export", str(file)).good()
    other.cache("import", str(file)).good()
    assert not other.build(forbid_tvm=True).good().ran
    assert other.artifact() == one.artifact()
    file.write_bytes(file.read_bytes()[:-5000])
    assert torn.cache("import", str(file)).code == 1
    torn.build().good()
    assert torn.artifact() == one.artifact()
    assert torn.cache("import", str(tmp_path / "absent.tar")).code == 2
    (tmp_path / "text.tar").write_text("hello")
    refused = torn.cache("import", str(tmp_path / "text.tar"))
    assert refused.code == 2
    assert "Traceback" not in refused.err


def test_a_file_is_taken_from_trusted_hands_only(built: Machine, machines: Machines, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    public = machines({}).cache("key", str(key)).good().out.strip()
    one, other = built, machines({"TVMAKE_TRUST": public})
    file = tmp_path / "net.tar"
    one.cache("export", str(file)).good()
    assert "not signed" in other.cache("import", str(file)).err
    one.cache("export", str(file), TVMAKE_SIGN_WITH=str(key)).good()
    other.cache("import", str(file)).good()
    file.write_bytes(file.read_bytes().replace(b"codegen", b"codegem", 1))
    assert other.cache("import", str(file)).code == 2


def test_what_is_pinned_stays(built: Machine) -> None:
    one = built
    one.cache("pin", "release-1").good()
    assert one.cache("gc", "--size", "0").code == 1
    for path in (one.workspace.cache / "ac").rglob("*"):
        os.utime(path, (0, 0))
    one.cache("gc", "--size", "0")
    shutil.rmtree(one.workspace.folder / "artifacts")
    (one.workspace.folder / ".doit.db").unlink()
    assert not one.build(forbid_tvm=True).good().ran
    assert one.cache("unpin", "release-2").code == 2
    one.cache("unpin", "release-1").good()


def test_the_store_tells_of_itself(sender: Machine, machines: Machines, folder: dict[str, str]) -> None:
    other = machines(folder)
    other.build().good()
    told = other.cache("stats").good()
    assert re.search(r"codegen .* 3 ", told.out), told.out
    assert "saved" in told.out
    assert '"remote_hits"' in other.cache("stats", "--json").good().out
    assert other.cache("verify").good().err.endswith("all as they should be\n")
    blob = next(path for path in (other.workspace.cache / "cas").rglob("*") if path.is_file())
    blob.chmod(0o644)
    blob.write_bytes(b"other bytes")
    assert other.cache("verify").code == 1
    assert "wants to know" in other.cache().err
    assert other.cache("shrink").code == 2
    assert other.cache("gc").code == 2, "nothing says how much to keep"
    assert "would remove" in other.cache("gc", "--size", "1MB", "-n").err


# what nobody would write who means well


def _rewritten(shared: Path, change: Callable[[ActionEntry], ActionEntry | None]) -> int:
    """Changes entries of a shared folder, each with a check that holds, and removes closures; returns how many."""
    changed = 0
    for path in sorted((shared / "ac").iterdir()):
        result = results.from_document(path.name, path.read_bytes())
        assert isinstance(result, results.Result)
        other = None if result.entry.stage == "closure" else change(result.entry)
        path.unlink()
        if other is not None:
            path.write_bytes(results.to_document(results.Result(other, other.to_bytes(path.name))))
            changed += 1
    return changed


@pytest.mark.parametrize("how", ["nothing made", "another stage"])
def test_entries_that_no_stage_would_make_are_made_again(
    folder: dict[str, str], sender: Machine, machines: Machines, tmp_path: Path, how: str
) -> None:
    other = machines({**folder, "TVMAKE_REMOTE_POLICY": "read-only"})

    def change(entry: ActionEntry) -> ActionEntry:
        outputs = {} if how == "nothing made" and entry.stage not in ("apply", "pack") else entry.outputs
        stage = "other" if how == "another stage" else entry.stage
        return ActionEntry(stage, entry.components, outputs, entry.seconds)

    assert _rewritten(tmp_path / "shared", change) > 10
    other.build().good()
    assert other.artifact() == sender.artifact()


@pytest.mark.parametrize(
    "stage", ["extract", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("apply", "codegen"))]
)
def test_blobs_that_make_no_sense_are_told_of_without_a_traceback(
    folder: dict[str, str], sender: Machine, machines: Machines, tmp_path: Path, stage: str
) -> None:
    garbage = b'{"garbage": 1}'
    (tmp_path / "shared" / "cas" / Digest.of(garbage).hash).write_bytes(garbage)

    def change(entry: ActionEntry) -> ActionEntry:
        outputs = dict.fromkeys(entry.outputs, Digest.of(garbage)) if entry.stage == stage else entry.outputs
        return ActionEntry(entry.stage, entry.components, outputs, entry.seconds)

    _rewritten(tmp_path / "shared", change)
    done = machines({**folder, "TVMAKE_REMOTE_POLICY": "read-only"}).build()
    assert done.code == 1
    assert "FAILED" in done.err
    assert "Traceback" not in done.err


def test_a_closure_cannot_write_outside_of_the_store(
    folder: dict[str, str], sender: Machine, machines: Machines, tmp_path: Path
) -> None:
    other = machines({**folder, "TVMAKE_REMOTE_POLICY": "read-only"})
    victim = other.workspace.write("precious.txt", "precious")
    names = (f"../workspace/{name}" for name in ("precious.txt", "new.txt"))
    entry = ActionEntry("codegen", {}, {}, 1.0)
    parts = tuple(closures.Part(name, "x", entry.to_bytes(name).decode()) for name in names)
    data = closures.Closure(parts).to_bytes()
    (tmp_path / "shared" / "cas" / Digest.of(data).hash).write_bytes(data)
    for path in (tmp_path / "shared" / "ac").iterdir():
        result = results.from_document(path.name, path.read_bytes())
        assert isinstance(result, results.Result)
        if result.entry.stage == "closure":
            path.unlink()
            evil = ActionEntry("closure", {}, {"entries": Digest.of(data)}, 0.0)
            path.write_bytes(results.to_document(results.Result(evil, evil.to_bytes(path.name))))
    other.build().good()
    assert victim.read_text() == "precious"
    assert not (other.workspace.folder / "new.txt").exists()


def test_what_plain_doit_and_tune_build_is_sent_as_well(machines: Machines, tmp_path: Path) -> None:
    for i, command in enumerate(([], ["tune", "--plan"])):
        folder = {"TVMAKE_REMOTE": (tmp_path / f"shared{i}").as_uri()}
        one, other = machines(folder), machines(folder)
        one.workspace.doit(*command, **folder).good()
        done = other.build(forbid_tvm=True).good()
        assert not done.ran, command


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
