"""`doit records`: databases of MetaSchedule's come in as claims and go out as they are; a list needs no TVM."""

from __future__ import annotations

import json
from typing import Any

import models
import pytest
import tvm
from conftest import NATIVE as NATIVE_FILE
from conftest import Done, WorkspaceFolder
from tvm import tirx
from tvm.s_tir import Schedule, meta_schedule

from pipeline.compiler import ir
from pipeline.store import Store
from pipeline.toolchain import detect
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.records import TOOLS, Certificate, Outcome, RetestRecord, TrialRecord
from tests.compiler.strategies.workloads import NATIVE, commit

OTHER = tvm.target.Target({"kind": "llvm", "mcpu": "cortex-a72", "mtriple": "aarch64-linux-gnu"})
RIGHT = Certificate("default", (0, 1), 1e-3, 1e-6)


def split(factor: int) -> Any:
    def change(sch: Schedule) -> None:
        first = sch.get_child_blocks(sch.get_sblock("root"))[0]
        sch.split(sch.get_loops(first)[1], [None, factor])

    return change


@pytest.fixture(scope="module")
def built(new_workspace: Any) -> WorkspaceFolder:
    workspace: WorkspaceFolder = new_workspace()
    workspace.onnx("dense.onnx", models.dense())
    workspace.dodo('Model.onnx("dense", "dense.onnx"),')
    workspace.build().good()
    return workspace


@pytest.fixture
def dense(built: WorkspaceFolder, new_workspace: Any) -> WorkspaceFolder:
    """The workspace with a store that has no records yet, and all else."""
    import shutil

    workspace: WorkspaceFolder = new_workspace()
    shutil.copytree(built.folder, workspace.folder, dirs_exist_ok=True)
    shutil.copytree(built.cache, workspace.cache)
    return workspace


def function(workspace: WorkspaceFolder) -> tirx.PrimFunc:
    digest = workspace.manifest("dense")["operators"][0]["workload"]
    return ir.load((workspace.cache / "cas" / digest[:2] / digest).read_bytes())


def listed(workspace: WorkspaceFolder) -> list[dict[str, Any]]:
    done = workspace.doit("records", "list", "--json", forbid_tvm=True)
    assert "Traceback" not in done.err
    return json.loads(done.out)


def taken_and_known(done: Done) -> str:
    return done.err.splitlines()[0]


def test_a_database_is_taken_in_as_claims(dense: WorkspaceFolder) -> None:
    assert listed(dense) == []
    folder = dense.folder / "work_dir"
    commit(folder, function(dense), split(4), [2e-3])
    commit(folder, function(dense), split(8), [1e-3])
    commit(folder, function(dense), split(2), [1e-9], OTHER)
    commit(folder, function(dense), split(16), [1e10])
    commit(folder, tirx.PrimFunc([], tirx.Evaluate(0)), lambda sch: None, [1.0])
    with open(folder / "database_tuning_record.json", "a") as stream:
        stream.write('[0, {"torn')

    done = dense.doit("records", "import", "work_dir").good()
    assert taken_and_known(done) == "native: 2 records taken, 0 known already"
    assert "left out: 1 measured on another target: llvm -mcpu=cortex-a72 -mtriple=aarch64-linux-gnu" in done.err
    assert "left out: 1 that failed when they were measured" in done.err
    assert "left out: 1 that cannot be read" in done.err
    assert "left out: 1 of operators that no model has" in done.err
    assert "type `doit tune`" in done.err
    (row,) = listed(dense)
    assert (row["claims"], row["trials"], row["winners"], row["gain"]) == (2, 0, 0, 1.0)
    about = Store(dense.cache).sets.about(row["key"])
    assert about["workload"] == dense.manifest("dense")["operators"][0]["workload"]
    assert about["target"]["kind"] == "llvm"

    again = dense.doit("records", "import", "work_dir").good()
    assert taken_and_known(again) == "native: 0 records taken, 2 known already"


def test_what_is_for_another_target_only_changes_nothing(dense: WorkspaceFolder) -> None:
    commit(dense.folder / "work_dir", function(dense), split(4), [1e-9], OTHER)
    done = dense.doit("records", "import", "work_dir")
    assert done.code == 1
    assert taken_and_known(done) == "native: 0 records taken, 0 known already"
    assert listed(dense) == []
    dense.write("targets/board.toml", 'target = {kind = "llvm", mcpu = "cortex-a72", mtriple = "aarch64-linux-gnu"}\n')
    done = dense.doit("records", "import", "work_dir", "-t", "board")
    assert done.code == 1
    assert 'write records = ["work_dir"] into targets/board.toml' in done.err


def tune(workspace: WorkspaceFolder, *factors: int) -> str:
    """Writes down what a night of tuning would have: candidates of which the last is the best."""
    commit(workspace.folder / "seed", function(workspace), split(2), [1.0])
    workspace.doit("records", "import", "seed").good()
    (row,) = listed(workspace)
    records: list[Any] = []
    tools = detect().pick(TOOLS)
    for i, factor in enumerate(factors):
        sch = Schedule(tvm.IRModule({"main": function(workspace)}))
        split(factor)(sch)
        decisions = json.loads(json.dumps(sch.trace.as_json(), default=int))
        name, seconds = f"{factor:064}", 1e-3 / (i + 1)
        timed = {"seconds": seconds, "baseline": 2e-3, "cost": 0.5, "tools": tools}
        known = {"space": "post-order-apply", "space_version": 1, "decisions": decisions, "certificate": RIGHT}
        records.append(TrialRecord(candidate=name, outcome=Outcome.TIMED, **known, **timed))
        records.append(RetestRecord(candidate=name, noise=0.01, certificate=RIGHT, **timed))
    records.append(TrialRecord(candidate="x", space="rules", space_version=1, decisions={}, outcome=Outcome.CRASHED))
    Ledger(Store(workspace.cache), 0.02).add(row["key"], {}, records)
    return str(row["key"])


def test_what_was_tuned_goes_out_as_a_database_that_is_found(dense: WorkspaceFolder) -> None:
    tune(dense, 4, 8)
    done = dense.doit("records", "export", "out/db").good()
    assert "native: 2 records of 1 operator written to out/db" in done.err
    database = meta_schedule.database.JSONDatabase(work_dir=str(dense.folder / "out/db"))
    assert len(database) == 2
    task = tvm.IRModule({"main": function(dense).with_attr("global_symbol", "main").with_attr("tirx.noalias", True)})
    best = database.query_tuning_record(task, NATIVE, "dense")
    assert [float(run) for run in best.run_secs] == pytest.approx([5e-4])
    assert database.query_schedule(task, NATIVE, "dense") is not None
    database.commit_tuning_record(best)  # whoever has it may go on with it

    refused = dense.doit("records", "export", "out/db")
    assert refused.code == 2
    assert "name a new folder" in refused.err
    # It comes back into a store that knows nothing of it.
    assert taken_and_known(dense.doit("records", "import", "out/db").good()) == (
        "native: 2 records taken, 0 known already"
    )


def test_a_list_tells_what_is_known_and_needs_no_tvm(dense: WorkspaceFolder) -> None:
    tune(dense, 4, 8)
    (row,) = listed(dense)
    assert (row["trials"], row["timed"], row["winners"], row["claims"], row["unread"]) == (3, 2, 2, 1, 0)
    assert (row["failures"], row["spent"], row["gain"]) == ({"crashed": 1}, 2.0, pytest.approx(4.0))
    assert (row["models"], row["best"]) == (["dense"], pytest.approx(5e-4))
    shown = dense.doit("records", "list", forbid_tvm=True).good().out
    assert row["operator"] in shown
    assert "4.00x" in shown
    assert "1 crashed" in shown
    Store(dense.cache).sets.add(row["key"], [b"no record"], {})
    assert "1 unread" in dense.doit("records", "list", forbid_tvm=True).good().out


def test_what_makes_no_sense_is_refused_with_what_to_type(dense: WorkspaceFolder) -> None:
    for arguments, said in (
        ((), "verbs: list, import, export"),
        (("frobnicate",), "`doit records frobnicate` is unknown"),
        (("import",), "`doit records import` wants a folder"),
        (("import", "work_dir", "--json"), "`doit records import` takes no --json\n  → that is for: list"),
        (("import", "nowhere"), "name the work_dir of a tuning run"),
        (("list", "nonesuch"), "there is no model 'nonesuch'"),
        (("list", "-t", "nonesuch"), "there is no target 'nonesuch'"),
    ):
        done = dense.doit("records", *arguments, forbid_tvm=True)
        assert done.code == 2, arguments
        assert said in done.err
        assert "Traceback" not in done.err
    empty = dense.doit("records", "export", "out")
    assert empty.code == 1
    assert "there are no records to export" in empty.err
    assert not (dense.folder / "out").exists()


def test_a_database_is_for_one_target(dense: WorkspaceFolder) -> None:
    dense.write("targets/other.toml", NATIVE_FILE)
    done = dense.doit("records", "export", "out")
    assert done.code == 2
    assert "doit records export out -t native" in done.err


def test_what_cannot_be_read_is_told_by_builds_and_nights(dense: WorkspaceFolder) -> None:
    dense.doit("forget", "--all").good()  # it knows the files of the folder that it was copied from
    dense.write("targets/native.toml", 'target = "native"\norder = ["tuned", "default"]\n')
    dense.build().good()
    key = tune(dense, 4, 8)
    torn = dense.cache / "sets" / key[:2] / key / ("0" * 64)
    torn.write_bytes(b"torn")
    assert dense.build().good().last.endswith("; 1 corrupt entry of the store set aside")
    assert not torn.exists()
    assert "could not be read" not in dense.doit("tune", "--budget", "1s", forbid_tvm=True).good().err

    store = Store(dense.cache)
    store.sets.add(key, [b"no record"], {})
    store.sets.add(key, [b'{"type": "trial", "format": 1000}', b'{"type": "wish", "format": 1000}'], {})
    dense.build().good()
    done = dense.doit("tune", "--budget", "1s", forbid_tvm=True).good()
    assert "3 tuning records could not be read (2 of a newer version of tvmake); set aside" in done.err.splitlines()
    torn.write_bytes(b"torn")
    done = dense.doit("tune", "--budget", "1s", forbid_tvm=True).good()
    assert "4 tuning records could not be read (2 of a newer version of tvmake); set aside" in done.err.splitlines()
