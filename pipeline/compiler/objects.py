"""A scheduled PrimFunc → its machine code and device code; a virtual machine's bytecode → an object file.

    kind                          host part                         device code
    llvm                          an object, for any triple         none
    c                             C source                          none
    cuda, metal, opencl, webgpu   an object that launches kernels   packed, to be joined into the library by `embed`

For WebAssembly objects are made as TVM's "system library": a module in a browser has no dynamic symbols to look up, so
each object registers its function with the runtime when it starts.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tvm
import tvm_ffi
from tvm.runtime import _ffi_api as runtime_api

from pipeline.compiler import nvcc, packed, targets
from pipeline.platforms import DEVICE_SUFFIXES, has_device_code, host_of, is_source, is_wasm, triple_of


@dataclass(frozen=True)
class Compiled:
    """An operator's parts.

    code     an object file, or C source
    device   its device code as `embed` takes it, empty where it has none
    kernels  the same device code to look at or to ship, by the suffix of its file: `.cl`, `.wgsl`, `.cu`, `.cubin`
    """

    code: bytes
    device: bytes = b""
    kernels: Mapping[str, bytes] = field(default_factory=dict)


def compile_function(func: tvm.tirx.PrimFunc, symbol: str, attributes: Mapping[str, object]) -> bytes:
    """The host part of one function, callable as `symbol` through TVM's FFI. Same function, same bytes."""
    return compile_parts(func, symbol, attributes).code


def compile_parts(
    func: tvm.tirx.PrimFunc, symbol: str, attributes: Mapping[str, object], cubin: bool = False
) -> Compiled:
    """All parts of one function, callable as `symbol` through TVM's FFI. Same function, same bytes.

    `cubin`: CUDA kernels become machine code through nvcc; without it they stay source, which the device's own
    compiler translates at load. Raises RuntimeError where a function for a device is bound to none of its threads.
    """
    built = _built(func.with_attr("global_symbol", symbol), attributes)
    code = _joinable(built.inspect_source()) if is_source(attributes) else _written(built)
    if not has_device_code(attributes):
        return Compiled(code)
    if not built.imports:
        # TVM compiles its loops for the host, which would reach into the device's memory.
        raise RuntimeError(f"the function is not scheduled for a device of kind {attributes['kind']}")
    devices = packed.decode(_packed(built)).devices
    sources = [module.inspect_source().encode() for module in built.imports]
    kernels = {DEVICE_SUFFIXES[str(attributes["kind"])]: b"\n".join(sources)}
    if cubin and attributes["kind"] == "cuda":
        ((device,), (source,)) = devices, sources  # TVM makes one module of all kernels of a target
        kernels[".cubin"] = machine_code = nvcc.cubin(source, str(attributes["arch"]))
        devices = (packed.with_cubin(device, source, machine_code),)
    alone = packed.Packed((packed.Module(packed.LIBRARY),), ((),))
    return Compiled(code, packed.encode(packed.join(alone, devices)), kernels)


def _built(func: tvm.tirx.PrimFunc, attributes: Mapping[str, object]) -> tvm.runtime.Module:
    """What TVM makes of one function. Raises RuntimeError with the beginning of what it says where it refuses."""
    if attributes["kind"] == "webgpu":
        func = _finite(func)
    mod = tvm.IRModule({func.attrs["global_symbol"]: func})
    if is_wasm(triple_of(attributes)):
        mod = mod.with_attr("system_lib_prefix", "")
    try:
        with _without_devices():
            return tvm.tirx.build(mod, target=targets.load(attributes))
    except Exception as error:
        # What follows the first line is the function, marked, over some hundred lines.
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RuntimeError(f"TVM generates no code: {first.strip()[:400]}") from error


def _finite(func: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """A function without infinities, for WGSL, which has no word for them and lets a device do without.

        max(x, -inf)  →  max(x, -3.4028235e38)

    https://www.w3.org/TR/WGSL/#floating-point-evaluation. Raises RuntimeError for what is not a number.
    """

    def replaced(value: tvm.tirx.FloatImm) -> tvm.tirx.FloatImm:
        if math.isnan(value.value):
            raise RuntimeError("WebGPU has no constants that are not a number")
        if not math.isinf(value.value):
            return value
        return (tvm.tirx.max_value if value.value > 0 else tvm.tirx.min_value)(str(value.ty.dtype))

    return tvm_ffi.structural_map(func, (tvm.tirx.FloatImm, replaced))


@contextmanager
def _without_devices() -> Iterator[None]:
    """Device code is generated as where there is no such device: with one, TVM compiles kernels for it at once."""
    name = "TVM_COMPILE_FORCE_FALLBACK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


_CONTEXT = "void* __tvm_ffi__library_ctx = NULL;"
_SHARED_CONTEXT = f"""\
#if defined(__GNUC__)
__attribute__((weak))
#endif
{_CONTEXT}"""
_ENTRY = "// CodegenC: NOTE: Auto-generated entry function"
# Words that TVM writes and C does not know, after the last header that might use them otherwise.
_HEADERS_END = "#include <stdbool.h>\n"
_WORDS = f"""\
{_HEADERS_END}\
#define inff INFINITY
#define inf ((double)INFINITY)
#define nanf NAN
#define nan ((double)NAN)
#define half _Float16
"""


def _joinable(source: str) -> bytes:
    """C source that is C, and that can be linked with that of other functions.

    TVM writes each function as if it were the only one of its library: with the library's context, which all share,
    and with an entry function that only calls it. It writes infinity as the numbers' printer does.

        void* __tvm_ffi__library_ctx = NULL;   →   __attribute__((weak)) void* __tvm_ffi__library_ctx = NULL;
        int32_t __tvm_ffi_main(...) {...}      →
        x > (-inff)                            →   #define inff INFINITY, and the same
    """
    source = source.replace(_CONTEXT, _SHARED_CONTEXT).replace(_HEADERS_END, _WORDS, 1)
    return source.partition(_ENTRY)[0].encode()


def pack_bytecode(executable: tvm.runtime.Module, attributes: Mapping[str, object]) -> bytes:
    """A virtual machine's executable, to be linked with the functions that it calls.

    An object file or C source; for targets with device code what `embed` makes an object of, together with that.
    """
    if has_device_code(attributes):
        return _packed(executable)
    if is_source(attributes):
        return str(runtime_api.ModulePackImportsToC(executable, False, "")).encode()
    return _carrying(_packed(executable), attributes)


def embed(main: bytes, devices: Iterable[bytes], attributes: Mapping[str, object]) -> bytes:
    """The object that carries what `pack_bytecode` gave and the device code of the functions that it calls."""
    modules = [module for device in devices for module in packed.decode(device).devices]
    return _carrying(packed.encode(packed.join(packed.decode(main), modules)), attributes)


def _packed(module: tvm.runtime.Module) -> bytes:
    return bytes(runtime_api.ModulePackImportsToTensor(module).numpy().tobytes())


def _carrying(block: bytes, attributes: Mapping[str, object]) -> bytes:
    """An object file of the host's that holds a packed block and nothing else."""
    host = dict(host_of(attributes))
    carry = tvm_ffi.get_global_func("codegen.codegen_blob")
    return _written(carry(block, is_wasm(triple_of(attributes)), json.dumps(host), ""))


def _written(module: tvm.runtime.Module) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.o"
        module.write_to_file(str(path))
        return path.read_bytes()
