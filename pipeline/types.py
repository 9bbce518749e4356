"""What travels between stages and what an artifact says of itself. Plain frozen records; no behaviour but reading them.

Signature      inputs, weights and outputs of a model: TensorSpec each
ModelSource    what `read` makes of a model: its skeleton without weights, and the weights
Workload       one unique PrimFunc of a model
Plan           what `extract` makes of a skeleton for one target
Decision       what `dispatch` chose for one workload, among which candidates
Reference      what `check` found
Manifest       what an artifact says of itself: manifest.json
"""

from __future__ import annotations

import enum
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


def symbol_of(digest: str) -> str:
    """The linkage name of the function with this digest."""
    return f"tvmake_{digest[:32]}"


class WeightUse(msgspec.Struct, frozen=True):
    """Where one weight argument of the entry function comes from: a weight of the model, or an output of `pack`."""

    spec: TensorSpec
    source: str  # name of a weight in the model; "" where `pack` makes it
    packed: int = -1  # index among the outputs of `pack`


class Plan(msgspec.Struct, frozen=True):
    """A model lowered for one target: what to compile, and how the compiled parts make a library."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[WeightUse, ...]  # arguments of the entry function after its inputs, in order
    packing: tuple[str, ...]  # weights that the preparation function takes, in order
    constants: tuple[Weight, ...]  # large constants that lowering made; named like weights
    workloads: tuple[Workload, ...]  # unique; the model's own first, by first call
    prepares: bool  # whether some weight needs preparation


class Decision(msgspec.Struct, frozen=True):
    """Which strategy's function a workload is compiled from, why, and what else applied."""

    strategy: str
    reason: str
    function: Digest
    candidates: tuple[str, ...]


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
    candidates: tuple[str, ...]
    object: str


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


MANIFEST_FORMAT = 1

# The files of an artifact.
MANIFEST = "manifest.json"
LIBRARY = "lib.so"
WEIGHTS = "weights.safetensors"
