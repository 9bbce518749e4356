"""The one normal form of a PrimFunc: equal bytes if and only if the functions are structurally equal.

Owns: the bytes that name a workload and that hold any function between stages, and what is read off a function for
people and for diagnosis. Must not: schedule, lower or know a target.

`tvm.ir.save_json` writes a graph of nodes that holds more than structure: names, source positions, the order of
attributes and which equal subexpressions happen to be one object. The normal form is the same format, rebuilt by
walking that graph from its root, depth first in field order:

    variables    n, threads         →  v0, v1, …        numbered at first visit, each kept apart from all others
    buffers      A, B, T_relu       →  b0, b1, …        a buffer is a variable of buffer type
    blocks       root, conv2d, …    →  root, block0, …  schedules find the outermost block by the name "root"
    fields that structural equality ignores  →  null    source positions
    maps         insertion order    →  sorted by key
    equal nodes  one or many        →  one
    PrimFunc.ty  as left by passes  →  derived anew from the parameters
    attributes                      →  all but `global_symbol`
    metadata     TVM's version      →  none             it belongs in keys, with the rest of the toolchain

What a field is (a node's index, a literal, a name, ignored) is read from the reflection that TVM's own serializer and
structural equality are driven by, so that a new kind of node needs no change here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm_ffi import core as ffi_core

from pipeline.errors import StoreError


def canonical(func: tirx.PrimFunc) -> bytes:
    """The normal form of a function. `Digest.of` it is the workload digest; `load` reads it back.

    Functions that differ in names only give the same bytes:

        def relu(A, B): for i in range(8): B[i] = max(A[i], 0)
        def main(x, y): for k in range(8): y[k] = max(x[k], 0)
        → b0, b1 and v0: the same nodes in the same order

    A variable that nothing defines is numbered like any other, as in structural equality with `map_free_vars`.
    """
    return _Walk(json.loads(tvm.ir.save_json(_anonymous(func)))).bytes()


def load(data: bytes) -> tirx.PrimFunc:
    """The function that `canonical` wrote, under its canonical names and without `global_symbol`.

    Raises StoreError where the bytes are not such a function.
    """
    try:
        func = tvm.ir.load_json(data.decode())
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise StoreError(f"a stored function cannot be read: {_first_line(error)}") from error
    if not isinstance(func, tirx.PrimFunc):
        raise StoreError(f"a stored function cannot be read: it is a {type(func).__name__}")
    return func


def structural_hash(func: tirx.PrimFunc) -> str:
    """TVM's structural hash without `global_symbol`, 64 bits as 16 hexadecimal digits.

    A bucket beside the digest, for comparison with TVM's own records. Too narrow to rest a shared key on.
    """
    return f"{tvm_ffi.structural_hash(_anonymous(func)) & (1 << 64) - 1:016x}"


def shapes(func: tirx.PrimFunc) -> tuple[str, ...]:
    """What a person reads of the buffer parameters, in order: extents in elements, then the dtype.

    A: Buffer((1, 64, n), "float32"), s: Buffer((), "int32")  →  "1x64x?:float32", "scalar:int32"
    """
    types = [param.ty for param in func.params if isinstance(param.ty, tirx.BufferType)]
    return tuple(f"{'x'.join(map(_extent, ty.shape)) or 'scalar'}:{ty.dtype}" for ty in types)


def written(func: tirx.PrimFunc) -> tuple[int, ...]:
    """The indices of the parameters that a function stores to."""
    stored = []

    def visit(store: tirx.BufferStore) -> None:
        stored.append(store.buffer)

    tvm_ffi.structural_walk(func.body, (tirx.BufferStore, visit), order="post")
    return tuple(i for i, param in enumerate(func.params) if any(buffer.same_as(param) for buffer in stored))


def _extent(extent: Any) -> str:
    return str(int(extent)) if isinstance(extent, tirx.IntImm) else "?"


def _anonymous(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function without its name, and with the type that follows from its parameters.

    Structural equality does not compare `PrimFunc.ty`, so passes may leave equal functions with different ones.
    """
    func = func.without_attr("global_symbol")
    return tirx.PrimFunc(func.params, func.body, func.ret_type, func.attrs)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


# What a name starts with, by the type that has it. Another type with a name that equality ignores gets "n0", "n1", …
_PREFIX = {"ir.Var": "v", "s_tir.SBlock": "block"}
_BUFFER_PREFIX, _ROOT_BLOCK = "b", "root"
# The types that structural equality tells apart by object, not by content (kind FreeVar). Reflection does not show
# this to Python. The other types with names (blocks) are compared by content at each place where they occur.
_VARIABLES = frozenset({"ir.Var", "relax.expr.DataflowVar"})
_SEQUENCES = frozenset({"ffi.Array", "ffi.List"})
_MAPS = frozenset({"ffi.Map", "ffi.Dict"})
_LEAF_KEYS = frozenset({"ffi.String", "int", "bool"})
# Field types that the serializer writes in place: None, int, bool, float, dtype. All others are indices of nodes.
_IN_PLACE = frozenset({0, 1, 2, 3, 5})


@dataclass(frozen=True, slots=True)
class _Layout:
    """How one type of node is written: a template for the indices of children, then literals, then the name."""

    template: str
    children: tuple[str, ...]
    literals: tuple[str, ...]
    named: bool


@functools.cache
def _layout(type_key: str) -> _Layout:
    children: list[str] = []
    literals: list[str] = []
    names: list[str] = []
    nulls: list[str] = []
    for field in _fields(ffi_core._lookup_or_register_type_info_from_type_key(type_key)):
        if field.field_static_type_index in _IN_PLACE:
            literals.append(field.name)
        elif field.c_structural_eq != "ignore":
            children.append(field.name)
        elif field.ty is not None and field.ty.origin == "str":
            names.append(field.name)
        else:
            nulls.append(field.name)
    if len(names) > 1:
        raise NotImplementedError(f"{type_key} has more than one name: {names}")
    slots = [f'"{name}":%s' for name in (*children, *literals, *names)] + [f'"{name}":0' for name in nulls]
    template = f'{{"type":"{type_key}","data":{{{",".join(slots)}}}}}'
    return _Layout(template, tuple(children), tuple(literals), bool(names))


def _fields(info: Any) -> Iterator[Any]:
    if info.parent_type_info is not None:
        yield from _fields(info.parent_type_info)
    yield from info.fields or ()


class _Walk:
    """One walk over one graph.

    A node is written as text over the indices of its children, so equal text is equal content and gets one index.
    Canonical names are unique, so nodes that have one are never merged.
    """

    def __init__(self, graph: dict[str, Any]) -> None:
        self._nodes: list[dict[str, Any]] = graph["nodes"]
        self._root: int = graph["root_index"]
        self._root_block = self._find_root_block()
        self._index: dict[str, int] = {'{"type":"None"}': 0}  # text of every node written → its new index
        self._seen: dict[int, int] = {}  # old index → new index, where another visit must give the same
        self._named: dict[str, int] = {}  # prefix → how many names were given

    def bytes(self) -> bytes:
        root = self._visit()
        return f'{{"root_index":{root},"nodes":[{",".join(self._index)}]}}'.encode()

    def _visit(self) -> int:
        """Visits depth first, with its own stack: a sum of thousands of terms is as deep as it is long."""
        todo = [self._root]  # an old index to enter, or the complement of one whose children are done
        done: list[int] = []  # new indices of finished nodes that no parent has taken yet
        while todo:
            at = todo.pop()
            if at >= 0:
                if (seen := self._seen.get(at)) is not None:
                    done.append(seen)
                    continue
                children = self._children(at)
                if children:
                    todo.append(~at)
                    todo.extend(reversed(children))
                    continue
                new = self._write(at, [])
            else:
                at = ~at
                children = self._children(at)
                new = self._write(at, done[-len(children) :])
                del done[-len(children) :]
            if self._is_the_same_at_each_visit(at, children):
                self._seen[at] = new
            done.append(new)
        return done[0]

    def _children(self, at: int) -> list[int]:
        node = self._nodes[at]
        kind: str = node["type"]
        data: Any = node.get("data")
        if isinstance(data, dict):
            return [data[name] for name in _layout(kind).children]
        if kind in _SEQUENCES:
            return list(data)
        return self._sorted(data) if kind in _MAPS else []

    def _sorted(self, data: list[int]) -> list[int]:
        """Keys and values in order of the keys. Other keys than leaves keep their order: at worst a missed sharing."""
        if len(data) <= 2:
            return data
        nodes = self._nodes
        pairs = list(zip(data[::2], data[1::2], strict=True))
        if all(nodes[key]["type"] in _LEAF_KEYS for key, _ in pairs):
            pairs.sort(key=lambda pair: (nodes[pair[0]]["type"], nodes[pair[0]]["data"]))
        return [index for pair in pairs for index in pair]

    def _write(self, at: int, children: list[int]) -> int:
        """Gives a node its new index, and its name where it has one."""
        node = self._nodes[at]
        kind, data = node["type"], node.get("data")
        if isinstance(data, dict):
            layout = _layout(kind)
            values: list[object] = list(children)
            if layout.literals:
                values += [json.dumps(data[name]) for name in layout.literals]
            if layout.named:
                values.append(self._intern(f'{{"type":"ffi.String","data":"{self._name(at)}"}}'))
            return self._intern(layout.template % tuple(values))
        if kind in _SEQUENCES or kind in _MAPS:
            return self._intern(f'{{"type":"{kind}","data":[{",".join(map(str, children))}]}}')
        if "data" not in node:
            return self._intern(f'{{"type":"{kind}"}}')
        return self._intern(f'{{"type":"{kind}","data":{json.dumps(data, separators=(",", ":"))}}}')

    def _intern(self, text: str) -> int:
        return self._index.setdefault(text, len(self._index))

    def _name(self, at: int) -> str:
        if at == self._root_block:
            return _ROOT_BLOCK
        node = self._nodes[at]
        prefix = _PREFIX.get(node["type"], "n")
        if prefix == "v" and self._nodes[node["data"]["ty"]]["type"] == "tirx.BufferType":
            prefix = _BUFFER_PREFIX
        number = self._named.get(prefix, 0)
        self._named[prefix] = number + 1
        return f"{prefix}{number}"

    def _is_the_same_at_each_visit(self, at: int, children: list[int]) -> bool:
        """Whether a second visit gives the first one's node: not where a block is inside, which gets a name a place.

        Otherwise one block object in two places and two equal blocks would differ. A variable is itself everywhere.
        """
        node = self._nodes[at]
        if node["type"] in _VARIABLES:
            return True
        if isinstance(node.get("data"), dict) and _layout(node["type"]).named:
            return False
        return all(child in self._seen for child in children)

    def _find_root_block(self) -> int:
        """The old index of the block that is the function's whole body, or -1."""
        body = self._nodes[self._nodes[self._root]["data"]["body"]]
        return int(body["data"]["block"]) if body["type"] == "s_tir.SBlockRealize" else -1
