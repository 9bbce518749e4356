"""One connection to one device, with the runtime part of TVM alone; and the device as a site to try candidates on.

Runs in a child of whoever measures: a device that hangs keeps its caller waiting for ever, and the child is killed.
The names of functions are those of TVM's RPC (tvm/rpc/client.py): a server in Python or in C++ has them without more.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm_ffi

from pipeline.config import Device
from pipeline.devices import probes
from pipeline.devices.contract import At, LostError, RefusedError
from pipeline.devices.tracker import Address
from pipeline.errors import DeviceError, last_line
from pipeline.linker import compile_source, link
from pipeline.measuring import Contender, spoilt
from pipeline.runtime import find_runtime
from pipeline.tensors import Array, Tensor
from pipeline.types import Cause, TensorSpec
from pipeline.weightfile import dtype_of

_CPU = 1  # kDLCPU
_MASK = 128  # devices of the n-th session have a type that is n * _MASK higher


class Session:
    """A device that is ours until this process ends. Raises LostError where it is gone."""

    def __init__(self, address: Address, device: Device) -> None:
        for name in ("libtvm_runtime.so", "libtvm_runtime_extra.so"):
            ctypes.CDLL(str(find_runtime().with_name(name)), ctypes.RTLD_GLOBAL)
        key = f"{address.match} -timeout={device.timeout:g}"
        try:
            self._session = _global("rpc.Connect")(address.host, address.port, key, False)
        except Exception as error:
            raise LostError(f"cannot be reached at {address.host}:{address.port}: {last_line(error)}") from error
        self._device_type = _CPU + (_global("rpc.SessTableIndex")(self._session) + 1) * _MASK
        self._place = tvm_ffi.device(self._device_type, 0)
        self.device = device

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """What goes wrong inside is raised as it is where the device still answers."""
        try:
            yield
        except LostError:
            raise
        except Exception as error:
            if not self._answers():
                raise LostError(last_line(error)) from error
            raise

    def upload(self, name: str, data: bytes | memoryview) -> None:
        with self.asking():
            self._session["tvm.rpc.server.upload"](name, bytearray(data))

    def module(self, name: str) -> Any:
        """The library of an uploaded file."""
        with self.asking():
            return _global("rpc.LoadRemoteModule")(self._session, name)

    def room(self, spec: TensorSpec) -> Tensor:
        """A tensor of the device's, with whatever is in its memory."""
        with self.asking():
            allocate = _global("runtime.TVMTensorAllocWithScope")
            return allocate(tvm_ffi.Shape(list(spec.shape)), tvm_ffi.dtype(spec.dtype), self._place, None)

    def tensor(self, spec: TensorSpec, array: Array) -> Tensor:
        """A tensor of the device's with the values of a contiguous array."""
        tensor = self.room(spec)
        with self.asking():
            _global("runtime.TVMTensorCopyFromBytes")(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return tensor

    def array(self, spec: TensorSpec, tensor: Tensor) -> Array:
        """The values of a tensor of the device's."""
        array = np.empty(spec.shape, dtype_of(spec.dtype))
        with self.asking():
            _global("runtime.TVMTensorCopyToBytes")(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array

    def seconds(self, module: Any, symbol: str, count: int, tensors: Sequence[Tensor]) -> float:
        """Seconds of one of `count` calls in a row after one that is not timed, by the device's clock."""
        with self.asking():
            place = (self._device_type, 0)
            timing = (count, 1, 0, 1, 0, 1, 0, "")  # one repeat, of which nothing is prolonged, cooled or flushed
            said = _global("runtime.RPCTimeEvaluator")(module, symbol, *place, *timing)(*tensors)
            (took,) = struct.unpack("@d", bytes(said))
            return float(took)

    def _answers(self) -> bool:
        try:
            self._session["tvm.rpc.server.workpath"]("")
        except Exception:
            return False
        return True


def _global(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = tvm_ffi.get_global_func(name)
    return found


def description(session: Session, triple: str) -> str:
    """What a device says of itself; little where its system is not one that probes.c is for. `triple` is what the code
    for it is built for. Raises DeviceError where it cannot load such code."""
    if not probes.can_guard(triple):
        return f"a device for {triple}"
    session.upload("device.so", link({"device.o": compile_source(probes.source(()), triple)}, triple=triple))
    try:
        module = session.module("device.so")
        with session.asking():
            return probes.description(str(module[probes.DEVICE]()))
    except RuntimeError as error:
        raise DeviceError(
            f"the device {session.device.key} cannot load what is built for {triple or 'this machine'}: "
            f"{last_line(error)}",
            hint="see whether `target` and device.key in the target's file are of the same board, and whether its TVM "
            "is the version that is installed here",
        ) from error


class Board:
    """A device as a site (see pipeline.devices.contract) for functions with these parameters."""

    def __init__(
        self, session: Session, parameters: Sequence[TensorSpec], written: Sequence[int], triple: str, patience: float
    ) -> None:
        self.session = session
        self.parameters = parameters
        self.written = written
        self._triple = triple
        self._patience = patience
        self._modules: dict[object, Any] = {}
        self._probes: dict[bytes, bytes] = {}  # objects by source
        self._uploaded: set[Path] = set()
        self._sent: dict[int, tuple[Array, Tensor]] = {}  # inputs, by the identity of their array

    def probe(self, contenders: Sequence[Contender], given: Sequence[Array], at: At) -> Mapping[str, RefusedError]:
        """Each is run once in a child on the device, before any is run in the session's own process."""
        symbols: dict[object, set[str]] = {}
        for each in contenders:
            symbols.setdefault(_parts(each), set()).add(each.symbol)
        harmful = {}
        for each in contenders:
            at(each.name)
            try:
                self._link(each, symbols[_parts(each)])
                self._guard(each, given)
            except RefusedError as refusal:
                harmful[each.name] = refusal
        return harmful

    def load(self, contender: Contender) -> _Call:
        """One that was probed before."""
        return _Call(self, self._modules[_parts(contender)], contender)

    def is_quiet(self, limit: float) -> bool:
        """Who else uses a device is not seen from here: the tracker gives it to one at a time."""
        return True

    def input(self, index: int, array: Array) -> Tensor:
        """An input on the device, sent once. No function writes to its inputs."""
        if id(array) not in self._sent:
            self._sent[id(array)] = (array, self.session.tensor(self.parameters[index], array))
        return self._sent[id(array)][1]

    def output(self, index: int, array: Array) -> Tensor:
        """Room for what is written, filled with what makes no sense: what was left unwritten is seen."""
        return self.session.tensor(self.parameters[index], spoilt(array))

    def _link(self, contender: Contender, symbols: set[str]) -> None:
        """Has the device load the library of a contender's objects, and of the probes for all functions in it."""
        parts = _parts(contender)
        if parts in self._modules:
            return
        try:
            objects: dict[str, Path | bytes] = {**contender.objects}
            if probes.can_guard(self._triple):
                objects["tvmake-probes.o"] = self._probe(probes.source(symbols))
            library = link(objects, libraries=contender.libraries, triple=self._triple)
            for name, path in contender.libraries.items():
                if path not in self._uploaded:
                    self.session.upload(name, path.read_bytes())
                    self._uploaded.add(path)
            file = f"candidates{len(self._modules)}.so"
            self.session.upload(file, library)
            self._modules[parts] = self.session.module(file)
        except (OSError, RuntimeError) as error:
            raise RefusedError(f"cannot be loaded: {last_line(error)}", Cause.FAILED) from error

    def _probe(self, source: bytes) -> bytes:
        if source not in self._probes:
            self._probes[source] = compile_source(source, self._triple)
        return self._probes[source]

    def _guard(self, contender: Contender, given: Sequence[Array]) -> None:
        """Raises RefusedError where a contender crashes or does not end. What it gives is looked at later."""
        if not probes.can_guard(self._triple):
            return
        # A weight in a layout of its own is all zeros here: whatever the values, the same memory is read.
        specs = {index: spec for index, _, spec in contender.packed}
        tensors = [
            self.session.tensor(specs[i], np.zeros(specs[i].shape, dtype_of(specs[i].dtype)))
            if i in specs
            else (self.output if i in self.written else self.input)(i, array)
            for i, array in enumerate(given)
        ]
        module = self._modules[_parts(contender)]
        with self.session.asking():
            status = int(module[probes.guarded(contender.symbol)](self._patience, *tensors))
        if (found := probes.fault(status, self._patience)) is not None:
            raise RefusedError(*found)


class _Call:
    """A candidate that a device has loaded."""

    def __init__(self, board: Board, module: Any, contender: Contender) -> None:
        self._board = board
        self._session = board.session
        self._module = module
        self._contender = contender

    def __call__(self, given: Sequence[Array]) -> list[Array]:
        tensors = self._tensors(given)
        self._run(self._contender.symbol, tensors)
        return [self._session.array(self._board.parameters[i], tensors[i]) for i in self._board.written]

    def timer(self, given: Sequence[Array]) -> Callable[[int], float]:
        """Nothing is laid out, allocated or sent in what is timed."""
        tensors, symbol = self._tensors(given), self._contender.symbol
        return lambda count: self._session.seconds(self._module, symbol, count, tensors)

    def _tensors(self, given: Sequence[Array]) -> list[Tensor]:
        board = self._board
        tensors = [(board.output if i in board.written else board.input)(i, array) for i, array in enumerate(given)]
        for index, symbol, spec in self._contender.packed:
            room = self._session.room(spec)
            self._run(symbol, [tensors[index], room])
            tensors[index] = room
        return tensors

    def _run(self, symbol: str, tensors: Sequence[Tensor]) -> None:
        try:
            with self._session.asking():
                self._module[symbol](*tensors)
        except LostError:
            raise
        except Exception as error:
            raise RefusedError(f"fails: {last_line(error)}", Cause.FAILED) from error


def _parts(contender: Contender) -> object:
    """What contenders are told apart by that are linked into one library."""
    return tuple(contender.objects.items()), tuple(contender.libraries.items())
