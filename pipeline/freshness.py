"""Whether an artifact is what a build would make now, answered in milliseconds and without TVM.

What the last build of an artifact depended on is kept as a record in doit's database: stamps of every file that was
read and of every file that was written, and a fingerprint of everything else that was declared. If all of it still
holds there is nothing to do, however many operators the model has. A lost record costs time, never a wrong answer: the
stages are looked up in the store one by one.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import sys
import sysconfig
import time
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.compiler.strategies import STRATEGIES
from pipeline.hashing import RACY_NS, Stamp
from pipeline.models import Model
from pipeline.processor import THREAD_VARIABLES
from pipeline.stages import STAGES
from pipeline.toolchain import PACKAGES, compiler, host_identity, tvm_library

Record = dict[str, Any]


def record(
    declared: str, files: Iterable[Path], made: Iterable[Path], begun_ns: int, own: Mapping[str, str] | None = None
) -> Record | None:
    """What to keep of a build that is done, or None where one of the files that it read changed after it began, unless
    it wrote the file itself: `own` has the hash of what it wrote, by path.

    Files that are not there are kept as such: one that appears later is a change. Waits some milliseconds where a file
    that was made is too new to be stamped.
    """
    read = {str(path): Stamp.of(path) for path in files}
    # The time of the inode's change tells of a file that was moved into place as well as of one that was written.
    ours = {name for name, stamp in read.items() if stamp is not None and (own or {}).get(name) == stamp.content}
    if any(_changed_ns(Path(name)) >= begun_ns - RACY_NS for name in read.keys() - ours):
        return None
    while True:
        stamps = {**read, **{str(path): Stamp.of(path) for path in made}}
        now = time.time_ns()
        newest = max((stamp.mtime_ns for stamp in stamps.values() if stamp), default=0)
        if not 0 <= now - newest <= RACY_NS:
            break
        time.sleep((RACY_NS - (now - newest) + 1_000_000) / 1e9)
    return {
        "declared": declared,
        "at": now,
        "files": {name: [s.size, s.mtime_ns, s.inode, s.content] if s else None for name, s in stamps.items()},
    }


def _changed_ns(path: Path) -> int:
    try:
        return path.stat().st_ctime_ns
    except OSError:
        return 0


def holds(kept: Mapping[str, Any] | None, declared: str, but: Collection[str] = ()) -> bool:
    """Whether everything that a record names is as it was, but for some files. A record of another form does not
    hold."""
    try:
        if not kept or kept["declared"] != declared:
            return False
        return all(
            Stamp(*stamp).still_holds(Path(name), kept["at"]) if stamp else not Path(name).exists()
            for name, stamp in kept["files"].items()
            if name not in but
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def declaration(model: Model, target: str, composed: str) -> str:
    """A fingerprint of what is declared apart from the bytes of files; `composed` is that of the strategies."""
    parts = [
        model.name,
        model.kind,
        target,
        str(model.source) if isinstance(model.source, Path) else function_fingerprint(model.source),
        repr(sorted(model.shapes.items())),
        repr([[str(path) for path in model.depends], [str(path) for path in model.cases]]),
        str(model.high),
        composed,
        _machine_declaration(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


# Of a workspace, each of Python files that strategies are made of.
FOLDERS = ("manual", "strategies", "libraries", "spaces")
# Where libraries of operators are looked for: folders that change when one is installed, variables that name others.
_PLACES = ("/usr/include", "/usr/local/include", "/usr/lib", "/usr/local/lib")
_ROOTS = ("ONEDNN_ROOT", "OPENBLAS_ROOT", "XNNPACK_ROOT", *THREAD_VARIABLES)


def composed(folder: Path) -> str:
    """What the choice of strategies depends on that is in no file which the last build read: which others there are,
    whether a library was installed since, and the versions of this project's strategies."""
    listed = [sorted(path.name for path in (folder / kind).glob("*")) for kind in FOLDERS]
    places = [*_PLACES, sysconfig.get_path("purelib"), os.path.join(sys.prefix, "lib")]
    changed = [_changed_ns(Path(place)) for place in places]
    versions = [(strategy.name, strategy.version) for strategy in STRATEGIES]
    # Files are kept by their full names: of a workspace that was copied, they are the original's.
    return repr([str(folder.resolve()), listed, changed, [os.environ.get(name) for name in _ROOTS], versions])


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
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    fixed = tuple(folder + os.sep for folder in (*folders, str(Path(__file__).resolve().parent)))
    files = {getattr(sys.modules.get(name), "__file__", None) for name in modules}
    return sorted(name for name in files if name and name.endswith(".py") and not name.startswith(fixed))


_PLAIN = (str, bytes, int, float, complex, bool, type(None), Path, enum.Enum)


def function_fingerprint(function: Callable[..., Any]) -> str:
    """What a function depends on that is in no file: the plain values that it closes over or reads from its module.

    The code itself is in files, which are stamped; a value may come from the environment.
    """
    met: dict[int, int] = {}  # functions by order of meeting; the graph of what they call has circles
    above: list[int] = []  # containers that are being told

    def told(value: object) -> object:
        if isinstance(value, _PLAIN):
            return (type(value).__name__, repr(value))
        if isinstance(value, types.FunctionType):
            if id(value) in met:
                return ("function", met[id(value)])
            met[id(value)] = len(met)
            reads = [name for name in _names(value.__code__) if name in value.__globals__]
            return (
                value.__qualname__,
                [_content(cell, told) for cell in value.__closure__ or ()],
                told(value.__defaults__),
                told(value.__kwdefaults__),
                [(name, told(value.__globals__[name])) for name in reads],
            )
        if id(value) in above:
            return ("circle", len(above) - above.index(id(value)))
        above.append(id(value))
        try:
            return (type(value).__name__, parts(value))
        finally:
            above.pop()

    def parts(value: object) -> object:
        if isinstance(value, functools.partial):
            return told(value.func), [told(item) for item in value.args], told(value.keywords)
        if isinstance(value, types.MethodType):
            return told(value.__func__), told(getattr(value.__self__, "__dict__", None))
        if isinstance(value, tuple | list):
            return [told(item) for item in value]
        if isinstance(value, set | frozenset):
            return sorted(repr(told(item)) for item in value)
        if isinstance(value, dict):
            return [(told(key), told(item)) for key, item in value.items()]
        return None

    return repr(told(function))


def _content(cell: types.CellType, told: Callable[[object], object]) -> object:
    try:
        return told(cell.cell_contents)
    except ValueError:
        return "unbound"


def _names(code: types.CodeType) -> list[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return sorted(set(code.co_names).union(*(_names(constant) for constant in inner)))
