"""What rules read off a block: its axes, its loads, and how a load's address moves along an axis.

Owns reading only; nothing here changes a schedule. Blocks are those of a function as lowering makes it: one loop for
each axis, in order, and one store.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tvm import ir, s_tir, sym, tirx
from tvm.s_tir.schedule import SBlockRV

from pipeline.compiler.rules import terms


@dataclass(frozen=True)
class Axis:
    var: tirx.Var
    extent: int


@dataclass(frozen=True)
class Access:
    """One place where a buffer is read or written."""

    buffer: Any
    indices: tuple[Any, ...]


@dataclass(frozen=True)
class Block:
    """A leaf block with constant extents.

    spatial and reduced are its axes in order; kinds has an S or an R for each axis of the block, in its own order.
    """

    rv: SBlockRV
    stmt: Any
    spatial: tuple[Axis, ...]
    reduced: tuple[Axis, ...]
    kinds: str

    @property
    def name(self) -> str:
        return str(self.stmt.name_hint)

    @property
    def store(self) -> Any:
        return self.stmt.body

    @property
    def target(self) -> Any:
        """The buffer that it writes."""
        return self.store.buffer

    @property
    def dtype(self) -> str:
        return str(self.target.dtype)

    @property
    def is_reduction(self) -> bool:
        return self.stmt.init is not None

    @property
    def points(self) -> int:
        """How often its body runs."""
        return product(axis.extent for axis in (*self.spatial, *self.reduced))

    @property
    def result(self) -> Access:
        """Where it writes."""
        return Access(self.target, tuple(self.store.indices))

    @cached_property
    def loads(self) -> tuple[Access, ...]:
        """What it reads, but for its own result."""
        found = (Access(load.source, tuple(load.indices)) for load in terms.nodes(self.store.value, ir.TensorLoad))
        return tuple(load for load in found if not load.buffer.same_as(self.target))

    @cached_property
    def inputs(self) -> tuple[Any, ...]:
        """The buffers that it reads, each once."""
        buffers: list[Any] = []
        for load in self.loads:
            if not any(load.buffer.same_as(known) for known in buffers):
                buffers.append(load.buffer)
        return tuple(buffers)

    @property
    def writes_in_order(self) -> bool:
        """Whether the indices of the store are the spatial axes, in order."""
        return is_identity(self.store.indices, self.spatial)


def product(extents: Iterable[int]) -> int:
    result = 1
    for extent in extents:
        result *= extent
    return result


def read(sch: s_tir.Schedule, rv: SBlockRV) -> Block | None:
    """The block as a record; None where it is no plain nest of constant extents with one store to a place of its
    own."""
    stmt = sch.get(rv)
    if not isinstance(stmt.body, tirx.BufferStore) or len(stmt.match_buffers) or len(stmt.alloc_buffers):
        return None
    if len(sch.get_loops(rv)) != len(stmt.iter_vars):
        return None
    spatial: list[Axis] = []
    reduced: list[Axis] = []
    kinds = ""
    for axis in stmt.iter_vars:
        extent = axis.dom.extent
        if not isinstance(extent, tirx.IntImm) or int(axis.dom.min) or axis.iter_type not in (0, 2):
            return None
        (reduced if axis.iter_type == 2 else spatial).append(Axis(axis.var, int(extent)))
        kinds += "R" if axis.iter_type == 2 else "S"
    if any(not isinstance(extent, tirx.IntImm) for extent in stmt.body.buffer.shape):
        return None
    block = Block(rv, stmt, tuple(spatial), tuple(reduced), kinds)
    return block if bool(reduced) == block.is_reduction and not _updates_in_place(block) else None


def _updates_in_place(block: Block) -> bool:
    """Whether a block without a reduction reads what it overwrites: then no point may be worked out twice."""
    reads = terms.nodes(block.store.value, ir.TensorLoad)
    return not block.is_reduction and any(load.source.same_as(block.target) for load in reads)


def all_blocks(sch: s_tir.Schedule) -> list[Block] | None:
    """The blocks of a function in order; None where one of them is not plain."""
    found = [read(sch, rv) for rv in sch.get_child_blocks(sch.get_sblock("root"))]
    plain = [block for block in found if block is not None]
    return plain if len(plain) == len(found) else None


def is_identity(indices: Sequence[Any], axes: Sequence[Axis]) -> bool:
    """Whether indices are these axes in order; an axis of extent 1 may stand as 0."""
    if len(indices) != len(axes):
        return False
    return all(
        index.same_as(axis.var) or (axis.extent == 1 and isinstance(index, tirx.IntImm) and int(index) == 0)
        for index, axis in zip(indices, axes, strict=True)
    )


def stride(load: Access, axis: Axis, tile: int = 0) -> int | None:
    """By how many elements the address of a load or store moves when an axis moves by one; None where that varies.

    With a tile it need hold only inside tiles of that many steps, the first of which starts at 0:

        b[(oc // 16) * 8 + k] along oc  →  None,   in tiles of 16  →  0
    """
    analyzer = sym.Analyzer()
    address, var, steps = _address(load), axis.var, axis.extent
    if tile:
        inner, outer = tirx.Var("inner", terms.dtype(var)), tirx.Var("outer", terms.dtype(var))
        analyzer.bind(outer, span(outer, -(-axis.extent // tile)))
        address = terms.substitute(address, {var: outer * tile + inner})
        var, steps = inner, tile
    if steps == 1:
        return 0
    # The step from one point to the next: the last point has none.
    analyzer.bind(var, span(var, steps - 1))
    step = analyzer.simplify(terms.substitute(address, {var: var + 1}) - address)
    return int(step) if isinstance(step, tirx.IntImm) else None


def span(var: tirx.Var, extent: int) -> Any:
    """0 … extent - 1, in the variable's own type."""
    return ir.Range(terms.integer(0, var), terms.integer(extent, var))


def _address(load: Access) -> Any:
    flat: Any = tirx.IntImm("int64", 0)
    for index, extent in zip(load.indices, load.buffer.shape, strict=True):
        flat = flat * extent + index
    return flat


def reads(block: Block, buffer: Any) -> bool:
    return any(buffer.same_as(known) for known in block.inputs)
