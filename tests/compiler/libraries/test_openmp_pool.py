"""TVM's parallel loops run on OpenMP's threads where the pool is linked in, and fail as on TVM's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm
from operators import ATTRIBUTES, call, driver, objects, pool
from tvm import tirx
from tvm.script import tirx as T  # noqa: N812


@T.prim_func(s_tir=True)
def where(x: T.Buffer((8,), "int32"), y: T.Buffer((8,), "int32")):
    for i in T.parallel(8):
        with T.sblock("y"):
            v = T.axis.spatial(8, i)
            y[v] = x[v] + T.call_extern("int32", "omp_in_parallel")


@T.prim_func(s_tir=True)
def raising(x: T.Buffer((8,), "int32"), y: T.Buffer((8,), "int32")):
    for i in T.parallel(8):
        with T.sblock("y"):
            v = T.axis.spatial(8, i)
            T.reads(x[v])
            T.writes(y[v])
            assert x[v] < 5, "too large"
            y[v] = x[v]


def loaded(func: tirx.PrimFunc, folder: Path, with_pool: bool = True) -> object:
    import tvm_ffi

    files = {"f.o": objects.compile_function(func, "f", ATTRIBUTES)} | ({"p.o": pool()} if with_pool else {})
    for name, data in files.items():
        (folder / name).write_bytes(data)
    path = folder / "f.so"
    subprocess.run([driver(), "-shared", "-o", path, *(folder / name for name in files), "-lgomp"], check=True)
    symbols = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True).stdout
    assert ("ParallelLaunch" in symbols) != with_pool
    return tvm_ffi.load_module(str(path))["f"]


def numbers(last: int = 7) -> list[np.ndarray]:
    x = np.arange(8, dtype=np.int32) - 7 + last
    return [x, np.zeros(8, np.int32)]


def test_loops_run_on_openmp(tmp_path: Path) -> None:
    x, y = numbers()
    expected = 1 if len(os.sched_getaffinity(0)) > 1 and os.environ.get("OMP_NUM_THREADS") != "1" else 0
    np.testing.assert_array_equal(call(loaded(where, tmp_path), [x, y]), x + expected)


def test_without_it_they_do_not(tmp_path: Path) -> None:
    x, y = numbers()
    np.testing.assert_array_equal(call(loaded(where, tmp_path, with_pool=False), [x, y]), x)


def test_an_error_in_a_task_reaches_the_caller(tmp_path: Path) -> None:
    function = loaded(raising, tmp_path)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="too large"):
            call(function, numbers(last=7))
        np.testing.assert_array_equal(call(function, numbers(last=4)), numbers(last=4)[0])


_ONE_THREAD = """
import sys, numpy as np, tvm, tvm_ffi
x, y = (tvm.runtime.tensor(np.arange(8, dtype=np.int32)) for _ in "xy")
tvm_ffi.load_module(sys.argv[1])["f"](x, y)
assert (y.numpy() == np.arange(8)).all()
"""


def test_one_thread_runs_all_tasks(tmp_path: Path) -> None:
    loaded(where, tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", _ONE_THREAD, str(tmp_path / "f.so")], check=True, env=environment)


def test_tasks_wait_for_each_other(tmp_path: Path) -> None:
    """y[i] = x[i] + 1; barrier; z[i] = y[7 - i]: each task reads what another one wrote."""

    @T.prim_func(s_tir=True)
    def waiting(x: T.Buffer((8,), "int32"), y: T.Buffer((8,), "int32"), z: T.Buffer((8,), "int32")):
        for i in T.parallel(8):
            with T.sblock("y"):
                v = T.axis.spatial(8, i)
                y[v] = x[v] + 1
        for j in T.parallel(8):
            with T.sblock("z"):
                v = T.axis.spatial(8, j)
                z[v] = y[7 - v]

    # All threads run the region, share each loop, and meet at the end of the first.
    one = tirx.IntImm("int32", 1)
    first, second = waiting.body.block.body.seq
    first = tirx.AttrStmt(first.loop_var, "pragma_parallel_barrier_when_finish", one, first)
    body = tirx.AttrStmt(second.loop_var, "pragma_parallel_launch_point", one, tirx.SeqStmt([first, second]))
    block = tvm.s_tir.SBlock([], [], [], "root", body, None, [])
    func = tirx.PrimFunc(waiting.params, tvm.s_tir.SBlockRealize([], True, block), waiting.ret_type, waiting.attrs)
    function = loaded(func, tmp_path)
    for i in range(200):
        x = np.arange(8, dtype=np.int32) + i
        np.testing.assert_array_equal(call(function, [x, np.zeros(8, np.int32), np.zeros(8, np.int32)]), x[::-1] + 1)
