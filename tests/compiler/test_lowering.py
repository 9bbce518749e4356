"""A Relax module → bytecode and unique functions."""

from __future__ import annotations

import pytest
import tvm
from tvm import relax

from pipeline.compiler import ir, targets
from pipeline.compiler.lowering import lower, readable_name
from pipeline.errors import ConfigError, ModelError
from pipeline.hashing import Digest

TARGET = targets.resolve("native")


def mlp(layers: int, width: int = 8, prefix: str = "") -> tuple[tvm.IRModule, list[str]]:
    builder = relax.BlockBuilder()
    x = relax.Var(prefix + "x", relax.TensorType((1, width), "float32"))
    names = [f"{prefix}w{i}" for i in range(layers)]
    weights = [relax.Var(name, relax.TensorType((width, width), "float32")) for name in names]
    with builder.function("main", [x, *weights]):
        with builder.dataflow():
            y = x
            for weight in weights:
                transposed = builder.emit(relax.op.permute_dims(weight))
                y = builder.emit(relax.op.nn.relu(builder.emit(relax.op.matmul(y, transposed))))
            out = builder.emit_output(y)
        builder.emit_func_output(out)
    return builder.get(), names


def test_equal_layers_are_one_workload_with_its_calls_counted() -> None:
    mod, weights = mlp(5)
    lowered = lower(mod, weights, ["y"], TARGET)
    counted = {function.name: (function.calls, function.prepares) for function in lowered.functions.values()}
    assert counted == {"fused_matmul_relu": (5, False), "transpose": (0, True)}
    assert [spec.name for spec in lowered.inputs] == ["x"]
    assert [(spec.name, spec.shape) for spec in lowered.outputs] == [("y", (1, 8))]
    assert lowered.packing == tuple(weights)
    assert [(name, packed) for _, name, packed, *_ in lowered.weights] == [("", i) for i in range(5)]


def test_functions_are_named_by_what_they_are() -> None:
    mod, weights = mlp(2)
    lowered = lower(mod, weights, ["y"], TARGET)
    for digest, function in lowered.functions.items():
        assert Digest.of(function.canonical).hash == digest
        # What was extracted is found again: the normal form is its own normal form.
        assert ir.canonical(ir.load(function.canonical)) == function.canonical
        assert len(function.structural_hash) == 16


def test_lowering_is_the_same_every_time_and_blind_to_the_weights_names() -> None:
    one = lower(*mlp(3), ["y"], TARGET)
    assert lower(*mlp(3), ["y"], TARGET) == one
    renamed = lower(*mlp(3, prefix="other_"), ["z"], TARGET)
    assert renamed.functions == one.functions
    assert renamed.prepare == one.prepare


def test_another_shape_is_another_workload() -> None:
    one, two = lower(*mlp(1, 8), ["y"], TARGET), lower(*mlp(1, 16), ["y"], TARGET)
    shared = set(one.functions) & set(two.functions)
    assert [one.functions[digest].name for digest in shared] == ["transpose"]  # what prepares weights takes any extents
    assert not any(one.functions[digest].calls for digest in shared)


def test_an_open_shape_is_refused_by_name() -> None:
    builder = relax.BlockBuilder()
    n = tvm.tirx.Var("n", "int64")
    x = relax.Var("image", relax.TensorType((n, 4), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(relax.op.add(x, x))
        builder.emit_func_output(y)
    with pytest.raises(ModelError, match="image") as refused:
        lower(builder.get(), [], ["y"], TARGET)
    assert "shapes=" in str(refused.value)


def test_a_layout_is_as_it_is_asked_for() -> None:
    builder = relax.BlockBuilder()
    x, w = (
        relax.Var("x", relax.TensorType((1, 3, 8, 8), "float32")),
        relax.Var("w", relax.TensorType((4, 3, 3, 3), "float32")),
    )
    with builder.function("main", [x, w]):
        with builder.dataflow():
            y = builder.emit_output(relax.op.nn.conv2d(x, w))
        builder.emit_func_output(y)

    def names(layout: str) -> dict[str, bool]:
        functions = lower(builder.get(), ["w"], ["y"], TARGET, layout=layout).functions.values()
        return {function.name: function.prepares for function in functions}

    assert names("as-is") == {"conv2d": False}
    assert set(names("NHWC")) == {"transpose", "conv2d"}


def test_each_step_can_be_watched() -> None:
    seen: list[str] = []
    mod, weights = mlp(1)
    lower(mod, weights, ["y"], TARGET, watch=lambda name, _: seen.append(name))
    assert seen[:3] == ["imported", "canonical", "main_lifted"]
    assert "main_fused" in seen
    assert seen[-1] == "prepare_final"


@pytest.mark.parametrize(
    ("name", "readable"),
    [
        ("fused_conv2d12_add3_relu7", "fused_conv2d_add_relu"),
        ("max_pool2d", "max_pool2d"),
        ("expand_dims1", "expand_dims"),
        ("log2", "log2"),
        ("fused_matmul_tir_tanh2", "fused_matmul_tanh"),
        ("softmax", "softmax"),
        ("conv1d3", "conv1d"),
    ],
)
def test_names_lose_their_counters(name: str, readable: str) -> None:
    assert readable_name(name) == readable


@pytest.mark.parametrize(
    "written", ["nonsense", {"kind": "llvm", "bogus": 1}, {"mcpu": "x"}, {"kind": "llvm", "num-cores": "four"}]
)
def test_a_target_that_tvm_refuses_is_refused_with_its_words(written: object) -> None:
    with pytest.raises(ConfigError) as refused:
        targets.resolve(written)  # type: ignore[arg-type]
    assert "llvm" in refused.value.hint


def test_a_processor_that_llvm_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="no processor"):
        targets.resolve({"kind": "llvm", "mcpu": "pentium9"})


def test_resolving_is_stable() -> None:
    assert targets.resolve(TARGET) == TARGET
