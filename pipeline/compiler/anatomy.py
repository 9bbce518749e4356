"""What a PrimFunc computes, read from its structure: a convolution or matrix product, and what is done to its result.

Owns: the reading of functions as lowering leaves them (unscheduled, one block in each nest of loops), whatever their
names. Must not: change a function, or know of a library.

    pad(x); y = conv(x, w); z = y + bias; out = max(z, 0)
    →  core   a product of x (padded) and w, summed into y
       cuts   y: nothing done · z: add bias · out: add bias, relu

A library takes the core and as many of the steps after it as it can: a *cut* is a buffer at which the function can be
parted, with the steps from the core's result to it, and the statements that remain to be run after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tvm
import tvm_ffi
from tvm import sym, tirx

from pipeline.compiler.activations import composed, recognised

SPATIAL, REDUCE = 0, 2  # kinds of a block's variables


@dataclass(frozen=True)
class Nest:
    """A statement of a function's body: loops around one block that stores one value at each place."""

    statement: Any
    block: Any

    @property
    def store(self) -> Any:
        return self.block.body

    @property
    def buffer(self) -> Any:
        """What the block writes."""
        return self.store.buffer

    @property
    def variables(self) -> list[Any]:
        return [axis.var for axis in self.block.iter_vars]

    def is_elementwise(self) -> bool:
        """Whether it stores once to each element, of which each index is one of the block's variables."""
        shape, indices = extents(self.buffer), list(self.store.indices)
        spatial = {axis.var: int(axis.dom.extent) for axis in self.block.iter_vars if int(axis.iter_type) == SPATIAL}
        return (
            self.block.init is None
            and len(spatial) == len(self.block.iter_vars) == len(set(indices)) == len(indices)
            and [spatial.get(index, -1) for index in indices] == list(shape)
        )


@dataclass(frozen=True)
class Operand:
    """A tensor beside the result: its stride in elements along each dimension of the result, 0 where it broadcasts."""

    buffer: Any
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One thing done to each element of the result: its name in `activations`, its numbers, or a second operand.

    add, sub, mul, div, max, min have an operand; the others have numbers only.
    """

    name: str
    numbers: tuple[float, ...] = ()
    operand: Operand | None = None


@dataclass(frozen=True)
class Cut:
    """A place where the function can be parted: `steps` lead from the core's result to `result`; `after` remains.

    `reshaped` tells that `result` has the elements of the core's result in the same order under another shape.
    """

    result: Any
    steps: tuple[Step, ...]
    after: tuple[Any, ...]
    reshaped: bool = False


@dataclass(frozen=True)
class Core:
    """A sum of products: result[...] = sum over the reduction axes of left[...] * right[...].

    before, after  zeros around `left`, for each of its dimensions
    """

    axes: tuple[tuple[Any, int, bool], ...]  # variable, extent, whether it is summed over
    left: Any
    left_indices: tuple[Any, ...]
    right: Any
    right_indices: tuple[Any, ...]
    result: Any
    result_indices: tuple[Any, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Anatomy:
    """A function's core, the statements that run before it, and its cuts, from the shortest to the longest."""

    core: Core
    first: tuple[Any, ...]
    cuts: tuple[Cut, ...]


def dissect(func: tirx.PrimFunc) -> Anatomy | None:
    """Reads a function. None where it is not one sum of products with elementwise blocks after it."""
    nests = nests_of(func)
    cores = [i for i, nest in enumerate(nests or ()) if _is_sum(nest)]
    if nests is None or len(cores) != 1:
        return None
    at = cores[0]
    first, later = nests[:at], nests[at + 1 :]
    core = _core(nests[at])
    if core is None or not all(nest.is_elementwise() for nest in later):
        return None
    padding = next((nest for nest in first if nest.buffer.same_as(core.left)), None)
    if padding is not None and not any(_reads(nest, core.left) for nest in nests if nest not in (nests[at], padding)):
        unpadded = _without_padding(core, padding)
        if unpadded is not None:
            core, first = unpadded, [nest for nest in first if nest is not padding]
    return Anatomy(core, tuple(nest.statement for nest in first), tuple(_cuts(func, core, later)))


def extents(buffer: Any) -> tuple[int, ...]:
    """The shape of a buffer; -1 for an extent that is not known."""
    return tuple(int(extent) if isinstance(extent, tirx.IntImm) else -1 for extent in buffer.shape)


def dtype(buffer: Any) -> str:
    return str(buffer.dtype)


# --- reading statements


def nests_of(func: tirx.PrimFunc) -> list[Nest] | None:
    """The statements of a function's body, if each of them is loops around one block that stores once."""
    root = func.body
    if not isinstance(root, tvm.s_tir.SBlockRealize) or root.block.iter_vars:
        return None
    body = root.block.body
    nests = [_nest(stmt) for stmt in (body.seq if isinstance(body, tirx.SeqStmt) else [body])]
    return None if None in nests else [nest for nest in nests if nest is not None]


def _nest(statement: Any) -> Nest | None:
    inner, loops = statement, []
    while isinstance(inner, tirx.For):
        if inner.kind != tirx.ForKind.SERIAL:
            return None
        loops.append(inner.loop_var)
        inner = inner.body
    if not isinstance(inner, tvm.s_tir.SBlockRealize) or not isinstance(inner.block.body, tirx.BufferStore):
        return None
    known = all(isinstance(axis.dom.extent, tirx.IntImm) for axis in inner.block.iter_vars)
    # Each variable of the block is a loop's or, where its extent is 1, the constant 0.
    bound = [value for value in inner.iter_values if not _is_integer(value, 0)]
    if not known or bound != loops or not _is_integer(inner.predicate, 1):
        return None
    return Nest(statement, inner.block)


def _is_integer(value: Any, wanted: int) -> bool:
    return isinstance(value, tirx.IntImm) and int(value) == wanted


def _is_sum(nest: Nest) -> bool:
    return nest.block.init is not None


def loads(expr: Any) -> list[Any]:
    """The loads within an expression or a statement, in order."""
    found: list[Any] = []
    tvm_ffi.structural_walk(expr, (tvm.ir.TensorLoad, found.append), order="post")
    return found


def _reads(nest: Nest, buffer: Any) -> bool:
    return any(load.source.same_as(buffer) for load in loads(nest.store.value))


def _substituted(expr: Any, values: Mapping[Any, Any]) -> Any:
    return tvm_ffi.structural_map(expr, (tirx.Var, lambda var: values.get(var, var)))


# --- the core


def _core(nest: Nest) -> Core | None:
    """sum[i] = sum[i] + left[...] * right[...], from 0, in float32"""
    init, store = nest.block.init, nest.store
    value = store.value
    if not isinstance(init, tirx.BufferStore) or not _is_zero(init.value) or not isinstance(value, tirx.Add):
        return None
    product = value.b
    if not _is_load(value.a, store.buffer, store.indices) or not isinstance(product, tirx.Mul):
        return None
    left, right = product.a, product.b
    if not isinstance(left, tvm.ir.TensorLoad) or not isinstance(right, tvm.ir.TensorLoad):
        return None
    buffers = (left.source, right.source, store.buffer)
    if any(dtype(buffer) != "float32" or -1 in extents(buffer) for buffer in buffers):
        return None
    axes = tuple((axis.var, int(axis.dom.extent), int(axis.iter_type) == REDUCE) for axis in nest.block.iter_vars)
    none = (0,) * len(left.indices)
    return Core(
        axes,
        left.source,
        tuple(left.indices),
        right.source,
        tuple(right.indices),
        store.buffer,
        tuple(store.indices),
        none,
        none,
    )


def _is_zero(value: Any) -> bool:
    return isinstance(value, tirx.FloatImm) and float(value.value) == 0.0


def _is_load(value: Any, buffer: Any, indices: Sequence[Any]) -> bool:
    return (
        isinstance(value, tvm.ir.TensorLoad)
        and value.source.same_as(buffer)
        and all(tvm_ffi.structural_equal(a, b) for a, b in zip(value.indices, indices, strict=True))
    )


def _without_padding(core: Core, nest: Nest) -> Core | None:
    """The core as it reads the tensor that a nest pads with zeros, or only copies; None where it does neither."""
    found = unpadded(nest, _is_zero)
    return None if found is None else replace(core, left=found[0], before=found[1], after=found[2])


def unpadded(nest: Nest, is_wanted: Callable[[Any], bool]) -> tuple[Any, tuple[int, ...], tuple[int, ...]] | None:
    """The tensor that a nest pads with a wanted value, and how much before and after each dimension.

    padded[i] = if_then_else(1 <= i < 15, x[i - 1], 0)  →  x, 1 before, 1 after
    """
    if not nest.is_elementwise():
        return None
    condition, load = None, nest.store.value
    if isinstance(load, tvm.ir.Call) and load.op.name.endswith("if_then_else"):
        condition, load, otherwise = load.args
        if not is_wanted(otherwise):
            return None
    if not isinstance(load, tvm.ir.TensorLoad) or dtype(load.source) != "float32":
        return None
    variables = list(nest.store.indices)
    if len(load.indices) != len(variables):
        return None
    analyzer = sym.Analyzer()
    shifts = [analyzer.simplify(i - at) for i, at in zip(variables, load.indices, strict=True)]
    if not all(isinstance(shift, tirx.IntImm) for shift in shifts):
        return None
    inner, outer = extents(load.source), extents(nest.buffer)
    before = tuple(int(shift) for shift in shifts)
    after = tuple(o - i - b for o, i, b in zip(outer, inner, before, strict=True))
    if min(*before, *after) < 0 or not _holds_exactly_inside(condition, variables, inner, before, outer):
        return None
    return load.source, before, after


def _holds_exactly_inside(
    condition: Any, variables: Sequence[Any], inner: Sequence[int], before: Sequence[int], outer: Sequence[int]
) -> bool:
    """Whether a condition is true for all places inside the padding and false for all others."""
    boxes = [range(b, b + i) for b, i in zip(before, inner, strict=True)]
    if condition is None:
        return all(box == range(o) for box, o in zip(boxes, outer, strict=True))
    if not _proves(condition, variables, boxes):
        return False
    for at, box in enumerate(boxes):
        for slab in (range(box.start), range(box.stop, outer[at])):
            place = [slab if i == at else range(extent) for i, extent in enumerate(outer)]
            if slab and not _proves(tirx.Not(condition), variables, place):
                return False
    return True


def _proves(condition: Any, variables: Sequence[Any], places: Sequence[range]) -> bool:
    analyzer = sym.Analyzer()
    for var, place in zip(variables, places, strict=True):
        analyzer.bind(var, _range(var, place))
    return bool(analyzer.can_prove(condition))


def _range(var: Any, place: range) -> tvm.ir.Range:
    kind = str(var.ty.dtype)
    return tvm.ir.Range.from_min_extent(tirx.IntImm(kind, place.start), tirx.IntImm(kind, len(place)))


# --- linear indices

Terms = dict[tuple[Any, int], int]  # (variable, what it is divided by) → its coefficient


def terms(index: Any, variables: Sequence[Any]) -> Terms | None:
    """An index as a sum of variables, or of their quotients by constants, with integer coefficients and no constant.

    v1 * 2 + v5  →  {(v1, 1): 2, (v5, 1): 1}        v3 // 8 * 4 + v4  →  {(v3, 8): 4, (v4, 1): 1}
    """
    quotients: dict[Any, tuple[Any, int]] = {}

    def replaced(node: Any) -> Any:
        if not (isinstance(node.a, tirx.Var) and isinstance(node.b, tirx.IntImm)):
            return node
        var = tirx.Var("quotient", str(node.a.ty.dtype))
        quotients[var] = (node.a, int(node.b))
        return var

    plain = tvm_ffi.structural_map(index, (tirx.FloorDiv, replaced))
    names = [*variables, *quotients]
    found = list(sym.detect_linear_equation(plain, names))
    if not found or not all(isinstance(each, tirx.IntImm) for each in found) or int(found[-1]) != 0:
        return None
    return {
        quotients.get(var, (var, 1)): int(each) for var, each in zip(names, found[:-1], strict=True) if int(each) != 0
    }


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a compact tensor, in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _offset(buffer: Any, indices: Sequence[Any]) -> Any:
    whole: Any = tirx.IntImm("int64", 0)
    for index, stride in zip(indices, row_major(extents(buffer)), strict=True):
        whole = whole + index.astype("int64") * tirx.IntImm("int64", stride)
    return whole


# --- what is done to the result


def _cuts(func: tirx.PrimFunc, core: Core, nests: Sequence[Nest]) -> Iterator[Cut]:
    """The places where a function can be parted, each with the steps that lead to it."""
    made = {nest.buffer: nest for nest in nests}
    chains: dict[Any, tuple[tuple[Step, ...], bool]] = {core.result: ((), False)}
    for nest in nests:
        for leaf in reversed(chains):
            more = _steps(nest, leaf, core.result, made, chains[leaf][1])
            if more is not None:
                chains[nest.buffer] = (*chains[leaf][0], *more[0]), more[1]
                break
    for result, (steps, reshaped) in chains.items():
        after = _after(func, core, result, nests)
        if after is not None:
            yield Cut(result, _joined(steps), after, reshaped)


def _joined(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Steps in a row that together are one activation become it: linear, clip  →  hardsigmoid"""
    for length in range(len(steps), 1, -1):
        for at in range(len(steps) - length + 1):
            run = steps[at : at + length]
            named = composed([(each.name, each.numbers) for each in run]) if not any(s.operand for s in run) else None
            if named is not None:
                return _joined((*steps[:at], Step(*named), *steps[at + length :]))
    return steps


def _after(func: tirx.PrimFunc, core: Core, result: Any, nests: Sequence[Nest]) -> tuple[Any, ...] | None:
    """What is left to run once `result` is known; None where that needs something of the way to it as well."""
    from_core = {core.result}
    for nest in nests:
        if any(load.source in from_core for load in loads(nest.store.value)):
            from_core.add(nest.buffer)
    needed = {result}
    for nest in reversed(nests):
        if nest.buffer in needed:
            needed |= {load.source for load in loads(nest.store.value)}
    within = (needed & from_core) - {result}
    gone = within | {result}
    kept = [nest for nest in nests if nest.buffer not in gone]
    if any(load.source in within for nest in kept for load in loads(nest.store.value)):
        return None
    if any(param in within for param in func.params):
        return None
    return tuple(nest.statement for nest in _alive(func, kept))


def _alive(func: tirx.PrimFunc, nests: Sequence[Nest]) -> list[Nest]:
    """Those of the nests whose result somebody reads."""
    wanted, alive = set(func.params), []
    for nest in reversed(nests):
        if nest.buffer in wanted:
            alive.append(nest)
            wanted |= {load.source for load in loads(nest.store.value)}
    return alive[::-1]


_TOO_LARGE = 256  # loads in one expression; activations as TVM writes them have less than ten


def _steps(
    nest: Nest, leaf: Any, result: Any, made: Mapping[Any, Nest], reshaped: bool
) -> tuple[tuple[Step, ...], bool] | None:
    """The steps from `leaf` to what a nest writes, and whether the shape has changed by then."""
    if dtype(nest.buffer) != "float32" or dtype(leaf) != "float32":
        return None
    value = _expanded(nest.store.value, leaf, made)
    if value is None:
        return None
    analyzer = sym.Analyzer()
    for var, extent in zip(nest.store.indices, extents(nest.buffer), strict=True):
        analyzer.bind(var, _range(var, range(extent)))
    here = _offset(nest.buffer, nest.store.indices)
    element = tirx.Var("element", "float32")
    elsewhere = False

    def replaced(load: Any) -> Any:
        nonlocal elsewhere
        if not load.source.same_as(leaf):
            return load
        same = math.prod(extents(leaf)) == math.prod(extents(nest.buffer))
        if same and _is_integer(analyzer.simplify(_offset(leaf, load.indices) - here), 0):
            return element
        elsewhere = True
        return load

    value = tvm_ffi.structural_map(value, (tvm.ir.TensorLoad, replaced))
    reshaped = reshaped or extents(nest.buffer) != extents(result)
    if elsewhere or any(load.source.same_as(result) for load in loads(value)):
        return None

    def operand(load: Any) -> Operand | None:
        return None if reshaped else _operand(load, nest, analyzer)

    found = _recognised(value, element, operand)
    return None if found is None else (tuple(found), reshaped)


def _expanded(value: Any, leaf: Any, made: Mapping[Any, Nest]) -> Any | None:
    """An expression with the loads of what other nests write, down to `leaf`, replaced by what these nests store."""

    def inlined(load: Any) -> Any:
        nest = made.get(load.source)
        if nest is None or load.source.same_as(leaf):
            return load
        return _substituted(nest.store.value, dict(zip(nest.store.indices, load.indices, strict=True)))

    while any(load.source in made and not load.source.same_as(leaf) for load in loads(value)):
        value = tvm_ffi.structural_map(value, (tvm.ir.TensorLoad, inlined))
        if len(loads(value)) > _TOO_LARGE:
            return None
    return value


def _operand(load: Any, nest: Nest, analyzer: Any) -> Operand | None:
    if dtype(load.source) != "float32" or -1 in extents(load.source):
        return None
    variables = list(nest.store.indices)
    shape = extents(nest.buffer)
    found = terms(analyzer.simplify(_offset(load.source, load.indices)), variables)
    if found is None or any(divisor != 1 for _, divisor in found):
        return None
    strides = tuple(found.get((var, 1), 0) if n > 1 else 0 for var, n in zip(variables, shape, strict=True))
    return Operand(load.source, strides) if min(strides, default=0) >= 0 else None


_BINARY: dict[type, str] = {
    tirx.Add: "add",
    tirx.Sub: "sub",
    tirx.Mul: "mul",
    tirx.Div: "div",
    tirx.Max: "max",
    tirx.Min: "min",
}


def _recognised(value: Any, element: Any, operand: Callable[[Any], Operand | None]) -> list[Step] | None:
    """An expression as a chain of steps on `element`: max(element + b[c], 0)  →  add b, relu"""
    if value.same_as(element):
        return []
    name = _BINARY.get(type(value))
    if name is not None and not (_has(value.a, element) and _has(value.b, element)):
        made = _with_operand(name, value, element, operand)
        if made is not None:
            return made
    # A function of one inner value: the smallest that leaves nothing of the element beside it, so that the function
    # is as much as has a name.
    for inner in _inner(value, element):
        variable = tirx.Var("inner", "float32")
        function = _without(value, inner, variable)
        if _has(function, element) or loads(function):
            continue
        named = recognised(function, variable)
        if named is None:
            continue
        steps = _recognised(inner, element, operand)
        return None if steps is None else [*steps, Step(*named)]
    return None


def _with_operand(name: str, value: Any, element: Any, operand: Callable[[Any], Operand | None]) -> list[Step] | None:
    """inner + b[...], and the other operations of two tensors; b[...] - inner as the sum of b and -inner."""
    inner, other = (value.a, value.b) if _has(value.a, element) else (value.b, value.a)
    if not isinstance(other, tvm.ir.TensorLoad):
        return None
    tensor, steps = operand(other), _recognised(inner, element, operand)
    if tensor is None or steps is None:
        return None
    if inner is value.b and name == "sub":
        return [*steps, Step("linear", (-1.0, 0.0)), Step("add", (), tensor)]
    if inner is value.b and name == "div":
        return None
    return [*steps, Step(name, (), tensor)]


def _has(expr: Any, element: Any) -> bool:
    found = False

    def visit(var: Any) -> None:
        nonlocal found
        found = found or var.same_as(element)

    tvm_ffi.structural_walk(expr, (tirx.Var, visit), order="post")
    return found


def _inner(value: Any, element: Any) -> list[Any]:
    """The parts of an expression that depend on the element, the smallest first, without the whole."""
    found: list[tuple[int, Any]] = []

    def visit(node: Any) -> int:
        children = [child for child in _children(node) if _has(child, element)]
        size = 1 + sum(visit(child) for child in children)
        found.append((size, node))
        return size

    visit(value)
    distinct: list[Any] = []
    for _, node in sorted(found[:-1], key=lambda pair: pair[0]):
        if not any(tvm_ffi.structural_equal(node, other) for other in distinct):
            distinct.append(node)
    return distinct


def _children(node: Any) -> list[Any]:
    if isinstance(node, tvm.ir.Call):
        return list(node.args)
    if isinstance(node, tirx.Select):
        return [node.condition, node.true_value, node.false_value]
    if isinstance(node, tirx.Cast | tirx.Not):
        return [node.value if isinstance(node, tirx.Cast) else node.a]
    return [node.a, node.b] if hasattr(node, "a") and hasattr(node, "b") else []


def _without(value: Any, inner: Any, variable: Any) -> Any:
    """An expression with all that equals `inner` replaced by a variable."""
    if tvm_ffi.structural_equal(value, inner):
        return variable
    return tvm_ffi.structural_map(
        value, (type(inner), lambda node: variable if tvm_ffi.structural_equal(node, inner) else node)
    )
