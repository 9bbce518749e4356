"""Workspaces with tuned operators, whose locks and records a test reads and changes."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from conftest import Done, WorkspaceFolder
from tuning_runs import plain, twin

from pipeline.hashing import Digest
from pipeline.lock import FILE, Entry, read
from pipeline.store import Store
from pipeline.tuning.records import Certificate, Record, RetestRecord, TrialRecord, decoded, encoded

RELU, SIGMOID = "fused_matmul_relu", "fused_matmul_sigmoid"


def digest(text: str) -> str:
    return Digest.of(text.encode()).hash


class Machine:
    """A workspace with two tuned operators, whose best candidates are as the test says."""

    def __init__(self, workspace: WorkspaceFolder, environment: dict[str, str] | None = None) -> None:
        self.workspace = workspace
        self.environment = environment or {}

    def build(self, *arguments: str, **more: str) -> Done:
        return self.workspace.build(*arguments, **{**self.environment, **more})

    def lock(self, *arguments: str, **more: str) -> Done:
        return self.workspace.doit("lock", *arguments, **{**self.environment, **more})

    @property
    def path(self) -> Path:
        return self.workspace.folder / FILE

    def entries(self) -> dict[str, Entry]:
        """By the operators' names without their digests."""
        found = read(self.path)
        assert found is not None
        return {plain(label): each for label, each in found.targets["native"].items()}

    def artifact(self) -> dict[str, bytes]:
        return self.workspace.artifact_bytes("net")

    def key(self, operator: str) -> str:
        sets = Store(self.workspace.cache).sets
        (key,) = [key for key in sets.all_keys() if sets.about(key)["operator"] == operator]
        return key

    def candidates(self, operator: str) -> list[TrialRecord]:
        """What was tried, in one order always."""
        found = [decoded(data) for _, data in Store(self.workspace.cache).sets.read(self.key(operator))]
        trials = {each.candidate: each for each in found if isinstance(each, TrialRecord)}
        return [trials[name] for name in sorted(trials)]

    def win(self, operator: str, number: int, gain: float) -> str:
        """Has a candidate be so many times as fast as the baseline; returns its digest."""
        trial = self.candidates(operator)[number]
        certificate = Certificate("default", (0, 1), 1e-3, 1e-6)
        won = RetestRecord(
            candidate=trial.candidate,
            seconds=1.0 / gain,
            baseline=1.0,
            noise=0.0,
            certificate=certificate,
            at=time.time(),
            tools=trial.tools,
        )
        sets, key = Store(self.workspace.cache).sets, self.key(operator)
        sets.add(key, [encoded(won)], sets.about(key))
        return trial.candidate

    def rewrite(self, operator: str, change: Callable[[Record], Record]) -> None:
        """Has the records of an operator be others."""
        sets, key = Store(self.workspace.cache).sets, self.key(operator)
        members, about = [encoded(change(decoded(data))) for _, data in sets.read(key)], sets.about(key)
        shutil.rmtree(self.workspace.cache / "sets" / key[:2] / key)
        sets.add(key, members, about)

    def change(self, operator: str, **more: str) -> None:
        """Edits one line of the lock."""
        text = self.path.read_text()
        (line,) = [each for each in text.splitlines() if each.startswith(f'"{operator}')]
        other = line
        for name, value in more.items():
            other = re.sub(rf'{name} = "[^"]*"', f'{name} = "{value}"', other)
        assert other != line
        self.workspace.write(FILE, text.replace(line, other))


def lines_changed(before: str, after: str) -> list[str]:
    return sorted(set(after.splitlines()) - set(before.splitlines()))


def copied(one: WorkspaceFolder, other: WorkspaceFolder, store: bool = True) -> Machine:
    return Machine(twin(one, other, store))
