"""What of an anatomy goes into the description that a shim reads: see shim.h."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.compiler.anatomy import Core, Cut
    from pipeline.compiler.products import Convolution
    from pipeline.compiler.windows import Pooling, Softmax

Words = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class View:
    """A tensor as a library is to see it: extents, and strides in elements."""

    extents: tuple[int, ...]
    strides: tuple[int, ...]

    def __str__(self) -> str:
        return f"{times(self.extents)}:{times(self.strides)}"

    def over(self, strides: Sequence[int]) -> View:
        """An operand of this tensor's extents, by its strides: of extent 1 where it broadcasts.

        An operand as large as the tensor has the tensor's strides along dimensions of extent 1, so that formats agree.
        """
        whole = all(stride or extent == 1 for stride, extent in zip(strides, self.extents, strict=True))
        extents = tuple(e if stride else 1 for e, stride in zip(self.extents, strides, strict=True))
        if whole:
            strides = tuple(stride or own for stride, own in zip(strides, self.strides, strict=True))
        return View(extents, tuple(strides))


def described(kind: str, words: Iterable[tuple[str, object]]) -> str:
    """("conv", [("stride", (2, 2)), ("then", "relu")])  →  "conv stride=2x2 then=relu" """
    written = ((name, times(value) if isinstance(value, tuple) else str(value)) for name, value in words)
    return " ".join([kind, *(f"{name}={value}" for name, value in written)])


def times(values: Sequence[int]) -> str:
    return "x".join(map(str, values))


def step(name: str, numbers: Sequence[float], operand: View | None = None) -> str:
    """("clip", (0, 6))  →  "clip:0.0:6.0" """
    return ":".join([name, *map(repr, numbers), *([str(operand)] if operand is not None else [])])


def convolution_words(conv: Convolution, cut: Cut) -> Words:
    spatial = "dhw"[3 - len(conv.extents) :]
    size = dict(zip(spatial, conv.extents, strict=True))
    x = _view(conv.source, {"n": conv.batch, "c": conv.channels[0], **size}, "nc" + spatial)
    size = dict(zip(spatial, conv.kernel, strict=True))
    w = _view(conv.weight, {"o": conv.channels[1], "i": conv.channels[0] // conv.groups, **size}, "oi" + spatial)
    size = dict(zip(spatial, conv.results, strict=True))
    sizes = {"n": conv.batch, "c": conv.channels[1], **size}
    y = _view(conv.result, sizes, "nc" + spatial)
    order = [conv.result.index(letter) for letter in "nc" + spatial]
    return (
        ("x", x),
        ("w", w),
        ("y", y),
        ("stride", conv.strides),
        ("dilation", conv.dilation),
        ("before", conv.before),
        ("after", conv.after),
        ("groups", conv.groups),
        *(("then", word) for word in _steps(cut, y, order)),
    )


def _steps(cut: Cut, result: View, order: list[int]) -> Iterator[str]:
    """The steps in words; `order` tells for each dimension of the view which one of the function's it is."""
    for each in cut.steps:
        operand = result.over([each.operand.strides[at] for at in order]) if each.operand is not None else None
        yield step(each.name, each.numbers, operand)


def _view(layout: str, extents: dict[str, int], order: str) -> View:
    """A compact tensor of that layout, its dimensions in oneDNN's order: "nhwc", {n: 1, ...}, "nchw"."""
    from pipeline.compiler.anatomy import row_major

    strides = dict(zip(layout, row_major([extents[letter] for letter in layout]), strict=True))
    return View(tuple(extents[letter] for letter in order), tuple(strides[letter] for letter in order))


def product_words(core: Core, cut: Cut) -> Words | None:
    """A product of matrices as batch..., m, k times batch..., k, n; None where it is none."""
    from pipeline.compiler.products import Axis, contraction

    operands = [each.operand for each in cut.steps if each.operand is not None]
    axes = contraction(core, operands)
    if axes is None:
        return None
    roles: dict[str, list[Axis]] = {role: [axis for axis in axes if axis.role == role] for role in "mnkbe"}
    if roles["e"] or len(roles["k"]) != 1 or not axes:
        return None
    (k,) = roles["k"]
    inner = {role: max(roles[role], key=lambda axis: -axis.result, default=None) for role in "mn"}
    m, n = inner["m"], inner["n"]
    batch = sorted((a for a in axes if a not in (m, n, k)), key=lambda axis: -axis.result)
    unit = Axis(1, 0, 0, 0, (0,) * len(operands))
    m = m or replace(unit, left=k.extent * k.left, result=0)
    n = n or replace(unit, right=0, result=0)
    shape = tuple(axis.extent for axis in (*batch, m, n))
    x = _matrix([*batch, m, k], "left")
    w = _matrix([*batch, k, n], "right")
    y = _matrix([*batch, m, n], "result")
    words: list[tuple[str, object]] = [("x", x), ("w", w), ("y", y)]
    result = View(shape, y.strides)
    at = 0
    for each in cut.steps:
        operand = None
        if each.operand is not None:
            operand = result.over([axis.operands[at] for axis in (*batch, m, n)])
            at += 1
        words.append(("then", step(each.name, each.numbers, operand)))
    return tuple(words)


def _matrix(axes: list[Any], of: str) -> View:
    """One matrix of a product: of extent 1 along axes that it does not have."""
    strides = [getattr(axis, of) for axis in axes]
    extents = [axis.extent if stride else 1 for axis, stride in zip(axes, strides, strict=True)]
    # An axis that is not there gets the stride of a compact tensor, which is what formats are told apart by.
    for at in reversed(range(len(axes))):
        if strides[at] == 0:
            inside = [strides[i] * extents[i] for i in range(at + 1, len(axes))]
            strides[at] = max(inside, default=1)
    return View(tuple(extents), tuple(strides))


def pooling_words(pooling: Pooling) -> Words:
    """Dimensions without a window are the batch and the channels, in this order; those with one are spatial."""
    from pipeline.compiler.anatomy import row_major

    windows = [at for at, each in enumerate(pooling.dimensions) if each.is_pooled]
    others = [at for at in range(len(pooling.dimensions)) if at not in windows]
    order = [*others[:-1], others[-1], *windows]
    sources = tuple(each.extent for each in pooling.dimensions)
    results = tuple(each.result for each in pooling.dimensions)
    x, y = row_major(sources), row_major(results)
    lead = (1,) * (2 - len(others))
    outer = (max(1, sources[0] * x[0]),) * len(lead), (max(1, results[0] * y[0]),) * len(lead)
    spatial = [pooling.dimensions[at] for at in windows]
    return (
        ("of", pooling.of),
        ("x", View((*lead, *(sources[at] for at in order)), (*outer[0], *(x[at] for at in order)))),
        ("y", View((*lead, *(results[at] for at in order)), (*outer[1], *(y[at] for at in order)))),
        ("kernel", tuple(each.kernel for each in spatial)),
        ("stride", tuple(each.stride for each in spatial)),
        ("dilation", tuple(each.dilation for each in spatial)),
        ("before", tuple(each.before for each in spatial)),
        ("after", tuple(each.after for each in spatial)),
    )


def softmax_words(softmax: Softmax) -> Words:
    from pipeline.compiler.anatomy import extents, row_major

    shape = extents(softmax.source)
    view = View(shape, row_major(shape))
    return (("x", view), ("y", view), ("axis", softmax.axis))
