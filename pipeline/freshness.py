"""Whether an artifact is what a build would make now, answered in milliseconds and without TVM.

What the last build of an artifact depended on is kept as a record in doit's database: stamps of every file that was
read and of every file that was written, and a fingerprint of everything else that was declared. If all of it still
holds there is nothing to do, however many operators the model has. A lost record costs time, never a wrong answer: the
stages are looked up in the store one by one.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import sys
import sysconfig
import time
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.hashing import RACY_NS, Stamp
from pipeline.models import Model
from pipeline.stages import STAGES
from pipeline.toolchain import PACKAGES, compiler, host_identity, tvm_library

Record = dict[str, Any]


def record(declared: str, files: Iterable[Path], made: Iterable[Path]) -> Record:
    """What to keep of a build that is done. Waits some milliseconds where a file is too new to be stamped."""
    paths = {str(path): Path(path) for path in (*files, *made)}
    while True:
        stamps = {name: Stamp.of(path) for name, path in paths.items()}
        now = time.time_ns()
        newest = max((stamp.mtime_ns for stamp in stamps.values() if stamp), default=0)
        if not 0 <= now - newest <= RACY_NS:
            break
        time.sleep((RACY_NS - (now - newest) + 1_000_000) / 1e9)
    return {
        "declared": declared,
        "at": now,
        "files": {name: [s.size, s.mtime_ns, s.inode, s.content] for name, s in stamps.items() if s},
    }


def holds(kept: Mapping[str, Any] | None, declared: str) -> bool:
    """Whether everything that a record names is as it was."""
    if not kept or kept.get("declared") != declared:
        return False
    return all(Stamp(*stamp).still_holds(Path(name), kept["at"]) for name, stamp in kept["files"].items())


def declaration(model: Model, target: str) -> str:
    """A fingerprint of what is declared apart from the bytes of files."""
    parts = [
        model.name,
        model.kind,
        target,
        str(model.source) if isinstance(model.source, Path) else function_fingerprint(model.source),
        repr(sorted(model.shapes.items())),
        repr([str(path) for path in (*model.depends, *model.cases)]),
        str(model.high),
        _machine_declaration(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache
def _machine_declaration() -> str:
    optional = ("onnx", "onnxsim", "onnxruntime", "torch")
    return "\0".join(
        [
            *(f"{stage.name} {stage.version}" for stage in STAGES),
            sys.version,
            host_identity(),
            str(compiler()),
            *(f"{name} {importlib.util.find_spec(name) is not None}" for name in optional),
        ]
    )


@functools.cache
def machine_files() -> tuple[Path, ...]:
    """Files that change when a tool is replaced: libraries, the compiler driver, each package's metadata."""
    files = [tvm_library("libtvm_compiler.so"), tvm_library("libtvm_runtime.so")]
    if driver := compiler():
        files.append(Path(driver).resolve())
    for package in PACKAGES.values():
        try:
            distribution = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        metadata = next((f for f in distribution.files or () if f.name == "METADATA"), None)
        if metadata is not None:
            files.append(Path(str(distribution.locate_file(metadata))))
    return tuple(files)


def loaded_user_files() -> list[Path]:
    """Files of the modules loaded now that may change: dodo.py and what it imports, not installed packages."""
    return [Path(name) for name in user_files(list(sys.modules))]


def user_files(modules: Iterable[str]) -> list[str]:
    """Files of the named modules that may change: not the standard library's, not installed packages', not ours."""
    fixed = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    package = str(Path(__file__).resolve().parent)
    files = {getattr(sys.modules.get(name), "__file__", None) for name in modules}
    return sorted(name for name in files if name and name.endswith(".py") and not name.startswith((*fixed, package)))


_PLAIN = (str, bytes, int, float, bool, type(None), Path)


def function_fingerprint(function: Callable[..., Any]) -> str:
    """What a function depends on that is in no file: the plain values that it closes over or reads from its module.

    The code itself is in files, which are stamped; a value may come from the environment.
    """
    seen: set[int] = set()
    parts: list[str] = []

    def visit(value: object) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, functools.partial):
            visit(value.func)
            for argument in (*value.args, *sorted(value.keywords.items())):
                visit(argument)
        elif isinstance(value, types.FunctionType):
            parts.append(value.__qualname__)
            for cell in value.__closure__ or ():
                visit(cell.cell_contents)
            visit(value.__defaults__)
            for name in _names(value.__code__):
                if name in value.__globals__:
                    found = value.__globals__[name]
                    if isinstance(found, (*_PLAIN, tuple, list, dict, types.FunctionType, functools.partial)):
                        parts.append(name)
                        visit(found)
        elif isinstance(value, _PLAIN):
            parts.append(repr(value))
            seen.discard(id(value))
        elif isinstance(value, tuple | list):
            for item in value:
                visit(item)
        elif isinstance(value, dict):
            for key, item in value.items():
                parts.append(repr(key))
                visit(item)

    visit(function)
    return "\0".join(parts)


def _names(code: types.CodeType) -> list[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return sorted(set(code.co_names).union(*(_names(constant) for constant in inner)))
