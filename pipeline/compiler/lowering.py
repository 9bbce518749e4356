"""A Relax module without weights → two bytecode objects, and the unique functions that they call.

The module's entry function takes the model's inputs and then its weights. What depends on weights alone is lifted into
a function of its own, `prepare`, which runs once when an artifact is linked; what is left is inference.

Everything of Relax that is applied, in order, stands in the tuples below.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import tvm
from tvm import relax
from tvm.relax import transform
from tvm.relax.backend.cpu_generic import pipeline as cpu_generic
from tvm.relax.vm_build import _ffi_api as vm_api
from tvm.relax.vm_build import _vmcodegen

from pipeline.compiler import ir, lifting, objects, passes, prepack, rewriting, targets
from pipeline.compiler.copies import is_copy
from pipeline.compiler.folding import fold_scales
from pipeline.compiler.layout import channels_last
from pipeline.compiler.patterns import Pattern, group, of_libraries
from pipeline.compiler.preparing import share_extents
from pipeline.compiler.simplify import simplify
from pipeline.errors import ModelError
from pipeline.hashing import Digest
from pipeline.types import TensorSpec, symbol_of
from pipeline.weightfile import dtype_of

ENTRY = "main"
PREPARE = "prepare"

Phase = Callable[[tvm.IRModule], tvm.IRModule]  # a pass of TVM's, or a function

# 1. Rewrites while operators are still whole.
CANONICALISE = (
    passes.fold_batch_norm,
    transform.DecomposeOpsForInference(),
    simplify,
    fold_scales,
)
# How activations and the weights of convolutions lie in memory, by what `lower` is told.
LAYOUTS: Mapping[str, tuple[Phase, ...]] = {"NHWC": (channels_last,), "as-is": ()}
# 2. What depends on weights alone leaves the entry function: see pipeline.compiler.lifting.
# 3. Operators that a library would take as one are grouped: see pipeline.compiler.patterns. Inference only.
# 4. Operators become functions, each distinct call once.
LEGALISE = (
    transform.CanonicalizeBindings(),
    transform.DeadCodeElimination(),
    relax.backend.DispatchSampling(),
    relax.backend.DispatchSortScan(),
    passes.legalize_once,
)
# 5. Neighbours are fused. Inference only: what prepares weights runs once.
FUSE = (
    transform.AnnotateTIROpPattern(),
    transform.FuseOps(),
    transform.FuseTIR(),
)


@dataclass(frozen=True)
class Function:
    """One unique function: its canonical bytes and what a person wants to know of it."""

    name: str
    canonical: bytes
    structural_hash: str
    shapes: tuple[str, ...]
    calls: int  # per inference
    prepares: bool  # whether the preparation of weights calls it
    written: tuple[int, ...]  # indices of the parameters that it writes
    copies: bool  # whether it copies and does nothing else


Functions = dict[str, Function]  # by digest, in the order of the first call


@dataclass(frozen=True)
class Lowered:
    """What lowering makes of a module.

    weights  for each weight argument of inference: its spec; its name in the model, or "" and its index among what the
             preparation makes; the digest of the one function that it is for and the index of its parameter there, or
             "" and -1 where it has other uses
    packing  names of the weights that the preparation takes
    main     the object with inference's bytecode; prepare the preparation's, empty where there is nothing to prepare
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[tuple[TensorSpec, str, int, str, int], ...]
    packing: tuple[str, ...]
    main: bytes
    prepare: bytes
    functions: Functions


Watch = Callable[[str, tvm.IRModule], None]


def _unwatched(_name: str, _mod: tvm.IRModule) -> None:
    return None


def lower(
    mod: tvm.IRModule,
    weights: Sequence[str],
    outputs: Sequence[str],
    attributes: Mapping[str, object],
    watch: Watch = _unwatched,
    layout: str = "NHWC",
    host: Mapping[str, object] | None = None,
    patterns: Sequence[str] = (),
) -> Lowered:
    """Lowers a module whose entry function `main` takes the inputs and then the named weights, in order.

    `outputs` names what the entry function returns; `watch` is shown the module after each step. `layout` is one of
    LAYOUTS: "NHWC" has convolutions computed channels-last, "as-is" leaves tensors as the model has them. `host` is
    this machine as a target, where the target is another: weights are prepared here. `patterns` names the libraries by
    whose patterns operators are grouped, in the order of choice.
    Raises ModelError for an operator that TVM cannot lower or a shape that is still open.
    """
    target = targets.load(attributes)
    count = len(mod[ENTRY].params) - len(weights)
    inputs = tuple(_spec(var.name, var.ty, "input") for var in mod[ENTRY].params[:count])
    watch("imported", mod)
    mod = rewriting.with_inputs(mod, ENTRY, count)
    mod = _apply((*CANONICALISE, *LAYOUTS[layout]), mod, target)
    watch("canonical", mod)
    returned = _returned(mod, outputs)
    main, prepare, parted = lifting.modules(mod, ENTRY, PREPARE, count)
    bytecode, functions, users = _finish(main, ENTRY, count, target, attributes, watch, of_libraries(patterns))
    preparation: bytes = b""
    if prepare:
        here = attributes if host is None else host
        preparation, preparing, _ = _finish(prepare, PREPARE, 0, targets.load(here), here, watch)
        functions |= {digest: _also_prepares(functions.get(digest), each) for digest, each in preparing.items()}
    return Lowered(
        inputs,
        returned,
        tuple((*use, *users.get(i, ("", -1))) for i, use in enumerate(_uses(parted.main, count, parted, weights))),
        tuple(weights[i] for i in parted.taken),
        bytecode,
        preparation,
        functions,
    )


def _also_prepares(known: Function | None, preparing: Function) -> Function:
    return replace(known or preparing, calls=known.calls if known else 0, prepares=True)


def _apply(phases: Iterable[Phase], mod: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    with target, tvm.transform.PassContext(opt_level=3):
        for phase in phases:
            mod = phase(mod)
    return mod


def _uses(
    main: relax.Function, count: int, parted: lifting.Parted, weights: Sequence[str]
) -> Iterator[tuple[TensorSpec, str, int]]:
    """Where each weight argument of inference comes from."""
    packed = itertools.count()
    for var, index in zip(main.params[count:], parted.arguments, strict=True):
        if index is None:
            place = next(packed)
            yield _spec(f"packed_{place}", var.ty, "weight"), "", place
        else:
            yield _spec(weights[index], var.ty, "weight"), weights[index], -1


def _finish(
    mod: tvm.IRModule,
    entry: str,
    inputs: int,
    target: tvm.target.Target,
    attributes: Mapping[str, object],
    watch: Watch,
    patterns: Sequence[Pattern] = (),
) -> tuple[bytes, Functions, dict[int, tuple[str, int]]]:
    """Groups, legalises, fuses and finalises one module, whose entry function takes `inputs` inputs and then weights.

    Returns its bytecode as an object; the functions that it calls; and for each weight that one function alone takes,
    and may take in another layout, that function's digest and the index of its parameter.
    """
    watch(f"{entry}_lifted", mod)
    skipped: frozenset[str] = frozenset()
    if entry == PREPARE:
        mod = _apply((share_extents,), mod, target)
        skipped = _needless(mod)
    mod = group(mod, patterns)
    mod = _apply(LEGALISE, mod, target)
    watch(f"{entry}_legalised", mod)
    _require_legal(mod)
    if entry == ENTRY:
        mod = _apply(FUSE, mod, target)
        watch(f"{entry}_fused", mod)
    places: dict[int, prepack.Place] = {}
    if entry == ENTRY:
        mod, places = prepack.mark_layout_free(mod, entry, inputs)
    # 6. TVM's own last steps for a CPU: memory is planned, and calls become the virtual machine's.
    last = [*cpu_generic.dataflow_lower_passes(target), *cpu_generic.finalize_passes(target)]
    last = [phase for phase in last if phase.info.name not in skipped]
    checks = next(i for i, phase in enumerate(last) if phase.info.name == "VMShapeLower")
    mod = _apply(last[:checks], mod, target)
    watch(f"{entry}_final", mod)

    functions: Functions = {}
    symbols = {}
    digests: dict[str, str] = {}
    for gvar, times in _calls(mod).items():
        canonical = ir.canonical(mod[gvar])
        digests[gvar.name_hint] = digest = Digest.of(canonical).hash
        symbols[gvar] = symbol_of(digest)
        known = functions.get(digest)
        functions[digest] = (
            replace(known, calls=known.calls + times) if known else _described(gvar, mod[gvar], canonical, times)
        )
    # From here on functions are called by name, and a weight may look as its function wants it.
    mod = passes.call_by_symbol(mod, symbols)
    if places:
        mod = prepack.weight_types(mod, entry, inputs)
    builder = relax.ExecBuilder()
    _vmcodegen(builder, _apply(last[checks:], mod, target))
    executable = vm_api.VMLink(builder, target, None, [], {})
    users = {i: (digests[gvar.name_hint], param) for i, (gvar, param) in places.items()}
    return objects.pack_bytecode(executable, attributes), functions, users


def _needless(mod: tvm.IRModule) -> frozenset[str]:
    """TVM's last passes that the preparation of weights goes without: all of them are slow on a thousand calls.

    Its memory is not planned, as it runs once; reshapes are not looked for where there are none.
    """
    shaping = {"reshape", "expand_dims", "squeeze", "flatten"}
    reshapes = any(rewriting.operator(call) in shaping for call in passes.all_calls(mod))
    return frozenset({"StaticPlanBlockMemory"} if reshapes else {"StaticPlanBlockMemory", "RewriteDataflowReshape"})


def _described(gvar: tvm.ir.GlobalVar, func: tvm.tirx.PrimFunc, canonical: bytes, calls: int) -> Function:
    name = readable_name(gvar.name_hint)
    return Function(
        name,
        canonical,
        ir.structural_hash(func),
        ir.shapes(func),
        calls,
        prepares=False,
        written=ir.written(func),
        copies=is_copy(func),
    )


def _calls(mod: tvm.IRModule) -> dict[tvm.ir.GlobalVar, int]:
    """How often each PrimFunc is called, in the order of the first call."""
    functions = {gvar for gvar, func in mod.functions_items() if isinstance(func, tvm.tirx.PrimFunc)}
    calls: dict[tvm.ir.GlobalVar, int] = {}
    for call in passes.all_calls(mod):
        for callee in (call.op, *call.args):
            if isinstance(callee, tvm.ir.GlobalVar) and callee in functions:
                calls[callee] = calls.get(callee, 0) + 1
    return calls


# Operators that later passes or the virtual machine take as they are.
_LATER = (
    "relax.call_tir",
    "relax.call_dps_packed",
    "relax.call_pure_packed",
    "relax.call_inplace_packed",
    "relax.call_builtin_with_ctx",
    "relax.invoke",
    "relax.null_value",
    "relax.reshape",
    "relax.shape_of",
    "relax.tensor_to_shape",
    "relax.shape_to_tensor",
    "relax.memory.",
    "relax.vm.",
    "relax.builtin.",
    "relax.to_vdevice",
    "relax.print",
    "relax.assert_op",
)


def _require_legal(mod: tvm.IRModule) -> None:
    operators = {call.op.name for call in passes.all_calls(mod) if isinstance(call.op, tvm.ir.Op)}
    left = [name for name in operators if not name.startswith(_LATER)]
    if left:
        raise ModelError(
            f"TVM has no code for the operator {', '.join(sorted(left))} with these arguments",
            hint="replace it in the model by operators that TVM lowers",
        )


def _returned(mod: tvm.IRModule, names: Sequence[str]) -> tuple[TensorSpec, ...]:
    ty = mod[ENTRY].ret_ty
    fields = list(ty.fields) if isinstance(ty, relax.TupleType) else [ty]
    chosen = list(names) if len(names) == len(fields) else [f"output_{i}" for i in range(len(fields))]
    return tuple(_spec(name, field, "output", mod) for name, field in zip(chosen, fields, strict=True))


def _spec(name: str, ty: relax.Type, role: str, mod: tvm.IRModule | None = None) -> TensorSpec:
    if not isinstance(ty, relax.TensorType):
        raise ModelError(f"the {role} {str(name)!r} is a {type(ty).__name__}, not a tensor", hint="return tensors only")
    if not passes.is_static(ty):
        raise ModelError(
            f"the {role} {str(name)!r} has an open shape{_opened_by(mod)}",
            hint="give inputs fixed shapes, shapes={'input': (1, 3, 224, 224)}; make constants of what decides shapes",
        )
    if not _is_whole_bytes(str(ty.dtype)):
        raise ModelError(
            f"the {role} {str(name)!r} has the dtype {ty.dtype}, which artifacts cannot take or return",
            hint="cast it in the model",
        )
    return TensorSpec(str(name), tuple(int(extent) for extent in ty.shape.values), str(ty.dtype))


def _is_whole_bytes(dtype: str) -> bool:
    """Whether NumPy can hold a dtype, element by element: not those of fewer than eight bits."""
    bits = re.search(r"\d+", dtype)
    try:
        return dtype_of(dtype).itemsize > 0 and (bits is None or int(bits[0]) % 8 == 0)
    except TypeError:
        return False


def _opened_by(mod: tvm.IRModule | None) -> str:
    """Which operator first gives a tensor whose shape is not known, in words."""
    for call, ty in passes.call_types(mod) if mod is not None else ():
        if isinstance(call.op, tvm.ir.Op) and not passes.is_static(ty):
            return f": that of what {call.op.name} gives is known only when it runs"
    return ""


def readable_name(name: str) -> str:
    """A function's name without the numbers that tell namesakes apart.

    fused_conv2d12_add3_relu7 → fused_conv2d_add_relu,  log2 → log2, expand_dims1 → expand_dims
    """
    return "_".join(_WITHOUT_COUNTER.sub(r"\1", part) for part in name.split("_") if part != "tir")


_WITHOUT_COUNTER = re.compile(r"^(.*?[123]d|(?!log2$|log10$)[a-z]+?)\d+$")
