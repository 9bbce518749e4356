"""Workspaces that look built and tuned, made within milliseconds: real manifests, record sets and values of doit's.

What no command that only looks can tell from the work of a build and a night.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
from doit.dependency import Dependency, SqliteDB

from pipeline.hashing import Digest
from pipeline.processor import device
from pipeline.store import Store
from pipeline.toolchain import detect
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.records import TOOLS, VALIDATOR, Certificate, Outcome, Record, RetestRecord, TrialRecord
from pipeline.types import MANIFEST_FORMAT, Manifest, Operator, Plan, Reference, Trial, Workload, symbol_of
from pipeline.types import CheckState as Check

ATTRIBUTES: dict[str, Any] = {"kind": "llvm", "keys": ["cpu"]}
NOW = 1_800_000_000.0
BASELINE = 2e-3


@functools.cache
def today() -> dict[str, str]:
    """The tools that are installed."""
    return detect().pick(TOOLS)


def trial(
    name: str,
    gain: float | None = 1.0,
    at: float = NOW,
    outcome: Outcome = Outcome.FAILED,
    baseline: float = BASELINE,
    tools: dict[str, str] | None = None,
) -> TrialRecord:
    """A candidate that is so many times as fast as the baseline; with None for that one that came to nothing."""
    return TrialRecord(
        candidate=digest_of(name),
        space="rules",
        space_version=1,
        decisions=[name],
        outcome=outcome if gain is None else Outcome.TIMED,
        seconds=None if gain is None else baseline / gain,
        baseline=None if gain is None else baseline,
        cost=0.5,
        at=at,
        tools=today() if tools is None else tools,
    )


def retest(
    name: str,
    gain: float,
    at: float = NOW,
    baseline: float = BASELINE,
    validator: int = VALIDATOR,
    tools: dict[str, str] | None = None,
) -> RetestRecord:
    return RetestRecord(
        candidate=digest_of(name),
        seconds=baseline / gain,
        baseline=baseline,
        noise=0.0,
        certificate=Certificate("default", (0, 1), 1e-3, 1e-6, validator),
        cost=1.0,
        at=at,
        tools=today() if tools is None else tools,
    )


def won(name: str, gain: float, at: float = NOW, tools: dict[str, str] | None = None) -> list[Record]:
    """A candidate with all that a winner needs."""
    return [trial(name, gain, at, tools=tools), retest(name, gain, at, tools=tools)]


def digest_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


@dataclass(frozen=True)
class Made:
    """An operator of a model. `seconds` are those of all its calls, None where the model was not profiled."""

    name: str
    implementation: str = "default"
    seconds: float | None = 1e-3
    records: Sequence[Record] = ()
    calls: int = 1
    candidates: tuple[Trial, ...] = ()
    shapes: tuple[str, ...] = ("1x64x56x56:float32", "1x64x56x56:float32")
    copies: bool = False
    device: str = field(default_factory=device)

    @property
    def digest(self) -> str:
        return digest_of(f"operator {self.name}")

    @property
    def label(self) -> str:
        return self.workload().label

    def workload(self) -> Workload:
        return Workload(self.name, Digest(self.digest, 1), "", self.shapes, self.calls, False, (1,), self.copies)

    def in_manifest(self) -> Operator:
        return Operator(
            name=self.label,
            workload=self.digest,
            structural_hash="",
            shapes=self.shapes,
            calls=self.calls,
            implementation=self.implementation,
            reason="the first in the order",
            candidates=self.candidates or (Trial(self.implementation),),
            object="",
        )

    @property
    def key(self) -> str:
        return Ledger.key_of(self.digest, ATTRIBUTES, self.device)

    def about(self) -> dict[str, object]:
        return {"operator": self.name, "workload": self.digest, "target": ATTRIBUTES, "device": self.device}


def build(
    folder: Path, store: Path, made: Sequence[Made], model: str = "net", target: str = "native", at: float = 0.0
) -> None:
    """Has a model look built for a target, at a moment, with what was tuned for its operators."""
    artifact = folder / "artifacts" / target / model
    artifact.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(
        MANIFEST_FORMAT, model, target, ATTRIBUTES, {}, (), (), (), "beside", {}, Reference(Check.SKIPPED),
        tuple(each.in_manifest() for each in made),
    )  # fmt: skip
    (artifact / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    opened = Store(store)
    plan = opened.put(msgspec.json.encode(Plan((), (), (), (), (), tuple(each.workload() for each in made), False)))
    times = {symbol_of(each.digest): each.seconds for each in made if each.seconds is not None}
    profile = {"seconds": sum(times.values()) * 1.1, "operators": times} if times else None
    remember(
        folder,
        {
            f"extract:{target}:{model}": {"plan": [plan.hash, plan.size]},
            f"profile:{target}:{model}": {"profile": profile},
            f"artifact:{target}:{model}": {"record": {"at": int(at * 1e9)}},
        },
    )
    tune(store, made)


def tune(store: Path, made: Iterable[Made]) -> None:
    """Writes the records of operators down."""
    opened = Store(store)
    ledger = Ledger(opened, 0.03)
    # What is made up need not outlive a power failure, and is told of once: a disk is slow at both.
    with mock.patch("os.fsync"), mock.patch.object(opened.sets, "_tell"):
        for each in made:
            if each.records:
                ledger.add(each.key, each.about(), each.records)
    opened.sets._tell()


def remember(folder: Path, values: dict[str, dict[str, Any]]) -> None:
    """Has doit remember values of tasks."""
    manager = Dependency(SqliteDB, str(folder / ".doit.db"))
    for task, kept in values.items():
        manager._set(task, "_values_:", kept)
    manager.close()
