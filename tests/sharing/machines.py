"""Machines of one team, in an end-to-end test: a workspace each, with a store of its own behind a remote."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import models
from conftest import Done, WorkspaceFolder

from pipeline.remotes import results

NET = 'Model.onnx("net", "net.onnx"),'
KINDS = ("folder", "nginx", "casd", "gateway")
BOUND = 60.0  # seconds: many times what these builds take


@dataclass
class Machine:
    """A workspace with a store of its own behind a remote."""

    workspace: WorkspaceFolder
    environment: dict[str, str] = field(default_factory=dict)

    def build(self, *, forbid_tvm: bool = False, **more: str) -> Done:
        begun = time.monotonic()
        done = self.workspace.doit(
            "build", forbid_tvm=forbid_tvm, **{"HOME": str(self.workspace.cache), **self.environment, **more}
        )
        assert time.monotonic() - begun < BOUND
        return done

    def cache(self, *arguments: str, **more: str) -> Done:
        return self.workspace.doit("cache", *arguments, **{**self.environment, **more})

    def artifact(self) -> dict[str, bytes]:
        return self.workspace.artifact_bytes("net")


Machines = Callable[..., Machine]


def filled(workspace: WorkspaceFolder, activation: str = "Relu", more: int = 0) -> WorkspaceFolder:
    workspace.onnx("net.onnx", models.chain("Sigmoid", activation, "Tanh", *["Tanh"] * more))
    workspace.dodo(NET)
    return workspace


def found(done: Done) -> tuple[int, int, int]:
    """Of how many actions how many were found on the remote, and how many were sent."""
    match = re.search(r"; (\d+) of (\d+) found on the remote(?:, (\d+) sent)?", done.last)
    assert match, done.err
    return int(match[1]), int(match[2]), int(match[3] or 0)


def bundles_in(held: Mapping[str, bytes]) -> dict[str, bytes]:
    """The bundles among what a remote holds, by their names."""
    bundled = {}
    for name, document in held.items():
        kind, _, key = name.partition("/")
        result = results.from_document(key, document) if kind == "ac" else None
        if isinstance(result, results.Result) and result.entry.stage == "closure":
            names = (f"cas/{each.hash}" for output, each in result.entry.outputs.items() if output != "entries")
            bundled |= {name: held[name] for name in names}
    return bundled
