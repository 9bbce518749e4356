"""Between NumPy and TVM's runtime: arrays as tensors and tensors as arrays, without a copy where that can be.

TVM's code takes an alignment of 64 bytes and C order for granted. NumPy's DLPack export refuses read-only arrays and
the dtypes of ml_dtypes; both go through their bytes and TVM's own view.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import numpy as np
import tvm_ffi
from numpy.typing import NDArray

from pipeline.weightfile import ALIGNMENT, dtype_of

Array = NDArray[np.generic]
Tensor = Any  # tvm_ffi.Tensor, which ships no types that hold once tvm is imported


def tensor_over(array: Array) -> Tensor:
    """A tensor over the memory of a contiguous array.

    NumPy exports neither read-only arrays nor the dtypes of ml_dtypes, so the bytes are exported, and TVM's own view
    gives them shape and dtype. No kernel writes to its inputs.
    """
    if array.flags.writeable and array.dtype.isbuiltin == 1:
        return tvm_ffi.from_dlpack(array)
    raw = np.frombuffer(memory_at(array.ctypes.data, array.nbytes, array), np.uint8)
    return _view(tvm_ffi.from_dlpack(raw), array.shape, array.dtype.name)


def array_over(tensor: Tensor) -> Array:
    """An array over the memory of a contiguous tensor."""
    dtype = dtype_of(str(tensor.dtype))
    if dtype.isbuiltin == 1:
        return np.from_dlpack(tensor)
    shape = tuple(tensor.shape)
    raw: Array = np.from_dlpack(_view(tensor, (math.prod(shape) * dtype.itemsize,), "uint8"))
    return raw.view(dtype).reshape(shape)


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result, which is one tensor or nested tuples of them."""
    if hasattr(result, "data_ptr"):
        return [result]
    return [tensor for part in result for tensor in flat(part)]


def fits(array: Array) -> bool:
    return array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0


def aligned_copy(array: Array) -> Array:
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % ALIGNMENT
    copy = room[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def strided_view(tensor: Tensor, dtype: np.dtype[Any]) -> Array:
    """An array over a tensor of any strides; it does not keep the tensor alive."""
    shape = tuple(tensor.shape)
    if 0 in shape:
        return np.empty(shape, dtype)
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    steps = [(extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)]
    low, high = sum(step for step in steps if step < 0), sum(step for step in steps if step > 0)
    memory = memory_at(tensor.data_ptr() + low, high - low + dtype.itemsize, None)
    return np.ndarray(shape, dtype, memory, -low, strides)


def memory_at(address: int, size: int, owner: object) -> Any:
    """Memory as a buffer of bytes that keeps its owner alive."""
    memory = (ctypes.c_ubyte * size).from_address(address)
    memory.owner = owner  # type: ignore[attr-defined]
    return memory


def _view(tensor: Tensor, shape: tuple[int, ...], dtype: str) -> Tensor:
    return _create_view()(tensor, tvm_ffi.Shape(shape), tvm_ffi.dtype(dtype), 0)


@cache
def _create_view() -> Any:
    return tvm_ffi.get_global_func("runtime.TVMTensorCreateView")
