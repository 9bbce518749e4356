"""Tuning records: MetaSchedule's databases read line by line, and the best record for a target replayed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tvm
from tvm import tirx

from pipeline.compiler import ir, prepack, records
from pipeline.errors import StoreError
from pipeline.platforms import architecture
from tests.compiler.strategies.workloads import DENSE, FREE, NATIVE, by_rows, commit, in_panels, lines, scheduled

OTHER = tvm.target.Target({"kind": "llvm", "mcpu": "cortex-a72", "mtriple": "aarch64-linux-gnu"})


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Two records of DENSE: the second is the faster one."""
    commit(tmp_path, DENSE, lambda sch: None, [3e-3, 2e-3])
    commit(tmp_path, DENSE, by_rows, [1e-3])
    return tmp_path


def group_of(folder: Path, func: tirx.PrimFunc = DENSE) -> records.Group:
    return records.read_database(*lines(folder))[0][records.digest_of(func)]


def replayed(folder: Path, target: tvm.target.Target = NATIVE) -> tuple[tirx.PrimFunc | None, list[str]]:
    made, refusals = records.replay_best([group_of(folder)], target)
    return made, list(refusals)


def same(one: tirx.PrimFunc, other: tirx.PrimFunc) -> bool:
    return ir.canonical(one) == ir.canonical(other)


def test_records_are_grouped_by_what_the_workload_computes(database: Path) -> None:
    commit(database, scheduled(DENSE, by_rows), lambda sch: None)
    groups, unread = records.read_database(*lines(database))
    assert unread == 0
    assert {digest: len(group.records) for digest, group in groups.items()} == {
        records.digest_of(DENSE): 2,
        records.digest_of(scheduled(DENSE, by_rows)): 1,
    }
    for digest, group in groups.items():
        assert group.digest() == digest
        assert records.Group.from_bytes(group.to_bytes()) == group


def test_which_parameters_are_weights_does_not_matter() -> None:
    assert records.digest_of(FREE) == records.digest_of(DENSE)
    assert ir.canonical(FREE) != ir.canonical(DENSE)


def test_the_fastest_is_replayed(database: Path) -> None:
    made, refusals = replayed(database)
    assert made is not None
    assert same(made, scheduled(DENSE, by_rows))
    assert not same(made, DENSE)
    assert not refusals


@pytest.mark.parametrize("failed", [None, [], [1e10], [1e10, 1e10]], ids=str)
def test_what_failed_when_it_was_measured_is_never_used(tmp_path: Path, failed: list[float] | None) -> None:
    commit(tmp_path, DENSE, by_rows, failed)
    assert replayed(tmp_path) == (None, [])
    commit(tmp_path, DENSE, in_panels, [9.0])
    assert same(replayed(tmp_path)[0], scheduled(DENSE, in_panels))


def test_a_record_for_another_target_is_not_used(database: Path) -> None:
    assert replayed(database, OTHER) == (None, [])
    commit(database, DENSE, in_panels, [5.0], OTHER)
    assert same(replayed(database, OTHER)[0], scheduled(DENSE, in_panels))
    assert same(replayed(database, NATIVE)[0], scheduled(DENSE, by_rows))


@pytest.mark.parametrize(
    ("recorded", "asked", "used"),
    [
        ({"mcpu": "znver4", "num-cores": 2}, {"mcpu": "znver4", "mtriple": "x86_64-linux-gnu"}, True),
        ({"mcpu": "znver4"}, {"mcpu": "znver3"}, False),
        ({"mcpu": "znver4", "mattr": ["+fma", "+avx2"]}, {"mcpu": "znver4", "mattr": ["+avx2", "+fma"]}, True),
        ({"mcpu": "znver4", "mattr": ["+avx2"]}, {"mcpu": "znver4"}, False),
        ({"mtriple": "aarch64-linux-gnu"}, {"mtriple": "x86_64-linux-gnu"}, False),
        ({"mtriple": "x86_64-conda-linux-gnu"}, {"mtriple": "x86_64-linux-gnu"}, True),
        ({"kind": "c"}, {"mtriple": "x86_64-linux-gnu"}, False),
        ({"kind": "no such kind"}, {}, False),
    ],
)
def test_targets_are_alike_where_they_run_the_same_code(recorded: dict, asked: dict, used: bool) -> None:
    record = [[], [1.0], {"kind": "llvm", **recorded}, []]
    assert records.is_for(record, tvm.target.Target({"kind": "llvm", **asked})) is used
    assert not records.is_for([[], [1.0], None, []], NATIVE)


GARBAGE = [
    b"",
    b"{",
    b"null",
    b"[0]",
    b"[[], [[], [1.0], {}, []]]",
    b'["0", [[], [1.0], {}, []]]',
    b"[7, [[], [1.0], {}, []]]",
    b"[0, [[], [1.0], {}]]",
    b'[0, [[], ["fast"], {}, []]]',
    b"[0, [[], 1.0, {}, []]]",
    b"[0, [[], [1.0], 3, []]]",
    b"\xff\xfe",
]


@pytest.mark.parametrize("line", GARBAGE, ids=repr)
def test_a_line_that_is_no_record_is_counted_and_left_out(database: Path, line: bytes) -> None:
    workloads, written = lines(database)
    groups, unread = records.read_database(workloads, line + b"\n" + written)
    assert unread == 1
    assert same(records.replay_best(groups.values(), NATIVE)[0], scheduled(DENSE, by_rows))


def test_a_torn_last_line_costs_that_record_alone(database: Path) -> None:
    workloads, written = lines(database)
    groups, unread = records.read_database(workloads, written[: len(written) - 40])
    assert unread == 1
    assert same(records.replay_best(groups.values(), NATIVE)[0], DENSE)
    groups, unread = records.read_database(workloads[: len(workloads) - 40], written)
    assert (groups, unread) == ({}, 3)  # the workload, and two records of nothing


def test_a_trace_that_does_not_fit_gives_way_to_the_next(database: Path) -> None:
    commit(database, DENSE, in_panels, [1e-6])
    path = database / "database_tuning_record.json"
    *others, last = path.read_text().splitlines()
    path.write_text("\n".join([*others, last.replace('"CacheRead"', '"CacheRaed"')]) + "\n")
    made, refusals = replayed(database)
    assert same(made, scheduled(DENSE, by_rows))
    assert len(refusals) == 1
    assert "CacheRaed" in refusals[0]


def test_a_set_that_cannot_be_read_is_an_error_in_words() -> None:
    for damaged in (b"", b"[]", b"[1]", b"{", b"[0, 1]"):
        with pytest.raises(StoreError, match="tuning records cannot be read"):
            records.Group.from_bytes(damaged)


def test_the_layout_of_weights_is_replayed_as_metaschedule_recorded_it(tmp_path: Path) -> None:
    commit(tmp_path, FREE, in_panels)
    made, _ = replayed(tmp_path)
    _, packings = prepack.split(made)
    assert [packing.param for packing in packings] == [1]


# Replays a trace that names an intrinsic of x86, in a process where none is registered yet.
_TENSORIZE = """
import json, sys
from pathlib import Path
from tvm.script import tirx as T
from pipeline.compiler import records
from tests.compiler.strategies.workloads import NATIVE, block, commit, lines

@T.prim_func(s_tir=True)
def dot(a: T.Buffer((4,), "uint8"), b: T.Buffer((16, 4), "int8"), c: T.Buffer((16,), "int32")):
    for i, k in T.grid(16, 4):
        with T.sblock("update"):
            vi, vk = T.axis.remap("SR", [i, k])
            c[vi] = c[vi] + T.cast(a[vk], "int32") * T.cast(b[vi, vk], "int32")

def loops(sch):
    sch.get_loops(block(sch))

folder = Path(sys.argv[1])
commit(folder, dot, loops)
workloads, written = lines(folder)
line = json.loads(written)
line[1][0][0].append(["Tensorize", ["l2"], ["dot_16x4_vnni", True], []])
groups, unread = records.read_database(workloads, json.dumps(line).encode())
made, refusals = records.replay_best(groups.values(), NATIVE)
print(unread, refusals, "vpdpbusd" in str(made))
print(sorted(name for name in sys.modules if name.startswith("tvm.s_tir.tensor_intrin")))
"""


@pytest.mark.skipif(architecture("") != "x86_64", reason="the intrinsic is for x86")
def test_intrinsics_are_registered_for_the_target_alone(tmp_path: Path) -> None:
    script = tmp_path / "replay.py"
    script.write_text(_TENSORIZE)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "0 [] True",
        "['tvm.s_tir.tensor_intrin.x86']",
    ], done.stderr


def test_a_group_is_json_of_metaschedules_own(database: Path) -> None:
    workload, listed = json.loads(group_of(database).to_bytes())
    assert len(workload) == 2
    assert [record[1] for record in listed] == [[3e-3, 2e-3], [1e-3]]
