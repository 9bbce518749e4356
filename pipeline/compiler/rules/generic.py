"""The rule that takes what no other does: outer spatial loops in parallel, blocks as they are."""

from __future__ import annotations

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.schedule import SBlockRV

from pipeline.compiler.rules.choices import Choices

_WORTH_THREADS = 1 << 14


def schedule(func: tirx.PrimFunc, _target: tvm.target.Target, _choices: Choices) -> s_tir.Schedule | None:
    """for i, j: y[i, j] = …  →  for ij in parallel: y[…] = …"""
    sch = s_tir.Schedule(func, error_render_level="fast")
    for rv in sch.get_child_blocks(sch.get_sblock("root")):
        _parallelise(sch, rv)
    return sch


def _parallelise(sch: s_tir.Schedule, rv: SBlockRV) -> None:
    axes, loops = sch.get(rv).iter_vars, sch.get_loops(rv)
    if len(axes) != len(loops):
        return
    spatial = []
    for axis, loop in zip(axes, loops, strict=True):
        if axis.iter_type != 0:
            break
        spatial.append(loop)
    extents = [sch.get(loop).extent for loop in loops]
    work = 1
    for extent in extents:
        work *= int(extent) if isinstance(extent, tirx.IntImm) else 1
    if spatial and work > _WORTH_THREADS:
        sch.parallel(sch.fuse(*spatial))
