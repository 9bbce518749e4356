"""A workspace that is built in this process, where the version of a tool or a stage can be another."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from conftest import WorkspaceFolder

from pipeline.build import Build
from pipeline.journal import Journal
from pipeline.memoizer import Memoizer
from pipeline.models import Model
from pipeline.processor import device
from pipeline.remotes.cache import RemoteCache
from pipeline.store import Store
from pipeline.toolchain import Toolchain
from pipeline.tuning.ledger import Ledger
from pipeline.workers import Workers

DENSE = "fused_matmul_add_relu"


@dataclasses.dataclass
class Bench:
    """A workspace whose builds run in this process."""

    place: WorkspaceFolder
    workers: Workers
    tools: dict[str, str]

    def target(self, order: list[str], **more: object) -> None:
        lines = ['target = "native"', 'layout = "as-is"', f"order = {json.dumps(order)}"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in more.items() if name != "tail"]
        lines += ["[measure]", "profile = false", "patience = 10", "seconds = 0.01", str(more.get("tail", ""))]
        self.place.write("targets/native.toml", "\n".join(lines))

    def model(self, made: Any) -> None:
        self.place.onnx("net.onnx", made)

    def build(self, cache: Path | None = None, remote: RemoteCache | None = None, **tools: str) -> Build:
        store = Store(cache or self.place.cache)
        workers = self.workers if cache is None else Workers(cache, 1)
        made = Build(self.place.folder, Memoizer(store, workers, Toolchain({**self.tools, **tools}), remote))
        try:
            made.artifact("native", Model.onnx("net", "net.onnx"))
        finally:
            if cache is not None:
                workers.stop()
        return made

    def why(self, name: str = "fused_*", *arguments: str, cache: Path | None = None, code: int = 0) -> str:
        done = self.place.doit("why", name, *arguments, TVMAKE_CACHE=str(cache or self.place.cache))
        assert done.code == code, done.out + done.err
        assert "Traceback" not in done.err
        return done.out + done.err

    def last(self, name: str = "fused_*") -> str:
        """What is told of the last build of one operator."""
        return self.why(name).partition("last build")[2].partition("comes from")[0].partition("  before  ")[0]

    def builds(self) -> list[Any]:
        return Journal(self.place.folder, "native", "net").builds()

    @property
    def key(self) -> str:
        """Of the only operator's records."""
        build = self.builds()[-1].state
        (operator,) = build.operators.values()
        return Ledger.key_of(operator.workload.hash, build.attributes, device())
