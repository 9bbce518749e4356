"""What a library carries beside its machine code: modules that the runtime makes again when it loads the library.

TVM packs them into one block of bytes that stands in the library under the name `__tvm_ffi__library_bin`. A library
has room for one, so the device code of its operators, each compiled alone, is joined here into one block:

    main       relax.VMExecutable → _lib
    operator   _lib → opencl (its kernels)                         one for each operator
    joined     relax.VMExecutable → _lib → opencl, opencl, …

The format is TVM's, of `ffi/extra/library_module.cc` in tvm-ffi, where it is read: the length of what follows; the tree
of imports as two vectors, child indices and where those of each module begin; then each module's kind and its bytes,
of which `_lib`, the library's own machine code, has none. Numbers are u64, little-endian; a vector's or a string's
length stands before it. Must not: know what the bytes of a kind mean, except for `with_cubin`.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

LIBRARY = "_lib"


@dataclass(frozen=True)
class Module:
    """One module of a packed block: what the runtime calls its kind, and the bytes from which it is made again."""

    kind: str
    content: bytes = b""


@dataclass(frozen=True)
class Packed:
    """Modules and which of them each imports, by index. The first is what the library loads as."""

    modules: tuple[Module, ...]
    imports: tuple[tuple[int, ...], ...]

    @property
    def devices(self) -> tuple[Module, ...]:
        """The modules that the machine code imports."""
        library = next(i for i, module in enumerate(self.modules) if module.kind == LIBRARY)
        return tuple(self.modules[i] for i in self.imports[library])


def join(main: Packed, devices: Iterable[Module]) -> Packed:
    """The block of `main` with further modules that its machine code imports. Each must import nothing."""
    added = tuple(devices)
    library = next(i for i, module in enumerate(main.modules) if module.kind == LIBRARY)
    count = len(main.modules)
    imports = [list(each) for each in main.imports] + [[] for _ in added]
    imports[library] += range(count, count + len(added))
    return Packed((*main.modules, *added), tuple(map(tuple, imports)))


def with_cubin(module: Module, source: bytes, cubin: bytes) -> Module:
    """A CUDA module of source text as one of machine code: (`cuda`, functions, source) → (`cubin`, functions, cubin).

    Raises ValueError where the module does not hold this source.
    """
    head, tail = _string(b"cuda"), _string(source)
    if not (module.content.startswith(head) and module.content.endswith(tail)):
        raise ValueError("TVM packed CUDA code in a way that is not known here")
    functions = module.content[len(head) : len(module.content) - len(tail)]
    return Module(module.kind, _string(b"cubin") + functions + _string(cubin))


def encode(packed: Packed) -> bytes:
    starts, children = [0], list[int]()
    for each in packed.imports:
        children += each
        starts.append(len(children))
    parts = [_vector(starts), _vector(children)]
    for module in packed.modules:
        parts.append(_string(module.kind.encode()))
        if module.kind != LIBRARY:
            parts.append(_string(module.content))
    return _string(b"".join(parts))


def decode(data: bytes) -> Packed:
    """The modules of a packed block. Raises ValueError where it is not one."""
    try:
        reader = _Reader(data)
        (length,) = reader.numbers(1)
        starts, children = reader.vector(), reader.vector()
        modules = tuple(_modules(reader, len(starts) - 1))
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError("not a block of packed modules") from error
    if length != len(data) - 8 or reader.place != len(data):
        raise ValueError("a block of packed modules that is longer or shorter than it says")
    return Packed(modules, tuple(children[a:b] for a, b in itertools.pairwise(starts)))


def _modules(reader: _Reader, count: int) -> Iterator[Module]:
    for _ in range(count):
        kind = reader.string().decode()
        yield Module(kind) if kind == LIBRARY else Module(kind, reader.string())


class _Reader:
    """Takes numbers and strings off the front of some bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.place = 0

    def numbers(self, count: int) -> tuple[int, ...]:
        found: tuple[int, ...] = struct.unpack_from(f"<{count}Q", self._data, self.place)
        self.place += 8 * count
        return found

    def vector(self) -> tuple[int, ...]:
        (length,) = self.numbers(1)
        return self.numbers(min(length, len(self._data)))

    def string(self) -> bytes:
        (length,) = self.numbers(1)
        found = self._data[self.place : self.place + length]
        self.place += length
        return found


def _vector(numbers: list[int]) -> bytes:
    return struct.pack(f"<{len(numbers) + 1}Q", len(numbers), *numbers)


def _string(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content
