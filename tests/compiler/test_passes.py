"""Our Relax passes: before and after, and the numbers they must keep."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import ir as I  # noqa: N812
from tvm.script import relax as R  # noqa: N812

from pipeline.compiler import passes


def run(mod: tvm.IRModule, *arrays: np.ndarray) -> list[np.ndarray]:
    machine = relax.VirtualMachine(relax.build(mod, tvm.target.Target("llvm")), tvm.cpu())
    result = machine["main"](*(tvm.runtime.tensor(array) for array in arrays))
    return [result.numpy()] if hasattr(result, "numpy") else [field.numpy() for field in result]


def batch_norm(shape: tuple[int, ...], axis: int, dtype: str = "float32", **attrs: object) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, dtype))
    stats = [relax.Var(name, relax.TensorType((shape[axis],), dtype)) for name in ("gamma", "beta", "mean", "var")]
    with builder.function("main", [x, *stats]):
        with builder.dataflow():
            normal = builder.emit(relax.op.nn.batch_norm(x, *stats, axis=axis, training=False, **attrs))
            y = builder.emit_output(relax.TupleGetItem(normal, 0))
        builder.emit_func_output(y)
    return builder.get()


def operators(mod: tvm.IRModule) -> list[str]:
    return [call.op.name for call in passes.all_calls(mod) if isinstance(call.op, tvm.ir.Op)]


@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 4, 4), 1), ((2, 4, 4, 3), 3), ((5, 3), 1), ((2, 3, 4), -2)])
@pytest.mark.parametrize("attrs", [{}, {"epsilon": 0.5}, {"center": False}, {"scale": False}])
def test_batch_normalisation_keeps_its_value(shape: tuple[int, ...], axis: int, attrs: dict[str, object]) -> None:
    random = np.random.default_rng(0)
    mod = batch_norm(shape, axis, **attrs)
    channels = shape[axis]
    arrays = [random.standard_normal(shape).astype("float32")]
    arrays += [random.standard_normal(channels).astype("float32") for _ in range(3)]
    arrays += [random.uniform(0.5, 1.5, channels).astype("float32")]
    folded = passes.fold_batch_norm(mod)
    assert "relax.nn.batch_norm" not in operators(folded)
    np.testing.assert_allclose(run(folded, *arrays)[0], run(mod, *arrays)[0], rtol=1e-4, atol=1e-5)


def test_one_multiplication_and_one_addition_depend_on_the_input() -> None:
    folded = relax.transform.DeadCodeElimination()(passes.fold_batch_norm(batch_norm((1, 3, 4, 4), 1)))
    assert operators(folded) == ["relax.call_tir", "relax.reshape", "relax.reshape", "relax.multiply", "relax.add"]


def test_layers_of_equal_width_share_one_preparing_function() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 3, 4, 4), "float32"))
    stats = [relax.Var(f"s{i}", relax.TensorType((3,), "float32")) for i in range(8)]
    with builder.function("main", [x, *stats]):
        with builder.dataflow():
            y = builder.emit(
                relax.TupleGetItem(builder.emit(relax.op.nn.batch_norm(x, *stats[:4], axis=1, training=False)), 0)
            )
            z = builder.emit_output(
                relax.TupleGetItem(builder.emit(relax.op.nn.batch_norm(y, *stats[4:], axis=1, training=False)), 0)
            )
        builder.emit_func_output(z)
    folded = passes.fold_batch_norm(builder.get())
    assert sum(isinstance(func, tvm.tirx.PrimFunc) for _, func in folded.functions_items()) == 1


def test_training_is_left_alone() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3), "float32"))
    stats = [relax.Var(f"s{i}", relax.TensorType((3,), "float32")) for i in range(4)]
    with builder.function("main", [x, *stats]):
        with builder.dataflow():
            out = builder.emit_output(relax.op.nn.batch_norm(x, *stats, axis=1, training=True))
        builder.emit_func_output(out)
    assert "relax.nn.batch_norm" in operators(passes.fold_batch_norm(builder.get()))


def with_constants(*constants: np.ndarray) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4,), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = x
            for constant in constants:
                y = builder.emit(relax.op.add(y, relax.const(constant)))
            out = builder.emit_output(y)
        builder.emit_func_output(out)
    return builder.get()


def test_constants_that_training_changes_become_parameters() -> None:
    values = np.arange(4, dtype="float32")
    mod, arrays = passes.detach_constants(with_constants(values, np.float32(2.0), values), "main", "c")
    assert list(arrays) == ["c0"]  # equal ones are one, and the scalar stays
    np.testing.assert_array_equal(arrays["c0"], values)
    assert [str(var.name) for var in mod["main"].params] == ["x", "c0"]
    x = np.ones(4, "float32")
    np.testing.assert_allclose(run(mod, x, values)[0], x + 2 * values + 2)


def test_constants_of_other_shape_or_type_with_the_same_bytes_are_told_apart() -> None:
    zeros = [np.zeros((4,), "float32"), np.zeros((1, 4), "float32")]
    _, arrays = passes.detach_constants(with_constants(*zeros), "main", "c")
    assert len(arrays) == 2


def test_a_single_whole_number_is_written_not_trained() -> None:
    three, half = np.full((1,), 3, "float32"), np.full((1,), 0.5, "float32")
    mod, arrays = passes.detach_constants(with_constants(three, half), "main", "c")
    assert [float(array[0]) for array in arrays.values()] == [0.5]
    np.testing.assert_allclose(run(mod, np.ones(4, "float32"), half)[0], np.full(4, 4.5))


def test_nothing_to_detach_leaves_the_module_as_it_is() -> None:
    mod = with_constants(np.float32(1.0))
    same, arrays = passes.detach_constants(mod, "main", "c")
    assert same.same_as(mod)
    assert arrays == {}


def test_calls_go_by_symbol() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((4,), "float32")):
            with R.dataflow():
                y = R.add(x, x)
                R.output(y)
            return y

    with tvm.target.Target("llvm"):
        mod = relax.transform.LegalizeOps()(Before)
        mod = relax.transform.CallTIRRewrite()(relax.transform.ToNonDataflow()(mod))
    gvar = next(gvar for gvar, func in mod.functions_items() if isinstance(func, tvm.tirx.PrimFunc))
    after = passes.call_by_symbol(mod, {gvar: "tvmake_abc"})
    assert [gvar.name_hint for gvar in after.get_global_vars()] == ["main"]
    called = [call.op for call in passes.all_calls(after) if isinstance(call.op, relax.ExternFunc)]
    assert [str(op.global_symbol) for op in called] == ["tvmake_abc"]
