"""Loads and runs a built artifact with the runtime part of TVM alone: tvm_ffi and libtvm_runtime, never `import tvm`.

An artifact is a folder with manifest.json, lib.so, and weights.safetensors unless the library holds the same bytes
between two symbols. `load` checks what it can in words, because what it cannot check may end in a crash: TVM's code
takes shapes, dtypes and an alignment of 64 bytes for granted. This module builds nothing and writes nothing there.

The protocol of TVM's virtual machine is the one of tvm/runtime/vm.py: `vm_load_executable`, `vm_initialization` with
device type, device and allocator for each device, then the function by its name.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tvm_ffi

from pipeline import manifests
from pipeline.errors import ArtifactError, SetupError, first_line
from pipeline.hashing import Digest
from pipeline.manifests import REBUILD
from pipeline.processor import cores, missing_features
from pipeline.tensors import (
    Array,
    Tensor,
    aligned_copy,
    array_over,
    fits,
    flat,
    memory_at,
    strided_view,
    tensor_over,
)
from pipeline.types import LIBRARY, MANIFEST, WEIGHTS, Manifest, TensorSpec
from pipeline.weightfile import (
    ALIGNMENT,
    WEIGHTS_BEGIN,
    WEIGHTS_END,
    dtype_of,
    open_weights,
    read_weights,
    size_of,
)

ENTRY = "main"

_CPU = 1  # kDLCPU
_POOLED_ALLOCATOR = 2  # VirtualMachine.POOLED_ALLOCATOR


def load(folder: str | os.PathLike[str], *, verify: bool = False) -> Model:
    """Loads the artifact in a folder, which may be read-only.

    The size of each file is held against the manifest; with `verify` its digest as well, which reads every byte.
    Raises ArtifactError for an artifact that is missing, incomplete, of another format or for another machine, and
    SetupError where TVM's runtime is not installed.

    A file of the artifact must not be overwritten in place while a model uses it, since it stays mapped. To replace
    it by renaming is safe: models loaded before keep the old files, and `load` finds the new ones.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    if manifest.unlinked:
        raise ArtifactError(f"{place} holds objects and no library: {manifest.unlinked}")
    _check_files(place, manifest, verify)
    runtime = find_runtime()
    _check_machine(place / LIBRARY, manifest, runtime)
    library, symbols = open_library(place, manifest.files, runtime)
    weights: dict[str, Array] = {}
    source = place / (LIBRARY if manifest.weights_in == "inside" else WEIGHTS)
    if manifest.weights:
        weights = _weights_inside(symbols, source) if manifest.weights_in == "inside" else open_weights(source)
    return Model(manifest, library, [_weight(spec, weights, source) for spec in manifest.weights])


def assembled(manifest: Manifest, library: Path, weights: Sequence[Array]) -> Model:
    """A model out of its parts, before they are an artifact: a library and the weights in the manifest's order."""
    with tempfile.TemporaryDirectory(prefix="tvmake-") as name:
        folder = Path(name)
        (folder / LIBRARY).symlink_to(library)
        opened, _ = open_library(folder, (), find_runtime())
    return Model(manifest, opened, [weight if fits(weight) else aligned_copy(weight) for weight in weights])


class Model:
    """A loaded artifact. Calls from several threads are safe and run one after the other."""

    def __init__(self, manifest: Manifest, library: Any, weights: Sequence[Array]) -> None:
        self.manifest = manifest
        self._library = library  # the machine's code lives as long as this
        self._weights = tuple(tensor_over(weight) for weight in weights)
        self._weight_ranges = _ranges(weights)
        self._input_sizes = [size_of(spec) for spec in manifest.inputs]
        self._lock = threading.Lock()
        try:
            self._machine = started(library)
            self._main = self._machine[ENTRY]
        except (AttributeError, RuntimeError) as error:
            raise ArtifactError(f"{LIBRARY} of {manifest.model} holds no program: {first_line(error)}") from error

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.manifest.outputs

    def __call__(self, /, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Runs the model on arrays, given in order or by name, and returns NumPy arrays by output name.

        Takes NumPy arrays and whatever speaks DLPack and lies in CPU memory. Shapes and dtypes must be exactly those
        of `inputs`: nothing is cast. Input that is not C-contiguous or not aligned is copied, all other is used where
        it lies. The results are the caller's own.
        """
        tensors = self._arguments(args, kwargs)
        results = self._invoke(tensors)
        taken = [*self._weight_ranges]
        for tensor, size in zip(tensors, self._input_sizes, strict=True):
            taken.append((tensor.data_ptr(), tensor.data_ptr() + size))
        arrays = {}
        for spec, result in zip(self.outputs, results, strict=True):
            array, address = array_over(result), result.data_ptr()
            # A model may hand an input or a weight through: then the memory is not the caller's to change.
            lent = any(begin <= address < end for begin, end in taken)
            arrays[spec.name] = array.copy() if lent else array
        return arrays

    def run(self, /, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Like a call, but returns TVM's tensors, which speak DLPack, and copies nothing.

        An output that the model hands through shares its memory with the input or weight that it is.
        """
        results = self._invoke(self._arguments(args, kwargs))
        return {spec.name: result for spec, result in zip(self.outputs, results, strict=True)}

    def time(self, inputs: Mapping[str, Any] | Sequence[Any], repeat: int = 10) -> list[float]:
        """Seconds of each of `repeat` runs, after one that does not count. Inputs are taken over once, before."""
        named = isinstance(inputs, Mapping)
        tensors = self._arguments((), dict(inputs)) if named else self._arguments(tuple(inputs), {})
        self._invoke(tensors)
        seconds = []
        for _ in range(repeat):
            begin = time.perf_counter()
            self._invoke(tensors)
            seconds.append(time.perf_counter() - begin)
        return seconds

    def profile(self, inputs: Mapping[str, Any], repeat: int = 10) -> dict[str, float]:
        """Seconds of each function that a run calls, by name: all its calls in one run, the least of `repeat` runs."""
        tensors = self._arguments((), dict(inputs))
        spent: dict[str, float] = {}
        begun: list[float] = []

        def watch(_function: Any, name: str, before: bool, *_: Any) -> int:
            now = time.perf_counter()
            if before:
                begun.append(now)
            else:
                spent[name] = spent.get(name, 0.0) + now - begun.pop()
            return 0

        least: dict[str, float] = {}
        self._machine["set_instrument"](tvm_ffi.convert(watch))
        for _ in range(repeat):
            spent.clear()
            self._invoke(tensors)
            least = {name: min(seconds, least.get(name, seconds)) for name, seconds in spent.items()}
        return least

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        if len(args) > len(self.inputs):
            raise self._refusal(f"takes {len(self.inputs)} inputs, not {len(args)}")
        values = {spec.name: value for spec, value in zip(self.inputs, args, strict=False)}
        for name, value in kwargs.items():
            if name in values:
                raise self._refusal(f"got the input {name!r} twice: in its place and by its name")
            values[name] = value
        known = {spec.name for spec in self.inputs}
        if unknown := [name for name in values if name not in known]:
            raise self._refusal(f"has no input {unknown[0]!r}")
        if missing := [spec.name for spec in self.inputs if spec.name not in values]:
            raise self._refusal(f"misses the input {missing[0]!r}")
        return [_input(spec, values[spec.name]) for spec in self.inputs]

    def _refusal(self, what: str) -> ArtifactError:
        inputs = ", ".join(_described(spec) for spec in self.inputs) or "none"
        return ArtifactError(f"{self.manifest.model} {what}", hint=f"its inputs: {inputs}")

    def _invoke(self, tensors: list[Tensor]) -> list[Tensor]:
        # The virtual machine keeps its frames in itself, and TVM lets go of the GIL while it runs.
        with self._lock:
            try:
                result = self._main(*tensors, *self._weights)
            except (RuntimeError, ValueError, TypeError) as error:
                raise ArtifactError(f"{self.manifest.model} failed to run: {first_line(error)}") from error
        results = flat(result)
        if len(results) != len(self.outputs):
            raise ArtifactError(
                f"{self.manifest.model} returned {len(results)} outputs, its {MANIFEST} lists {len(self.outputs)}",
                hint=REBUILD,
            )
        return results


# --- reading an artifact ----------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact whose tensors can be had here, or an ArtifactError in words."""
    manifest = manifests.read_manifest(folder)
    try:
        for spec in (*manifest.inputs, *manifest.weights, *manifest.outputs):
            dtype_of(spec.dtype)
    except TypeError as error:
        raise ArtifactError(f"{folder / MANIFEST} is broken: {error}", hint=REBUILD) from error
    return manifest


def _check_files(folder: Path, manifest: Manifest, verify: bool) -> None:
    """Holds the files against the manifest. A truncated file is worse than none: to map it ends in a bus error."""
    if manifest.weights_in not in ("beside", "inside"):
        raise ArtifactError(f"{folder / MANIFEST} is broken: weights_in is {manifest.weights_in!r}", hint=REBUILD)
    needed = [LIBRARY] + ([WEIGHTS] if manifest.weights and manifest.weights_in == "beside" else [])
    for name in dict.fromkeys((*manifest.files, *needed)):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ArtifactError(f"{folder / MANIFEST} is broken: it lists the file {name!r}", hint=REBUILD)
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing", hint=REBUILD)
        expected = manifest.files.get(name)
        if expected is None:
            raise ArtifactError(f"{folder / MANIFEST} is broken: it does not list {name}", hint=REBUILD)
        size = path.stat().st_size
        if size != expected.size:
            state = "truncated" if size < expected.size else "changed"
            raise ArtifactError(f"{path} is {state}: it has {size} bytes instead of {expected.size}", hint=REBUILD)
        if verify and Digest.of_file(path) != expected:
            raise ArtifactError(f"{path} is damaged: its digest is not the manifest's {expected}", hint=REBUILD)


# --- the library ------------------------------------------------------------------------------------------------------


def find_runtime() -> Path:
    """TVM's runtime library. The path finder is asked first: it works whatever sys.modules holds under tvm's name."""
    spec = importlib.machinery.PathFinder.find_spec("tvm") or importlib.util.find_spec("tvm")
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = Path(root) / "lib" / "libtvm_runtime.so"
        if path.is_file():
            return path
    raise SetupError("TVM's runtime library is not installed here", hint="pip install tvmake, which brings it")


# ELF, https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.eheader.html: class at 4, byte order at 5, machine at 18.
_MACHINES = {3: "x86", 40: "Arm", 62: "x86-64", 183: "AArch64", 243: "RISC-V"}


def _machine_of(path: Path) -> tuple[int, int, int] | None:
    """Word size, byte order and machine of an ELF file, or None where it is none."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(20)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return None
    return head[4], head[5], int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")


def _check_machine(library: Path, manifest: Manifest, runtime: Path) -> None:
    """Refuses what would not load, and what would load and die of an illegal instruction."""
    kind = manifest.target_spec.get("kind", "llvm")
    if kind not in ("llvm", "c"):
        raise ArtifactError(f"{library} is built for {kind} ({manifest.target}); only CPU code can be run here")
    built, here = _machine_of(library), _machine_of(runtime)
    if built is None:
        raise ArtifactError(f"{library} is no ELF library: it is damaged or built for another system", hint=REBUILD)
    if here is not None and built != here:
        ours, theirs = (_MACHINES.get(machine[2], f"machine {machine[2]}") for machine in (here, built))
        raise ArtifactError(
            f"{library} is built for another machine: target {manifest.target}, {theirs}; this is {ours}",
            hint="build it for a target of this machine",
        )
    if missing := missing_features(manifest.target_spec):
        raise ArtifactError(
            f"{library} is built for another processor: target {manifest.target} uses {', '.join(missing)}, "
            "which this one lacks",
            hint="build it for a target of this machine",
        )


# What was opened under each inode in this process: dlopen hands out an open library again for the same inode.
_opened: dict[tuple[int, int], tuple[int, int]] = {}


def started(library: Any) -> Any:
    """The virtual machine of an open library, ready to run on the CPU: its functions by name."""
    machine = library["vm_load_executable"]()
    machine["vm_initialization"](_CPU, 0, _POOLED_ALLOCATOR)
    return machine


def open_library(folder: Path, files: Iterable[str], runtime: Path) -> tuple[Any, ctypes.CDLL]:
    """Opens the library of a folder with these files as TVM's module and for its symbols.

    dlopen returns the open library when it is given a path or an inode that it knows. So the path is a fresh link each
    time, and a library whose inode was open before with other bytes is copied. The module is kept for the life of the
    process: of two modules over one open library, the end of one would leave the other pointing at nothing.
    """
    for variable, value in _thread_settings().items():
        os.environ.setdefault(variable, value)
    try:
        for part in (runtime, runtime.with_name("libtvm_runtime_extra.so")):  # sorting and the like are in the second
            if part.is_file():
                ctypes.CDLL(str(part), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise SetupError(f"TVM's runtime does not load: {first_line(error)}") from error
    stat = (folder / LIBRARY).stat()
    inode, state = (stat.st_dev, stat.st_ino), (stat.st_size, stat.st_mtime_ns)
    with _fresh_links(folder, {LIBRARY, *files}) as fresh:
        library = fresh / LIBRARY
        try:
            if _opened.setdefault(inode, state) != state:
                library.unlink()
                shutil.copyfile(folder / LIBRARY, library)
            symbols = ctypes.CDLL(str(library))
            return tvm_ffi.load_module(str(library)), symbols
        except (OSError, RuntimeError) as error:
            reason = first_line(error).replace(f"{library}: ", "").replace(str(library), LIBRARY)
            raise ArtifactError(f"{folder / LIBRARY} does not load: {reason}", hint=REBUILD) from error


def _thread_settings() -> dict[str, str]:
    """What the pools of threads read when they are loaded, where the user has not set it.

    TVM takes half of the processors that it sees for second threads of a core, whether they are or not. GCC's OpenMP
    spins for milliseconds where it waits: on a core that another program uses as well, that keeps the thread that it
    waits for from running. After some microseconds it had better sleep. TVM's own threads yield 300,000 times before
    they sleep, also when the process is about to end: on a core that is in use that takes minutes.
    """
    return {"TVM_NUM_THREADS": str(cores()), "TVM_THREAD_POOL_SPIN_COUNT": "1000", "GOMP_SPINCOUNT": "1000"}


def preload(libraries: Iterable[Path]) -> None:
    """Loads shared libraries that another will need: the loader then finds them loaded, by their own names."""
    for path in libraries:
        try:
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise ArtifactError(f"{path.name} does not load: {first_line(error)}", hint=REBUILD) from error


@contextmanager
def _fresh_links(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """A folder of a new name with a link to each file: a library may look beside itself for others."""
    try:
        fresh = tempfile.TemporaryDirectory(prefix="tvmake-")
    except OSError as error:
        raise SetupError(
            f"no temporary folder can be made: {error.strerror}", hint="set TMPDIR to a folder that can be written"
        ) from error
    with fresh as place:
        for name in names:
            link = Path(place, name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((folder / name).resolve())
        yield Path(place)


# --- weights ----------------------------------------------------------------------------------------------------------


def _weights_inside(symbols: ctypes.CDLL, library: Path) -> dict[str, Array]:
    """The weights that are linked into a library."""
    try:
        begin, end = (ctypes.addressof(ctypes.c_char.in_dll(symbols, name)) for name in (WEIGHTS_BEGIN, WEIGHTS_END))
    except ValueError as error:
        raise ArtifactError(f"{library} holds no weights: {first_line(error)}", hint=REBUILD) from error
    return read_weights(memoryview(memory_at(begin, end - begin, symbols)).cast("B"), str(library))


def _weight(spec: TensorSpec, weights: Mapping[str, Array], source: Path) -> Array:
    """A weight as the manifest describes it, at an aligned place."""
    weight = weights.get(spec.name)
    if weight is None:
        raise ArtifactError(f"{source} has no weight {spec.name!r}", hint=REBUILD)
    if weight.dtype != dtype_of(spec.dtype) or weight.shape != spec.shape:
        found = _described(TensorSpec(spec.name, weight.shape, weight.dtype.name))
        raise ArtifactError(f"{source} holds {found}; {MANIFEST} says {_described(spec)}", hint=REBUILD)
    return weight if fits(weight) else aligned_copy(weight)


def _ranges(weights: Sequence[Array]) -> list[tuple[int, int]]:
    """The memory that weights lie in, as few ranges."""
    ranges: list[tuple[int, int]] = []
    for begin, end in sorted((weight.ctypes.data, weight.ctypes.data + weight.nbytes) for weight in weights):
        if ranges and begin <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
        else:
            ranges.append((begin, end))
    return ranges


# --- inputs -----------------------------------------------------------------------------------------------------------


def _input(spec: TensorSpec, value: Any) -> Tensor:
    """The tensor for an input: over the caller's memory where that will do, else over a copy."""
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        _check_input(spec, array.shape, array.dtype, str(array.dtype))
        return tensor_over(array if fits(array) else aligned_copy(array))
    if not hasattr(value, "__dlpack__"):
        raise ArtifactError(f"input {spec.name!r} is a {type(value).__name__}; it must be a NumPy or DLPack array")
    try:
        tensor = value if isinstance(value, tvm_ffi.Tensor) else tvm_ffi.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"input {spec.name!r} cannot be taken over: {first_line(error)}") from error
    if tensor.__dlpack_device__()[0] != _CPU:
        raise ArtifactError(f"input {spec.name!r} lies on {tensor.device}, not in CPU memory")
    name = str(tensor.dtype)
    try:
        dtype = dtype_of(name)
    except TypeError:
        dtype = None
    _check_input(spec, tuple(tensor.shape), dtype, name)
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor_over(aligned_copy(strided_view(tensor, dtype_of(spec.dtype))))


def _check_input(spec: TensorSpec, shape: tuple[int, ...], dtype: np.dtype[Any] | None, name: str) -> None:
    if dtype != dtype_of(spec.dtype):
        raise ArtifactError(f"input {spec.name!r}: expected dtype {spec.dtype}, got {name}; nothing is cast")
    if shape != spec.shape:
        raise ArtifactError(f"input {spec.name!r}: expected shape {list(spec.shape)}, got {list(shape)}")


def _described(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype}[{', '.join(map(str, spec.shape))}]"
