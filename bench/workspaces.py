"""Workspaces in a temporary folder with a store of their own, and doit run in them and measured.

Owns how a benchmark calls doit: in a fresh process, with the package that the benchmark came with, away from the
user's store. What a build prints is kept, and its last line is read.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.cpu import Usage, measure

ROOT = Path(__file__).resolve().parent.parent

_ONE_MODEL = """\
from pipeline import DOIT_CONFIG, Model, Workspace  # noqa: F401

workspace = Workspace(Model.onnx("model", "model.onnx"))
"""
_SUMMARY = re.compile(r"(\d+) operators? compiled, (\d+) cached, (\d+) librar(?:y|ies) linked")
_FAILED = re.compile(
    r"^FAILED (\S+): (.*(?:\n(?!\[\d+/\d+\] |FAILED |ERROR|\d+ (?:of \d+ )?artifacts?).*)*)", re.MULTILINE
)
_RAN = re.compile(r"^(?:\[\d+/\d+\] )?(resolved|read|extracted|compiled|packed|linked|checked) ", re.MULTILINE)


class BenchError(Exception):
    """A benchmark cannot go on: what it measures did not work."""


@dataclass(frozen=True)
class Run:
    """What one doit command used and said."""

    usage: Usage
    out: str
    err: str

    @property
    def compiled(self) -> int:
        """Operators compiled, as the build's last line counts them; 0 where there was nothing to do."""
        found = _SUMMARY.search(self.err)
        return int(found[1]) if found else 0

    @property
    def linked(self) -> int:
        found = _SUMMARY.search(self.err)
        return int(found[3]) if found else 0

    @property
    def stages_run(self) -> int:
        """How many stages said that they ran."""
        return len(_RAN.findall(self.err))

    @property
    def failures(self) -> dict[str, str]:
        """What each failed task said, by its name."""
        return {name: message.strip() for name, message in _FAILED.findall(self.err)}

    @property
    def last_line(self) -> str:
        return (self.err.strip().splitlines() or [""])[-1]

    def require_good(self) -> Run:
        if self.usage.returncode != 0:
            raise BenchError(f"doit ended with {self.usage.returncode}:\n{self.err[-3000:]}{self.out[-1000:]}")
        return self


@dataclass(frozen=True)
class Scratch:
    """A workspace's folder, and the folder of the store that it uses."""

    folder: Path
    store: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def write(self, dodo: str, *, check: bool = True) -> None:
        """Writes dodo.py and the one target, `native`."""
        self.folder.joinpath("dodo.py").write_text(dodo)
        self.folder.joinpath("targets").mkdir(exist_ok=True)
        switched = "" if check else "[check]\nenabled = false\n"
        self.folder.joinpath("targets", "native.toml").write_text(f'target = "native"\n{switched}')

    def hold(self, model: bytes, target: str = "") -> None:
        """Makes it the workspace of one ONNX model, called `model`, and of the target `native`, of which `target` says
        more, in TOML."""
        self.folder.joinpath("model.onnx").write_bytes(model)
        self.write(_ONE_MODEL)
        with open(self.folder / "targets" / "native.toml", "a") as stream:
            stream.write(target)

    def doit(self, *arguments: str) -> Run:
        """Runs `doit` with these arguments and waits for every process that came of it."""
        return self.run(sys.executable, "-m", "doit", *arguments)

    def run(self, *argv: str) -> Run:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "TVMAKE_CACHE": str(self.store),
            **self.environment,
        }
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            usage = measure(argv, environment, self.folder, stdout=out.fileno(), stderr=err.fileno())
            texts = []
            for stream in (out, err):
                stream.seek(0)
                texts.append(stream.read().decode(errors="replace"))
        return Run(usage, *texts)

    def forget(self) -> None:
        """Deletes doit's database."""
        for path in self.folder.glob(".doit.db*"):
            path.unlink()

    def empty_store(self) -> None:
        shutil.rmtree(self.store, ignore_errors=True)

    def start_over(self) -> None:
        """Deletes everything that was built."""
        self.forget()
        self.empty_store()
        shutil.rmtree(self.folder / "artifacts", ignore_errors=True)


@contextmanager
def scratch(**environment: str) -> Iterator[Scratch]:
    """A workspace that lives as long as the block."""
    with tempfile.TemporaryDirectory(prefix="tvmake-bench-") as name:
        folder = Path(name, "workspace")
        folder.mkdir()
        yield Scratch(folder, Path(name, "store"), environment)
