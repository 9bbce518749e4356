"""What travels between stages and what an artifact says of itself. Plain frozen records; no behaviour but reading them.

Signature      inputs, weights and outputs of a model: TensorSpec each
ModelSource    what `read` makes of a model: its skeleton without weights, and the weights
Workload       one unique PrimFunc of a model
Plan           what `extract` makes of a skeleton for one target
Candidate      what one strategy offers for one workload
Trial          what became of a candidate: its time, or why it was put aside
Decision       what `dispatch` chose for one workload, among which candidates
Profile        where a model's time goes
Reference      what `check` found
Manifest       what an artifact says of itself: manifest.json
"""

from __future__ import annotations

import enum
import fnmatch
from typing import Any

import msgspec

from pipeline.hashing import Digest


class TensorSpec(msgspec.Struct, frozen=True):
    """Name, shape (elements per axis) and dtype (NumPy's or ml_dtypes' name) of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Weight(msgspec.Struct, frozen=True):
    """A weight of a model and the blob that holds its bytes: little-endian, C order, nothing around them."""

    spec: TensorSpec
    blob: Digest


class ModelKind(enum.StrEnum):
    """Where a model comes from."""

    ONNX = "onnx"  # a ModelProto: from a file, or made in dodo.py
    RELAX = "relax"  # an IRModule or nn.Module, made in dodo.py
    TORCH = "torch"  # an exported program


class ModelSource(msgspec.Struct, frozen=True):
    """A model as its front end read it: the skeleton holds structure and small constants, the weights are apart."""

    kind: ModelKind
    skeleton: Digest
    weights: tuple[Weight, ...]
    cases: tuple[Digest, ...] = ()  # recorded inputs and outputs, .npz


class Workload(msgspec.Struct, frozen=True):
    """One unique PrimFunc: a readable name, the digest and blob of its canonical form, and TVM's structural hash."""

    name: str
    function: Digest
    structural_hash: str
    shapes: tuple[str, ...]
    calls: int  # per inference; 0 where only the preparation of weights calls it
    prepares: bool  # whether the preparation of weights calls it
    written: tuple[int, ...] = ()  # indices of the parameters that it writes
    copies: bool = False  # whether it copies its input and does nothing else

    @property
    def digest(self) -> str:
        """The workload digest: 256 bits in hexadecimal over the canonical, alpha-invariant encoding."""
        return self.function.hash

    @property
    def symbol(self) -> str:
        """The name under which the compiled function is linked."""
        return symbol_of(self.function.hash)

    @property
    def label(self) -> str:
        """What a person reads: name and short key."""
        return f"{self.name}-{self.function.hash[:8]}"

    def matches(self, pattern: str) -> bool:
        """Whether a pattern with * and ? is for it: by label, name or digest."""
        return any(fnmatch.fnmatchcase(name, pattern) for name in (self.label, self.name, self.digest))

    @property
    def parameters(self) -> tuple[TensorSpec, ...]:
        """The parameters in order, named by their place. Raises ValueError where an extent is open."""
        return tuple(_spec_of(f"p{i}", shape) for i, shape in enumerate(self.shapes))


def _spec_of(name: str, shape: str) -> TensorSpec:
    extents, _, dtype = shape.partition(":")
    return TensorSpec(name, tuple(map(int, extents.split("x"))) if extents != "scalar" else (), dtype)


def symbol_of(digest: str) -> str:
    """The linkage name of the function with this digest."""
    return f"tvmake_{digest[:32]}"


class WeightUse(msgspec.Struct, frozen=True):
    """Where one weight argument of the entry function comes from: a weight of the model, or an output of `pack`."""

    spec: TensorSpec
    source: str  # name of a weight in the model; "" where `prepare` makes it
    packed: int = -1  # index among the results of `prepare`
    # The one workload that uses it and the index of its parameter, where its layout is free to that workload.
    user: str = ""
    param: int = -1


class Plan(msgspec.Struct, frozen=True):
    """A model lowered for one target: what to compile, and how the compiled parts make a library."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[WeightUse, ...]  # arguments of the entry function after its inputs, in order
    packing: tuple[str, ...]  # weights that the preparation function takes, in order
    constants: tuple[Weight, ...]  # large constants that lowering made; named like weights
    workloads: tuple[Workload, ...]  # unique; the model's own first, by first call
    prepares: bool  # whether some weight needs preparation


class Packed(msgspec.Struct, frozen=True):
    """A parameter that a candidate takes in a layout of its own: what lays it out, and what that gives."""

    param: int
    function: Digest  # of the plain weight and the buffer to fill
    spec: TensorSpec


class Candidate(msgspec.Struct, frozen=True):
    """A function that computes what a workload does, as one strategy offers it.

    whole     the function with the workload's parameters
    function  the same less what lays out weights: what is compiled
    packed    what lays out weights, each run once when an artifact is packed
    library   the library that it calls, or ""
    """

    strategy: str
    whole: Digest
    function: Digest
    packed: tuple[Packed, ...] = ()
    library: str = ""


class Cause(enum.StrEnum):
    """Why a candidate that was run was put aside."""

    WRONG = "wrong"  # another result than the default's
    FAILED = "failed"  # it cannot be loaded, or says an error when it is called
    CRASHED = "crashed"  # it ended the process
    TIMED_OUT = "timed out"


class Trial(msgspec.Struct, frozen=True):
    """What became of one candidate.

    seconds  least seconds of a run, None where it was not timed
    refused  why it was put aside, "" where it was not
    cause    the kind of that reason, where the candidate was run
    error    max |y - r| / max |r| over all outputs and seeds, against the default's; None where it was not compared
    noise    how far its time is to be trusted, relative
    """

    strategy: str
    seconds: float | None = None
    refused: str = ""
    error: float | None = None
    noise: float = 0.0
    cause: Cause | None = None


class Terms(msgspec.Struct, frozen=True):
    """How candidates are tried: the seeds of their inputs, the seconds of timing for each (0: they are compared only),
    and the seconds until one that has not ended is given up."""

    seeds: tuple[int, ...] = (0, 1)
    seconds: float = 0.1
    patience: float = 20.0


class Decision(msgspec.Struct, frozen=True):
    """Which candidate a workload is compiled from, why, and what became of the others, in the order of choice."""

    candidate: Candidate
    reason: str
    trials: tuple[Trial, ...]

    @property
    def strategy(self) -> str:
        return self.candidate.strategy

    @property
    def seconds(self) -> float | None:
        """The time of the chosen one, where it was measured."""
        return next((trial.seconds for trial in self.trials if trial.strategy == self.strategy), None)


class Profile(msgspec.Struct, frozen=True):
    """Where the time of one inference goes on one device: seconds of all, and of each function by name."""

    seconds: float
    operators: dict[str, float]


class CheckState(enum.StrEnum):
    """What became of the comparison with the reference."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"  # switched off, or no reference is installed; the reason says which


class Reference(msgspec.Struct, frozen=True):
    """How far an artifact's outputs are from the reference's, on seeded inputs."""

    state: CheckState
    reason: str = ""
    reference: str = ""  # name and version
    seeds: tuple[int, ...] = ()
    cases: int = 0  # recorded cases that came with the model
    tolerance: float = 0.0
    # Per output: max |y - r| / max |r| over all inputs tried; "inf" where one is not finite and the other is.
    errors: dict[str, float] = {}


class Operator(msgspec.Struct, frozen=True):
    """One workload in a manifest."""

    name: str
    workload: str
    structural_hash: str
    shapes: tuple[str, ...]
    calls: int
    implementation: str
    reason: str
    candidates: tuple[Trial, ...]
    object: str


class LibraryUse(msgspec.Struct, frozen=True):
    """A library that an artifact calls: its name, version, SPDX licence, and its files in the artifact."""

    name: str
    version: str
    licence: str
    files: tuple[str, ...]


class Manifest(msgspec.Struct, frozen=True):
    """manifest.json: what is in an artifact and why. Holds no path of the machine and no time."""

    format: int
    model: str
    target: str
    target_spec: dict[str, Any]
    toolchain: dict[str, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[TensorSpec, ...]
    weights_in: str  # "beside" or "inside" the library
    files: dict[str, Digest]
    reference: Reference
    operators: tuple[Operator, ...]
    libraries: tuple[LibraryUse, ...] = ()
    unlinked: str = ""  # why there are objects instead of a library


MANIFEST_FORMAT = 2

TUNED = "tuned"  # the strategy that applies what tuning found

# The files of an artifact.
MANIFEST = "manifest.json"
LIBRARY = "lib.so"
WEIGHTS = "weights.safetensors"
