"""A workspace with a store, built as a person builds it: `doit build` in a process of its own, which may be killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 150  # seconds that a build of one of these models may take: what takes longer hangs

ONE_ONNX = """\
from pipeline import DOIT_CONFIG, Model, Workspace  # noqa: F401

workspace = Workspace(Model.onnx("net", "net.onnx"))
"""
# Nothing that needs a library, and nothing timed: two builds leave the same files in their stores.
NATIVE = 'target = "native"\norder = ["default"]\nlayout = "as-is"\nmeasure.profile = false\n'


@dataclass(frozen=True)
class Outcome:
    """How a build ended."""

    code: int
    output: str

    @property
    def summary(self) -> dict[str, int]:
        """The numbers of the last line; a build with nothing to do has none of them."""
        last = self.output.strip().rpartition("\n")[2]
        kinds = {"compiled": "operators? compiled", "cached": "cached", "linked": "librar(?:y|ies) linked"}
        kinds["corrupt"] = "corrupt entr(?:y|ies)"
        found = {kind: re.search(rf"(\d+) {words}", last) for kind, words in kinds.items()}
        return {kind: int(match[1]) if match else 0 for kind, match in found.items()}


WIDTHS = (8, 12)  # two versions of one model, to be built in turn


@dataclass(frozen=True)
class Undisturbed:
    """The right bytes of the artifact of each version of the model, and how many seconds a build takes."""

    right: dict[int, dict[str, bytes]]
    seconds: float


class Place:
    """A workspace's folder, a store, and the processes that were started there."""

    def __init__(
        self, folder: Path, store: Path, dodo: str = ONE_ONNX, targets: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.store = store
        self.scratch = folder.parent / f"{folder.name}-tmp"
        self.scratch.mkdir(parents=True)
        (folder / "targets").mkdir(parents=True)
        (folder / "dodo.py").write_text(dodo)
        for name, text in (targets or {"native": NATIVE}).items():
            (folder / "targets" / f"{name}.toml").write_text(text)
        self._sessions: list[int] = []

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Starts `doit build`, or another command of doit's, in a session of its own."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TVMAKE_", "PYTHON"))}
        process = subprocess.Popen(
            [sys.executable, "-m", "doit", *(arguments or ("build",))],
            cwd=self.folder,
            env={
                **inherited,
                "TVMAKE_CACHE": str(self.store),
                "TMPDIR": str(self.scratch),
                "PYTHONPATH": str(ROOT),
                "PYTHONFAULTHANDLER": "1",
                **environment,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
        self._sessions.append(process.pid)
        return process

    def run(self, *arguments: str, **environment: str) -> Outcome:
        return finish(self.start(*arguments, **environment))

    def build(self, **environment: str) -> Outcome:
        """Builds, and insists that it succeeds and leaves no process behind."""
        outcome = self.run(**environment)
        assert outcome.code == 0, outcome.output
        self.require_nobody_left()
        return outcome

    def artifacts(self) -> dict[str, bytes]:
        """Every file of the artifacts, by its path under artifacts/, without what killed builds left beside them."""
        files = tree(self.folder / "artifacts")
        return {name: data for name, data in files.items() if "/." not in name}

    def forget(self) -> None:
        """Leaves nothing but the store of what was built."""
        shutil.rmtree(self.folder / "artifacts", ignore_errors=True)
        for path in self.folder.glob(".doit.db*"):
            path.unlink()

    def empty_store(self) -> None:
        shutil.rmtree(self.store, ignore_errors=True)

    def stored(self) -> list[Path]:
        """Every blob and entry of the store, relative to it."""
        return sorted(
            path.relative_to(self.store) for kind in ("ac", "cas") for path in (self.store / kind).glob("*/*")
        )

    def require_nobody_left(self) -> None:
        """Fails where a process of an earlier build lives; those whose parent was killed have a moment to notice."""
        until = time.monotonic() + 15
        while alive := [process for leader in self._sessions for process in members(leader)]:
            assert time.monotonic() < until, f"left behind: {[process.cmdline() for process in alive]}"
            time.sleep(0.02)
        self._sessions.clear()


def _heed_interrupts() -> None:
    # Where the tests run in the background of a shell, Ctrl-C is ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: subprocess.Popen[str]) -> Outcome:
    """Waits for a build. One that hangs is killed with all that it started, and fails the test."""
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        for member in members(process.pid):
            member.kill()
        output, _ = process.communicate()
        raise AssertionError(f"hangs:\n{output}") from None
    return Outcome(process.returncode, output)


def members(leader: int) -> Iterator[psutil.Process]:
    """The living processes of the session that `leader` leads: it, its workers, and what these started."""
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except (OSError, psutil.NoSuchProcess):
            continue


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
