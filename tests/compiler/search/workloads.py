"""What tests of search spaces share: operators as extraction leaves them, and proposals for them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import tvm
from tvm import te, topi

from pipeline.compiler import ir, prepack, records, search, targets
from pipeline.compiler.search import PostOrderApply, Proposal, Tried

NATIVE = targets.load(targets.resolve("native"))


def workload(*tensors: te.Tensor, free: Sequence[int] = ()) -> tvm.tirx.PrimFunc:
    func = te.create_prim_func(list(tensors)).without_attr(prepack.LAYOUT_FREE)
    return ir.load(ir.canonical(func.with_attr(prepack.LAYOUT_FREE, list(free)) if free else func))


def conv(size: int = 14, channels: int = 32, free: bool = True) -> tvm.tirx.PrimFunc:
    """relu of a 3x3 convolution, channels last; its weight may lie as the kernel likes."""
    x = te.placeholder((1, size, size, channels), name="x")
    w = te.placeholder((3, 3, channels, channels), name="w")
    return workload(x, w, topi.nn.relu(topi.nn.conv2d_nhwc(x, w, 1, 1, 1)), free=[1] if free else [])


def reshape() -> tvm.tirx.PrimFunc:
    x = te.placeholder((1, 14, 14, 32), name="x")
    return workload(x, topi.reshape(x, (196, 32)))


def relu() -> tvm.tirx.PrimFunc:
    x = te.placeholder((1, 14, 14, 32), name="x")
    return workload(x, topi.nn.relu(x))


def tiny() -> tvm.tirx.PrimFunc:
    """A sum of three numbers: there are few ways to compute it."""
    x = te.placeholder((2, 3), name="x")
    return workload(x, topi.sum(x, axis=1))


def proposed(
    func: tvm.tirx.PrimFunc,
    count: int = 8,
    seed: int = 1,
    tried: Sequence[Tried] = (),
    known: Collection[str] = (),
    space: search.Space | None = None,
) -> Sequence[Proposal]:
    """On one thread where no space is given, so that a seed gives one answer."""
    return (space or PostOrderApply(threads=1)).propose(func, NATIVE, tried, known, count, seed)


def digests(proposals: Sequence[Proposal]) -> list[str]:
    return [records.digest_of(each.function) for each in proposals]
