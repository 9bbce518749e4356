"""What each rule does to the structure of a function."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import tvm
from tvm import relax, s_tir, tirx
from tvm.script import tirx as T  # noqa: N812

from pipeline.compiler import ir, rules
from pipeline.compiler.rules import blocks, fastmath, gpu, inline, lanes, registers, stages, terms
from pipeline.compiler.rules.choices import Choices
from pipeline.compiler.rules.machine import machine
from pipeline.compiler.rules.stages import Kind
from pipeline.compiler.strategies.rules import Rules
from tests.compiler.rules.cases import NATIVE, assert_same, conv2d, fused, run, target

R = relax.op


def found(func: tirx.PrimFunc) -> list[blocks.Block]:
    """The blocks that are left after merging."""
    left = inline.inline(s_tir.Schedule(func))
    assert left is not None
    return left


def loops(func: tirx.PrimFunc, kind: tirx.ForKind) -> list[int]:
    """The extents of all loops of a kind."""
    return [int(loop.extent) for loop in terms.nodes(func.body, tirx.For) if loop.kind == kind]


def scheduled(func: tirx.PrimFunc, on: tvm.target.Target = NATIVE) -> tirx.PrimFunc:
    result = rules.schedule(func, on)
    assert result is not None
    return result


@pytest.mark.parametrize(
    ("mcpu", "triple", "vector_bytes", "registers"),
    [
        ("znver5", "x86_64-linux-gnu", 64, 32),
        ("haswell", "x86_64-linux-gnu", 32, 16),
        ("x86-64", "x86_64-linux-gnu", 16, 16),
        ("cortex-a76", "aarch64-linux-gnu", 16, 32),
    ],
)
def test_machine_is_read_from_the_target(mcpu: str, triple: str, vector_bytes: int, registers: int) -> None:
    read = machine(target(mcpu, triple))
    assert (read.vector_bytes, read.registers, read.cores) == (vector_bytes, registers, 0)
    assert read.lanes("float32") == vector_bytes // 4
    assert read.lanes("bool") == vector_bytes
    assert read.accumulators("float32") < registers


def test_more_cores_get_more_parts() -> None:
    assert machine(target("znver5", **{"num-cores": 16})).chunks() == 64
    assert machine(target("znver5")).chunks() == 16


def test_the_vector_width_of_the_target_is_used() -> None:
    func = fused(lambda emit, x: emit(R.nn.relu(x)), (1024, 64))
    assert loops(scheduled(func, target("znver5")), tirx.ForKind.VECTORIZED) == [64]
    assert loops(scheduled(func, target("haswell")), tirx.ForKind.VECTORIZED) == [32]
    assert loops(scheduled(func, target("x86-64")), tirx.ForKind.VECTORIZED) == [16]


def test_inlining_leaves_padding_convolution_and_one_block_behind_it() -> None:
    left = found(conv2d((1, 9, 9, 8), (3, 3, 8, 16), padding=1, epilogue=("bias", "residual", "silu")))
    assert [block.is_reduction for block in left] == [False, True, False]


def test_inlining_keeps_exp_where_a_sum_and_another_read_it() -> None:
    assert len(found(fused(lambda emit, x: emit(R.nn.softmax(x, -1)), (8, 30)))) == 4


def test_inlining_merges_into_reductions_that_read_each_element_once() -> None:
    assert len(found(fused(lambda emit, x: emit(R.sum(emit(R.multiply(x, x)), (1,))), (8, 30)))) == 1


def test_a_stride_is_that_of_the_address() -> None:
    (block,) = found(fused(lambda emit, x: emit(R.nn.max_pool2d(x, (3, 3), (2, 2), layout="NHWC")), (1, 9, 11, 8)))
    _, h, w, c = (blocks.stride(block.loads[0], axis) for axis in block.spatial)
    assert (h, w, c) == (2 * 11 * 8, 2 * 8, 1)


def test_a_group_of_channels_bounds_a_stride() -> None:
    left = found(conv2d((1, 4, 4, 32), (1, 1, 8, 64), groups=4, epilogue=()))
    block = next(block for block in left if block.is_reduction)
    channel = block.spatial[-1]
    grouped = next(load for load in block.loads if blocks.stride(load, channel) is None)
    assert blocks.stride(grouped, channel, tile=16) == 0
    assert blocks.stride(grouped, channel, tile=32) is None


@pytest.mark.parametrize(
    ("func", "kinds"),
    [
        (conv2d((1, 9, 9, 8), (3, 3, 8, 16), padding=1), [Kind.TILES]),
        (fused(lambda emit, x: emit(R.nn.softmax(x, -1)), (8, 30)), [Kind.ROWS]),
        (fused(lambda emit, x: emit(R.sum(x, (1,))), (8, 30)), [Kind.ROWS]),
        (fused(lambda emit, x: emit(R.sum(x, (0,))), (8, 30)), [Kind.TILES]),
        (fused(lambda emit, x: emit(R.nn.relu(x)), (8, 30)), [Kind.INJECTIVE]),
    ],
    ids=["convolution", "softmax", "inner sum", "outer sum", "relu"],
)
def test_stages(func: tirx.PrimFunc, kinds: list[Kind]) -> None:
    parted = stages.partition(found(func), Choices())
    assert parted is not None
    assert [stage.kind for stage in parted] == kinds


@pytest.mark.parametrize("mcpu", ["znver5", "haswell", "x86-64"])
@pytest.mark.parametrize("data", [(1, 56, 56, 64), (1, 13, 13, 48), (1, 7, 7, 512)])
def test_a_tile_fits_the_registers(mcpu: str, data: tuple[int, ...]) -> None:
    cpu = machine(target(mcpu))
    block = next(b for b in found(conv2d(data, (3, 3, data[3], 64))) if b.is_reduction)
    tile = registers.choose(block, cpu)
    assert tile.lanes == cpu.lanes("float32")
    assert 4 < tile.vectors * tile.across * tile.down <= cpu.accumulators("float32")


def test_a_convolution_accumulates_in_unrolled_vectors() -> None:
    result = scheduled(conv2d((1, 28, 28, 32), (3, 3, 32, 64), padding=1), target("znver5"))
    assert 16 in loops(result, tirx.ForKind.VECTORIZED)
    assert math.prod(loops(result, tirx.ForKind.UNROLLED)) > 1
    assert len(loops(result, tirx.ForKind.PARALLEL)) == 1  # padding is made inside


def test_tails_leave_no_condition() -> None:
    result = scheduled(conv2d((1, 13, 13, 48), (1, 1, 48, 58)), target("znver5"))
    conditions = [realize.predicate for realize in terms.nodes(result.body, s_tir.SBlockRealize)]
    assert all(isinstance(condition, tirx.IntImm) for condition in conditions)


@pytest.mark.parametrize(("rows", "is_parallel"), [(4, False), (4096, True)])
def test_small_functions_start_no_threads(rows: int, is_parallel: bool) -> None:
    for func in (
        fused(lambda emit, x: emit(R.nn.relu(x)), (rows, 64)),
        fused(lambda emit, x: emit(R.nn.softmax(x, -1)), (rows, 64)),
        fused(lambda emit, x, y: emit(R.matmul(x, y)), (rows, 64), (64, 64)),
    ):
        assert bool(loops(scheduled(func), tirx.ForKind.PARALLEL)) == is_parallel


def test_a_concatenation_is_cut_at_its_seams() -> None:
    func = fused(lambda emit, x, y: emit(R.concat([x, y], 1)), (300, 24), (300, 40))
    extents = loops(scheduled(func), tirx.ForKind.SERIAL)
    assert {24, 40} <= set(extents)


def test_what_is_updated_in_place_is_worked_out_once() -> None:
    @T.prim_func(s_tir=True)
    def more(a: T.Buffer((50, 21), "float32")):
        for i, j in T.grid(50, 21):
            with T.sblock("more"):
                vi, vj = T.axis.remap("SS", [i, j])
                a[vi, vj] = a[vi, vj] + T.float32(1)

    assert_same(more, rules.schedule(more, NATIVE))


def test_lanes_count_each_point_once() -> None:
    func = fused(lambda emit, x: emit(R.sum(x, (1,))), (3, 37))
    sch = s_tir.Schedule(func)
    (block,) = found(func)
    (plain,) = blocks.all_blocks(sch) or ()
    cut = lanes.cut(func, sch.get(sch.get_loops(plain.rv)[0]), plain, 16)
    assert lanes.width(block, 16) == 16
    assert_same(func, cut)


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("exp", np.exp),
        ("tanh", np.tanh),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
        ("erf", np.vectorize(math.erf)),
    ],
)
def test_functions_are_within_a_millionth(name: str, exact) -> None:
    x = np.concatenate([np.linspace(-90, 90, 40001), np.linspace(-4.5, 4.5, 40001), np.logspace(-20, 0, 500)])
    x = np.concatenate([x, [np.inf, -np.inf, np.nan, 0.0]]).astype("float32")
    func = fastmath.vectorizable(fused(lambda emit, v: emit(getattr(R, name)(v)), x.shape))
    assert not {name, "exp"} & {terms.function_name(call) for call in terms.nodes(func.body, tvm.ir.Call)}
    _, got = run(func, [x, np.empty_like(x)])
    with np.errstate(over="ignore"):
        want = exact(x.astype("float64")).astype("float32")
    ordinary = ~(np.abs(want) < np.finfo("float32").tiny)  # or NaN
    np.testing.assert_allclose(got[ordinary], want[ordinary], rtol=1e-6)
    np.testing.assert_allclose(got[~ordinary], 0, atol=1e-37)


def test_a_rule_that_fails_is_logged_and_the_next_is_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_func: object, _target: object, _choices: object) -> None:
        raise RuntimeError("no such loop")

    monkeypatch.setattr(rules, "RULES", (("first", fails), *rules.RULES[1:]))
    func = conv2d((1, 9, 9, 8), (3, 3, 8, 16))
    with caplog.at_level(logging.WARNING):
        assert_same(func, rules.schedule(func, NATIVE))
    assert "the rule first failed: no such loop" in caplog.text


def test_the_same_function_is_scheduled_the_same() -> None:
    func = conv2d((1, 9, 9, 8), (3, 3, 8, 58), padding=1, epilogue=("bias", "silu"))
    first, second = (ir.canonical(scheduled(ir.load(ir.canonical(func)))) for _ in range(2))
    assert first == second


def test_the_strategy_offers_what_the_rules_make() -> None:
    func = conv2d((1, 5, 5, 8), (1, 1, 8, 16))
    offered = Rules().apply(func, NATIVE)
    assert offered is not None
    assert ir.canonical(offered) == ir.canonical(scheduled(func))


@pytest.mark.parametrize("kind", ["cuda", "opencl", "webgpu"])
@pytest.mark.parametrize(
    "func",
    [
        conv2d((1, 8, 8, 16), (3, 3, 16, 16), padding=1),
        fused(lambda emit, x, y: emit(R.matmul(x, y)), (64, 32), (32, 48)),
        fused(lambda emit, x: emit(R.nn.softmax(x, -1)), (8, 70)),
        fused(lambda emit, x: emit(R.permute_dims(x)), (30, 40)),
    ],
    ids=["convolution", "product", "softmax", "transposition"],
)
def test_gpus_get_code(kind: str, func: tirx.PrimFunc) -> None:
    host = {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}
    arch = {"arch": "sm_80"} if kind == "cuda" else {}
    device = tvm.target.Target({"kind": kind, "host": host, **arch})
    assert kind in gpu.KINDS
    named = scheduled(func, device).with_attr("global_symbol", "main")
    built = tvm.tirx.build(tvm.IRModule({"main": named}), target=device)
    assert "main_kernel" in built.imports[0].inspect_source()
