"""One lock on several machines: the same is built, whatever of records and stores they share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import models
import msgspec
from conftest import WorkspaceFolder
from tuning_runs import NET, twin

from pipeline.lock import FILE
from pipeline.store import Store
from pipeline.tuning.records import Certificate, Outcome, encoded
from tests.lock.machines import RELU, SIGMOID, Machine, copied, digest


def test_two_machines_and_one_remote(
    tuned_once: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder], tmp_path: Path
) -> None:
    remote = {"TVMAKE_REMOTE": (tmp_path / "shared").as_uri()}
    one, other = copied(tuned_once, new_workspace()), copied(tuned_once, new_workspace(), store=False)
    one.environment = other.environment = remote
    one.lock().good()
    one.workspace.doit("cache", "push", **remote).good()
    shutil.rmtree(other.workspace.folder / "artifacts")
    other.workspace.write(FILE, one.path.read_bytes())
    one.win(RELU, 2, 1300.0)
    one.build().good()
    one.workspace.doit("cache", "push", **remote).good()
    done = other.build("--locked").good()
    assert done.compiled == 0
    assert other.artifact() == one.artifact()


def test_two_machines_that_share_nothing_but_records(
    tuned_once: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]
) -> None:
    one, other = copied(tuned_once, new_workspace()), copied(tuned_once, new_workspace(), store=False)
    one.lock().good()
    shutil.rmtree(other.workspace.folder / "artifacts")
    other.workspace.write(FILE, one.path.read_bytes())
    failed = other.build("--locked")
    assert failed.code == 1
    assert len(failed.failures) == 2
    # What comes by way of a database is only claimed: it counts as far as it goes, and is compared first.
    theirs, ours = Store(one.workspace.cache).sets, Store(other.workspace.cache).sets
    for operator in (RELU, SIGMOID):
        key = one.key(operator)
        locked = next(each for each in one.candidates(operator) if each.candidate == one.entries()[operator].candidate)
        claim = msgspec.structs.replace(locked, outcome=Outcome.CLAIMED, certificate=None, cost=0.0, run="else")
        ours.add(key, [encoded(claim)], theirs.about(key))
    done = other.build("--locked").good()
    assert done.compiled == 2
    assert other.artifact() == one.artifact()


def test_two_machines_and_a_database_of_metaschedules(
    workspace: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]
) -> None:
    """What is imported is only claimed, and yet is what the lock names: it is compared, and then used."""
    import tvm
    from tvm import s_tir

    from pipeline.compiler import ir
    from tests.compiler.strategies.workloads import commit

    def split(schedule: s_tir.Schedule) -> None:
        (block, *_) = schedule.get_child_blocks(schedule.get_sblock("root"))
        schedule.split(schedule.get_loops(block)[1], [None, 4])

    workspace.onnx("net.onnx", models.dense())
    workspace.dodo(NET)
    workspace.write("targets/native.toml", 'target = "native"\norder = ["tuned", "default"]\nmeasure.profile = false\n')
    workspace.build().good()
    other = twin(workspace, new_workspace())
    one, (operator,) = Machine(workspace), [each["workload"] for each in workspace.manifest("net")["operators"]]
    function = ir.load((workspace.cache / "cas" / operator[:2] / operator).read_bytes())
    assert isinstance(function, tvm.tirx.PrimFunc)
    commit(workspace.folder / "first", function, split, [1e-3])
    workspace.doit("records", "import", "first").good()
    name = workspace.manifest("net")["operators"][0]["name"].rpartition("-")[0]
    sets, key = Store(workspace.cache).sets, one.key(name)
    (claim,) = one.candidates(name)
    right = Certificate("default", (0, 1), 1e-3, 1e-6)
    timed = msgspec.structs.replace(claim, outcome=Outcome.TIMED, baseline=2e-3, certificate=right, at=1.0)
    sets.add(key, [encoded(timed)], sets.about(key))
    one.win(name, 0, 1000.0)
    one.lock().good()
    assert one.entries()[name].use == "tuned"
    workspace.doit("records", "export", "second").good()

    shutil.copytree(workspace.folder / "second", other.folder / "second")
    other.doit("records", "import", "second").good()
    other.write(FILE, one.path.read_bytes())
    assert "timed the candidates" in other.build("--locked").good().err
    assert other.artifact_bytes("net") == one.artifact()


def test_what_was_tuned_on_another_device_is_found(locked: Machine) -> None:
    made = locked.artifact()
    sets = Store(locked.workspace.cache).sets
    for operator in (RELU, SIGMOID):
        key = locked.key(operator)
        members = [data for _, data in sets.read(key)]
        about = sets.about(key)
        shutil.rmtree(locked.workspace.cache / "sets" / key[:2] / key)
        sets.add(digest(key), members, about)
    locked.build("--locked").good()
    assert locked.artifact() == made


def test_what_is_timed_on_each_machine_is_not_in_what_follows_a_lock(workspace: WorkspaceFolder) -> None:
    """`fastest` may choose otherwise on every machine; by a lock nothing is timed."""
    workspace.onnx("net.onnx", models.dense())
    workspace.dodo(NET)
    workspace.write(
        "targets/native.toml",
        'target = "native"\norder = ["rules", "default"]\nselect = "fastest"\nmeasure.profile = false\n',
    )
    machine = Machine(workspace)
    machine.lock().good()
    made = machine.artifact()
    (found,) = machine.entries().values()
    assert found.use in ("rules", "default")
    assert found.seconds
    shutil.rmtree(workspace.cache)
    shutil.rmtree(workspace.folder / "artifacts")
    done = machine.build("--locked").good()
    assert "timed the candidates" not in done.err
    assert machine.artifact() == made
    assert b"seconds" not in machine.artifact()["manifest.json"].partition(b'"operators"')[2].replace(
        b'"seconds": null', b""
    )
