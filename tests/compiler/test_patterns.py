"""Groups of Relax operators as one workload, and attention as the library that takes one kind of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tvm
from relax_graphs import graph
from tvm import relax, tirx
from tvm.relax.dpl import is_op, wildcard

sys.path.insert(0, str(Path(__file__).parent / "libraries"))
import operators

from pipeline.compiler import ir, libraries, targets
from pipeline.compiler.libraries.attention import Attention
from pipeline.compiler.libraries.heads import read
from pipeline.compiler.lowering import FUSE, LEGALISE, Lowered, lower
from pipeline.compiler.patterns import Pattern, group, of_libraries
from pipeline.errors import ConfigError

ATTENTION = Attention()
TARGET = targets.resolve("native")
op = relax.op
Body = Callable[..., relax.Expr]

BATCH, ROWS, KEYS, HEADS, DEPTH, WIDTH = 2, 24, 37, 3, 20, 40
INPUTS = {"q": (BATCH, ROWS, HEADS, DEPTH), "k": (BATCH, KEYS, HEADS, DEPTH), "v": (BATCH, KEYS, HEADS, WIDTH)}
HEADS_OUT, HEADS_IN, TURNED = [0, 2, 1, 3], [0, 2, 1, 3], [0, 2, 3, 1]


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    if all(library.name != ATTENTION.name for library in libraries.LIBRARIES):
        monkeypatch.setattr(libraries, "LIBRARIES", (*libraries.LIBRARIES, ATTENTION))


def scalar(value: float) -> relax.Expr:
    return relax.const(value, "float32")


def attention(
    scale: str = "divide",
    *,
    is_flat: bool = False,
    is_mask_first: bool = False,
    late_keys: bool = False,
) -> Body:
    """Attention of q, k and v as batch, position, head and depth, in one of the spellings that exporters have."""

    def body(emit: Callable[..., relax.Var], q: relax.Var, k: relax.Var, v: relax.Var, *mask: relax.Var) -> relax.Expr:
        def keys() -> relax.Var:
            return emit(op.permute_dims(k, TURNED))

        early = None if late_keys else keys()
        rows = emit(op.permute_dims(q, HEADS_IN))
        values = emit(op.permute_dims(v, HEADS_IN))
        turned = keys() if early is None else early
        if scale == "both":
            rows, turned = emit(op.multiply(rows, scalar(0.5))), emit(op.multiply(turned, scalar(0.5)))
        scores = emit(op.matmul(rows, turned))
        if scale == "divide":
            scores = emit(op.divide(scores, scalar(4.0)))
        if scale == "multiply":
            scores = emit(op.multiply(scores, scalar(0.25)))
        for each in mask:
            scores = emit(op.add(each, scores) if is_mask_first else op.add(scores, each))
        if is_flat:
            scores = emit(op.reshape(scores, (BATCH * HEADS * ROWS, KEYS)))
        weights = emit(op.nn.softmax(scores, axis=-1))
        if is_flat:
            weights = emit(op.reshape(weights, (BATCH, HEADS, ROWS, KEYS)))
        result = emit(op.matmul(weights, values))
        return op.nn.relu(emit(op.permute_dims(result, HEADS_OUT)))

    return body


def expected(q: np.ndarray, k: np.ndarray, v: np.ndarray, *mask: np.ndarray, scale: float = 0.25) -> np.ndarray:
    """Before the relu of the bodies above."""
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * np.float32(scale)
    for each in mask:
        scores = scores + each
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(axis=-1, keepdims=True), v)


def workloads(mod: tvm.IRModule, patterns: Sequence[Pattern]) -> dict[str, tirx.PrimFunc]:
    """The functions that a module becomes, by name."""
    mod = group(mod, patterns)
    with targets.load(TARGET), tvm.transform.PassContext(opt_level=3):
        for phase in (*LEGALISE, *FUSE):
            mod = phase(mod)
    return {gvar.name_hint: func for gvar, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)}


def grouped(body: Body, mask: tuple[int, ...] | None = None, **changed: tuple[int, ...]) -> dict[str, tirx.PrimFunc]:
    shapes = {**INPUTS, **changed} | ({} if mask is None else {"mask": mask})
    return workloads(graph(shapes, {}, body), ATTENTION.patterns())


MASKS = [None, (BATCH, 1, 1, KEYS), (BATCH, HEADS, ROWS, KEYS), (ROWS, KEYS)]


@pytest.mark.parametrize("scale", ["divide", "multiply", "both", "none"])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_is_one_workload_and_the_library_computes_it(scale: str, mask: tuple[int, ...] | None) -> None:
    functions = grouped(attention(scale), mask)
    assert set(functions) == {"attention", "relu"}
    func = functions["attention"]
    claimed = ATTENTION.match(func, operators.TARGET, operators.ready(ATTENTION)[2])
    assert claimed is not None
    assert operators.remaining(claimed) <= 1  # at most the loop that shares out the work
    arrays = operators.arguments(func)
    got = operators.call(operators.linked({"claimed": claimed}, ATTENTION)["claimed"], arrays)
    # Parameters are in the order of need: q and k for the scores, a mask for them, then v.
    q, k, *rest = arrays[:-1]
    masks = rest[:-1]
    wanted = expected(q, k, rest[-1], *masks, scale=1.0 if scale == "none" else 0.25)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_scores_may_be_flat_for_the_softmax() -> None:
    functions = grouped(attention(is_flat=True), (BATCH, 1, 1, KEYS))
    assert set(functions) == {"attention", "relu"}
    claimed = ATTENTION.match(functions["attention"], operators.TARGET, operators.ready(ATTENTION)[2])
    assert claimed is not None
    operators.same(functions["attention"], claimed, ATTENTION)


def test_a_large_one_is_shared_out_and_rows_left_over_are_computed() -> None:
    (name,) = set(grouped(attention(), q=(2, 203, 4, 64), k=(2, 203, 4, 64), v=(2, 203, 4, 64))) - {"relu"}
    func = grouped(attention(), q=(2, 203, 4, 64), k=(2, 203, 4, 64), v=(2, 203, 4, 64))[name]
    claimed = ATTENTION.match(func, operators.TARGET, operators.ready(ATTENTION)[2])
    assert claimed is not None
    arrays = operators.arguments(func)
    got = operators.call(operators.linked({"claimed": claimed}, ATTENTION)["claimed"], arrays)
    np.testing.assert_allclose(got, expected(*arrays[:3]), rtol=1e-4, atol=1e-5)


def test_keys_that_a_mask_forbids_have_no_weight() -> None:
    func = grouped(attention(), (BATCH, 1, 1, KEYS))["attention"]
    claimed = ATTENTION.match(func, operators.TARGET, operators.ready(ATTENTION)[2])
    assert claimed is not None
    q, k, mask, v, y = operators.arguments(func)
    mask[:] = 0
    mask[..., 5:] = -np.inf
    v[:, 5:] = 1e6
    got = operators.call(operators.linked({"claimed": claimed}, ATTENTION)["claimed"], [q, k, mask, v, y])
    np.testing.assert_allclose(got, expected(q, k[:, :5], v[:, :5]), rtol=1e-4, atol=1e-5)


def test_the_workload_is_blind_to_names_and_to_the_order_of_the_model() -> None:
    one = ir.canonical(grouped(attention())["attention"])
    assert ir.canonical(grouped(attention(late_keys=True))["attention"]) == one
    renamed = graph({f"other_{name}": shape for name, shape in INPUTS.items()}, {}, attention())
    assert ir.canonical(workloads(renamed, ATTENTION.patterns())["attention"]) == one


def test_all_spellings_are_the_same_to_the_library() -> None:
    masked = (BATCH, 1, 1, KEYS)
    heads = [
        read(grouped(body, masked)["attention"])
        for body in (attention(), attention("multiply"), attention("both"), attention(is_flat=True))
    ]
    heads.append(read(grouped(attention(is_mask_first=True), masked)["attention"]))
    seen = {(each.q.strides, each.k.strides, each.v.strides, each.y.strides, each.scale) for each in heads if each}
    assert None not in heads
    assert seen == {
        (
            (ROWS * HEADS * DEPTH, DEPTH, HEADS * DEPTH, 1),
            (KEYS * HEADS * DEPTH, DEPTH, HEADS * DEPTH, 1),
            (KEYS * HEADS * WIDTH, WIDTH, HEADS * WIDTH, 1),
            (ROWS * HEADS * WIDTH, WIDTH, HEADS * WIDTH, 1),
            0.25,
        )
    }


def plain(emit: Callable[..., relax.Var], q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Expr:
    """Attention without transposes, of what others transpose."""
    weights = emit(op.nn.softmax(emit(op.matmul(q, k)), axis=-1))
    return emit(op.matmul(weights, v))


PLAIN = {"q": (2, 64, 32), "k": (2, 32, 96), "v": (2, 96, 32)}


def test_transposes_are_not_needed() -> None:
    (func,) = workloads(graph(PLAIN, {}, plain), ATTENTION.patterns()).values()
    claimed = ATTENTION.match(func, operators.TARGET, operators.ready(ATTENTION)[2])
    assert claimed is not None
    operators.same(func, claimed, ATTENTION)


@pytest.mark.parametrize(
    "shapes",
    [
        {"q": (64, 4, 32), "k": (64, 32, 96), "v": (64, 96, 32)},  # few rows
        {"q": (2, 16, 8), "k": (2, 8, 12), "v": (2, 12, 8)},  # little work
        {"q": (2, 64, 32), "k": (32, 96), "v": (2, 96, 32)},  # keys without a batch
        {"q": (128, 32), "k": (32, 96), "v": (96, 32)},  # no batch at all
    ],
)
def test_what_the_library_would_not_take_is_not_grouped(shapes: dict[str, tuple[int, ...]]) -> None:
    mod = graph(shapes, {}, plain)
    assert group(mod, ATTENTION.patterns()) is mod


def test_a_softmax_along_another_axis_is_not_grouped() -> None:
    def body(emit: Callable[..., relax.Var], q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Expr:
        return emit(op.matmul(emit(op.nn.softmax(emit(op.matmul(q, k)), axis=1)), v))

    mod = graph(PLAIN, {}, body)
    assert group(mod, ATTENTION.patterns()) is mod


def test_what_others_use_stays_outside() -> None:
    def shows_weights(emit: Callable[..., relax.Var], q: relax.Var, k: relax.Var, v: relax.Var) -> list[relax.Expr]:
        weights = emit(op.nn.softmax(emit(op.matmul(q, k)), axis=-1))
        return [emit(op.matmul(weights, v)), weights]

    def shares_keys(emit: Callable[..., relax.Var], q: relax.Var, k: relax.Var, v: relax.Var) -> list[relax.Expr]:
        turned = emit(op.permute_dims(k, [0, 2, 1]))
        return [plain(emit, q, turned, v), emit(op.exp(turned))]

    mod = graph(PLAIN, {}, shows_weights)  # type: ignore[arg-type]
    assert group(mod, ATTENTION.patterns()) is mod
    shared = workloads(graph({**PLAIN, "k": (2, 96, 32)}, {}, shares_keys), ATTENTION.patterns())  # type: ignore[arg-type]
    assert read(shared["attention"]) is not None
    assert len(shared) == 3  # the transpose of the keys and the exponential beside it


def test_other_functions_are_no_attention() -> None:
    for build, shapes in (
        (operators.matmul("relu"), [(4, 8), (8, 8)]),
        (lambda emit, x: op.nn.softmax(x), [(4, 8)]),
    ):
        for func in operators.fused(build, shapes):
            assert read(func) is None


def test_products_of_other_things_are_no_attention() -> None:
    """Groups that a wider pattern makes: weights by which nothing is weighed, and a step that is not known."""

    def squared(emit: Callable[..., relax.Var], q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Expr:
        scores = emit(op.exp(emit(op.matmul(q, k))))
        return emit(op.matmul(emit(op.nn.softmax(scores, axis=-1)), v))

    def turned(emit: Callable[..., relax.Var], q: relax.Var, k: relax.Var, v: relax.Var) -> relax.Expr:
        weights = emit(op.nn.softmax(emit(op.matmul(q, k)), axis=-1))
        return emit(op.matmul(emit(op.permute_dims(weights, [0, 2, 1])), v))

    any_of = is_op("relax.exp")(wildcard()) | is_op("relax.matmul")(wildcard(), wildcard())
    weights = is_op("relax.nn.softmax")(any_of)
    either = is_op("relax.permute_dims")(weights) | weights
    wide = [Pattern("wide", is_op("relax.matmul")(either, wildcard()))]
    square = {"q": (2, 16, 8), "k": (2, 8, 16), "v": (2, 16, 8)}
    for body in (squared, turned):
        found = workloads(graph(square, {}, body), wide)
        assert read(found["wide"]) is None
    assert read(workloads(graph(square, {}, plain), wide)["wide"]) is not None


def lowered(patterns: Sequence[str], layers: int = 1) -> Lowered:
    """A chain of attentions, each with keys and values of its own."""
    names = ["q", *(f"{name}{i}" for i in range(layers) for name in "kv")]

    def body(emit: Callable[..., relax.Var], q: relax.Var, *others: relax.Var) -> relax.Expr:
        for i in range(layers):
            q = emit(attention()(emit, q, *others[2 * i : 2 * i + 2]))
        return q

    mod = graph(dict.fromkeys(names, (1, 64, 4, 16)), {}, body)
    return lower(mod, [], ["y"], TARGET, patterns=patterns)


@pytest.mark.usefixtures("_registered")
def test_lowering_groups_by_the_patterns_of_the_libraries_named() -> None:
    functions = lowered(["onednn", "attention"], layers=2).functions.values()
    # Transposes between the layers are the layout's to place: the two need not be one workload.
    assert sum(each.calls for each in functions if each.name == "attention") == 2
    assert not any("matmul" in each.name or "softmax" in each.name for each in functions)


@pytest.mark.usefixtures("_registered")
def test_libraries_without_patterns_and_patterns_without_a_match_change_nothing() -> None:
    assert lowered(["onednn", "openblas"]) == lowered([])
    assert "attention" not in {each.name for each in lowered([]).functions.values()}
    mod = graph({"x": (4, 8)}, {}, lambda emit, x: op.nn.softmax(x))
    assert lower(mod, [], ["y"], TARGET, patterns=["attention"]) == lower(mod, [], ["y"], TARGET)


def test_a_library_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="nonsense") as refused:
        of_libraries(["nonsense"])
    assert "onednn" in refused.value.hint


def test_the_first_pattern_takes_what_several_match() -> None:
    mod = graph({"x": (4, 8)}, {}, lambda emit, x: emit(op.nn.relu(emit(op.exp(x)))))
    one = Pattern("one", is_op("relax.exp")(wildcard()))
    both = Pattern("both", is_op("relax.nn.relu")(is_op("relax.exp")(wildcard())))
    assert set(workloads(mod, [one, both])) == {"one", "relu"}
    assert set(workloads(mod, [both, one])) == {"both"}


def test_groups_of_one_name_are_numbered_and_named_apart_from_what_is_there() -> None:
    def body(emit: Callable[..., relax.Var], x: relax.Var, y: relax.Var) -> list[relax.Expr]:
        return [emit(op.exp(emit(op.nn.relu(x)))), emit(op.exp(y))]

    pattern = Pattern("main", is_op("relax.exp")(wildcard()))
    found = group(graph({"x": (4, 8), "y": (2, 3)}, {}, body), [pattern])  # type: ignore[arg-type]
    assert {gvar.name_hint for gvar in found.get_global_vars()} == {"main", "main1", "main2"}
