"""Front ends: a model as its owner has it → a skeleton without weights, and the weights; a skeleton → a Relax module.

    read(...)           what the owner has → Read                 needs the model's own library, not always TVM
    load(skeleton, …)   skeleton bytes     → (IRModule, …)        whose `main` takes the inputs and then the weights

Each front end is one file. The skeleton holds everything that decides what code is generated and nothing else, so that
a retrained model has the same skeleton.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.types import TensorSpec


@dataclass(frozen=True)
class Case:
    """Inputs and the outputs that the model's own framework gives for them, by name."""

    origin: str
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Read:
    """What a front end makes of a model. Weights are raw bytes: little-endian, C order; `files` is what it read."""

    skeleton: bytes
    weights: Sequence[tuple[TensorSpec, bytes | memoryview]]
    cases: Sequence[Case] = field(default_factory=tuple)
    files: Sequence[Path] = field(default_factory=tuple)


def raw(array: np.ndarray) -> memoryview:
    """An array's bytes without a copy where it lies in C order already."""
    return np.asarray(array, order="C").reshape(-1).view(np.uint8).data
