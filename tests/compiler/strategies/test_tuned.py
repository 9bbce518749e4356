"""The strategy of tuning records: from a database on disk to the function, and to an artifact of a workspace."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tvm
from conftest import WorkspaceFolder
from tvm.s_tir import Schedule, meta_schedule

from pipeline.compiler import ir, prepack, records
from pipeline.compiler.strategies.tuned import Tuned
from pipeline.errors import StageError
from pipeline.platforms import architecture
from tests import models
from tests.compiler.strategies.workloads import (
    DENSE,
    FREE,
    NATIVE,
    W,
    X,
    Y,
    block,
    by_rows,
    call,
    commit,
    in_panels,
    lines,
    scheduled,
)

OTHER = tvm.target.Target({"kind": "llvm", "mcpu": "cortex-a72", "mtriple": "aarch64-linux-gnu"})


def tuned(folder: Path) -> Tuned:
    return Tuned(records.read_database(*lines(folder))[0].values())


def spoil(folder: Path, before: str, after: str) -> None:
    """Renames an instruction in every record."""
    path = folder / "database_tuning_record.json"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


def test_applies_to_the_very_workload(tmp_path: Path) -> None:
    commit(tmp_path, DENSE, by_rows)
    made = tuned(tmp_path).apply(DENSE, NATIVE)
    assert ir.canonical(made) == ir.canonical(scheduled(DENSE, by_rows))
    assert tuned(tmp_path).apply(scheduled(DENSE, by_rows), NATIVE) is None
    assert tuned(tmp_path).apply(DENSE, OTHER) is None
    assert Tuned([]).apply(DENSE, NATIVE) is None


def test_which_weights_are_free_is_the_workloads_to_say(tmp_path: Path) -> None:
    commit(tmp_path / "free", FREE, in_panels)
    commit(tmp_path / "plain", DENSE, in_panels)
    for folder in ("free", "plain"):
        strategy = tuned(tmp_path / folder)
        assert len(prepack.split(strategy.apply(FREE, NATIVE))[1]) == 1
        # Its weight has a second use, which takes it as it is.
        assert prepack.split(strategy.apply(DENSE, NATIVE))[1] == ()


def test_records_that_cannot_be_replayed_are_an_error_with_the_reason(tmp_path: Path) -> None:
    commit(tmp_path, DENSE, by_rows)
    spoil(tmp_path, '"Vectorize"', '"Vectorise"')
    with pytest.raises(StageError, match=r"none of 1 tuning records can be replayed, .*Vectorise"):
        tuned(tmp_path).apply(DENSE, NATIVE)
    assert tuned(tmp_path).apply(DENSE, OTHER) is None


@pytest.fixture
def _x86_intrinsics_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """MetaSchedule imports the intrinsics of all targets, which takes half a minute: it gets those of x86."""
    package = ModuleType("tvm.s_tir.tensor_intrin")
    package.__path__ = [str(Path(tvm.__file__).parent / "s_tir" / "tensor_intrin")]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    importlib.import_module("tvm.s_tir.tensor_intrin.x86")


def sampled(func: tvm.tirx.PrimFunc, target: tvm.target.Target, seeds: int) -> Iterator[Schedule]:
    """Schedules out of MetaSchedule's own search space, as its search would measure them."""
    mod = tvm.IRModule({"main": func})
    context = meta_schedule.TuneContext(
        mod=mod, target=target, space_generator="post-order-apply", search_strategy="replay-trace", num_threads=1
    )
    for space in context.generate_design_space():
        for seed in range(1, seeds + 1):
            sch = Schedule(mod, seed=seed)
            space.trace.apply_to_schedule(sch, remove_postproc=True)
            sch.enter_postproc()
            if all(each.apply(sch) for each in context.space_generator.postprocs):
                yield sch


@pytest.mark.usefixtures("_x86_intrinsics_alone")
@pytest.mark.skipif(architecture("") != "x86_64", reason="the search space is that of x86")
def test_what_metaschedule_itself_samples_is_replayed(tmp_path: Path) -> None:
    target = tvm.target.Target({"kind": "llvm", "mcpu": str(NATIVE.attrs["mcpu"]), "num-cores": 2})
    found = list(sampled(FREE, target, seeds=2))
    assert len(found) > 2
    packings = []
    for i, sch in enumerate(found):
        commit(tmp_path / str(i), FREE, lambda _, sch=sch: sch, target=target)
        for func in (FREE, DENSE):
            made = tuned(tmp_path / str(i)).apply(func, NATIVE)
            rest, parts = prepack.split(made)
            weight = call(parts[0].function, W, name="pack") if parts else W
            np.testing.assert_allclose(call(rest, X, weight), Y, rtol=1e-4, atol=1e-5)
            packings.append(len(parts))
    assert set(packings[::2]) == {1}  # the weight is free, and MetaSchedule lays it out
    assert set(packings[1::2]) == {0}


# In a workspace, where each operator's records are found in the folders that the target names.

INPUT = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
TARGET = 'target = "native"\nrecords = ["tuning"]\norder = ["tuned", "default"]\n'


def operators(workspace: WorkspaceFolder, model: str = "dense") -> list[Any]:
    return workspace.manifest(model)["operators"]


def workload(workspace: WorkspaceFolder, operator: Any) -> tvm.tirx.PrimFunc:
    """An operator's function, out of the workspace's store."""
    digest = operator["workload"]
    return ir.load((workspace.cache / "cas" / digest[:2] / digest).read_bytes())


@pytest.fixture
def dense(workspace: WorkspaceFolder) -> WorkspaceFolder:
    """A workspace of one operator that was built before anything was tuned."""
    workspace.onnx("dense.onnx", models.dense())
    workspace.dodo('Model.onnx("dense", "dense.onnx"),')
    workspace.write("targets/native.toml", TARGET)
    done = workspace.build().good()
    assert "WARNING native: the records in tuning cannot be used: No such file" in done.err
    return workspace


def tune(workspace: WorkspaceFolder, change: Callable[[Schedule], None], **more: Any) -> None:
    (operator,) = operators(workspace)
    commit(workspace.folder / "tuning", workload(workspace, operator), change, **more)


def built(workspace: WorkspaceFolder, implementation: str, *said: str) -> None:
    """Builds, and requires what the operator runs on, the right outputs, and these warnings alone."""
    done = workspace.build().good()
    (operator,) = operators(workspace)
    assert operator["implementation"] == implementation, done.err
    warnings = [line for line in done.err.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == len(said)
    for warning, words in zip(warnings, said, strict=True):
        assert words in warning
    (output,) = workspace.run("dense", x=INPUT).values()
    np.testing.assert_allclose(output, models.dense_of(INPUT), rtol=1e-4, atol=1e-5)
    workspace.idle_build()


def columns(sch: Schedule) -> None:
    """The weight by columns, laid out when the artifact is packed."""
    product = block(sch)
    index = [region.source.name for region in sch.get(product).reads].index("b1")
    laid_out = sch.cache_read(product, index, "global")
    sch.transform_layout(product, ("read", index), lambda k, j: (j, k))
    sch.annotate(laid_out, prepack.PREPROCESS, 1)


@pytest.mark.parametrize("select", ["first", "fastest"])
def test_a_record_is_taken_into_the_artifact(dense: WorkspaceFolder, select: str) -> None:
    assert operators(dense)[0]["implementation"] == "default"
    dense.write("targets/native.toml", TARGET + f'select = "{select}"\n[measure]\nseconds = 0.01\n')
    tune(dense, columns)
    plain = dense.manifest("dense")["weights"]
    dense.build().good()
    assert "tuned" in {trial["strategy"] for trial in operators(dense)[0]["candidates"]}
    if select == "first":
        built(dense, "tuned")
        assert [each["shape"] for each in plain] != [each["shape"] for each in dense.manifest("dense")["weights"]]


def test_a_faster_record_replaces_a_slower_one(dense: WorkspaceFolder) -> None:
    tune(dense, lambda sch: sch.annotate(block(sch), "slow", 1), seconds=[2e-3])
    built(dense, "tuned")
    before = dense.manifest("dense")["weights"]
    tune(dense, columns, seconds=[1e-3])
    built(dense, "tuned")
    assert dense.manifest("dense")["weights"] != before


def test_records_for_another_target_or_that_failed_are_not_used(dense: WorkspaceFolder) -> None:
    tune(dense, columns, target=OTHER)
    tune(dense, columns, seconds=[1e10])
    tune(dense, columns, seconds=None)
    built(dense, "default")


def test_a_torn_line_is_counted(dense: WorkspaceFolder) -> None:
    tune(dense, columns)
    path = dense.folder / "tuning" / "database_tuning_record.json"
    dense.write("tuning/database_tuning_record.json", path.read_bytes() + path.read_bytes()[:200])
    built(dense, "tuned", "1 line of the records in tuning cannot be read")


def test_a_record_that_cannot_be_replayed_is_put_aside(dense: WorkspaceFolder) -> None:
    tune(dense, columns)
    spoil(dense.folder / "tuning", '"CacheRead"', '"CacheRaed"')
    built(dense, "default", "tuned is put aside for fused_matmul_add_relu")


def test_what_is_dumped_can_be_tuned(dense: WorkspaceFolder) -> None:
    dense.build("--dump", "ir").good()
    (dumped,) = (dense.folder / "ir/native/dense/operators").glob("*.default.py")
    func = tvm.script.from_source(dumped.read_text())
    commit(dense.folder / "tuning", func, columns)
    built(dense, "tuned")


def test_records_of_another_operator_are_left_alone(dense: WorkspaceFolder) -> None:
    commit(dense.folder / "tuning", DENSE, by_rows)
    built(dense, "default")


def panels_of_eight(sch: Schedule) -> None:
    """A convolution's weight (h, w, in, out) in panels of eight outputs, as MetaSchedule's RewriteLayout lays them."""
    (conv,) = [each for each in sch.get_child_blocks(sch.get_sblock("root")) if _reads(sch, each, "b1")]
    index = [region.source.name for region in sch.get(conv).reads].index("b1")
    laid_out = sch.cache_read(conv, index, "global")
    sch.transform_layout(conv, ("read", index), lambda h, w, i, o: (o // 8, h, w, i, o % 8))
    sch.annotate(laid_out, prepack.PREPROCESS, 1)
    *outer, last = sch.get_loops(conv)[:4]
    vectors, lanes = sch.split(last, [None, 8])
    sch.parallel(sch.fuse(*outer))
    sch.reorder(vectors, *sch.get_loops(conv)[-3:], lanes)
    sch.vectorize(lanes)


def _reads(sch: Schedule, candidate: object, buffer: str) -> bool:
    return buffer in [region.source.name for region in sch.get(candidate).reads]


@pytest.mark.slow
def test_a_network_takes_the_records_of_its_operators(workspace: WorkspaceFolder) -> None:
    zoo = pytest.importorskip("bench.zoo")
    workspace.onnx("squeezenet.onnx", zoo.light("squeezenet"))
    workspace.dodo('Model.onnx("squeezenet", "squeezenet.onnx"),')
    workspace.write("targets/native.toml", TARGET)
    workspace.build().good()
    before = operators(workspace, "squeezenet")
    chosen = [each for each in before if each["name"].startswith("fused_conv2d") and "x64:float32" in each["shapes"][1]]
    assert len(chosen) > 2
    for operator in chosen:
        commit(workspace.folder / "tuning", workload(workspace, operator), panels_of_eight)
    done = workspace.build().good()
    assert "WARNING" not in done.err
    assert done.compiled >= len(chosen)
    tuned_now = {each["name"] for each in operators(workspace, "squeezenet") if each["implementation"] == "tuned"}
    assert tuned_now == {each["name"] for each in chosen}
    assert workspace.manifest("squeezenet")["reference"]["state"] == "passed"
    layouts = [weight["shape"] for weight in workspace.manifest("squeezenet")["weights"]]
    assert sum(len(shape) == 5 for shape in layouts) == sum(each["calls"] for each in chosen)
