"""Functions and schedules written by hand: bound to one workload, and to no other."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T  # noqa: N812

from pipeline.compiler import ir, prepack
from pipeline.compiler.strategies import manual
from pipeline.compiler.strategies.manual import Manual, Replacement
from pipeline.errors import ConfigError
from pipeline.hashing import Digest
from tests.compiler.strategies.workloads import DENSE, FREE, NATIVE, W, X, Y, by_rows, call, in_panels, scheduled

DIGEST = Digest.of(ir.canonical(DENSE)).hash


@manual.replaces(DIGEST)
@T.prim_func(s_tir=True)
def by_columns(x: T.Buffer((8, 16), "float32"), w: T.Buffer((16, 32), "float32"), y: T.Buffer((8, 32), "float32")):
    T.func_attr({"tirx.noalias": True})
    for j in T.parallel(32):
        for i in range(8):
            y[i, j] = T.float32(0)
            for k in range(16):
                y[i, j] = y[i, j] + x[i, k] * w[k, j]
            y[i, j] = T.max(y[i, j], T.float32(0))


def right(made: tirx.PrimFunc | None) -> bool:
    return made is not None and bool(np.allclose(call(made, X, W), Y, rtol=1e-4, atol=1e-5))


def test_a_function_stands_for_its_workload() -> None:
    assert by_columns.name == "by_columns"
    made = Manual(by_columns).apply(DENSE, NATIVE)
    assert made.same_as(by_columns.implementation)
    assert right(made)


@pytest.mark.parametrize("bound", [DIGEST, DIGEST[:12], DIGEST[:8].upper(), DENSE], ids=str)
def test_a_workload_is_named_by_its_digest_or_by_itself(bound: object) -> None:
    strategy = Manual(manual.replaces(bound)(by_rows))
    assert ir.canonical(strategy.apply(DENSE, NATIVE)) == ir.canonical(scheduled(DENSE, by_rows))


@pytest.mark.parametrize("other", [scheduled(DENSE, by_rows), FREE], ids=["another", "its weight is free"])
def test_does_not_apply_to_another_workload(other: tirx.PrimFunc) -> None:
    for bound in (DIGEST, DENSE):
        assert Manual(manual.replaces(bound)(by_rows)).apply(other, NATIVE) is None


def test_a_schedule_may_change_what_it_is_given_or_return_another() -> None:
    def other(sch: Schedule) -> Schedule:
        made = Schedule(sch.mod)
        by_rows(made)
        return made

    for written in (by_rows, other):
        made = Manual(manual.replaces(DENSE)(written)).apply(DENSE, NATIVE)
        assert ir.canonical(made) == ir.canonical(scheduled(DENSE, by_rows))
        assert right(made)


def test_a_schedule_is_made_within_the_targets_scope() -> None:
    seen = []

    def look(sch: Schedule) -> None:
        import tvm

        seen.append(str(tvm.target.Target.current()))

    Manual(manual.replaces(DENSE)(look)).apply(DENSE, NATIVE)
    assert seen == [str(NATIVE)]


def test_a_function_with_a_name_is_scheduled_as_well() -> None:
    named = DENSE.with_attr("global_symbol", "dense")
    made = Manual(manual.replaces(DENSE)(by_rows)).apply(named, NATIVE)
    assert ir.canonical(made) == ir.canonical(scheduled(DENSE, by_rows))


def test_a_schedule_may_lay_out_weights_that_are_free() -> None:
    made = Manual(manual.replaces(FREE)(in_panels)).apply(FREE, NATIVE)
    assert [packing.param for packing in prepack.split(made)[1]] == [1]


@T.prim_func(s_tir=True)
def _of_another_shape(
    x: T.Buffer((8, 16), "float32"), w: T.Buffer((16, 31), "float32"), y: T.Buffer((8, 31), "float32")
):
    for i, j in T.grid(8, 31):
        y[i, j] = x[i, 0] * w[0, j]


@T.prim_func(s_tir=True)
def _with_fewer(x: T.Buffer((8, 16), "float32"), y: T.Buffer((8, 32), "float32")):
    for i, j in T.grid(8, 32):
        y[i, j] = x[i, 0]


@pytest.mark.parametrize("written", [_of_another_shape, _with_fewer], ids=["shape", "number"])
def test_other_parameters_are_refused_in_words(written: tirx.PrimFunc) -> None:
    strategy = Manual(Replacement(DENSE, written, "dense"))
    with pytest.raises(ConfigError, match=r"the manual function 'dense' takes \(8x16:float32.*; the workload takes"):
        strategy.apply(DENSE, NATIVE)


def test_a_modules_bindings_come_in_the_order_of_its_text() -> None:
    module = ModuleType("manual")
    module.second = 2
    module.b = manual.replaces("bb")(by_rows)
    module.a = manual.replaces("aa")(in_panels)
    assert [(each.name, each.workload_digest()) for each in manual.replacements(module)] == [
        ("by_rows", "bb"),
        ("in_panels", "aa"),
    ]
