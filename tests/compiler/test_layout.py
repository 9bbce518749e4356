"""Channels-last: how many transposes are left, and that the numbers stay."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import tvm
import tvm_ffi
from relax_graphs import at_run_time, graph, require_same
from tvm import relax

from pipeline.compiler.layout import channels_last
from pipeline.compiler.rewriting import operator

op = relax.op


def transposes(mod: tvm.IRModule) -> int:
    return at_run_time(mod).count("permute_dims")


def check(mod: tvm.IRModule, left: int) -> tvm.IRModule:
    """The module channels-last: the same numbers, with so many transposes of activations."""
    after = channels_last(mod)
    assert transposes(after) == left, at_run_time(after)
    require_same(mod, after)
    return after


def calls(mod: tvm.IRModule, name: str) -> list[relax.Call]:
    bindings = [binding for block in mod["main"].body.blocks for binding in block.bindings]
    return [binding.value for binding in bindings if operator(binding.value) == name]


X = {"x": (1, 4, 6, 6)}


def conv(emit: Callable, x: relax.Expr, w: relax.Expr, **attrs: object) -> relax.Expr:
    return emit(op.nn.conv2d(x, w, **attrs))


def test_a_chain_of_convolutions_is_transposed_at_its_ends() -> None:
    def body(emit, x, w, b, v):
        y = emit(op.nn.relu(emit(op.add(conv(emit, x, w, padding=1), emit(op.reshape(b, (1, 8, 1, 1)))))))
        return conv(emit, emit(op.nn.max_pool2d(y, 2, 2)), v)

    after = check(graph(X, {"w": (8, 4, 3, 3), "b": (8,), "v": (3, 8, 1, 1)}, body), left=2)
    assert [str(call.attrs.kernel_layout) for call in calls(after, "nn.conv2d")] == ["HWIO", "HWIO"]
    # The bias goes along the last axis as it is.
    assert [len(call.args[1].ty.shape.values) for call in calls(after, "add")] == [1]


def test_a_function_without_convolutions_stays_as_it_is() -> None:
    def body(emit, x):
        return emit(op.nn.softmax(emit(op.nn.max_pool2d(emit(op.nn.relu(x)), 2, 2)), axis=1))

    after = check(graph(X, {}, body), left=0)
    assert str(calls(after, "nn.max_pool2d")[0].attrs.layout) == "NCHW"


def test_a_transpose_of_axes_of_extent_one_is_a_reshape() -> None:
    def body(emit, x, w):
        y = emit(op.mean(conv(emit, x, w), axis=[2, 3], keepdims=True))
        return emit(op.reshape(y, (1, 8)))

    check(graph(X, {"w": (8, 4, 1, 1)}, body), left=1)


def test_squeeze_and_excitation_moves_nothing() -> None:
    def body(emit, x, w, v):
        y = conv(emit, x, w)
        gate = emit(op.sigmoid(conv(emit, emit(op.mean(y, axis=[2, 3], keepdims=True)), v)))
        return emit(op.sum(emit(op.add(emit(op.multiply(gate, y)), y)), axis=[1, 2, 3]))

    check(graph(X, {"w": (8, 4, 1, 1), "v": (8, 8, 1, 1)}, body), left=1)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_and_depthwise_convolutions(groups: int) -> None:
    def body(emit, x, w):
        return conv(emit, x, w, groups=groups, strides=2, padding=[1, 0, 0, 1])

    check(graph(X, {"w": (8, 4 // groups, 3, 3)}, body), left=2)


def test_a_channel_shuffle_costs_one_transpose() -> None:
    def body(emit, x, w, v):
        y = emit(op.reshape(conv(emit, x, w), (1, 2, 4, 6, 6)))
        y = emit(op.reshape(emit(op.permute_dims(y, [0, 2, 1, 3, 4])), (1, 8, 6, 6)))
        return emit(op.mean(conv(emit, y, v, groups=8), axis=[2, 3]))

    check(graph(X, {"w": (8, 4, 1, 1), "v": (8, 1, 3, 3)}, body), left=2)


def test_normalisation_across_channels_pools_in_place() -> None:
    def body(emit, x, w):
        y = conv(emit, x, w)
        pooled = emit(op.nn.avg_pool3d(emit(op.expand_dims(y, 1)), (3, 1, 1), padding=[1, 0, 0, 1, 0, 0]))
        return emit(op.mean(emit(op.divide(y, emit(op.exp(emit(op.squeeze(pooled, 1)))))), axis=[2, 3]))

    check(graph(X, {"w": (8, 4, 1, 1)}, body), left=1)


def test_a_transposed_convolution_of_patches_is_a_product_and_a_shuffle() -> None:
    def body(emit, x, w):
        return emit(op.nn.conv2d_transpose(x, w, strides=(2, 2)))

    # One of the input, one that weaves the patches; the result has one channel, so that its form is a reshape.
    after = check(graph(X, {"w": (4, 1, 2, 2)}, body), left=2)
    assert not calls(after, "nn.conv2d_transpose")


def test_an_overlapping_transposed_convolution_is_left() -> None:
    def body(emit, x, w):
        return emit(op.nn.conv2d_transpose(x, w, strides=(2, 2)))

    check(graph(X, {"w": (4, 3, 3, 3)}, body), left=0)


def test_what_has_no_rule_gets_one_logical_form_for_all_its_uses() -> None:
    def body(emit, x, w):
        y = conv(emit, x, w)
        return [emit(op.cumsum(y, 1)), emit(op.cumsum(y, 2)), emit(op.nn.relu(y))]

    check(graph(X, {"w": (8, 4, 1, 1)}, body), left=3)


def test_parts_of_a_split_keep_the_form() -> None:
    def body(emit, x, w, v):
        parts = emit(op.split(conv(emit, x, w), 2, axis=1))
        one, other = (emit(relax.TupleGetItem(parts, i)) for i in range(2))
        y = conv(emit, emit(op.concat([other, one], axis=1)), v)
        return emit(op.strided_slice(y, (1, 2), (0, 1), (2, 5)))

    check(graph(X, {"w": (8, 4, 1, 1), "v": (3, 8, 1, 1)}, body), left=2)


def test_a_tuple_that_is_returned_has_the_logical_form() -> None:
    def body(emit, x, w):
        parts = emit(op.split(conv(emit, x, w), 2, axis=1))
        return emit(op.concat(parts, axis=2))

    check(graph(X, {"w": (8, 4, 1, 1)}, body), left=3)


def test_a_sequence_is_read_off_a_picture() -> None:
    def body(emit, x, w, v):
        y = emit(op.permute_dims(emit(op.squeeze(conv(emit, x, w, strides=[6, 1]), 2)), [0, 2, 1]))
        return emit(op.matmul(y, v))

    check(graph(X, {"w": (8, 4, 6, 1), "v": (8, 5)}, body), left=1)


def test_control_flow_is_left_alone() -> None:
    builder = relax.BlockBuilder()
    x, flag = relax.Var("x", relax.TensorType([4], "float32")), relax.Var("flag", relax.TensorType([], "bool"))
    with builder.function("main", [x, flag]):
        branch = builder.emit(relax.If(flag, relax.SeqExpr([], x), relax.SeqExpr([], x)))
        builder.emit_func_output(branch)
    before = builder.get()
    assert tvm_ffi.structural_equal(channels_last(before), before)


def random_graph(seed: int, steps: int) -> tvm.IRModule:
    """A net of supported operators over tensors of four axes; what is left over at its end is returned."""
    choose = random.Random(seed)
    weights = {f"w{i}": (8, 8, 1, 1) for i in range(3)} | {"d": (8, 1, 3, 3), "b": (8,), "s": (8, 1, 1)}

    def body(emit, x, *params):
        *kernels, depthwise, bias, scale = params
        wide = [conv(emit, x, kernels[0])]  # all of shape 1 8 6 6
        others: list[relax.Expr] = []

        def step() -> None:
            a, b = choose.choice(wide), choose.choice(wide)
            kind = choose.randrange(13)
            made = {
                0: lambda: conv(emit, a, choose.choice(kernels)),
                1: lambda: conv(emit, a, depthwise, groups=8, padding=1),
                2: lambda: emit(choose.choice([op.add, op.maximum, op.subtract])(a, b)),
                3: lambda: emit(op.multiply(a, scale)),
                4: lambda: emit(op.add(emit(op.reshape(bias, (1, 8, 1, 1))), a)),
                5: lambda: emit(choose.choice([op.nn.relu, op.sigmoid, op.negative])(a)),
                6: lambda: emit(op.nn.max_pool2d(a, 3, 1, 1)),
                7: lambda: emit(
                    op.subtract(a, emit(op.mean(a, axis=choose.choice([[1], [2, 3], [-1]]), keepdims=True)))
                ),
                8: lambda: emit(op.nn.softmax(a, axis=choose.choice([1, 3]))),
                9: lambda: emit(op.permute_dims(a, [0, 1, 3, 2])),
                10: lambda: emit(op.strided_slice(emit(op.concat([a, b], axis=1)), (1,), (3,), (11,))),
                11: lambda: emit(
                    op.strided_slice(emit(op.nn.pad(a, [0, 0, 0, 1, 1, 0, 1, 0])), (1, 2, 3), (1, 1, 1), (9, 7, 7))
                ),
                12: lambda: shuffled(a),
            }[kind]()
            wide.append(made)
            if choose.random() < 0.2:
                others.append(emit(op.sum(made, axis=choose.choice([[1], [2, 3], [0, 3], None]))))
                others.append(emit(op.cumsum(made, choose.randrange(4))))

        def shuffled(a: relax.Expr) -> relax.Expr:
            shape, axes = choose.choice(
                [((1, 2, 4, 6, 6), [0, 2, 1, 3, 4]), ((8, 6, 2, 3), [0, 3, 1, 2]), ((8, 36), [1, 0])]
            )
            return emit(op.reshape(emit(op.permute_dims(emit(op.reshape(a, shape)), axes)), (1, 8, 6, 6)))

        for _ in range(steps):
            step()
        return [wide[-1], *others]

    return graph({"x": (1, 8, 6, 6)}, weights, body)


@pytest.mark.parametrize("seed", range(4))
def test_random_graphs_keep_their_values(seed: int) -> None:
    before = random_graph(seed, 8)
    require_same(before, channels_last(before), seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 150))
def test_many_random_graphs_keep_their_values(seed: int) -> None:
    before = random_graph(seed, 20)
    require_same(before, channels_last(before), seed)
