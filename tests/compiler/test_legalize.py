"""Each distinct call is worked out once, and what comes out is what LegalizeOps gives."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax
from tvm.script import ir as I  # noqa: N812
from tvm.script import relax as R  # noqa: N812

from pipeline.compiler.legalize import legalize
from pipeline.compiler.passes import all_calls


def legalised(mod: tvm.IRModule) -> tvm.IRModule:
    operators = {call.op.name for call in all_calls(mod) if isinstance(call.op, tvm.ir.Op)}
    with tvm.target.Target("llvm"):
        return legalize(mod, operators)


def assert_same_program(mod: tvm.IRModule) -> None:
    """Every call of ours calls a function that is structurally equal to the one that TVM's own pass calls there."""
    with tvm.target.Target("llvm"):
        theirs = relax.transform.LegalizeOps()(mod)
    ours = legalised(mod)
    mine, others = list(all_calls(ours)), list(all_calls(theirs))
    assert len(mine) == len(others)
    for a, b in zip(mine, others, strict=True):
        assert a.op.same_as(b.op)
        assert tvm_ffi.structural_equal(ours[a.args[0]], theirs[b.args[0]])
        assert tvm_ffi.structural_equal(a.ty_args, b.ty_args)
        names = [[str(field.name) for field in call.args[1].fields] for call in (a, b)]
        assert names[0] == names[1]


@I.ir_module
class Repeated:
    @R.function
    def main(x: R.Tensor((4, 4), "float32"), y: R.Tensor((4, 4), "float32"), z: R.Tensor((4,), "float32")):
        with R.dataflow():
            a = R.add(x, y)
            b = R.add(a, x)
            c = R.add(b, z)
            d = R.add(z, c)
            e = R.add(c, c)
            f = R.permute_dims(e, axes=[1, 0])
            g = R.permute_dims(f, axes=[1, 0])
            h = R.permute_dims(g, axes=[0, 1])
            i = R.sum(h, axis=[0])
            j = R.sum(h, axis=[1])
            k = R.concat((a, b), axis=0)
            o = R.concat((b, a), axis=0)
            m = R.concat((b, b), axis=0)
            R.output(d, i, j, k, o, m)
        return (d, i, j, k, o, m)


def test_it_is_what_tvm_gives() -> None:
    assert_same_program(Repeated)


def test_equal_calls_share_a_function() -> None:
    calls = list(all_calls(legalised(Repeated)))
    called = [call.args[0] for call in calls]
    assert called[0].same_as(called[1])  # add of two 4x4
    assert not called[0].same_as(called[2])  # add of 4x4 and 4
    assert not called[2].same_as(called[3])  # add of 4 and 4x4
    assert called[5].same_as(called[6])  # the same axes
    assert not called[5].same_as(called[7])  # other axes
    assert not called[8].same_as(called[9])
    assert called[10].same_as(called[11])


@pytest.mark.parametrize("value", [1.0, 2.0])
def test_a_scalar_constant_is_part_of_the_function(value: float) -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4,), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.multiply(x, relax.const(np.float32(value))))
            z = builder.emit_output(relax.op.multiply(y, relax.const(np.float32(3.0))))
        builder.emit_func_output(z)
    mod = builder.get()
    assert_same_program(mod)
    called = [call.args[0] for call in all_calls(legalised(mod))]
    assert not called[0].same_as(called[1])
