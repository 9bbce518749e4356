"""Functions that prepare weights serve any extents."""

from __future__ import annotations

from itertools import pairwise

import tvm
from relax_graphs import graph, require_same
from tvm import relax, tirx

from pipeline.compiler import targets
from pipeline.compiler.lowering import lower
from pipeline.compiler.preparing import extents_of, share_extents

op = relax.op


def functions(mod: tvm.IRModule) -> list[str]:
    return sorted(gvar.name_hint for gvar, func in mod.functions_items() if isinstance(func, tirx.PrimFunc))


def test_which_extents_are_the_same() -> None:
    assert extents_of([(64, 32, 1, 1), (64, 1, 1, 1)]) == [(~0, ~1, ~2, ~3), (~0, 1, 1, 1)]
    assert extents_of([(8, 3), (3,), ()]) == [(~0, ~1), (~1,), ()]
    assert extents_of([(1, 3), (8, 1)]) == [(1, ~1), (~0, 1)]


def test_weights_of_any_extents_share_a_function() -> None:
    def body(emit, v, w, s, t):
        made = []
        for weight, scale in ((v, s), (w, t)):
            extents = (scale.ty.shape.values[0], 1, 1, 1)
            scaled = emit(op.multiply(weight, emit(op.reshape(scale, extents))))
            made.append(emit(op.permute_dims(scaled, [2, 3, 1, 0])))
        return made

    mod = graph({}, {"v": (8, 4, 3, 3), "w": (6, 1, 1, 1), "s": (8,), "t": (6,)}, body)
    after = share_extents(mod)
    assert functions(after) == ["multiply", "transpose"]
    require_same(mod, after)


def test_operands_that_broadcast_otherwise_do_not() -> None:
    def body(emit, v, w):
        return [
            emit(op.subtract(v, w)),
            emit(op.subtract(v, v)),
            emit(op.subtract(w, v)),
            emit(op.divide(v, relax.const(2.0))),
            emit(op.divide(relax.const(2.0), v)),
            emit(op.divide(v, relax.const(4.0))),
            emit(op.sqrt(emit(op.multiply(v, v)))),
        ]

    mod = graph({}, {"v": (3, 4), "w": (1, 4)}, body)
    after = share_extents(mod)
    assert len(functions(after)) == 8
    require_same(mod, after)


def test_a_reshape_that_moves_elements_to_other_axes_is_kept() -> None:
    def body(emit, v, w):
        return emit(op.add(v, emit(op.reshape(w, (3, 4)))))

    mod = graph({}, {"v": (3, 4), "w": (4, 3)}, body)
    require_same(mod, share_extents(mod))


def test_a_network_prepares_its_weights_with_few_functions() -> None:
    channels = (4, 8, 12, 16)

    def body(emit, x, *weights):
        y = x
        for w, *stats in zip(*[iter(weights)] * 5, strict=True):
            y = emit(op.nn.conv2d(y, w))
            y = emit(op.nn.relu(emit(relax.TupleGetItem(emit(op.nn.batch_norm(y, *stats, 1, training=False)), 0))))
        return y

    shapes = {}
    for i, (have, make) in enumerate(pairwise(channels)):
        shapes[f"w{i}"] = (make, have, 3, 3)
        shapes |= {f"{name}{i}": (make,) for name in ("gamma", "beta", "mean", "var")}
    mod = graph({"x": (1, 4, 9, 9)}, shapes, body)
    lowered = lower(mod, list(shapes), ["y"], targets.resolve("native"))
    assert sorted(f.name for f in lowered.functions.values() if f.calls) == [
        *["fused_conv2d_add_relu"] * 3,
        *["transpose"] * 2,
    ]
    prepared = sorted(f.name for f in lowered.functions.values() if f.prepares)
    assert prepared == ["fold_batch_norm", "multiply", "transpose"]
    as_is = lower(mod, list(shapes), ["y"], targets.resolve("native"), layout="as-is")
    assert {f.name for f in as_is.functions.values() if f.calls} == {"fused_conv2d_add_relu"}
