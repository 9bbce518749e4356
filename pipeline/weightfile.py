"""The file that carries an artifact's weights, in the safetensors format. Owns no policy: bytes in, bytes out.

The format (https://github.com/huggingface/safetensors#format): an unsigned little-endian 64-bit length, a JSON header
of that length, `{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, then the tensors, little-endian, C order,
without gaps. What this module adds stays inside the format: the header is padded with spaces so that the data begins
at a multiple of 64, and tensors stand in an order that puts most of them at one as well, so that they can be used
where they are mapped.

Weights pass from blob files into the file and from the file into memory without passing through Python objects.
NumPy is loaded where arrays are asked for: a build writes weight files without it.
"""

from __future__ import annotations

import errno
import io
import json
import math
import mmap
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import msgspec

from pipeline.errors import ArtifactError
from pipeline.types import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ALIGNMENT = 64

# The symbols between which the same bytes stand inside a library.
WEIGHTS_BEGIN, WEIGHTS_END = "tvmake_weights_begin", "tvmake_weights_end"

# The names of dtypes in the format and in manifests, and their bytes; what is not here, the format cannot hold.
_DTYPES = (
    ("BOOL", "bool", 1),
    ("U8", "uint8", 1),
    ("I8", "int8", 1),
    ("U16", "uint16", 2),
    ("I16", "int16", 2),
    ("U32", "uint32", 4),
    ("I32", "int32", 4),
    ("U64", "uint64", 8),
    ("I64", "int64", 8),
    ("F16", "float16", 2),
    ("BF16", "bfloat16", 2),
    ("F32", "float32", 4),
    ("F64", "float64", 8),
    ("C64", "complex64", 8),
    ("F8_E4M3", "float8_e4m3fn", 1),
    ("F8_E5M2", "float8_e5m2", 1),
    ("F8_E8M0", "float8_e8m0fnu", 1),
)
_NAMES = {code: name for code, name, _ in _DTYPES}
_CODES = {name: code for code, name, _ in _DTYPES}
_SIZES = {name: size for _, name, size in _DTYPES}
_METADATA = "__metadata__"
_MAX_HEADER = 100_000_000  # as in the reference implementation
_PREFIX = 8
_CHUNK = 1 << 24
_KERNEL_CHUNK = 1 << 30
# How copy_file_range says that it cannot serve these two files, as opposed to that the disk is full.
_NO_COPY_FILE_RANGE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


def dtype_of(name: str) -> np.dtype[np.generic]:
    """The NumPy dtype of a manifest's dtype name, those of ml_dtypes included. TypeError for any other name."""
    import ml_dtypes
    import numpy as np

    return np.dtype(getattr(ml_dtypes, name, name))


def size_of(spec: TensorSpec) -> int:
    """Bytes of a tensor."""
    return math.prod(spec.shape) * (_SIZES.get(spec.dtype) or dtype_of(spec.dtype).itemsize)


def write(target: str | os.PathLike[str] | BinaryIO, weights: Sequence[tuple[TensorSpec, Path]]) -> int:
    """Writes weights, each from a file with its raw bytes, and returns the bytes written.

    The bytes depend on the weights alone, not on their order. A path appears whole or not at all; a stream is written
    from where it stands. Raises ArtifactError for a dtype that the format cannot hold, two weights of one name, and a
    blob that is not as long as its tensor.
    """
    ordered = _checked(weights)
    header = _header([spec for spec, _ in ordered])
    if not isinstance(target, str | os.PathLike):
        return _write_to(target, header, ordered)
    final = Path(target)
    unfinished = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(unfinished, "xb") as stream:
            written = _write_to(stream, header, ordered)
        os.replace(unfinished, final)
    finally:
        unfinished.unlink(missing_ok=True)
    return written


def _checked(weights: Sequence[tuple[TensorSpec, Path]]) -> list[tuple[TensorSpec, Path]]:
    """The weights in the order of the file, each looked at before the first byte is written."""
    names: set[str] = set()
    for spec, blob in weights:
        if spec.name in names or spec.name == _METADATA:
            raise ArtifactError(f"weight {spec.name!r}: the name is taken; names in a weight file must be unique")
        names.add(spec.name)
        if spec.dtype not in _CODES:
            raise ArtifactError(f"weight {spec.name!r}: a weight file cannot hold dtype {spec.dtype}")
        try:
            size = blob.stat().st_size
        except OSError as error:
            raise ArtifactError(f"weight {spec.name!r}: cannot read {blob}: {error.strerror}") from error
        if size != size_of(spec):
            raise ArtifactError(f"weight {spec.name!r}: {blob} has {size} bytes, its shape needs {size_of(spec)}")
    return sorted(weights, key=lambda weight: (-_evenness(size_of(weight[0])), weight[0].name))


def _evenness(size: int) -> int:
    """The largest power of two, 64 at most, that divides a size.

    With falling evenness every tensor begins at a multiple of its own: those of 64 at multiples of 64, and each at
    least at a multiple of its item size.
    """
    return min(size & -size, ALIGNMENT) if size else ALIGNMENT


def _header(specs: Sequence[TensorSpec]) -> bytes:
    entries: dict[str, object] = {}
    end = 0
    for spec in specs:
        begin, end = end, end + size_of(spec)
        entries[spec.name] = {"dtype": _CODES[spec.dtype], "shape": spec.shape, "data_offsets": (begin, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(_PREFIX + len(text)) % ALIGNMENT)
    return len(text).to_bytes(_PREFIX, "little") + text


def _write_to(stream: BinaryIO, header: bytes, weights: Sequence[tuple[TensorSpec, Path]]) -> int:
    stream.write(header)
    written = len(header)
    for spec, blob in weights:
        with open(blob, "rb", buffering=0) as source:
            if isinstance(stream, io.BufferedWriter):
                _copy_in_kernel(source, stream)
            shutil.copyfileobj(source, stream, _CHUNK)
            if source.tell() != size_of(spec):
                raise ArtifactError(f"weight {spec.name!r}: {blob} changed while it was copied")
        written += size_of(spec)
    return written


def _copy_in_kernel(source: io.FileIO, target: io.BufferedWriter) -> None:
    """Copies between files without leaving the kernel, which shares blocks where the file system can.

    Where these two files cannot be copied so, or no further, both are left where the copy got to.
    """
    target.flush()
    try:
        while os.copy_file_range(source.fileno(), target.fileno(), _KERNEL_CHUNK):
            target.seek(target.raw.tell())  # the writer must learn where its file stands
    except OSError as error:
        if error.errno not in _NO_COPY_FILE_RANGE:
            raise


def open_weights(path: str | os.PathLike[str], offset: int = 0) -> dict[str, NDArray[np.generic]]:
    """Maps a weight file into memory and returns its tensors by name: read-only views, nothing is copied.

    `offset` is where the file's first byte stands inside a larger one; other bytes may then follow it. Raises
    ArtifactError, which names the file, for one that is missing, truncated or broken, or holds an unknown dtype.
    """
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < offset + _PREFIX:
                raise ArtifactError(f"{path}: the file is truncated: {size} bytes hold no header")
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot read the weights: {error.strerror or error}") from error
    return read_weights(memoryview(mapped)[offset:], str(path), exact=not offset)


def read_weights(buffer: memoryview, source: str, *, exact: bool = True) -> dict[str, NDArray[np.generic]]:
    """The tensors of a weight file that is in memory, as read-only views; `source` names it in errors.

    With `exact` the buffer must end where the last tensor does.
    """
    begin, header = _read_header(buffer, source)
    import numpy as np

    weights: dict[str, NDArray[np.generic]] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in _NAMES:
            raise ArtifactError(f"{source}: weight {name!r} has the unknown dtype {entry.dtype}")
        spec = TensorSpec(name, entry.shape, _NAMES[entry.dtype])
        if entry.data_offsets != (end, end + size_of(spec)):
            raise ArtifactError(
                f"{source}: the header is broken: weight {name!r} stands at {list(entry.data_offsets)}, "
                f"its shape and place make that {[end, end + size_of(spec)]}"
            )
        end += size_of(spec)
        if begin + end > len(buffer):
            raise ArtifactError(f"{source}: the file is truncated: weight {name!r} ends behind the end of the file")
        place = begin + entry.data_offsets[0]
        weights[name] = np.ndarray(spec.shape, dtype_of(spec.dtype), buffer[place : begin + end])
        weights[name].flags.writeable = False
    if exact and begin + end != len(buffer):
        raise ArtifactError(f"{source}: the file is broken: {len(buffer) - begin - end} bytes follow the last weight")
    return weights


_Natural = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct, frozen=True):
    """One tensor in the header."""

    dtype: str
    shape: tuple[_Natural, ...]
    data_offsets: tuple[_Natural, _Natural]


def _read_header(buffer: memoryview, source: str) -> tuple[int, dict[str, _Entry]]:
    """Where the data begins, and the entries by name."""
    length = int.from_bytes(buffer[:_PREFIX], "little")
    if length > _MAX_HEADER:
        raise ArtifactError(f"{source}: the header is broken: it claims to be {length} bytes long")
    if _PREFIX + length > len(buffer):
        raise ArtifactError(f"{source}: the file is truncated: it ends inside its header of {length} bytes")
    try:
        header = msgspec.json.decode(buffer[_PREFIX : _PREFIX + length], type=dict[str, msgspec.Raw])
        header.pop(_METADATA, None)
        return _PREFIX + length, {name: msgspec.json.decode(raw, type=_Entry) for name, raw in header.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{source}: the header is broken: {error}") from error
