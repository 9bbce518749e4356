"""The stages of a build, in order, each a pure function of named blobs and plain options.

    resolve   target as written            → target as TVM understands it, for this machine where it says `native`
    read      model as declared            → skeleton without weights, and weights
    extract   skeleton, target             → plan, bytecode objects, n unique workloads
    bindings  a file of manual/            → the workloads that its functions are for
    records   a database, workloads        → the tuning records of each
    claim     records of a workload        → candidates to be tried here before they count
    export    candidates and their times   → a database of MetaSchedule's
    shim      a library's C++              → the object that calls the library
    apply     workload, strategy, target   → a candidate function, or not applicable
    search    workload, what was tried     → candidates that nobody has tried
    learn     candidates and their times   → the cost model that guides the search
    codegen   function, target             → one object, or C, and device code
    cc        C                            → one object
    measure   compiled candidates          → which are right, and how fast
    pack      preparation, weights         → weights as the entry function wants them
    embed     bytecode, device code        → the object that carries both
    link      objects                      → one shared library
    check     library, weights, model      → how far the outputs are from a reference's
    profile   library, weights             → where the time of an inference goes
    dump      skeleton, candidates         → the IR after each step, to look at

A stage knows nothing of doit, of caches or of where its blobs lie. Its module has one function `run(inputs, options)`
that returns its outputs by name. What a stage declares here decides how it is keyed and where it runs.

Raise a stage's version when the same inputs would give other bytes.
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.hashing import Digest
from pipeline.store import Store


class Home(enum.Enum):
    """Where a stage runs."""

    COMPILER = "compiler"  # a process that has TVM loaded and is used again
    FRESH = "fresh"  # a process of its own: it runs code that was built, or it needs no TVM
    RUNNER = "runner"  # a process that is used again and runs what was built in children of its own
    INLINE = "inline"  # a thread of the build: it needs no TVM and runs no code that was built


class Kind(enum.Enum):
    """What a stage's results depend on, besides its inputs and options."""

    BINARY = "binary"  # on the tools that made them: rebuilt when one changes
    DECISION = "decision"  # on nothing else: kept when a tool changes
    SOURCE = "source"  # on the world outside the store, a file or a user's function: never looked up


class Inputs(Mapping[str, bytes]):
    """A stage's inputs by name: bytes when indexed, a file to be mapped for those too large to hold."""

    def __init__(self, store: Store, digests: Mapping[str, Digest]) -> None:
        self._store = store
        self._digests = digests

    def __getitem__(self, name: str) -> bytes:
        data = self._store.get(self._digests[name])
        if data is None:
            raise FileNotFoundError(f"input {name} ({self._digests[name]}) has vanished from the store")
        return data

    def file(self, name: str) -> Path:
        path = self._store.path(self._digests[name])
        if path is None:
            raise FileNotFoundError(f"input {name} ({self._digests[name]}) has vanished from the store")
        return path

    def __iter__(self) -> Iterator[str]:
        return iter(self._digests)

    def __len__(self) -> int:
        return len(self._digests)


Options = Mapping[str, object]
Outputs = Mapping[str, bytes | memoryview]


class Run(Protocol):
    """The signature of a stage."""

    def __call__(self, inputs: Inputs, options: Options) -> Outputs: ...


@dataclass(frozen=True)
class Stage:
    """What the memoizer must know of a stage. `tools` names the parts of the toolchain that enter its key."""

    name: str
    version: int
    kind: Kind
    home: Home
    tools: tuple[str, ...] = ()
    alone: bool = False  # whether it times something, so that nothing else of the build may run meanwhile
    makes: tuple[str, ...] = ()  # outputs of which every result has at least one; none where there may be nothing

    def load(self) -> Run:
        run: Run = importlib.import_module(f"pipeline.stages.{self.name}").run
        return run


_TVM = ("tvm", "tvm-ffi", "libtvm")

RESOLVE = Stage("resolve", 2, Kind.BINARY, Home.COMPILER, (*_TVM, "host"), makes=("target",))
# Of a model that is a file, and of one that a function of the user's makes.
READ_FILE = Stage("read", 2, Kind.BINARY, Home.COMPILER, (*_TVM, "onnx", "torch"), makes=("beside",))
READ = Stage("read", 2, Kind.SOURCE, Home.COMPILER)
EXTRACT = Stage("extract", 3, Kind.BINARY, Home.COMPILER, (*_TVM, "onnx", "onnxsim", "torch"), makes=("plan",))
BINDINGS = Stage("bindings", 1, Kind.BINARY, Home.COMPILER, _TVM, makes=("bindings",))
RECORDS = Stage("records", 2, Kind.BINARY, Home.COMPILER, _TVM, makes=("unread",))
CLAIM = Stage("claim", 2, Kind.BINARY, Home.COMPILER, _TVM)
EXPORT = Stage("export", 1, Kind.BINARY, Home.COMPILER, _TVM)
SHIM = Stage("shim", 1, Kind.BINARY, Home.FRESH, ("cc",), makes=("object",))
APPLY = Stage("apply", 2, Kind.BINARY, Home.COMPILER, _TVM)
SEARCH = Stage("search", 1, Kind.BINARY, Home.COMPILER, _TVM)
LEARN = Stage("learn", 1, Kind.BINARY, Home.COMPILER, _TVM)
CODEGEN = Stage("codegen", 2, Kind.BINARY, Home.COMPILER, _TVM, makes=("object", "source"))
COMPILE = Stage("compile", 1, Kind.BINARY, Home.COMPILER, _TVM)
CC = Stage("cc", 1, Kind.BINARY, Home.FRESH, (*_TVM, "cc"), makes=("object",))
MEASURE = Stage("measure", 2, Kind.DECISION, Home.RUNNER, alone=True, makes=("trials",))
PACK = Stage("pack", 2, Kind.BINARY, Home.FRESH, (*_TVM, "cc"))
EMBED = Stage("embed", 1, Kind.BINARY, Home.COMPILER, _TVM, makes=("object",))
LINK = Stage("link", 2, Kind.BINARY, Home.INLINE, ("cc",), makes=("library",))
CHECK = Stage(
    "check", 2, Kind.BINARY, Home.FRESH, (*_TVM, "host", "onnx", "onnxruntime", "torch"), makes=("reference",)
)
PROFILE = Stage("profile", 2, Kind.DECISION, Home.FRESH, alone=True, makes=("profile",))
DUMP = Stage("dump", 2, Kind.BINARY, Home.COMPILER, EXTRACT.tools)

STAGES = (
    *(
        RESOLVE,
        READ_FILE,
        READ,
        EXTRACT,
        BINDINGS,
        RECORDS,
        CLAIM,
        EXPORT,
        SHIM,
        APPLY,
        SEARCH,
        LEARN,
        CODEGEN,
        COMPILE,
        CC,
        MEASURE,
    ),
    *(PACK, EMBED, LINK, CHECK, PROFILE, DUMP),
)
