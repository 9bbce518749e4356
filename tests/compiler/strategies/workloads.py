"""What tests of strategies share: a small workload, schedules of it, databases of records of it, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tvm
from tvm import tirx
from tvm.s_tir import Schedule, meta_schedule
from tvm.script import tirx as T  # noqa: N812

from pipeline.compiler import ir, prepack, targets

NATIVE = targets.load(targets.resolve("native"))
X, W = (np.random.default_rng(0).standard_normal(shape).astype("float32") for shape in ((8, 16), (16, 32)))


@T.prim_func(s_tir=True)
def _dense(x: T.Buffer((8, 16), "float32"), w: T.Buffer((16, 32), "float32"), y: T.Buffer((8, 32), "float32")):
    T.func_attr({"tirx.noalias": True})
    product = T.sblock_alloc_buffer((8, 32), "float32")
    for i, j, k in T.grid(8, 32, 16):
        with T.sblock("product"):
            vi, vj, vk = T.axis.remap("SSR", [i, j, k])
            with T.init():
                product[vi, vj] = T.float32(0)
            product[vi, vj] = product[vi, vj] + x[vi, vk] * w[vk, vj]
    for i, j in T.grid(8, 32):
        with T.sblock("relu"):
            vi, vj = T.axis.remap("SS", [i, j])
            y[vi, vj] = T.max(product[vi, vj], T.float32(0))


DENSE = ir.load(ir.canonical(_dense))  # relu(x w), as extraction leaves it
FREE = DENSE.with_attr(prepack.LAYOUT_FREE, [1])  # the same where w is a weight with no other use
Y = np.maximum(X @ W, 0)

Change = Callable[[Schedule], Schedule | None]  # changes what it is given, or returns another


def block(sch: Schedule, index: int = 0) -> object:
    return sch.get_child_blocks(sch.get_sblock("root"))[index]


def by_rows(sch: Schedule) -> None:
    """Vectors along the columns of the product."""
    i, j, k = sch.get_loops(block(sch))
    sch.reorder(i, k, j)
    sch.vectorize(j)


def in_panels(sch: Schedule) -> None:
    """What MetaSchedule's RewriteLayout does: w in panels of eight columns, laid out by a block of its own."""
    product = block(sch)
    laid_out = sch.cache_read(product, 1, "global")
    sch.transform_layout(product, ("read", 1), lambda k, j: (j // 8, k, j % 8))
    sch.annotate(laid_out, prepack.PREPROCESS, 1)  # `true` in MetaSchedule's sources, a number in its records


def scheduled(func: tirx.PrimFunc, change: Change) -> tirx.PrimFunc:
    return _traced(func, change).mod["main"]


def _traced(func: tirx.PrimFunc, change: Change) -> Schedule:
    sch = Schedule(tvm.IRModule({"main": func}))
    return change(sch) or sch


def commit(
    folder: Path,
    func: tirx.PrimFunc,
    change: Change,
    seconds: Sequence[float] | None = (1e-3,),
    target: tvm.target.Target = NATIVE,
) -> None:
    """Adds a record to MetaSchedule's own database in a folder, as a tuning run does."""
    folder.mkdir(parents=True, exist_ok=True)
    database = meta_schedule.database.JSONDatabase(work_dir=str(folder))
    workload = database.commit_workload(tvm.IRModule({"main": func}))
    arguments = meta_schedule.arg_info.ArgInfo.from_prim_func(func)
    trace = _traced(func, change).trace
    runs = None if seconds is None else list(seconds)
    database.commit_tuning_record(meta_schedule.database.TuningRecord(trace, workload, runs, target, arguments))


def lines(folder: Path) -> tuple[bytes, bytes]:
    """A database's two files: workloads, records."""
    return tuple((folder / f"database_{part}.json").read_bytes() for part in ("workload", "tuning_record"))


def call(func: tirx.PrimFunc, *inputs: np.ndarray, name: str = "main") -> np.ndarray:
    """What a function writes to its last parameter."""
    compiled = tvm.compile(tvm.IRModule({name: func.with_attr("global_symbol", name)}), target=NATIVE)
    shape = tuple(int(extent) for extent in func.params[-1].ty.shape)
    result = tvm.runtime.tensor(np.zeros(shape, str(func.params[-1].ty.dtype)))
    compiled[name](*(tvm.runtime.tensor(array) for array in inputs), result)
    return result.numpy()
