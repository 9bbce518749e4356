"""Scaled dot-product attention as one function: scores stay in the cache, and tensors are read where they lie.

Part of this project: it needs no package, only a C++ compiler. A network's attention is several operators, each of
which would be a workload of its own, with transposes between them. So this library has patterns, by which the
operators are grouped before any are fused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.compiler.libraries import wording
from pipeline.compiler.libraries.contract import Installed, Shim
from pipeline.compiler.libraries.locations import threads_of
from pipeline.compiler.libraries.wording import View

if TYPE_CHECKING:
    import tvm

    from pipeline.compiler.libraries.heads import Heads
    from pipeline.compiler.patterns import Match, Pattern

_SMALL = 1 << 18  # multiplications: fewer of them are neither grouped nor shared out between threads
_FEW = 8  # rows that are computed together: for fewer of them, most of the work would be for nothing


class Attention:
    """softmax(scale * q k' + mask) v  →  for task in parallel: tvmake_attention_run(..., task)"""

    name = "attention"
    version = 1
    licence = "Apache-2.0"
    install = "nothing to install"
    threads: Literal["openmp", "caller"] = "caller"
    shim = Path(__file__).with_suffix(".cc")

    def find(self) -> Installed | None:
        """Always there. Without the flags, loops over whole vectors would not be unrolled."""
        return Installed("built in", (), {}, ("-O3", "-ffp-contract=fast"))

    def patterns(self) -> Sequence[Pattern]:
        """Attention with the transposes around it, or without them where others use what is transposed.

            permute_dims(q); permute_dims(k); s = matmul(q, k); s * c; s + mask; a = softmax(s); permute_dims(v);
            y = matmul(a, v); permute_dims(y)

        Scaling may also stand before the product, and each product's batch dimensions may be one for the softmax. All
        but the products and the softmax is optional.
        """
        from pipeline.compiler.patterns import Pattern

        return [
            Pattern("attention", _pattern(with_inputs, with_result), _is_taken)
            for with_inputs, with_result in ((True, True), (True, False), (False, True), (False, False))
        ]

    def match(self, func: tvm.tirx.PrimFunc, target: tvm.target.Target, shim: Shim) -> tvm.tirx.PrimFunc | None:
        from pipeline.compiler.libraries.heads import read

        heads = read(func)
        if heads is None:
            return None
        description = wording.described("attention", _words(heads))
        return _call(func, heads, description, threads_of(target)) if shim.plan(description) is not None else None


def _words(heads: Heads) -> wording.Words:
    words: list[tuple[str, object]] = [("scale", repr(heads.scale))]
    for name in ("q", "k", "v", "y", "mask"):
        tensor = getattr(heads, name)
        if tensor is not None:
            words.append((name, View(tensor.extents, tensor.strides)))
    return tuple(words)


def _call(func: Any, heads: Heads, description: str, threads: int) -> Any:
    from pipeline.compiler.libraries import calls

    mask = [] if heads.mask is None else [heads.mask.buffer]
    read = (heads.q.buffer, heads.k.buffer, heads.v.buffer)
    call = calls.Call(
        "tvmake_attention_run",
        (description, *read, *(mask or [None]), heads.y.buffer),
        (*read, *mask),
        heads.y.buffer,
        "the attention library refused the call",
    )
    return calls.with_call(func, (), calls.split(call, 1 if heads.work < _SMALL else threads), ())


# --- patterns of Relax operators


def _pattern(with_inputs: bool, with_result: bool) -> Any:
    from tvm.relax.dpl import is_const, is_op, wildcard

    def maybe(name: str, arg: Any, *others: Any) -> Any:
        return is_op(f"relax.{name}")(arg, *others) | arg

    def transposed() -> Any:
        return maybe("permute_dims", maybe("permute_dims", wildcard())) if with_inputs else wildcard()

    def scaled(arg: Any) -> Any:
        return maybe("multiply", maybe("divide", arg, is_const()), is_const())

    def factor() -> Any:
        return scaled(transposed()) if with_inputs else transposed()

    scores = scaled(is_op("relax.matmul")(factor(), factor()))
    mask = wildcard()
    masked = is_op("relax.add")(scores, mask) | is_op("relax.add")(mask, scores) | scores
    weights = is_op("relax.nn.softmax")(maybe("reshape", masked, wildcard()))
    result = is_op("relax.matmul")(maybe("reshape", weights, wildcard()), transposed())
    return is_op("relax.permute_dims")(result) if with_result else result


def _is_taken(match: Match) -> bool:
    """Whether `read` and the shim take what becomes of a match."""
    from pipeline.compiler.rewriting import operator, shape_of

    calls = list(match.bindings.values())
    softmax = next(call for call in calls if operator(call) == "nn.softmax")
    second = match.result if operator(match.result) == "matmul" else match.bindings[match.result.args[0]]
    first = next(call for call in calls if operator(call) == "matmul" and not call.same_as(second))
    tensors = [arg for call in calls for arg in call.args[: 1 if operator(call) == "reshape" else 2]]
    if any(shape_of(tensor) is None or str(tensor.ty.dtype) != "float32" for tensor in tensors):
        return False
    scores, source = shape_of(first) or (), shape_of(softmax.args[0]) or ()
    batches = {(shape_of(arg) or ())[:-2] for arg in (*first.args, *second.args)}
    return (
        len(scores) >= 3
        and batches == {scores[:-2]}
        and scores[-2] >= _FEW
        and math.prod(scores) * ((shape_of(first.args[0]) or ())[-1] + (shape_of(second.args[1]) or ())[-1]) >= _SMALL
        and source[-1] == scores[-1]
        and int(softmax.attrs.axis) in (-1, len(source) - 1)
    )
