"""Any function as a sequence of stages, each scheduled by the rule for its kind.

What remains after elementwise blocks were merged falls into reductions, each with the elementwise block behind it, and
elementwise blocks of their own. Where the whole function is one chain over rows, it is one stage.

    pad → conv → add, relu      →  tiles: conv + (add, relu), pad made where it is used
    softmax                     →  rows: max, exp, sum, division
    mean → conv → sigmoid       →  rows: mean;  tiles: conv + sigmoid
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import tvm
from tvm import s_tir, tirx

from pipeline.compiler.prepack import layout_free
from pipeline.compiler.rules import blocks, injective, inline, lanes, rows, tiles, windows
from pipeline.compiler.rules.blocks import Block
from pipeline.compiler.rules.choices import Choices
from pipeline.compiler.rules.machine import Machine, machine


class Kind(enum.Enum):
    TILES = "tiles"  # a reduction that is vectorised along the result
    ROWS = "rows"  # reductions that are vectorised along what they reduce
    INJECTIVE = "injective"  # no reduction
    WINDOWS = "windows"  # a reduction that reads in steps: only where a search decides so


@dataclass(frozen=True)
class Stage:
    """Blocks that are scheduled together. The first of tiles is the reduction; made_inside are blocks that only it
    reads."""

    kind: Kind
    blocks: tuple[Block, ...]
    made_inside: tuple[Block, ...] = ()


def schedule(func: tirx.PrimFunc, target: tvm.target.Target, choices: Choices) -> s_tir.Schedule | None:
    """None where a block is not a plain nest, or a reduction has no contiguous axis to be vectorised along."""
    cpu = machine(target)
    sch = s_tir.Schedule(func, error_render_level="fast")
    found = inline.inline(sch)
    stages = partition(found, choices) if found else None
    if stages is None:
        return None
    free = [func.params[i] for i in sorted(layout_free(func))]
    sch, cut = _cut(sch, stages, cpu, choices)
    by_name = {block.name: block for block in blocks.all_blocks(sch) or ()}
    for place, stage in enumerate(stages):
        asked = choices.within(place)
        own = [by_name[block.name] for block in stage.blocks]
        inside = [by_name[block.name] for block in stage.made_inside]
        if stage.kind is Kind.TILES:
            tiles.schedule(sch, own[0], own[1] if len(own) > 1 else None, inside, free, cpu, asked)
        elif stage.kind is Kind.ROWS:
            rows.schedule(sch, own, cut, cpu, asked)
        elif stage.kind is Kind.WINDOWS:
            windows.schedule(sch, own, inside, asked)
        else:
            injective.schedule(sch, own[0], cpu, asked)
    return sch


def partition(found: Sequence[Block], choices: Choices) -> list[Stage] | None:
    """The stages of a function, in order; None where no rule takes one of them."""
    tiled = {block.name for block in found if block.is_reduction and tiles.suits(block)}
    if len(found) > 2 and not tiled and rows.suits(found):
        return [Stage(Kind.ROWS, tuple(found))]
    epilogues = {block.name: _epilogue(block, found) for block in found if block.is_reduction}
    hosted = {each.name for each in epilogues.values() if each}
    windowed = {block.name for block in found if block.name not in tiled and windows.suits(block)}
    if windowed and not choices.pick("windows", (False, True)):
        windowed = set()
    inside = {name: _made_inside(name, found) for name in tiled | windowed}
    hosted |= {block.name for made in inside.values() for block in made}
    stages: list[Stage] = []
    for block in found:
        if block.name in hosted:
            continue
        group = _with(block, epilogues)
        if block.name in tiled:
            stages.append(Stage(Kind.TILES, group, inside[block.name]))
        elif block.name in windowed:
            stages.append(Stage(Kind.WINDOWS, group, inside[block.name]))
        elif not block.is_reduction:
            stages.append(Stage(Kind.INJECTIVE, group))
        elif rows.suits(group):
            stages.append(Stage(Kind.ROWS, group))
        else:
            return None
    return stages


def _with(block: Block, epilogues: Mapping[str, Block | None]) -> tuple[Block, ...]:
    """A block and the one that takes its results, where there is one."""
    epilogue = epilogues.get(block.name)
    return (block, epilogue) if epilogue else (block,)


def _made_inside(name: str, found: Sequence[Block]) -> tuple[Block, ...]:
    """The elementwise blocks that only one reduction reads."""
    reduction = next(block for block in found if block.name == name)
    producers = [block for block in found if not block.is_reduction and blocks.reads(reduction, block.target)]
    return tuple(block for block in producers if sum(blocks.reads(other, block.target) for other in found) == 1)


def _epilogue(block: Block, found: Sequence[Block]) -> Block | None:
    """The one reader of a reduction, where it takes each result once, in its place."""
    readers = [other for other in found if blocks.reads(other, block.target)]
    if len(readers) != 1 or readers[0].is_reduction:
        return None
    reader = readers[0]
    same = [axis.extent for axis in reader.spatial] == [axis.extent for axis in block.spatial]
    loads = [load for load in reader.loads if load.buffer.same_as(block.target)]
    if not same or not reader.writes_in_order or not block.writes_in_order:
        return None
    return reader if all(blocks.is_identity(load.indices, reader.spatial) for load in loads) else None


def _cut(
    sch: s_tir.Schedule, stages: Sequence[Stage], cpu: Machine, choices: Choices
) -> tuple[s_tir.Schedule, set[str]]:
    """Cuts the reductions of rows into vectors, and has them multiply where they divide, if a search decides so.
    Returns a schedule of what comes of it, and the names of those cut."""
    chosen = [
        (block, width)
        for place, stage in enumerate(stages)
        for block in stage.blocks
        if stage.kind is Kind.ROWS
        and block.is_reduction
        and (width := choices.within(place).pick("lanes", lanes.widths(block, cpu.lanes(block.dtype))))
    ]
    func = whole = sch.mod["main"]
    for block, width in chosen:
        func = lanes.cut(func, sch.get(sch.get_loops(block.rv)[0]), block, width)
    for block in _multiplying(stages, choices):
        func = rows.multiplied(func, block)
    if func.same_as(whole):
        return sch, set()
    return s_tir.Schedule(func, error_render_level="fast"), {block.name for block, _ in chosen}


def _multiplying(stages: Sequence[Stage], choices: Choices) -> Iterator[Block]:
    """The blocks that a search wants to multiply where they divide."""
    for place, stage in enumerate(stages):
        divisions = [block for block in stage.blocks if stage.kind is Kind.ROWS and rows.divides(block)]
        if divisions:
            yield from choices.within(place).pick("divide", ([], divisions))
