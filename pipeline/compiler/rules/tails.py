"""Tiles that do not divide their axis: the last one moves back until it fits, in place of a condition in every step.

A split whose factor does not divide leaves a predicate on the blocks inside, which would stand in the innermost loop.
Here a loop of one round holds where the tile starts:

    for o in range(4): for i in vectorized(16):  where o*16 + i < 58:  y[o*16 + i] = x[o*16 + i]
    →  for o in range(4): for s in range(min(o*16, 42), + 1): for i in vectorized(16):  y[s + i] = x[s + i]

The last tile does a few points a second time. For spatial axes that is harmless, as long as no block reads what it or
a tile beside it overwrites: every rule here accumulates in buffers that belong to one tile. Along reduced axes the
points that an earlier tile has counted are left as they are:

    for o in range(4): for i in vectorized(16):  where o*16 + i < 58:  t[i] = t[i] + x[o*16 + i]
    →  …  t[i] = select(s + i >= o*16, t[i] + x[s + i], t[i])

Blocks that carry the annotation EXACT keep their predicates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tvm
import tvm_ffi
from tvm import sym, tirx
from tvm.s_tir import SBlockRealize

from pipeline.compiler.rules import terms

EXACT = "tvmake.exact"


def overlap(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Rewrites every predicate of the form above; others stay."""
    loops = terms.nodes(func.body, tirx.For)
    tails = _Tails({loop.loop_var: int(loop.extent) for loop in loops if isinstance(loop.extent, tirx.IntImm)})
    body = terms.rewrite(func.body, SBlockRealize, tails.moved)
    return func.with_body(terms.rewrite(body, tirx.For, tails.started))


@dataclass(frozen=True)
class _Start:
    """Where a tile starts: a variable that stands for min(outer, last), inside the loop over `inside`."""

    var: Any
    outer: Any
    last: int
    inside: Any

    def loop(self, body: Any) -> Any:
        first = tirx.min(self.outer, terms.integer(self.last, self.outer))
        return tirx.For(self.var, first, terms.integer(1, self.outer), tirx.ForKind.SERIAL, body)


@dataclass
class _Tails:
    extents: dict[Any, int]  # of each loop, by variable; outer loops first
    starts: list[_Start] = field(default_factory=list)

    def started(self, loop: Any) -> Any:
        """The loop with the starts of its tiles set inside it."""
        body = loop.body
        for start in self.starts:
            if start.inside.same_as(loop.loop_var):
                body = start.loop(body)
        if body.same_as(loop.body):
            return loop
        return tirx.For(
            loop.loop_var, loop.min, loop.extent, loop.kind, body, loop.thread_binding, loop.annotations, loop.step
        )

    def moved(self, realize: Any) -> Any:
        """The block without those conditions that its tiles no longer need."""
        block = realize.block
        if EXACT in block.annotations:
            kept = {key: value for key, value in block.annotations.items() if key != EXACT}
            return SBlockRealize(realize.iter_values, realize.predicate, _changed(block, annotations=kept))
        values, kept_conditions = list(realize.iter_values), []
        conditions = list(terms.conjuncts(realize.predicate))
        for condition in conditions:
            at = next((i for i, v in enumerate(values) if _bounds(condition, v)), None)
            split = self._parts(values[at]) if at is not None else None
            if at is None or split is None or split[2] > int(condition.b):
                kept_conditions.append(condition)
                continue
            outer, inner, tile = split
            start = self._start(outer, int(condition.b) - tile)
            values[at] = start.var + inner
            if block.iter_vars[at].iter_type == 2:
                block = _counted_once(block, block.iter_vars[at].var, outer)
        if len(kept_conditions) == len(conditions):
            return realize
        predicate = tirx.const(True, "bool")
        for condition in kept_conditions:
            predicate = tirx.And(predicate, condition)
        return SBlockRealize(values, predicate, block)

    def _start(self, outer: Any, last: int) -> _Start:
        known = next((s for s in self.starts if s.last == last and tvm_ffi.structural_equal(s.outer, outer)), None)
        if known is None:
            order = list(self.extents)
            inside = max(terms.variables(outer), key=lambda var: next(i for i, v in enumerate(order) if v.same_as(var)))
            known = _Start(tirx.Var("start", terms.dtype(outer)), outer, last, inside)
            self.starts.append(known)
        return known

    def _parts(self, value: Any) -> tuple[Any, Any, int] | None:
        """o*16 + i with i in range(16)  →  o*16, i, 16. Terms belong to the tile as long as they leave no gap in it."""
        variables = terms.variables(value)
        if any(var not in self.extents for var in variables):
            return None
        # A loop of one round stands for nothing but 0.
        value = terms.substitute(value, {var: terms.integer(0, var) for var in variables if self.extents[var] == 1})
        variables = [var for var in variables if self.extents[var] > 1]
        factors = sym.detect_linear_equation(value, variables)
        if len(factors) != len(variables) + 1 or not all(isinstance(factor, tirx.IntImm) for factor in factors):
            return None
        steps = sorted(zip(map(int, factors[:-1]), variables, strict=True), key=lambda pair: pair[0])
        if int(factors[-1]) or not steps or steps[0][0] <= 0:
            return None
        tile, inner = 1, terms.integer(0, value)
        while len(steps) > 1 and steps[0][0] <= tile:
            step, var = steps.pop(0)
            tile += step * (self.extents[var] - 1)
            inner = inner + var * step
        if tile == 1 or steps[0][0] != tile:
            return None
        outer = sum((var * step for step, var in steps), start=terms.integer(0, value))
        analyzer = sym.Analyzer()
        return analyzer.simplify(outer), analyzer.simplify(inner), tile


def _bounds(condition: Any, value: Any) -> bool:
    """Whether a condition is value < constant."""
    if not isinstance(condition, tirx.LT) or not isinstance(condition.b, tirx.IntImm):
        return False
    return bool(sym.Analyzer().can_prove_equal(value, condition.a))


def _counted_once(block: Any, var: Any, outer: Any) -> Any:
    """The block with an update that leaves alone the points which an earlier tile has counted."""
    store = block.body
    value = tirx.Select(var >= outer, store.value, tirx.BufferLoad(store.buffer, store.indices))
    return _changed(block, body=tirx.BufferStore(store.buffer, value, store.indices))


def _changed(block: Any, body: Any = None, annotations: Any = None) -> Any:
    return tvm.s_tir.SBlock(
        block.iter_vars,
        block.reads,
        block.writes,
        block.name_hint,
        block.body if body is None else body,
        block.init,
        block.alloc_buffers,
        block.match_buffers,
        block.annotations if annotations is None else annotations,
    )
