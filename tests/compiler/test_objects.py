"""Functions become code for each kind of target that TVM builds for here, without the device, always the same."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm.script import ir as I  # noqa: N812
from tvm.script import relax as R  # noqa: N812

from pipeline import symbols
from pipeline.compiler import ir, objects, packed, targets
from pipeline.compiler.lowering import lower
from pipeline.linker import compile_source, link
from pipeline.platforms import has_device_code, is_source, suffix_of, triple_of
from pipeline.stages import cc, codegen, embed
from pipeline.stages import link as link_stage
from pipeline.toolchain import driver_for, nvcc, runtime_headers
from pipeline.types import symbol_of

TARGETS: dict[str, Any] = {
    "native": "native",
    "aarch64": {"kind": "llvm", "mtriple": "aarch64-linux-gnu"},
    "armv7": {"kind": "llvm", "mtriple": "armv7-linux-gnueabihf", "mattr": ["+neon"]},
    "riscv64": {"kind": "llvm", "mtriple": "riscv64-linux-gnu"},
    "wasm32": {"kind": "llvm", "mtriple": "wasm32-unknown-unknown-wasm"},
    "windows": {"kind": "llvm", "mtriple": "x86_64-pc-windows-msvc"},
    "apple": {"kind": "llvm", "mtriple": "arm64-apple-macos"},
    "c": {"kind": "c"},
    "opencl": {"kind": "opencl", "host": {"kind": "llvm", "mtriple": "aarch64-linux-gnu"}},
    "webgpu": {"kind": "webgpu"},
    "metal": {"kind": "metal"},
    "cuda": {"kind": "cuda", "arch": "sm_80"},
}
# How an object for each begins. ELF: the machine stands at byte 18.
# https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.eheader.html
ELF, WASM, MACH_O, COFF = b"\x7fELF", b"\0asm", b"\xcf\xfa\xed\xfe", b"\x64\x86"
MAGIC = {
    "aarch64": (ELF, 183),
    "armv7": (ELF, 40),
    "riscv64": (ELF, 243),
    "wasm32": (WASM, None),
    "windows": (COFF, None),
    "apple": (MACH_O, None),
    "opencl": (ELF, 183),
    "webgpu": (WASM, None),
    "metal": (MACH_O, None),
}
KERNELS = {
    "opencl": (".cl", "__kernel void"),
    "webgpu": (".wgsl", "@compute"),
    "metal": (".metal", "kernel void"),
    "cuda": (".cu", "__global__"),
}


@I.ir_module
class Perceptron:
    @R.function
    def main(
        x: R.Tensor((2, 16), "float32"), a: R.Tensor((16, 32), "float32"), b: R.Tensor((32, 4), "float32")
    ) -> R.Tensor((2, 4), "float32"):
        with R.dataflow():
            hidden = R.nn.relu(R.matmul(x, a))
            y = R.matmul(hidden, b)
            R.output(y)
        return y


@I.ir_module
class Convolutional:
    @R.function
    def main(
        x: R.Tensor((1, 8, 8, 4), "float32"), k: R.Tensor((3, 3, 4, 16), "float32"), a: R.Tensor((16, 10), "float32")
    ) -> R.Tensor((1, 10), "float32"):
        with R.dataflow():
            c = R.nn.relu(R.nn.conv2d(x, k, padding=1, data_layout="NHWC", kernel_layout="HWIO"))
            p = R.nn.max_pool2d(c, pool_size=(2, 2), strides=(2, 2), layout="NHWC")
            y = R.nn.softmax(R.matmul(R.mean(p, axis=[1, 2]), a))
            R.output(y)
        return y


@dataclass(frozen=True)
class Made:
    """A network's parts for a target."""

    attributes: Mapping[str, object]
    main: bytes
    functions: Mapping[str, tvm.tirx.PrimFunc]

    def compiled(self, cubin: bool = False) -> dict[str, objects.Compiled]:
        return {
            symbol: objects.compile_parts(func, symbol, self.attributes, cubin)
            for symbol, func in self.functions.items()
        }

    def files(self, compiled: Mapping[str, objects.Compiled]) -> dict[str, bytes]:
        """What is linked, by file name: objects, or C sources that are to be compiled first."""
        suffix, main = suffix_of(self.attributes), self.main
        if has_device_code(self.attributes):
            main = objects.embed(main, [each.device for each in compiled.values()], self.attributes)
        return {f"main{suffix}": main, **{f"{symbol}{suffix}": each.code for symbol, each in compiled.items()}}

    def linked(self, compiled: Mapping[str, objects.Compiled]) -> memoryview:
        triple, files = triple_of(self.attributes), self.files(compiled)
        if is_source(self.attributes):
            files = {f"{name}.o": compile_source(source, triple) for name, source in files.items()}
        return link(files, triple=triple)


def made(mod: tvm.IRModule, target: str | dict[str, object]) -> Made:
    attributes = targets.resolve(TARGETS[target] if isinstance(target, str) else target)
    weights = [str(var.name) for var in mod["main"].params[1:]]
    low = lower(mod, weights, ["y"], attributes)
    functions = {symbol_of(digest): ir.load(each.canonical) for digest, each in low.functions.items()}
    return Made(attributes, low.main, {name: scheduled(func, attributes) for name, func in functions.items()})


def scheduled(func: tvm.tirx.PrimFunc, attributes: Mapping[str, object]) -> tvm.tirx.PrimFunc:
    """A function as it is, or bound to a device's threads by the one rule of TVM's that applies to all."""
    if not has_device_code(attributes):
        return func
    from tvm.s_tir import dlight

    with targets.load(attributes):
        return dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(tvm.IRModule({"main": func}))["main"]


def require_magic(target: str, content: bytes) -> None:
    magic, machine = MAGIC.get(target, (ELF, None))
    assert content.startswith(magic)
    assert machine is None or int.from_bytes(content[18:20], "little") == machine


def require_c(tmp_path: Path, source: bytes) -> None:
    """That a C compiler takes the source, without one warning."""
    (tmp_path / "function.c").write_bytes(source)
    headers = [argument for folder in runtime_headers() for argument in ("-isystem", str(folder))]
    command = ["gcc", "-fsyntax-only", "-Wall", "-Werror", "-Wno-unused", *headers, "function.c"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def require_code(target: str, compiled: Mapping[str, objects.Compiled], tmp_path: Path) -> None:
    for symbol, each in compiled.items():
        if target == "c":
            assert f"__tvm_ffi_{symbol}(" in each.code.decode()
            require_c(tmp_path, each.code)
        else:
            require_magic(target, each.code)
        assert bool(each.device) == (target in KERNELS)
        if target in KERNELS:
            suffix, word = KERNELS[target]
            text = each.kernels[suffix].decode()
            assert word in text
            assert f"{symbol}_kernel" in text
            assert [module.kind for module in packed.decode(each.device).devices] == [target]


@pytest.mark.parametrize("target", TARGETS)
def test_a_small_network_compiles(target: str, tmp_path: Path) -> None:
    network = made(Perceptron, target)
    compiled = network.compiled()
    assert len(compiled) == 2
    require_code(target, compiled, tmp_path)
    files = network.files(compiled)
    if target == "c":
        require_c(tmp_path, files["main.c"])
    else:
        require_magic(target, files["main.o"])


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_operator_compiles_for_every_target_to_the_same_bytes_and_links(target: str, tmp_path: Path) -> None:
    for mod in (Perceptron, Convolutional):
        network, again = made(mod, target), made(mod, target)
        compiled = network.compiled()
        require_code(target, compiled, tmp_path)
        assert again.files(again.compiled()) == network.files(compiled)
        if driver_for(triple_of(network.attributes)):
            assert network.linked(compiled) == network.linked(compiled)


def test_c_sources_of_several_functions_become_one_library(tmp_path: Path) -> None:
    network = made(Perceptron, "c")
    library = loaded(network.linked(network.compiled()), tmp_path)
    (code,) = library.imports
    assert (library.kind, code.kind) == ("relax.VMExecutable", "library")
    assert all(code.implements_function(symbol) for symbol in network.functions)


def loaded(library: memoryview, folder: Path) -> tvm.runtime.Module:
    (folder / "lib.so").write_bytes(library)
    return tvm.runtime.load_module(str(folder / "lib.so"))


@pytest.fixture
def opencl() -> Iterator[list[bytes]]:
    """The OpenCL modules that this process loads: something stands for the runtime that it lacks, and keeps them."""
    name = "ffi.Module.load_from_bytes.opencl"
    if tvm_ffi.get_global_func(name, allow_missing=True) is not None:
        pytest.skip("this TVM has a runtime for OpenCL")
    seen: list[bytes] = []
    some_func = next(iter(made(Perceptron, "native").functions.values()))
    some_module = tvm.tirx.build(some_func.with_attr("global_symbol", "some"), target="llvm")

    def load(content: bytes) -> tvm.runtime.Module:
        seen.append(bytes(content))
        return some_module

    tvm_ffi.register_global_func(name, load)
    yield seen
    tvm_ffi.registry.remove_global_func(name)


def test_one_library_carries_the_device_code_of_all_its_operators(opencl: list[bytes], tmp_path: Path) -> None:
    network = made(Perceptron, {"kind": "opencl", "host": {"kind": "llvm"}})
    compiled = network.compiled()
    library = loaded(network.linked(compiled), tmp_path)
    assert opencl == [packed.decode(each.device).devices[0].content for each in compiled.values()]
    assert len(set(opencl)) == 2
    (code,) = library.imports
    assert all(code.implements_function(symbol) for symbol in compiled)
    assert len(code.imports) == 2


class Blobs(dict[str, bytes]):
    """A stage's inputs, in memory and, where a file is asked for, in a folder."""

    def __init__(self, folder: Path, content: Mapping[str, bytes]) -> None:
        super().__init__(content)
        self.folder = folder

    def file(self, name: str) -> Path:
        self.folder.mkdir(exist_ok=True)
        (self.folder / name).write_bytes(self[name])
        return self.folder / name


@pytest.mark.parametrize("target", ["native", "c", {"kind": "opencl", "host": {"kind": "llvm"}}], ids=str)
def test_each_stage_takes_what_the_one_before_it_gives(target: str | dict[str, object], tmp_path: Path) -> None:
    network = made(Perceptron, target)
    parts = {"main": network.main}
    devices = {}
    for symbol, func in network.functions.items():
        options = {"symbol": symbol, "target": network.attributes}
        outputs = codegen.run(Blobs(tmp_path, {"function": ir.canonical(func)}), options)  # type: ignore[arg-type]
        parts[f"o{symbol}"] = bytes(outputs["source" if target == "c" else "object"])
        if "device" in outputs:
            devices[f"d{symbol}"] = bytes(outputs["device"])
            assert b"__kernel" in outputs["kernels.cl"]
    if devices:
        inputs = Blobs(tmp_path, {"main": network.main, **devices})
        parts["main"] = bytes(embed.run(inputs, {"target": network.attributes})["object"])  # type: ignore[arg-type]
    if target == "c":
        sources = {name: Blobs(tmp_path, {"source": source}) for name, source in parts.items()}
        parts = {n: bytes(cc.run(s, {"target": network.attributes})["object"]) for n, s in sources.items()}  # type: ignore[arg-type]
    linked = link_stage.run(Blobs(tmp_path / "blobs", parts), {"target": network.attributes})  # type: ignore[arg-type]
    (tmp_path / "lib.so").write_bytes(linked["library"])
    functions = {f"__tvm_ffi_{symbol}" for symbol in network.functions}
    assert symbols.provided(tmp_path / "lib.so", functions) == functions


@pytest.mark.skipif(nvcc() is None, reason="there is no nvcc")
def test_nvcc_makes_machine_code_of_kernels() -> None:
    network = made(Perceptron, "cuda")
    symbol, func = next(iter(network.functions.items()))
    compiled = objects.compile_parts(func, symbol, network.attributes, cubin=True)
    assert objects.compile_parts(func, symbol, network.attributes, cubin=True) == compiled
    cubin = compiled.kernels[".cubin"]
    require_magic("cuda", cubin)
    assert int.from_bytes(cubin[18:20], "little") == 190  # EM_CUDA
    assert f"{symbol}_kernel".encode() in cubin
    (device,) = packed.decode(compiled.device).devices
    assert device.content.endswith(cubin)
    assert b"__global__" not in device.content
    assert str(Path.cwd()).encode() not in cubin


def test_a_browser_finds_functions_without_looking_them_up() -> None:
    network = made(Perceptron, "wasm32")
    assert all(b"TVMFFIEnvModRegisterSystemLibSymbol" in each.code for each in network.compiled().values())
    assert b"TVMFFIEnvModRegisterSystemLibSymbol" in network.main


def test_functions_for_a_device_must_be_scheduled_for_it() -> None:
    attributes = targets.resolve(TARGETS["opencl"])
    symbol, func = next(iter(made(Perceptron, "native").functions.items()))
    with pytest.raises(RuntimeError, match="not scheduled for a device of kind opencl"):
        objects.compile_parts(func, symbol, attributes)


def extreme(dtype: str, *values: float) -> tvm.tirx.PrimFunc:
    """x where it is the largest, otherwise constants."""
    x = tvm.te.placeholder((8,), dtype)
    constants = [tvm.tirx.const(value, dtype) for value in values]
    return tvm.te.create_prim_func([x, tvm.te.compute((8,), lambda i: tvm.te.max(x[i], *constants))])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("value", ["-inf", "nan"])
def test_c_has_the_constants_that_its_printer_has_not(dtype: str, value: str, tmp_path: Path) -> None:
    func = extreme(dtype, float(value))
    require_c(tmp_path, objects.compile_function(func, "extreme", targets.resolve("c")))


def test_webgpu_makes_do_without_infinities() -> None:
    attributes = targets.resolve("webgpu")
    for dtype, least in (("float32", "-3.402823e+38f"), ("float16", "-6.550400e+04h")):
        func = scheduled(extreme(dtype, -math.inf), attributes)
        text = objects.compile_parts(func, "extreme", attributes).kernels[".wgsl"].decode()
        assert "inf" not in text
        assert least in text
    with pytest.raises(RuntimeError, match="not a number"):
        objects.compile_parts(scheduled(extreme("float32", math.nan), attributes), "extreme", attributes)


def test_what_tvm_refuses_is_told_in_one_line() -> None:
    attributes = targets.resolve("webgpu")
    with pytest.raises(RuntimeError, match=r"^TVM generates no code: .*f16 or f32[^\n]*$"):
        objects.compile_parts(scheduled(extreme("float64", 0.0), attributes), "extreme", attributes)


_HARNESS = """
#include <dlfcn.h>
#include <stdio.h>
#include <tvm/ffi/c_api.h>

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  for (int32_t i = 0; i < count; ++i) fputs(parts[i], stderr);
}

int main(int count, char** words) {
  void* library = dlopen(words[1], RTLD_NOW);
  TVMFFISafeCallType sum = library ? (TVMFFISafeCallType)dlsym(library, words[2]) : 0;
  if (sum == 0) return fputs(dlerror(), stderr), 2;
  float data[3][8];
  int64_t shape[1] = {8};
  DLTensor tensors[3] = {0};
  TVMFFIAny arguments[3] = {0}, result = {0};
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 8; ++j) data[i][j] = (i + 1) * j;
    tensors[i] = (DLTensor){.data = data[i], .device = {1, 0}, .ndim = 1, .dtype = {2, 32, 1}, .shape = shape};
    arguments[i] = (TVMFFIAny){.type_index = kTVMFFIDLTensorPtr, .v_ptr = &tensors[i]};
  }
  int failed = sum(0, arguments, 3, &result);
  for (int j = 0; j < 8; ++j) printf("%g ", data[2][j]);
  return failed;
}
"""


def addition() -> tvm.tirx.PrimFunc:
    x, y = (tvm.te.placeholder((8,), "float32") for _ in "xy")
    return tvm.te.create_prim_func([x, y, tvm.te.compute((8,), lambda i: x[i] + y[i])])


def test_code_from_c_source_runs(tmp_path: Path) -> None:
    attributes = targets.resolve("c")
    source = objects.compile_function(addition(), "sum", attributes)
    library = loaded(link({"sum.o": compile_source(source)}), tmp_path)
    x, y, z = (tvm.runtime.tensor(np.full(8, value, np.float32)) for value in (1, 2, 0))
    library["sum"](x, y, z)
    assert (z.numpy() == 3).all()


@pytest.mark.parametrize("machine", ["aarch64", "riscv64"])
def test_code_for_another_processor_runs_there(machine: str, tmp_path: Path) -> None:
    gnu, emulator = f"{machine}-linux-gnu", shutil.which(f"qemu-{machine}")
    if emulator is None or shutil.which(f"{gnu}-gcc") is None:
        pytest.skip(f"needs {gnu}-gcc and qemu-{machine}")
    attributes = targets.resolve(TARGETS[machine])
    (tmp_path / "lib.so").write_bytes(
        link({"sum.o": objects.compile_function(addition(), "sum", attributes)}, triple=triple_of(attributes))
    )
    (tmp_path / "main.c").write_text(_HARNESS)
    headers = [f"-I{folder}" for folder in runtime_headers()]
    subprocess.run([f"{gnu}-gcc", "-rdynamic", *headers, "main.c", "-o", "main", "-ldl"], cwd=tmp_path, check=True)
    command = [emulator, "-L", f"/usr/{gnu}", "./main", "./lib.so", "__tvm_ffi_sum"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()) == (0, [f"{3 * j}" for j in range(8)]), done.stderr


# Tensors, their shape, arguments and data lie in a page added to the module's memory. Offsets: dlpack.h, 32 bits.
_PAGE = """
const nothing = new Proxy({}, {get: () => () => 0});
const code = new WebAssembly.Module(require("fs").readFileSync(process.argv[2]));
const {memory, __tvm_ffi_sum: sum} = new WebAssembly.Instance(code, {env: nothing}).exports;
memory.grow(2);
const base = memory.buffer.byteLength - 65536, view = new DataView(memory.buffer, base);
view.setBigInt64(1024, 8n, true);
for (let i = 0; i < 3; ++i) {
  const tensor = 256 * i, data = 2048 + 64 * i;
  for (let j = 0; j < 8; ++j) view.setFloat32(data + 4 * j, (i + 1) * j, true);
  view.setUint32(tensor, base + data, true);
  view.setUint32(tensor + 4, 1, true);
  view.setUint32(tensor + 12, 1, true);
  view.setUint32(tensor + 16, 2 | 32 << 8 | 1 << 16, true);
  view.setUint32(tensor + 20, base + 1024, true);
  view.setUint32(4096 + 16 * i, 7, true);
  view.setUint32(4096 + 16 * i + 8, base + tensor, true);
}
const failed = sum(0, base + 4096, 3, base + 8192);
console.log([...Array(8).keys()].map(j => view.getFloat32(2048 + 128 + 4 * j, true)).join(" "));
process.exit(failed);
"""


def test_code_for_webassembly_runs_there(tmp_path: Path) -> None:
    attributes = targets.resolve(TARGETS["wasm32"])
    linker, node = driver_for(triple_of(attributes)), shutil.which("node")
    if linker is None or "wasm-ld" not in linker.argv[0] or node is None:
        pytest.skip("needs wasm-ld and node")
    library = link({"sum.o": objects.compile_function(addition(), "sum", attributes)}, triple=triple_of(attributes))
    (tmp_path / "lib.o").write_bytes(library)
    whole = ["--no-entry", "--export=__tvm_ffi_sum", "--allow-undefined", "-o", "page.wasm", "lib.o"]
    subprocess.run([*linker.argv, *whole], cwd=tmp_path, check=True)
    (tmp_path / "page.cjs").write_text(_PAGE)
    done = subprocess.run(
        [node, "page.cjs", "page.wasm"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.split()) == (0, [f"{3 * j}" for j in range(8)]), done.stderr
