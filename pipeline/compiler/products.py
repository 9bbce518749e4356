"""What kind of product a core is: a convolution, or a product of matrices.

Both are read from how indices depend on the axes of the core: an axis of the right factor and the result alone is one
of channels or columns, one of the left factor and the result alone one of pixels or rows, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx

from pipeline.compiler.anatomy import Core, Operand, Terms, extents, row_major, terms


@dataclass(frozen=True)
class Convolution:
    """A convolution over one, two or three spatial dimensions.

    source, weight, result  what each dimension of the tensor is: "nchw", "oihw" and so on, a letter for each
    channels                in and out, of all groups together
    before, after           zeros around the spatial dimensions
    """

    source: str
    weight: str
    result: str
    batch: int
    channels: tuple[int, int]
    extents: tuple[int, ...]
    results: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    groups: int


def wide(conv: Convolution) -> Convolution:
    """A convolution of tall and thin images as one of low and wide ones, which kernels work along.

    nhwc 512x1, kernel 5x1  →  nwhc 1x512, kernel 1x5: the same numbers at the same places
    """
    if len(conv.results) != 2 or conv.results[1] != 1 or conv.results[0] == 1:
        return conv
    turned = str.maketrans("hw", "wh")
    letters = {name: getattr(conv, name).translate(turned) for name in ("source", "weight", "result")}
    sizes = ("extents", "results", "kernel", "strides", "dilation", "before", "after")
    changes: dict[str, Any] = {**letters, **{name: getattr(conv, name)[::-1] for name in sizes}}
    return replace(conv, **changes)


def convolution(core: Core) -> Convolution | None:
    """The core as a convolution of `left` with `right`; None where it is another product."""
    reader = _ConvolutionReader.of(core)
    return reader.read() if reader is not None else None


@dataclass
class _ConvolutionReader:
    core: Core
    left: list[Terms]
    right: list[Terms]
    result: list[Terms]

    @classmethod
    def of(cls, core: Core) -> _ConvolutionReader | None:
        variables = [var for var, _, _ in core.axes]
        read = [
            [terms(index, variables) for index in indices]
            for indices in (core.left_indices, core.right_indices, core.result_indices)
        ]
        if any(each is None for one in read for each in one):
            return None
        left, right, result = ([each for each in one if each is not None] for one in read)
        return cls(core, left, right, result)

    def read(self) -> Convolution | None:
        extent = {var: n for var, n, _ in self.core.axes}
        summed = {var for var, _, is_summed in self.core.axes if is_summed}
        right_at, result_at = self._places(self.right), self._places(self.result)
        if right_at is None or result_at is None or len(self.result) != len(self.left):
            return None
        spatial: list[tuple[int, Any, Any]] = []  # dimension of the source, variable of the result, of the kernel
        batch = channel = None
        for at, index in enumerate(self.left):
            outer = [var for var, _ in index if var in result_at]
            inner = [var for var, _ in index if var in summed]
            if len(outer) == 1 and len(inner) == 1 and outer[0] not in right_at and (outer[0], 1) in index:
                spatial.append((at, outer[0], inner[0]))
            elif len(outer) == 1 and not inner and outer[0] not in right_at and index == {(outer[0], 1): 1}:
                if batch is not None:
                    return None
                batch = (at, outer[0])
            elif channel is None:
                channel = at
            else:
                return None
        if batch is None or channel is None or not 1 <= len(spatial) <= 3:
            return None
        return self._made(extent, right_at, result_at, batch, channel, spatial)

    @staticmethod
    def _places(indices: list[Terms]) -> dict[Any, int] | None:
        """Where each variable is, if each index is one variable and nothing else."""
        if any(len(index) != 1 or next(iter(index.items()))[1] != 1 for index in indices):
            return None
        places = {next(iter(index)): at for at, index in enumerate(indices)}
        if len(places) != len(indices) or any(divisor != 1 for _, divisor in places):
            return None
        return {var: at for (var, _), at in places.items()}

    def _made(
        self,
        extent: Mapping[Any, int],
        right_at: Mapping[Any, int],
        result_at: Mapping[Any, int],
        batch: tuple[int, Any],
        channel: int,
        spatial: list[tuple[int, Any, Any]],
    ) -> Convolution | None:
        known = {batch[1], *(y for _, y, _ in spatial)}
        out = [var for var in result_at if var not in known]
        kernel = [k for _, _, k in spatial]
        into = [var for var in right_at if var not in (*kernel, *out)]
        if len(out) != 1 or len(into) != 1 or out[0] not in right_at or any(k not in right_at for k in kernel):
            return None
        if len(right_at) != len(spatial) + 2:
            return None
        groups = self._groups(self.left[channel], out[0], into[0], extent)
        letters = "dhw"[3 - len(spatial) :]
        source = {batch[0]: "n", channel: "c"} | {at: each for (at, _, _), each in zip(spatial, letters, strict=True)}
        weight = {right_at[out[0]]: "o", right_at[into[0]]: "i"}
        weight |= {right_at[k]: each for (_, _, k), each in zip(spatial, letters, strict=True)}
        result = {result_at[batch[1]]: "n", result_at[out[0]]: "c"}
        result |= {result_at[y]: each for (_, y, _), each in zip(spatial, letters, strict=True)}
        shape = extents(self.core.left)
        before, after = self.core.before, self.core.after
        if groups is None or any(before[at] or after[at] for at in (batch[0], channel)):
            return None
        return Convolution(
            _word(source),
            _word(weight),
            _word(result),
            extent[batch[1]],
            (extent[into[0]] * groups, extent[out[0]]),
            tuple(shape[at] for at, _, _ in spatial),
            tuple(extent[y] for _, y, _ in spatial),
            tuple(extent[k] for _, _, k in spatial),
            tuple(self.left[at][y, 1] for at, y, _ in spatial),
            tuple(self.left[at].get((k, 1), 0) for at, _, k in spatial),
            tuple(before[at] for at, _, _ in spatial),
            tuple(after[at] for at, _, _ in spatial),
            groups,
        )

    @staticmethod
    def _groups(index: Terms, out: Any, into: Any, extent: Mapping[Any, int]) -> int | None:
        """The number of groups, from how the channel to read depends on the one to write.

        c  →  1        o // (out / g) * (in / g) + c  →  g        o + c, with one c  →  as many as there are o
        """
        rest = dict(index)
        if rest.pop((into, 1), 1) != 1 or len(rest) > 1:
            return None
        if not rest:
            return 1
        ((var, divisor), step) = next(iter(rest.items()))
        if not var.same_as(out) or step != extent[into] or extent[out] % divisor:
            return None
        return extent[out] // divisor


def _word(letters: Mapping[int, str]) -> str:
    return "".join(letters[at] for at in sorted(letters))


@dataclass(frozen=True)
class Axis:
    """One axis of a matrix product: its extent, and its stride in elements in each tensor, 0 where it is not there."""

    extent: int
    left: int
    right: int
    result: int
    operands: tuple[int, ...]

    @property
    def role(self) -> str:
        """m is the left matrix's, n the right one's, k what is summed over, b the batch's; e stands beside them."""
        if self.result == 0:
            return "k"
        return {(True, False): "m", (False, True): "n", (True, True): "b"}.get((self.left > 0, self.right > 0), "e")


def contraction(core: Core, operands: Sequence[Operand] = ()) -> tuple[Axis, ...] | None:
    """The core as a product of matrices: its axes, as few as say the same, each before those that lie further in.

    Y[i, j, n] += X[i, j, k] * W[k, n]  →  (m: i and j as one), n, k
    None where an index is no linear function of the axes, or where zeros are padded.
    """
    if any(core.before) or any(core.after):
        return None
    shape = extents(core.result)
    strides = [
        _strides(core, buffer, indices)
        for buffer, indices in (
            (core.left, core.left_indices),
            (core.right, core.right_indices),
            (core.result, core.result_indices),
        )
    ]
    if any(each is None for each in strides):
        return None
    left, right, result = (each for each in strides if each is not None)
    along: dict[Any, tuple[int, ...]] = {}
    for at, index in enumerate(core.result_indices):
        if not isinstance(index, tirx.Var):
            return None
        along[index] = tuple(operand.strides[at] if shape[at] > 1 else 0 for operand in operands)
    none = (0,) * len(operands)
    axes = [
        Axis(n, left.get(var, 0), right.get(var, 0), result.get(var, 0), along.get(var, none))
        for var, n, _ in core.axes
        if n > 1
    ]
    return tuple(_merged(axes))


def _strides(core: Core, buffer: Any, indices: Sequence[Any]) -> dict[Any, int] | None:
    variables = [var for var, _, _ in core.axes]
    found: dict[Any, int] = {}
    for index, stride in zip(indices, row_major(extents(buffer)), strict=True):
        read = terms(index, variables)
        if read is None or any(divisor != 1 or step < 0 for (_, divisor), step in read.items()):
            return None
        for (var, _), step in read.items():
            found[var] = found.get(var, 0) + step * stride
    return found


def _merged(axes: list[Axis]) -> list[Axis]:
    """Two axes that are one in every tensor become one."""
    merged: list[Axis] = []
    for axis in axes:
        outer = merged[-1] if merged else None
        if outer is not None and outer.role == axis.role and _all(outer) == _all(axis, axis.extent):
            merged[-1] = Axis(outer.extent * axis.extent, axis.left, axis.right, axis.result, axis.operands)
        else:
            merged.append(axis)
    return merged


def _all(axis: Axis, times: int = 1) -> tuple[int, ...]:
    return tuple(stride * times for stride in (axis.left, axis.right, axis.result, *axis.operands))
