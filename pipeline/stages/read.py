"""read: a model as declared in dodo.py → its skeleton, its weights, and cases that came with it.

The one stage that looks at the world outside the store: a file, which is named by what is in it, or a function of the
user's. What a function makes is never looked up; whether it needs to run at all is told by the stamps of what it read.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np

from pipeline.errors import ModelError, TvmakeError, raised
from pipeline.freshness import user_files
from pipeline.modelfiles import is_within, require_unchanged
from pipeline.stages import Inputs, Options, Outputs
from pipeline.types import ModelKind

if TYPE_CHECKING:
    from pipeline.compiler.frontends import Case, Read


def run(inputs: Inputs, options: Options) -> Outputs:
    """Options: kind; shapes; cases, folders; import path; and function, pickled, or

        path; file, recorded, beside and looks: what is in the files, and how they looked (pipeline.modelfiles)

    Outputs: skeleton; weights, JSON of their specs in order; w0, w1, …, their bytes; case0, …, as .npz; and, of a
    function, files, JSON of the files that were read and of those Python files that it imported; of a file, beside,
    JSON of the names of files that hold weights: nothing but them where `beside` names others.
    """
    sys.path += [entry for entry in cast("list[str]", options["import path"]) if entry not in sys.path]
    read = _read(options)
    outputs: dict[str, bytes | memoryview] = {
        "skeleton": read.skeleton,
        "weights": msgspec.json.encode([spec for spec, _ in read.weights]),
    }
    outputs |= {f"w{i}": data for i, (_, data) in enumerate(read.weights)}
    outputs |= {f"case{i}": _npz(case) for i, case in enumerate(read.cases)}
    if options.get("path"):
        return _of_file(outputs, read, options)
    # All that are imported by now: what another model imported before in this process, this one may have used as well.
    files = [str(path) for path in read.files] + user_files(list(sys.modules))
    outputs["files"] = msgspec.json.encode(sorted(set(files)))
    return outputs


def _of_file(outputs: dict[str, bytes | memoryview], read: Read, options: Options) -> Outputs:
    """What was read of files, if they are still those that the key names."""
    path = Path(cast(str, options["path"]))
    # The model's own and those of cases are known before it is read.
    known = {path, *(file for case in cast("list[str]", options["cases"]) for file in Path(case).glob("*.pb"))}
    beside = sorted(os.path.relpath(file, path.parent) for file in set(read.files) - known)
    require_unchanged(cast("list[list[object]]", options["looks"]))
    if outside := [name for name in beside if not is_within(name)]:
        raise ModelError(f"{path} has weights in {outside[0]!r}, which is not beside it or below")
    named = {"beside": msgspec.json.encode(beside)}
    return {**outputs, **named} if beside == sorted(cast("dict[str, str]", options["beside"])) else named


def _read(options: Options) -> Read:
    kind = ModelKind(cast(str, options["kind"]))
    source = Path(cast(str, options["path"])) if options.get("path") else _Called(cast(bytes, options["function"]))
    shapes = {
        name: tuple(cast("list[int]", shape)) for name, shape in cast("dict[str, Any]", options["shapes"]).items()
    }
    if kind is ModelKind.ONNX:
        from pipeline.compiler.frontends import onnx

        return onnx.read(source, shapes, [Path(case) for case in cast("list[str]", options["cases"])])
    if kind is ModelKind.TORCH:
        from pipeline.compiler.frontends import torch

        return torch.read(source)
    from pipeline.compiler.frontends import relax

    assert isinstance(source, _Called)
    return relax.read(source)


class _Called:
    """A function of the user's: called here, its own failures told apart from ours."""

    def __init__(self, pickled: bytes) -> None:
        self._pickled = pickled

    def __call__(self) -> Any:
        try:
            function = pickle.loads(self._pickled)
        except Exception as error:
            raise ModelError(f"the function cannot be sent to a worker: {type(error).__name__}: {error}") from error
        try:
            return function()
        except TvmakeError:
            raise
        except Exception as error:
            raise ModelError(f"its function raised {raised(error)}") from error


def _npz(case: Case) -> bytes:
    """A case as an .npz: in:<name> and out:<name>, and the dtypes that NumPy has no name for under dtype:<entry>."""
    entries: dict[str, Any] = {"origin": np.array(case.origin)}
    for role, arrays in (("in", case.inputs), ("out", case.outputs)):
        for name, array in arrays.items():
            entry = f"{role}:{name}"
            entries[entry] = array
            if array.dtype.isbuiltin != 1:
                entries[entry] = array.view(f"u{array.dtype.itemsize}")
                entries[f"dtype:{entry}"] = np.array(array.dtype.name)
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **entries)
    return stream.getvalue()
