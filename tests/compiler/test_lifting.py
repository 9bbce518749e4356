"""What depends on weights alone leaves inference: before and after, and what must not move."""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import relax
from tvm.script import ir as I  # noqa: N812
from tvm.script import relax as R  # noqa: N812

from pipeline.compiler.lifting import Parted, modules, part


def parted(mod: tvm.IRModule, inputs: int = 1) -> Parted:
    return part(mod["main"], inputs)


def require_well_formed(mod: tvm.IRModule) -> None:
    for each in modules(mod, "main", "prepare", 1)[:2]:
        if each is not None:
            relax.analysis.well_formed(each)  # raises where it is not


def canonical(func: relax.Function) -> relax.Function:
    """Without the bindings that only rename."""
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return relax.transform.CanonicalizeBindings()(mod)["main"]


def same(func: relax.Function, expected: relax.Function) -> bool:
    return bool(tvm_ffi.structural_equal(canonical(func), canonical(expected)))


def test_a_transposed_weight_is_prepared() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 4), "float32"), w: R.Tensor((8, 4), "float32"), b: R.Tensor((8,), "float32")):
            with R.dataflow():
                t = R.permute_dims(w)
                m = R.matmul(x, t)
                y = R.add(m, b)
                R.output(y)
            return y

    @I.ir_module
    class Inference:
        @R.function
        def main(x: R.Tensor((1, 4), "float32"), b: R.Tensor((8,), "float32"), t: R.Tensor((4, 8), "float32")):
            with R.dataflow():
                m = R.matmul(x, t)
                y = R.add(m, b)
                R.output(y)
            return y

    @I.ir_module
    class Preparation:
        @R.function
        def main(w: R.Tensor((8, 4), "float32")):
            with R.dataflow():
                t = R.permute_dims(w)
                packed = (t,)
                R.output(packed)
            return packed

    result = parted(Before)
    assert same(result.main, Inference["main"])
    assert result.prepare is not None
    assert same(result.prepare, Preparation["main"])
    assert result.arguments == (1, None)
    assert result.taken == (0,)


def test_a_weight_that_nothing_reads_is_dropped_and_one_that_is_used_stays() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((4,), "float32"), unused: R.Tensor((4,), "float32"), w: R.Tensor((4,), "float32")):
            with R.dataflow():
                y = R.add(x, w)
                R.output(y)
            return y

    result = parted(Before)
    assert [str(var.name) for var in result.main.params] == ["x", "weight_0"]
    assert result.arguments == (1,)
    assert result.prepare is None
    assert result.taken == ()


def test_what_only_the_preparation_reads_is_no_argument_of_inference() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((4,), "float32"), a: R.Tensor((4,), "float32"), b: R.Tensor((4,), "float32")):
            with R.dataflow():
                s = R.add(a, b)
                t = R.sqrt(s)
                y = R.add(x, t)
                R.output(y)
            return y

    result = parted(Before)
    assert result.arguments == (None,)
    assert result.taken == (0, 1)
    assert len(result.main.body.blocks[0].bindings) <= 3


def test_a_tuple_is_not_handed_over_but_its_fields_are() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2,), "float32"), w: R.Tensor((4,), "float32")):
            with R.dataflow():
                halves = R.split(w, indices_or_sections=2)
                first = halves[0]
                y = R.add(x, first)
                z = R.concat(halves)
                R.output(y, z)
            return (y, z)

    result = parted(Before)
    assert all(isinstance(var.ty, relax.TensorType) for var in result.main.params)
    require_well_formed(Before)


def test_an_output_that_depends_on_no_input_is_prepared() -> None:
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2,), "float32"), w: R.Tensor((2,), "float32")):
            with R.dataflow():
                y = R.add(x, x)
                z = R.multiply(w, w)
                R.output(y, z)
            return (y, z)

    result = parted(Before)
    assert result.arguments == (None,)
    require_well_formed(Before)


def test_effects_stay_where_they_are() -> None:
    @I.ir_module
    class Before:
        @R.function(pure=False)
        def main(x: R.Tensor((2,), "float32"), w: R.Tensor((2,), "float32")):
            _ = R.print(w, format="{}")
            return R.add(x, w)

    result = parted(Before)
    assert result.prepare is None
    assert [str(var.name) for var in result.main.params] == ["x", "weight_0"]


def test_a_weight_of_another_shape_leaves_the_preparation_of_others_alone() -> None:
    def model(other: int) -> tvm.IRModule:
        builder = relax.BlockBuilder()
        x = relax.Var("x", relax.TensorType((1, 4), "float32"))
        w = relax.Var("w", relax.TensorType((4, 4), "float32"))
        v = relax.Var("v", relax.TensorType((4, other), "float32"))
        with builder.function("main", [x, w, v]):
            with builder.dataflow():
                t = builder.emit(relax.op.permute_dims(w))
                h = builder.emit(relax.op.matmul(x, t))
                y = builder.emit_output(relax.op.matmul(h, v))
            builder.emit_func_output(y)
        return builder.get()

    one, two = parted(model(8)), parted(model(16))
    assert one.prepare is not None
    assert two.prepare is not None
    assert tvm_ffi.structural_equal(one.prepare, two.prepare)
    assert not tvm_ffi.structural_equal(one.main, two.main)
