"""The normal form of a PrimFunc: equal bytes if and only if structurally equal, and stable everywhere."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tvm
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, te, tirx, topi
from tvm.script import tirx as T  # noqa: N812

from pipeline.compiler import ir
from pipeline.errors import StoreError
from pipeline.hashing import Digest

# Changes only with TVM or with the normal form itself; then every cached workload changes with it.
# To pin again: python -m tests.compiler.test_ir
PINNED = {
    "conv2d": ("c0d3f9281d1c", "d985cb9c1c3c7e2f"),
    "softmax": ("1b9ebcd0eedd", "f051667b460152b5"),
    "transposed": ("3b630231c31f", "0c3c40f793392818"),
}


def _te(make: Callable[..., te.Tensor], *shapes: tuple[int, ...], dtype: str = "float32") -> tirx.PrimFunc:
    inputs = [te.placeholder(shape, dtype=dtype) for shape in shapes]
    return te.create_prim_func([*inputs, make(*inputs)])


@functools.cache
def _conv2d() -> tirx.PrimFunc:
    return _te(lambda x, w: topi.nn.relu(topi.nn.conv2d_nchw(x, w, 1, 1, 1)), (1, 8, 14, 14), (16, 8, 3, 3))


@functools.cache
def _softmax() -> tirx.PrimFunc:
    return _te(topi.nn.softmax, (4, 32))


@functools.cache
def _transposed() -> tirx.PrimFunc:
    """With open extents, an annotation and a thread axis."""

    @T.prim_func(s_tir=True)
    def transposed(a: T.handle, b: T.handle):
        n = T.int64()
        m = T.int64()
        A = T.match_buffer(a, (n, m), "float32")  # noqa: N806
        B = T.match_buffer(b, (m, n), "float32")  # noqa: N806
        for i in T.thread_binding(n, thread="blockIdx.x"):
            for j in T.serial(m, annotations={"unroll": 4, "pragma": True}):
                with T.sblock("transpose"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    B[vj, vi] = A[vi, vj]

    return transposed


@functools.cache
def _transposed_renamed() -> tirx.PrimFunc:
    @T.prim_func(s_tir=True)
    def other(x: T.handle, y: T.handle):
        rows = T.int64()
        columns = T.int64()
        X = T.match_buffer(x, (rows, columns), "float32")  # noqa: N806
        Y = T.match_buffer(y, (columns, rows), "float32")  # noqa: N806

        for r in T.thread_binding(rows, thread="blockIdx.x"):
            for c in T.serial(columns, annotations={"pragma": True, "unroll": 4}):
                with T.sblock("copy"):
                    vr, vc = T.axis.remap("SS", [r, c])
                    Y[vc, vr] = X[vr, vc]

    return other


GOLDEN: dict[str, Callable[[], tirx.PrimFunc]] = {
    "conv2d": _conv2d,
    "softmax": _softmax,
    "transposed": _transposed,
}


def _bare(func: tirx.PrimFunc) -> tirx.PrimFunc:
    return func.without_attr("global_symbol")


def _edited(func: tirx.PrimFunc, edit: Callable[[dict, list], None]) -> tirx.PrimFunc:
    """The function after `edit(node, nodes)` of every node of its saved graph."""
    graph = json.loads(tvm.ir.save_json(func))
    for node in list(graph["nodes"]):
        edit(node, graph["nodes"])
    return tvm.ir.load_json(json.dumps(graph))


def _renamed(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function under another symbol, each variable, buffer and block under another name."""

    def rename(node: dict, nodes: list) -> None:
        field = {"ir.Var": "name", "s_tir.SBlock": "name_hint"}.get(node["type"])
        if field:
            nodes.append({"type": "ffi.String", "data": f"other_{len(nodes)}"})
            node["data"][field] = len(nodes) - 1

    return _edited(func, rename).with_attr("global_symbol", "other")


def _copied(expression: Callable[[Callable[[], tirx.Expr]], tirx.Expr], *, name: str = "f") -> tirx.PrimFunc:
    """B[i] = expression of A[i], where each call of the argument makes A[i] anew."""
    a = tirx.decl_buffer((8,), "float32", name=f"{name}_a")
    b = tirx.decl_buffer((8,), "float32", name=f"{name}_b")
    i = tirx.Var(f"{name}_i", "int32")
    store = tirx.BufferStore(b, expression(lambda: tirx.BufferLoad(a, [i])), [i])
    return tirx.PrimFunc([a, b], tirx.For(i, 0, 8, tirx.ForKind.SERIAL, store))


def _elementwise(value: tirx.Expr) -> tirx.PrimFunc:
    return _copied(lambda load: load() + tirx.Cast("float32", value))


@pytest.mark.parametrize("name", GOLDEN)
def test_pinned_digests(name: str) -> None:
    data = ir.canonical(GOLDEN[name]())
    assert (str(Digest.of(data)), ir.structural_hash(GOLDEN[name]())) == PINNED[name]


def test_names_and_order_of_attributes_do_not_count() -> None:
    assert ir.canonical(_transposed()) == ir.canonical(_transposed_renamed())
    assert ir.canonical(_conv2d()) == ir.canonical(_renamed(_conv2d()))
    one = _conv2d().with_attr("a", 1).with_attr("b", 2)
    two = _conv2d().with_attr("b", 2).with_attr("a", 1)
    assert ir.canonical(one) == ir.canonical(two)


def test_no_name_survives() -> None:
    data = ir.canonical(_transposed().with_attr("global_symbol", "secret_symbol"))
    for name in (b"secret_symbol", b"transpose", b'"vi"', b'"A"', b"tvm_version", b"SourceName", b".py"):
        assert name not in data
    assert b'"root"' in data  # schedules look for it
    assert b"blockIdx.x" in data  # a thread tag is not a name


def test_what_passes_leave_in_the_type_does_not_count() -> None:
    def impure(node: dict, _: list) -> None:
        if node["type"] == "relax.FuncType":
            node["data"]["purity"] = not node["data"]["purity"]

    stale = _edited(_softmax(), impure)
    assert tvm_ffi.structural_equal(_softmax(), stale)
    assert ir.canonical(_softmax()) == ir.canonical(stale)


def _add(*shapes: tuple[int, ...], dtype: str = "float32") -> tirx.PrimFunc:
    return _te(topi.add, *shapes, dtype=dtype)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(lambda: _add((8,), (8,)), lambda: _add((9,), (9,)), id="extent"),
        pytest.param(
            lambda: _te(topi.nn.relu, (tirx.IntImm("int32", 8),)),
            lambda: _te(topi.nn.relu, (tirx.IntImm("int64", 8),)),
            id="type of extent",
        ),
        pytest.param(lambda: _add((8,), (8,)), lambda: _add((8,), (8,), dtype="float16"), id="dtype"),
        pytest.param(lambda: _add((8,), (8,)), lambda: _add((8,), (1,)), id="broadcast"),
        pytest.param(lambda: _te(lambda x: x + 1.0, (8,)), lambda: _te(lambda x: x + 2.0, (8,)), id="constant"),
        pytest.param(lambda: _te(lambda x: x * 0.0, (8,)), lambda: _te(lambda x: x * -0.0, (8,)), id="sign of zero"),
        pytest.param(lambda: _te(topi.subtract, (8,), (8,)), lambda: _te(lambda x, y: y - x, (8,), (8,)), id="swapped"),
        pytest.param(
            lambda: _te(topi.add, (8,), (8,)), lambda: _te(lambda x, y: x + x + y * 0.0, (8,), (8,)), id="body"
        ),
        pytest.param(
            lambda: _te(lambda x, y: te.compute((8,), lambda i: x[i] + y[i]), (8,), (8,)),
            lambda: _te(lambda x, y: te.compute((8,), lambda i: x[i] + x[i]), (8,), (8,)),
            id="aliased buffer",
        ),
        pytest.param(
            lambda: _te(lambda x: te.compute((8, 8), lambda i, j: x[i, j]), (8, 8)),
            lambda: _te(lambda x: te.compute((8, 8), lambda i, j: x[j, i]), (8, 8)),
            id="swapped indices",
        ),
        pytest.param(_softmax, lambda: _softmax().with_attr("op_pattern", 4), id="attribute"),
        pytest.param(
            lambda: _softmax().with_attr("k", True), lambda: _softmax().with_attr("k", 1), id="type of attribute"
        ),
        pytest.param(lambda: _softmax().with_attr("k", 1), lambda: _softmax().with_attr("k", "1"), id="number or word"),
        pytest.param(
            lambda: _softmax().with_attr("t", tvm.runtime.tensor(np.arange(3))),
            lambda: _softmax().with_attr("t", tvm.runtime.tensor(np.arange(1, 4))),
            id="tensor",
        ),
        pytest.param(
            lambda: _elementwise(tirx.const(2**63 - 1, "uint64")),
            lambda: _elementwise(tirx.IntImm("uint64", 2**64 - 1)),
            id="big integer",
        ),
    ],
)
def test_what_counts(one: Callable[[], tirx.PrimFunc], other: Callable[[], tirx.PrimFunc]) -> None:
    assert not tvm_ffi.structural_equal(_bare(one()), _bare(other()))
    assert ir.canonical(one()) != ir.canonical(other())


TRICKY: dict[str, Callable[[], tirx.PrimFunc]] = {
    "infinity": lambda: _te(lambda x: te.compute((8,), lambda i: x[i] + tirx.const(float("inf"), "float32")), (8,)),
    "nan": lambda: _te(lambda x: te.compute((8,), lambda i: x[i] + tirx.const(float("nan"), "float32")), (8,)),
    "a third": lambda: _elementwise(tirx.const(1 / 3, "float64")),
    "a float without fraction": lambda: _elementwise(tirx.const(2.0**53, "float64")),
    "big integer": lambda: _elementwise(tirx.IntImm("uint64", 2**64 - 1)),
    "negative": lambda: _elementwise(tirx.IntImm("int64", -(2**63))),
    "tensor": lambda: _softmax().with_attr("t", tvm.runtime.tensor(np.arange(6, dtype="int8").reshape(2, 3))),
    "target": lambda: _softmax().with_attr("target", tvm.target.Target({"kind": "llvm", "mcpu": "x86-64"})),
    "text": lambda: _softmax().with_attr("t", 'é😀"\n\\/%s \x01\u2028'),
    "bytes": lambda: _softmax().with_attr("t", tvm_ffi.convert(b"\x00\xff%d")),
    "shape": lambda: _softmax().with_attr("t", tvm_ffi.Shape([3, 0, 5])),
    "nested": lambda: _softmax().with_attr("t", {"b": [1, 2.5, None, True], "a": {}}),
    "layout": lambda: _softmax().with_attr("t", tirx.IndexMap.from_func(lambda i, j: [j, i // 4, i % 4])),
    "open extents": _transposed,
    "no parameters": lambda: tirx.PrimFunc([], tirx.Evaluate(0)),
}


@pytest.mark.parametrize("make", [*GOLDEN.values(), *TRICKY.values()], ids=[*GOLDEN, *TRICKY])
def test_round_trip(make: Callable[[], tirx.PrimFunc]) -> None:
    func = make()
    data = ir.canonical(func)
    back = ir.load(data)
    tvm.ir.assert_structural_equal(back, _bare(func))
    assert ir.canonical(back) == data
    assert ir.structural_hash(back) == ir.structural_hash(func)
    assert ir.shapes(back) == ir.shapes(func)
    tvm.ir.assert_structural_equal(back.ty, ir.load(ir.canonical(_renamed(func))).ty, map_free_vars=True)


def test_scheduled_and_lowered_functions_round_trip() -> None:
    schedule = tvm.s_tir.Schedule(_conv2d())
    names = [schedule.get(block).name_hint for block in schedule.get_child_blocks(schedule.get_sblock("root"))]
    for name in names:
        loops = schedule.get_loops(schedule.get_sblock(name))
        schedule.vectorize(schedule.split(loops[3], [None, 2])[1])
        schedule.parallel(schedule.fuse(*loops[:2]))
    schedule.cache_write(schedule.get_sblock(names[1]), 0, "global")
    scheduled = schedule.mod["main"]
    blocks = tvm.s_tir.transform
    lower = (
        blocks.LowerInitBlock(),
        blocks.PlanAndUpdateBufferAllocationLocation(),
        blocks.ConvertBlocksToOpaque(),
        blocks.CompactBufferAllocation(),
        blocks.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
    )
    module = schedule.mod
    for step in lower:
        module = step(module)
    assert "sblock" not in module["main"].script()
    for func in (scheduled, module["main"]):
        data = ir.canonical(func)
        assert tvm_ffi.structural_equal(ir.load(data), _bare(func))
        assert ir.canonical(ir.load(data)) == ir.canonical(_renamed(func)) == data
    assert ir.canonical(scheduled) != ir.canonical(_conv2d())


def test_a_canonical_function_can_be_scheduled() -> None:
    schedule = tvm.s_tir.Schedule(ir.load(ir.canonical(_conv2d())))
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    assert [schedule.get(block).name_hint for block in blocks] == ["block0", "block1", "block2"]


def test_sharing_does_not_count() -> None:
    def shared(load: Callable[[], tirx.Expr]) -> tirx.Expr:
        term = load() * 2.0
        return term + term

    def apart(load: Callable[[], tirx.Expr]) -> tirx.Expr:
        return load() * 2.0 + load() * 2.0

    one, other = _copied(shared), _copied(apart, name="g")
    assert tvm_ffi.structural_equal(one, other)
    assert ir.canonical(one) == ir.canonical(other)


def test_a_block_in_two_places_is_two_blocks() -> None:
    buffer = tirx.decl_buffer((1,), "float32")

    def block() -> tirx.Stmt:
        store = tirx.BufferStore(buffer, tirx.const(0.0, "float32"), [0])
        return tvm.s_tir.SBlockRealize([], True, tvm.s_tir.SBlock([], [], [buffer[0:1]], "zero", store))

    one = block()
    statements = tirx.SeqStmt([one, one])
    shared = tirx.PrimFunc([buffer], tirx.SeqStmt([statements, tirx.IfThenElse(True, statements, None)]))
    apart = tirx.PrimFunc(
        [buffer],
        tirx.SeqStmt([block(), block(), tirx.IfThenElse(True, tirx.SeqStmt([block(), block()]), None)]),
    )
    assert tvm_ffi.structural_equal(shared, apart)
    assert ir.canonical(shared) == ir.canonical(apart)
    assert all(f'"block{number}"'.encode() in ir.canonical(shared) for number in range(4))


def test_depth_is_no_limit() -> None:
    def deep(load: Callable[[], tirx.Expr]) -> tirx.Expr:
        return functools.reduce(lambda total, _: total + load(), range(1200), load())

    assert sys.getrecursionlimit() <= 1200
    assert ir.canonical(_copied(deep)) == ir.canonical(_copied(deep, name="g"))


def _legalized() -> list[tirx.PrimFunc]:
    """Every function that LegalizeOps makes of a few operators of Relax."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 4, 8, 8), "float32"))
    w = relax.Var("w", relax.TensorType((4, 4, 3, 3), "float32"))
    with builder.function("main", [x, w]):
        y = x
        for op in (
            lambda y: relax.op.nn.conv2d(y, w, padding=1),
            relax.op.nn.relu,
            relax.op.nn.max_pool2d,
            relax.op.nn.gelu,
            lambda y: relax.op.permute_dims(y, [0, 2, 3, 1]),
            lambda y: relax.op.reshape(y, (2, -1)),
            lambda y: relax.op.nn.softmax(y, axis=-1),
            lambda y: relax.op.concat([y, y], axis=1),
            lambda y: relax.op.strided_slice(y, [1], [0], [5]),
            lambda y: relax.op.astype(y, "float16"),
            lambda y: relax.op.matmul(relax.op.permute_dims(y), y),
            lambda y: relax.op.mean(y, axis=1),
            relax.op.exp,
            relax.op.negative,
        ):
            y = builder.emit(op(y))
        builder.emit_func_output(y)
    module = relax.transform.LegalizeOps()(builder.finalize())
    return [func for func in module.functions.values() if isinstance(func, tirx.PrimFunc)]


def _zoo() -> list[tirx.PrimFunc]:
    made = [
        *(_te(op, (4, 8)) for op in (topi.nn.relu, topi.exp, topi.tanh, topi.sigmoid, topi.sqrt, topi.transpose)),
        *(_te(op, (4, 8), (4, 8)) for op in (topi.add, topi.subtract, topi.maximum, topi.minimum, topi.less)),
        *(_te(op, (4, 8), (8,)) for op in (topi.add, topi.multiply)),
        *(_te(functools.partial(op, axis=axis), (4, 8)) for op in (topi.sum, topi.max, topi.argmax) for axis in (0, 1)),
        _te(topi.matmul, (4, 8), (8, 4)),
        _te(topi.matmul, (8, 8), (8, 8)),
        _te(topi.nn.dense, (8, 8), (8, 8)),
        _conv2d(),
        _softmax(),
        _transposed(),
        _transposed_renamed(),
        *(make() for make in TRICKY.values()),
        *_legalized(),
    ]
    return [*made, *map(_renamed, made[::2])]


def test_agrees_with_structural_equality_on_every_pair() -> None:
    zoo = [_bare(func) for func in _zoo()]
    assert len(zoo) >= 40
    data = [ir.canonical(func) for func in zoo]
    for one, other in itertools.combinations(range(len(zoo)), 2):
        assert (data[one] == data[other]) == tvm_ffi.structural_equal(zoo[one], zoo[other]), (one, other)


# An expression as nested tuples of A[i], constants and operators.
_OPERATORS: dict[str, Callable[[tirx.Expr, tirx.Expr], tirx.Expr]] = {
    "+": lambda a, b: tirx.Add(a, b),
    "*": lambda a, b: tirx.Mul(a, b),
    "max": lambda a, b: tirx.Max(a, b),
}
_TREES = st.recursive(
    st.sampled_from(["load", 0.0, 1.5]),
    lambda inner: st.tuples(st.sampled_from(sorted(_OPERATORS)), inner, inner),
    max_leaves=6,
)


def _of_tree(tree: object, name: str, share: bool) -> tirx.PrimFunc:
    def build(load: Callable[[], tirx.Expr]) -> tirx.Expr:
        made: dict[object, tirx.Expr] = {}

        def visit(tree: object) -> tirx.Expr:
            if share and tree in made:
                return made[tree]
            if isinstance(tree, tuple):
                made[tree] = _OPERATORS[tree[0]](visit(tree[1]), visit(tree[2]))
            else:
                made[tree] = load() if tree == "load" else tirx.FloatImm("float32", tree)
            return made[tree]

        return visit(tree)

    return _copied(build, name=name)


@settings(max_examples=60, deadline=None)
@given(one=_TREES, other=_TREES)
def test_equal_bytes_are_equal_structure(one: object, other: object) -> None:
    data = ir.canonical(_of_tree(one, "f", share=False))
    assert data == ir.canonical(_of_tree(one, "g", share=True))
    assert (data == ir.canonical(_of_tree(other, "f", share=True))) == (one == other)
    assert ir.canonical(ir.load(data)) == data


def test_the_same_in_another_process(tmp_path: Path) -> None:
    code = (
        "from tests.compiler.test_ir import GOLDEN, ir, Digest\n"
        "for name, make in GOLDEN.items(): print(name, Digest.of(ir.canonical(make())).hash)"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    there = dict(line.split() for line in done.stdout.splitlines())
    assert there == {name: Digest.of(ir.canonical(make())).hash for name, make in GOLDEN.items()}


def test_equal_functions_compile_to_equal_objects(tmp_path: Path) -> None:
    host = tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
    objects = []
    for number, func in enumerate((_conv2d(), _renamed(_conv2d()))):
        named = ir.load(ir.canonical(func)).with_attr("global_symbol", "tvmake_op")
        path = tmp_path / f"{number}.o"
        tvm.tirx.build(tvm.IRModule({"tvmake_op": named}), target=host).write_to_file(str(path))
        objects.append(path.read_bytes())
    assert objects[0] == objects[1]


def test_structural_hash_is_tvm_s_without_the_symbol() -> None:
    expected = tvm_ffi.structural_hash(_bare(_conv2d())) % 2**64
    assert int(ir.structural_hash(_conv2d()), 16) == expected
    assert len(ir.structural_hash(_conv2d())) == 16
    assert ir.structural_hash(_renamed(_conv2d())) == ir.structural_hash(_conv2d())


def test_shapes() -> None:
    assert ir.shapes(_conv2d()) == ("1x8x14x14:float32", "16x8x3x3:float32", "1x16x14x14:float32")
    assert ir.shapes(_transposed()) == ("?x?:float32", "?x?:float32")
    assert ir.shapes(_te(topi.nn.relu, (), dtype="int8")) == ("scalar:int8", "scalar:int8")
    assert ir.shapes(TRICKY["no parameters"]()) == ()


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"{}", b'{"root_index":0,"nodes":[]}', b'{"root_index":0,"nodes":[{"type":"None"}]}']
)
def test_other_bytes_are_refused_in_words(data: bytes) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        ir.load(data)


def test_the_input_is_left_as_it_was() -> None:
    func = _conv2d().with_attr("global_symbol", "mine")
    before = tvm.ir.save_json(func)
    ir.canonical(func)
    ir.structural_hash(func)
    assert tvm.ir.save_json(func) == before


if __name__ == "__main__":
    for golden, make_golden in GOLDEN.items():
        pinned = (str(Digest.of(ir.canonical(make_golden()))), ir.structural_hash(make_golden()))
        print(f'    "{golden}": {pinned},'.replace("'", '"'))
