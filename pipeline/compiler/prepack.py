"""Weights laid out ahead: which parameters are weights, and what of a scheduled function may run once, at build time.

Both follow TVM's own conventions, those of MetaSchedule's RewriteLayout and Relax's SplitLayoutRewritePreproc:

    PrimFunc attribute "layout_free_buffers"                   indices of parameters that are weights used only here, so
                                                               that a schedule may lay them out as it likes
    block annotation "meta_schedule.layout_rewrite_preproc"    a block that lays out such a weight and nothing else

A strategy leaves its function whole, so that it computes the same with or without a build system; `split` parts it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import tvm
import tvm_ffi
from tvm import relax, tirx

LAYOUT_FREE = "layout_free_buffers"
PREPROCESS = "meta_schedule.layout_rewrite_preproc"

Place = tuple[tvm.ir.GlobalVar, int]  # a function and the index of one of its parameters


def mark_layout_free(mod: tvm.IRModule, entry: str, inputs: int) -> tuple[tvm.IRModule, dict[int, Place]]:
    """Marks in each PrimFunc the parameters that are weights wherever it is called, and used nowhere else.

        main(x, weight_0): y = call_tir(conv2d, (x, weight_0))   →  conv2d gets {"layout_free_buffers": [1]}

    `inputs` is the number of the entry function's parameters before its weights. Returns the module, and for each
    marked weight, by its index among the weights, where it is used.
    """
    func = mod[entry]
    indices = {var: i for i, var in enumerate(func.params[inputs:])}
    given: dict[Place, list[relax.Expr]] = defaultdict(list)
    used: dict[relax.Var, set[Place | None]] = defaultdict(set)
    for place, argument in _arguments(func):
        if place is not None:
            given[place].append(argument)
        if isinstance(argument, relax.Var):
            used[argument].add(place)

    def only_here(argument: relax.Expr, place: Place) -> bool:
        return isinstance(argument, relax.Var) and argument in indices and used[argument] == {place}

    free = {place for place, arguments in given.items() if all(only_here(each, place) for each in arguments)}
    marked = {gvar: sorted(i for g, i in free if g.same_as(gvar)) for gvar in {gvar for gvar, _ in free}}
    changed = {
        gvar: mod[gvar].with_attr(LAYOUT_FREE, marked[gvar]) if gvar in marked else each
        for gvar, each in mod.functions_items()
    }
    places = {index: next(iter(used[var])) for var, index in indices.items() if used[var] & free}
    return tvm.IRModule(changed, attrs=mod.attrs), {i: place for i, place in places.items() if place is not None}


def _arguments(func: relax.Function) -> Iterator[tuple[Place | None, relax.Expr]]:
    """Every use of a variable in a function's bindings, with its place where it is an argument of call_tir."""
    for block in func.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if _is_call_tir(value):
                yield from (((value.args[0], i), each) for i, each in enumerate(value.args[1].fields))
            else:
                yield from ((None, var) for var in relax.analysis.free_vars(value))
    yield from ((None, var) for var in relax.analysis.free_vars(func.body.body))


def _is_call_tir(value: relax.Expr) -> bool:
    return (
        isinstance(value, relax.Call)
        and isinstance(value.op, tvm.ir.Op)
        and value.op.name == "relax.call_tir"
        and isinstance(value.args[1], relax.Tuple)
    )


def layout_free(func: tirx.PrimFunc) -> frozenset[int]:
    """The indices of the parameters whose layout is free."""
    return frozenset(int(index) for index in (func.attrs or {}).get(LAYOUT_FREE, ()))


@dataclass(frozen=True)
class Packing:
    """What lays out one parameter: its index, and a function of the plain weight and the buffer to fill."""

    param: int
    function: tirx.PrimFunc


def split(func: tirx.PrimFunc) -> tuple[tirx.PrimFunc, tuple[Packing, ...]]:
    """Parts a scheduled function into one that takes its weights as laid out, and what lays them out.

        def f(x, w, y):                                       def f(x, packed, y):
            packed = alloc()                                      y = conv(x, packed)
            with block("pack"):   # layout_rewrite_preproc    →
                packed[...] = w[...]                          def pack(w, packed):
            y = conv(x, packed)                                   packed[...] = w[...]

    A block of that kind which is not at the top, or which reads anything but one free parameter, stays where it is.
    """
    root = func.body
    if not isinstance(root, tvm.s_tir.SBlockRealize):
        return func, ()
    free = layout_free(func)
    params = list(func.params)
    packings, kept, gone = [], [], set()
    attrs = func.without_attr(LAYOUT_FREE).attrs
    stmts = _statements(root.block.body)
    for stmt in stmts:
        place = _packs(stmt, params, free, root.block.alloc_buffers)
        if place is None or _mentions(stmts, stmt, func.params[place[0]]):
            kept.append(stmt)
            continue
        index, packed = place
        packings.append(Packing(index, _function([func.params[index], packed], [stmt], (), attrs)))
        params[index] = packed
        gone.add(packed)
    if not packings or not kept:
        return func, ()
    alloc = [buffer for buffer in root.block.alloc_buffers if buffer not in gone]
    return _function(params, kept, alloc, attrs), tuple(packings)


def _statements(stmt: tirx.Stmt) -> list[tirx.Stmt]:
    return list(stmt.seq) if isinstance(stmt, tirx.SeqStmt) else [stmt]


def _function(
    params: list[tirx.Var], stmts: list[tirx.Stmt], alloc: Sequence[tirx.Var], attrs: tvm.ir.DictAttrs | None
) -> tirx.PrimFunc:
    body = stmts[0] if len(stmts) == 1 else tirx.SeqStmt(stmts)
    block = tvm.s_tir.SBlock([], [], [], "root", body, None, list(alloc))
    return tirx.PrimFunc(params, tvm.s_tir.SBlockRealize([], True, block), attrs=attrs)


def _packs(
    stmt: tirx.Stmt, params: list[tirx.Var], free: frozenset[int], alloc: Iterable[tirx.Var]
) -> tuple[int, tirx.Var] | None:
    """The parameter that a statement lays out and the buffer that it fills; None where it does something else."""
    found: list[tvm.s_tir.SBlock] = []

    def visit(block: tvm.s_tir.SBlock) -> None:
        found.append(block)

    tvm_ffi.structural_walk(stmt, (tvm.s_tir.SBlock, visit), order="post")
    if len(found) != 1 or not bool(found[0].annotations.get(PREPROCESS, False)):
        return None
    reads = {region.source for region in found[0].reads}
    writes = {region.source for region in found[0].writes}
    if len(reads) != 1 or len(writes) != 1:
        return None
    (read,), (written,) = reads, writes
    index = next((i for i, param in enumerate(params) if param.same_as(read)), -1)
    is_alloc = any(written.same_as(buffer) for buffer in alloc)
    return (index, written) if index in free and is_alloc else None


def _mentions(stmts: Iterable[tirx.Stmt], but: tirx.Stmt, param: tirx.Var) -> bool:
    """Whether another statement reads a parameter as it is."""
    sources: list[relax.Expr] = []

    def visit(block: tvm.s_tir.SBlock) -> None:
        sources.extend(region.source for region in (*block.reads, *block.writes))

    for stmt in stmts:
        if not stmt.same_as(but):
            tvm_ffi.structural_walk(stmt, (tvm.s_tir.SBlock, visit), order="post")
    return any(source.same_as(param) for source in sources)


def weight_types(mod: tvm.IRModule, entry: str, inputs: int) -> tvm.IRModule:
    """Takes the types from the weights of an entry function: what a weight looks like is decided after extraction.

        def main(x: R.Tensor((1, 8)), weight_0: R.Tensor((8, 8)))  →  def main(x: R.Tensor((1, 8)), weight_0: R.Any)

    For a module whose callees are external: a function in the module states the types that it takes.
    """
    func = mod[entry]
    free = {var: relax.Var(var.name, relax.AnyType()) for var in func.params[inputs:]}
    body = _Renamer(mod, free).visit_expr(func.body)
    params = [free.get(var, var) for var in func.params]
    renamed = relax.Function(params, body, func.ret_ty, func.is_pure, func.attrs)
    return tvm.IRModule({mod.get_global_var(entry): renamed}, attrs=mod.attrs)


@relax.expr_functor.mutator
class _Renamer(relax.expr_functor.PyExprMutator):
    def __init__(self, mod: tvm.IRModule, names: Mapping[relax.Var, relax.Var]) -> None:
        super().__init__(mod)
        self._names = names

    def visit_var_(self, var: relax.Var) -> relax.Expr:
        return self._names.get(var, var)
