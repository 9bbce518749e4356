"""Parts a Relax function into what depends on weights alone and what depends on inputs.

    def main(x, w, b):                            def prepare(w):
        t = permute_dims(w)                           t = permute_dims(w)
        y = add(matmul(x, t), b)             →        return (t,)
        return y                                  def main(x, b, t):
                                                      return add(matmul(x, t), b)

Weights that inference takes as they are stay as they are, and those that nothing reads are dropped. (TVM's own
LiftTransformParams hands every weight through one tuple, so that any change of one weight's shape changes the whole.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm
from tvm import relax

from pipeline.compiler.rewriting import INPUTS


@dataclass(frozen=True)
class Parted:
    """The two functions, and where inference's weight arguments come from.

    arguments  for each parameter of `main` after the inputs: the index of a weight, or None for the next of what
               `prepare` returns
    taken      for each parameter of `prepare`: the index of a weight
    prepare    None where there is nothing to prepare
    """

    main: relax.Function
    arguments: tuple[int | None, ...]
    prepare: relax.Function | None
    taken: tuple[int, ...]


def part(func: relax.Function, inputs: int) -> Parted:
    """Parts a function whose first `inputs` parameters are inputs and whose others are weights."""
    weights = {var: i for i, var in enumerate(func.params[inputs:])}
    lifted, rest = _classified(func, set(weights))
    used = {var for _, bindings in rest for b in bindings for var in relax.analysis.free_vars(b.value)}
    used.update(relax.analysis.free_vars(func.body.body))

    direct = [var for var in weights if var in used]
    crossing = [binding.var for binding in lifted if binding.var in used]
    fresh = _numbered([*direct, *crossing])
    aliases = list(zip([*direct, *crossing], fresh, strict=True))
    main = _inference(func, [*func.params[:inputs], *fresh], aliases, rest)
    arguments = (*(weights[var] for var in direct), *(None for _ in crossing))
    if not crossing:
        return Parted(main, arguments, None, ())
    prepare, taken = _preparation(lifted, crossing, weights)
    return Parted(main, arguments, prepare, taken)


Bindings = list[relax.Binding]


def _classified(
    func: relax.Function, fixed: set[relax.Var]
) -> tuple[Bindings, list[tuple[relax.BindingBlock, Bindings]]]:
    """Bindings that depend on weights alone, and the others by block. Only dataflow is moved: it has no effects."""
    lifted: Bindings = []
    rest: list[tuple[relax.BindingBlock, Bindings]] = []
    for block in func.body.blocks:
        kept: Bindings = []
        for binding in block.bindings:
            pure = isinstance(block, relax.DataflowBlock) and isinstance(binding, relax.VarBinding)
            if pure and all(var in fixed for var in relax.analysis.free_vars(binding.value)):
                fixed.add(binding.var)
                lifted.append(binding)
            else:
                kept.append(binding)
        rest.append((block, kept))
    return _tensors_only(lifted, rest), rest


def _tensors_only(lifted: Bindings, rest: list[tuple[relax.BindingBlock, Bindings]]) -> Bindings:
    """Gives back what inference would have to be handed as a tuple or a shape: only tensors are stored."""
    used = {var for _, bindings in rest for b in bindings for var in relax.analysis.free_vars(b.value)}
    stays: Bindings = []
    for binding in reversed(lifted):
        if binding.var in used and not isinstance(binding.var.ty, relax.TensorType):
            rest[0][1].insert(0, binding)
            used.update(relax.analysis.free_vars(binding.value))
        else:
            stays.append(binding)
    return stays[::-1]


def _inference(
    func: relax.Function,
    params: Sequence[relax.Var],
    aliases: Sequence[tuple[relax.Var, relax.Var]],
    rest: Sequence[tuple[relax.BindingBlock, Bindings]],
) -> relax.Function:
    blocks = [
        relax.DataflowBlock(bindings) if isinstance(block, relax.DataflowBlock) else relax.BindingBlock(bindings)
        for block, bindings in rest
    ]
    if aliases:
        blocks.insert(0, relax.DataflowBlock([relax.VarBinding(var, param) for var, param in aliases]))
    merged = _merged(blocks)
    return relax.Function(params, relax.SeqExpr(merged, func.body.body), func.ret_ty, func.is_pure, func.attrs)


def _merged(blocks: Sequence[relax.BindingBlock]) -> list[relax.BindingBlock]:
    """Adjacent dataflow blocks as one: a dataflow variable does not outlive its block."""
    merged: list[relax.BindingBlock] = []
    for block in blocks:
        if merged and isinstance(block, relax.DataflowBlock) and isinstance(merged[-1], relax.DataflowBlock):
            merged[-1] = relax.DataflowBlock([*merged[-1].bindings, *block.bindings])
        elif block.bindings:
            merged.append(block)
    return merged


def _preparation(
    lifted: Bindings, crossing: Sequence[relax.Var], weights: dict[relax.Var, int]
) -> tuple[relax.Function, tuple[int, ...]]:
    """A function of just those weights that `crossing` depends on."""
    alive = set(crossing)
    kept: Bindings = []
    for binding in reversed(lifted):
        if binding.var in alive:
            alive.update(relax.analysis.free_vars(binding.value))
            kept.append(binding)
    taken = [var for var in weights if var in alive]
    params = _numbered(taken)
    aliases = [relax.VarBinding(var, param) for var, param in zip(taken, params, strict=True)]
    result = relax.Var("packed", relax.TupleType([var.ty for var in crossing]))
    block = relax.DataflowBlock([*aliases, *kept[::-1], relax.VarBinding(result, relax.Tuple(list(crossing)))])
    func = relax.Function(params, relax.SeqExpr([block], result), result.ty, True)
    return func, tuple(weights[var] for var in taken)


def _numbered(variables: Sequence[relax.Var]) -> list[relax.Var]:
    """Parameters named by their place: what a model calls its weights is no part of its code."""
    return [relax.Var(f"weight_{i}", var.ty) for i, var in enumerate(variables)]


def modules(
    mod: tvm.IRModule, entry: str, prepare: str, inputs: int
) -> tuple[tvm.IRModule, tvm.IRModule | None, Parted]:
    """A module parted into one for inference and one for preparation, which share its PrimFuncs."""
    others = {gvar: func for gvar, func in mod.functions_items() if gvar.name_hint != entry}
    parted = part(mod[entry].without_attr(INPUTS), inputs)
    main = _normal(tvm.IRModule({**others, entry: parted.main}, attrs=mod.attrs))
    if parted.prepare is None:
        return main, None, parted
    named = parted.prepare.with_attr("global_symbol", prepare)
    return main, _normal(tvm.IRModule({**others, prepare: named}, attrs=mod.attrs)), parted


def _normal(mod: tvm.IRModule) -> tvm.IRModule:
    return relax.transform.Normalize()(mod)
