"""Databases of MetaSchedule's taken in and given out, with the real class; and what that class gets wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tvm
from tvm import te, tirx, topi
from tvm.s_tir import Schedule, meta_schedule

from pipeline.compiler import exchange, intrinsics, ir, prepack, records, targets
from pipeline.compiler.search import traces
from pipeline.platforms import architecture
from pipeline.processor import device
from pipeline.store import Store
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.records import Outcome
from tests.compiler.strategies.workloads import (
    DENSE,
    FREE,
    NATIVE,
    _dense,
    by_rows,
    commit,
    in_panels,
    lines,
    scheduled,
)

OTHER = tvm.target.Target({"kind": "llvm", "mcpu": "cortex-a72", "mtriple": "aarch64-linux-gnu"})
x86_only = pytest.mark.skipif(architecture("") != "x86_64", reason="the search space is that of x86")


def taken(folder: Path, func: tirx.PrimFunc = DENSE, target: tvm.target.Target = NATIVE) -> exchange.Taken:
    group = records.read_database(*lines(folder))[0][records.digest_of(func)]
    return exchange.taken(group, func, target)


def candidate(func: tirx.PrimFunc, change: Any) -> str:
    return records.digest_of(scheduled(func, change))


def as_searched(sch: Schedule) -> None:
    """The same with the annotation as MetaSchedule's search makes it; its JSON makes a number of it."""
    in_panels(sch)
    laid_out = sch.get_child_blocks(sch.get_sblock("root"))[0]
    sch.unannotate(laid_out, prepack.PREPROCESS)
    sch.annotate(laid_out, prepack.PREPROCESS, True)


def _named(sch: Schedule) -> None:
    """A schedule that finds blocks by their names in `_dense`, also one that the schedule made."""
    update = sch.decompose_reduction(sch.get_sblock("product"), sch.get_loops(sch.get_sblock("product"))[2])
    del update
    loops = sch.get_loops(sch.get_sblock("product_update"))
    sch.unroll(loops[2])
    sch.vectorize(sch.get_loops(sch.get_sblock("relu"))[1])


# taken


def test_records_become_claims_that_are_tried_like_any_candidate(tmp_path: Path) -> None:
    commit(tmp_path, DENSE, by_rows, [3e-3, 2e-3])
    commit(tmp_path, DENSE, in_panels, [1e-3])
    made = taken(tmp_path)
    assert {claim.candidate: claim.seconds for claim in made.claims} == {
        candidate(DENSE, by_rows): 2e-3,
        candidate(DENSE, as_searched): 1e-3,
    }
    for claim in made.claims:
        assert (claim.outcome, claim.space, claim.baseline) == (Outcome.CLAIMED, "post-order-apply", None)
        assert json.loads(json.dumps(claim.decisions)) == claim.decisions
        for func in (DENSE, FREE):
            assert records.digest_of(traces.make(func, NATIVE, claim.decisions)) == claim.candidate
    assert taken(tmp_path) == made, "the same claims each time: importing twice adds nothing"


def test_the_names_of_whoever_tuned_give_way_to_the_canonical_ones(tmp_path: Path) -> None:
    theirs = _dense.without_attr("global_symbol")
    commit(tmp_path, theirs, _named)
    (claim,) = taken(tmp_path).claims
    named = [each[2][0] for each in claim.decisions[0] if each[0] == "GetSBlock"]
    assert named == ["block0", "block0", "block0_update", "block1"]
    assert claim.candidate == records.digest_of(scheduled(theirs, _named))
    assert claim.candidate == records.digest_of(traces.make(DENSE, NATIVE, claim.decisions))


def test_what_is_made_of_a_block_is_named_after_the_longest_name_that_fits() -> None:
    blocks = {"root": "root", "conv": "block0", "conv_1": "block1", "sum": "block2"}
    buffers = {"b": "b3", "conv": "b4", "conv_1": "b5"}
    told = {"conv": "block0", "conv_1": "block1", "conv_update": "block0_update", "conv_1_rf": "block1_rf"}
    told |= {"conv_o_init": "block0_o_init", "conv_1_rf_update": "block1_rf_update"}
    told |= {"root": "root", "b_global": "b3_global", "convoy": "convoy", "other": "other"}
    # What copies a buffer is named after it, though a block has the same name; where only a block has it, after that.
    told |= {"conv_global": "b4_global", "conv_1_reindex_shared": "b5_reindex_shared", "conv.rf_local": "b4.rf_local"}
    told |= {"sum_global": "block2_global", "sum_update": "block2_update", "b_update": "b3_update"}
    for theirs, ours in told.items():
        trace = [[["GetSBlock", [], [theirs, "main"], ["b0"]], ["Fuse", ["l1"], [theirs], ["l2"]]], [[0, theirs]]]
        (first, second), decisions = exchange.renamed(trace, blocks, buffers)
        assert first[2] == [ours, "main"]
        assert (second[2], decisions) == ([theirs], [[0, theirs]])
    for garbage in (
        None,
        3,
        [],
        [1],
        "ab",
        [[], [], []],
        [[3], []],
        [[["GetSBlock"]], []],
        [[["GetSBlock", 1, 2, 3]], 4],
    ):
        assert exchange.renamed(garbage, blocks, buffers) == garbage


def test_another_targets_records_are_counted_by_target_and_never_taken(tmp_path: Path) -> None:
    commit(tmp_path, DENSE, by_rows, [5.0])
    commit(tmp_path, DENSE, in_panels, [1e-9], OTHER)
    commit(tmp_path, DENSE, lambda sch: None, [1e-9], OTHER)
    made = taken(tmp_path)
    assert [claim.seconds for claim in made.claims] == [5.0]
    assert made.others == {"llvm -mcpu=cortex-a72 -mtriple=aarch64-linux-gnu": 2}
    assert [claim.seconds for claim in taken(tmp_path, target=OTHER).claims] == [1e-9, 1e-9]


def test_what_failed_or_does_not_replay_is_counted_and_not_taken(tmp_path: Path) -> None:
    commit(tmp_path, DENSE, by_rows, [1e10, 1e10])
    commit(tmp_path, DENSE, by_rows, None)
    commit(tmp_path, DENSE, by_rows, [1.0])
    commit(tmp_path, DENSE, in_panels, [2.0])
    path = tmp_path / "database_tuning_record.json"
    path.write_text(path.read_text().replace('"CacheRead"', '"CacheRaed"') + '{"torn": \n')
    groups, unread = records.read_database(*lines(tmp_path))
    made = exchange.taken(groups[records.digest_of(DENSE)], DENSE, NATIVE)
    assert unread == 1
    assert [claim.candidate for claim in made.claims] == [candidate(DENSE, by_rows)]
    assert made.failed == 2
    ((reason, count),) = made.broken.items()
    assert count == 1
    assert "CacheRaed" in reason
    assert "\n" not in reason


def test_one_candidate_is_claimed_once_at_its_least(tmp_path: Path) -> None:
    for seconds in (2.0, 1.0, 3.0):
        commit(tmp_path, DENSE, by_rows, [seconds])
    assert [claim.seconds for claim in taken(tmp_path).claims] == [1.0]


def conv() -> tirx.PrimFunc:
    x, w = te.placeholder((1, 14, 14, 16), name="x"), te.placeholder((3, 3, 16, 32), name="w")
    return te.create_prim_func([x, w, topi.nn.relu(topi.nn.conv2d_nhwc(x, w, 1, 1, 1))]).without_attr("global_symbol")


def by_panels_of_channels(sch: Schedule) -> None:
    product = sch.get_sblock("block1")
    sch.split(sch.get_loops(product)[3], [None, 8])


def sampled(func: tirx.PrimFunc, target: tvm.target.Target) -> list[Schedule]:
    """One schedule out of each of MetaSchedule's own design spaces, post-processed as its search does it."""
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    intrinsics.register(target)
    with intrinsics.standing_in():
        context = meta_schedule.TuneContext(
            mod=mod, target=target, space_generator="post-order-apply", search_strategy="replay-trace", num_threads=1
        )
    found = []
    for space in context.generate_design_space():
        sch = Schedule(mod, seed=1)
        space.trace.apply_to_schedule(sch, remove_postproc=True)
        sch.enter_postproc()
        if all(each.apply(sch) for each in context.space_generator.postprocs):
            found.append(sch)
    return found


def _cached(sch: Schedule) -> None:
    """A schedule that finds what it made by name: a copy of what the convolution writes, one of what it reads, and the
    parts of the sum. The convolution and what it writes have one name, as everything that TE makes."""
    product = sch.get_sblock("conv2d_nhwc")
    sch.cache_write(product, 0, "global")
    sch.cache_read(product, 0, "global")
    sch.vectorize(sch.get_loops(sch.get_sblock("conv2d_nhwc_global"))[-1])
    sch.unroll(sch.get_loops(sch.get_sblock("pad_temp_global"))[-1])
    sch.decompose_reduction(product, sch.get_loops(product)[4])
    sch.unroll(sch.get_loops(sch.get_sblock("conv2d_nhwc_update"))[4])


def _factored(sch: Schedule) -> None:
    """A copy of the buffer that a factored sum has of its own."""
    total = sch.get_sblock("x_red")
    _, inner = sch.split(sch.get_loops(total)[1], [None, 8])
    sch.cache_write(sch.rfactor(inner, 1), 0, "global")
    sch.vectorize(sch.get_loops(sch.get_sblock("x_red.rf_global"))[-1])
    sch.unroll(sch.get_loops(sch.get_sblock("x_red_rf"))[-1])


def total() -> tirx.PrimFunc:
    x = te.placeholder((16, 64), name="x")
    return te.create_prim_func([x, topi.sum(x, 1)]).without_attr("global_symbol")


@pytest.mark.parametrize(("make", "change"), [(conv, _cached), (total, _factored)], ids=["cached", "factored"])
def test_what_copies_a_buffer_is_found_under_its_own_name(tmp_path: Path, make: Any, change: Any) -> None:
    theirs = make()
    commit(tmp_path, theirs, change)
    made = taken(tmp_path, ir.load(ir.canonical(theirs)))
    assert made.broken == {}
    assert [claim.candidate for claim in made.claims] == [candidate(theirs, change)]


def softmax() -> tirx.PrimFunc:
    """Reductions that MetaSchedule parts in two: blocks named after blocks."""
    x = te.placeholder((64, 1000), name="x")
    return te.create_prim_func([x, topi.nn.softmax(x)]).without_attr("global_symbol")


def two_products() -> tirx.PrimFunc:
    """Two blocks the name of one of which is the beginning of the other's."""
    x, w, v = (te.placeholder(shape, name=name) for shape, name in (((8, 64), "x"), ((64, 64), "w"), ((64, 64), "v")))
    return te.create_prim_func([x, w, v, topi.nn.matmul(topi.nn.matmul(x, w), v)]).without_attr("global_symbol")


def sums() -> tirx.PrimFunc:
    """A sum of sums: the name of a block is that of another and a suffix."""
    x = te.placeholder((1, 32, 32, 64), name="x")
    return te.create_prim_func([x, topi.nn.relu(topi.sum(topi.sum(x, 1), 1))]).without_attr("global_symbol")


def depthwise() -> tirx.PrimFunc:
    x, w = te.placeholder((1, 32, 14, 14), name="x"), te.placeholder((32, 1, 3, 3), name="w")
    return te.create_prim_func([x, w, topi.nn.depthwise_conv2d_nchw(x, w, 1, 1, 1)]).without_attr("global_symbol")


WORKLOADS = {
    "conv": lambda: conv().without_attr("layout_free_buffers"),
    "conv with a free weight": lambda: conv().with_attr("layout_free_buffers", [1]),
    "softmax": softmax,
    "two products": two_products,
    "sum of sums": sums,
    "depthwise": depthwise,
}


@x86_only
@pytest.mark.parametrize("make", WORKLOADS.values(), ids=WORKLOADS)
def test_what_metaschedule_itself_finds_is_taken_as_the_candidate_that_it_is(tmp_path: Path, make: Any) -> None:
    theirs = make()
    ours = ir.load(ir.canonical(theirs))
    target = tvm.target.Target({"kind": "llvm", "mcpu": str(NATIVE.attrs["mcpu"]), "num-cores": 2})
    found = sampled(theirs, target)
    assert found
    for i, sch in enumerate(found):
        commit(tmp_path, theirs, lambda _, sch=sch: sch, [1.0 + i], target)
    made = taken(tmp_path, ours)
    assert (made.broken, made.others) == ({}, {})
    assert {claim.candidate for claim in made.claims} == {records.digest_of(sch.mod["main"]) for sch in found}


# given


def written(folder: Path, *workloads: tuple[tirx.PrimFunc, list[tuple[Any, float]]]) -> exchange.Given:
    made = exchange.given(workloads, NATIVE)
    folder.mkdir()
    (folder / "database_workload.json").write_bytes(made.workloads)
    (folder / "database_tuning_record.json").write_bytes(made.records)
    return made


def trace_of(func: tirx.PrimFunc, change: Any) -> Any:
    sch = Schedule(tvm.IRModule({"main": func}))
    change(sch)
    return traces.plain(sch.trace)


def loaded(folder: Path) -> meta_schedule.database.JSONDatabase:
    return meta_schedule.database.JSONDatabase(work_dir=str(folder))


def as_task(func: tirx.PrimFunc) -> tvm.IRModule:
    """A function as MetaSchedule's tasks and look-ups have it."""
    return tvm.get_global_func("tvm.s_tir.meta_schedule.normalize_mod")(func.with_attr("global_symbol", "main"))


def test_the_stock_database_loads_what_is_given_and_finds_the_fastest(tmp_path: Path) -> None:
    other = ir.load(ir.canonical(conv()))
    candidates = [(trace_of(DENSE, by_rows), 2e-3), (trace_of(DENSE, in_panels), 1e-3)]
    made = written(tmp_path / "db", (DENSE, candidates), (other, [(trace_of(other, by_panels_of_channels), 5e-3)]))
    assert made.broken == 0
    database = loaded(tmp_path / "db")
    assert len(database) == 3
    best = database.query_tuning_record(as_task(DENSE), NATIVE, "dense")
    assert [float(run) for run in best.run_secs] == [1e-3]
    # Names play no part: the task of whoever asks has its own.
    found = database.query_schedule(as_task(_dense), NATIVE, "dense")
    assert records.digest_of(found.mod["main"].without_attr("global_symbol")) == candidate(
        DENSE.with_attr("tirx.noalias", True), in_panels
    )
    assert [float(run) for run in database.query_tuning_record(as_task(conv()), NATIVE, "c").run_secs] == [5e-3]
    assert str(best.target) == str(NATIVE)


def test_what_is_given_can_be_taken_again(tmp_path: Path) -> None:
    written(tmp_path / "db", (DENSE, [(trace_of(DENSE, by_rows), 2e-3), (trace_of(DENSE, in_panels), 1e-3)]))
    assert {claim.candidate for claim in taken(tmp_path / "db").claims} == {
        candidate(DENSE, by_rows),
        candidate(DENSE, as_searched),
    }


def test_a_trace_that_would_make_the_database_unloadable_is_left_out(tmp_path: Path) -> None:
    good = trace_of(DENSE, by_rows)
    bad = json.loads(json.dumps(good).replace('"Vectorize"', '"Vectorise"'))
    made = written(
        tmp_path / "db", (DENSE, [(bad, 1e-9), (None, 1.0), ([1], 1.0), (good, 2e-3)]), (conv(), [(bad, 1.0)])
    )
    assert made.broken == 4
    assert len(loaded(tmp_path / "db")) == 1
    assert len(made.workloads.splitlines()) == 1


# what the stock database gets wrong


def test_a_targets_records_never_serve_another_though_the_stock_database_serves_them(tmp_path: Path) -> None:
    commit(tmp_path / "db", DENSE, by_rows, [1e-3])
    stock = loaded(tmp_path / "db").query_tuning_record(tvm.IRModule({"main": DENSE}), OTHER, "dense")
    assert stock is not None
    assert str(stock.target) != str(OTHER), "the stock look-up serves what was tuned for another processor"

    assert taken(tmp_path / "db", target=OTHER).claims == ()
    (claim,) = taken(tmp_path / "db").claims
    ledger, workload = Ledger(Store(tmp_path / "store"), 0.02), records.digest_of(DENSE)
    attributes = {"native": json.loads(str(NATIVE)), "other": json.loads(str(OTHER))}
    keys = {name: ledger.key_of(workload, each, device()) for name, each in attributes.items()}
    ledger.add(keys["native"], {}, [claim])
    assert len(ledger.standing(keys["native"]).claims) == 1
    assert ledger.standing(keys["other"]).claims == ()
    assert keys["native"] == ledger.key_of(workload, targets.resolve("native"), device())


# Two tuners that share a folder: both open it, then each writes records of a workload of its own.
_WRITER = """
import sys
from pathlib import Path
import tvm
from tvm.s_tir import Schedule, meta_schedule
from pipeline.store import Store
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.records import Outcome, TrialRecord
from tests.compiler.strategies.workloads import DENSE, NATIVE, by_rows, scheduled

folder, name = Path(sys.argv[1]), sys.argv[2]
func = DENSE if name == "one" else scheduled(DENSE, by_rows)
database = meta_schedule.database.JSONDatabase(work_dir=str(folder / "db"))
ledger = Ledger(Store(folder / "store"), 0.02)
print("open", flush=True)
sys.stdin.readline()
workload = database.commit_workload(tvm.IRModule({"main": func}))
arguments = meta_schedule.arg_info.ArgInfo.from_prim_func(func)
for i in range(5):
    trace = Schedule(workload.mod).trace
    database.commit_tuning_record(
        meta_schedule.database.TuningRecord(trace, workload, [1.0 + i], NATIVE, arguments))
    ledger.add(name * 20, {}, [TrialRecord(candidate=f"{name} {i}", space="s", space_version=1, decisions=[],
                                           outcome=Outcome.TIMED, seconds=1.0 + i, baseline=1.0)])
print("done", flush=True)
"""


def test_two_writers_of_one_folder_lose_nothing_though_the_stock_database_does(tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path), name],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for process in writers:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
    for process in writers:
        assert process.communicate("go\n", timeout=60)[0] == "done\n"

    ledger = Ledger(Store(tmp_path / "store"), 0.02)
    for name in ("one", "two"):
        assert ledger.standing(name * 20).tried == {f"{name} {i}" for i in range(5)}
    try:
        database = loaded(tmp_path / "db")
        kept = {
            name: len(database.get_top_k(database.commit_workload(tvm.IRModule({"main": func})), 100))
            for name, func in (("one", DENSE), ("two", scheduled(DENSE, by_rows)))
        }
    except Exception:
        kept = {}
    assert kept != {"one": 5, "two": 5}, "the stock database has learnt to share a folder: say so in the documents"
