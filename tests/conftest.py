"""What end-to-end tests share: a workspace of its own for each test, the real `doit` in it, and what it said.

A build there uses a store of its own, never the user's.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
# Most tests are about the build, not about strategies: this one needs nothing installed and is the same everywhere.
NATIVE = 'target = "native"\norder = ["default"]\n'

# Ends the process that starts to import TVM or starts a worker, whatever catches exceptions there. To look where TVM
# lies, as importlib.util.find_spec does, is allowed.
_NO_TVM = """
import importlib.machinery, os, sys

def end(why):
    os.write(2, f"FORBIDDEN: {why}\\n".encode())
    os._exit(97)

class Forbidden:
    def create_module(self, spec):
        end(f"import of {spec.name}")

    def exec_module(self, module):
        end(f"import of {module.__name__}")

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "tvm":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = Forbidden()
        return spec

def audit(event, arguments):
    if event == "subprocess.Popen" and "pipeline.workers" in [str(part) for part in arguments[1]]:
        end("start of a worker")

sys.meta_path.insert(0, Finder())
sys.addaudithook(audit)
"""

_RUN = """
import sys
import numpy as np
from pipeline import load

given = dict(np.load(sys.argv[2]))
np.savez(sys.argv[3], **load(sys.argv[1], verify=True)(**given))
"""

_DODO = "from pipeline import DOIT_CONFIG, Model, Workspace\n"
_VERBS = "read|extracted|compiled|packed|linked|checked"
_LINE = re.compile(rf"^(?:\[\d+/\d+\] )?({_VERBS}) (\S+) \([\d.]+ s\)$", re.MULTILINE)
_SUMMARY = re.compile(
    r"(?:\d+ of )?(\d+) artifacts?(?:, (\d+) tasks? failed)?: (\d+) operators? compiled, (\d+) cached, (\d+) librar"
)
_IDLE = re.compile(r"\d+ artifacts? up to date, nothing to do")
_FAILED = re.compile(r"^FAILED (\S+): (.*(?:\n {2,}.*)*)$", re.MULTILINE)


_ENVIRONMENT = dict(os.environ)
_THREADS = re.compile(r"(TVM|OMP|OPENBLAS)_NUM_THREADS|GOMP_\w+")


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """To open an artifact says for the whole process how many threads it has, and so makes another device of this
    machine: that is for no other test, also where a fixture of a module opened it."""
    yield
    for name in filter(_THREADS.fullmatch, os.environ.keys() | _ENVIRONMENT.keys()):
        if name in _ENVIRONMENT:
            os.environ[name] = _ENVIRONMENT[name]
        else:
            os.environ.pop(name, None)


@dataclass(frozen=True)
class Done:
    """What one run of doit left: its exit code and what it printed, and what that says."""

    code: int
    out: str
    err: str

    @cached_property
    def last(self) -> str:
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""

    @cached_property
    def ran(self) -> Counter[str]:
        """How many stages ran, by what is said of them: read, extracted, compiled, packed, linked, checked."""
        return Counter(match[1] for match in _LINE.finditer(self.err))

    def subjects(self, verb: str) -> list[str]:
        """What was read, compiled, …, in alphabetical order."""
        return sorted(match[2] for match in _LINE.finditer(self.err) if match[1] == verb)

    @cached_property
    def idle(self) -> bool:
        """Whether there was nothing to do."""
        return bool(_IDLE.fullmatch(self.last)) and not self.ran

    @property
    def compiled(self) -> int:
        return self._counts[2]

    @property
    def cached(self) -> int:
        return self._counts[3]

    @property
    def linked(self) -> int:
        return self._counts[4]

    @property
    def tasks_failed(self) -> int:
        return self._counts[1]

    @cached_property
    def failures(self) -> dict[str, str]:
        """What is said of each task that failed."""
        return {match[1]: match[2] for match in _FAILED.finditer(self.err)}

    @cached_property
    def _counts(self) -> list[int]:
        match = _SUMMARY.match(self.last)
        assert match, f"the last line is no summary:\n{self.err}"
        return [int(number or 0) for number in match.groups()]

    def good(self) -> Done:
        """Itself, where nothing went wrong."""
        assert self.code == 0, self.out + self.err
        assert "Traceback" not in self.out + self.err
        return self


class WorkspaceFolder:
    """A folder with a dodo.py, targets and a store beside it."""

    def __init__(self, folder: Path, cache: Path, no_tvm: Path) -> None:
        self.folder = folder
        self.cache = cache
        self._no_tvm = no_tvm
        self.write("targets/native.toml", NATIVE)

    def write(self, name: str, content: str | bytes) -> Path:
        """A new file: replaced, not overwritten, as editors do."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def onnx(self, name: str, model: Any) -> Path:
        return self.write(name, model.SerializeToString())

    def dodo(self, models: str, *functions: Callable[..., Any] | str) -> str:
        """Writes dodo.py: functions, by their source, and the declarations of the models. Returns its text."""
        sources = [f if isinstance(f, str) else textwrap.dedent(inspect.getsource(f)) for f in functions]
        text = "\n\n".join([_DODO, *sources, f"workspace = Workspace(\n{textwrap.indent(models.strip(), '    ')}\n)\n"])
        self.write("dodo.py", text)
        return text

    def edit(self, before: str, after: str, name: str = "dodo.py") -> None:
        """Replaces text that stands in a file."""
        text = (self.folder / name).read_text()
        assert before in text
        self.write(name, text.replace(before, after))

    def environment(self, *, forbid_tvm: bool = False, **changes: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TVMAKE_")}
        path = [str(self._no_tvm)] if forbid_tvm else []
        if kept.get("PYTHONPATH"):
            path.append(kept["PYTHONPATH"])
        return {**kept, "TVMAKE_CACHE": str(self.cache), "PYTHONPATH": os.pathsep.join(path), **changes}

    def doit(self, *arguments: str, forbid_tvm: bool = False, timeout: float = 120, **environment: str) -> Done:
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(forbid_tvm=forbid_tvm, **environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    @staticmethod
    def command(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "doit", *arguments]

    def build(self, *arguments: str, **environment: Any) -> Done:
        return self.doit("build", *arguments, **environment)

    def idle_build(self, *arguments: str) -> Done:
        """A build that must have nothing to do: it dies where it imports TVM or starts a worker."""
        done = self.build(*arguments, forbid_tvm=True).good()
        assert done.idle, done.err
        return done

    def artifact(self, model: str, target: str = "native") -> Path:
        return self.folder / "artifacts" / target / model

    def manifest(self, model: str, target: str = "native") -> Any:
        return json.loads((self.artifact(model, target) / "manifest.json").read_bytes())

    def artifact_bytes(self, model: str, target: str = "native") -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.artifact(model, target).iterdir())}

    def run(self, artifact: Path | str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Loads an artifact in a fresh process that cannot import TVM's compiler, and calls it."""
        folder = self.artifact(artifact) if isinstance(artifact, str) else artifact
        given, taken = self.cache.parent / "given.npz", self.cache.parent / "taken.npz"
        np.savez(given, **inputs)
        done = subprocess.run(
            [sys.executable, "-c", _RUN, str(folder), str(given), str(taken)],
            cwd=self.cache.parent,
            env=self.environment(forbid_tvm=True),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        with np.load(taken) as outputs:
            return dict(outputs)


@pytest.fixture(scope="session")
def no_tvm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that makes importing TVM, and starting a worker, fatal to the Python that has it on its path."""
    folder = tmp_path_factory.mktemp("no_tvm")
    (folder / "sitecustomize.py").write_text(_NO_TVM)
    return folder


@pytest.fixture(scope="session")
def new_workspace(tmp_path_factory: pytest.TempPathFactory, no_tvm: Path) -> Callable[[], WorkspaceFolder]:
    """Makes an empty workspace with an empty store, for tests and for fixtures that live longer than one test."""

    def make() -> WorkspaceFolder:
        folder = tmp_path_factory.mktemp("work")
        return WorkspaceFolder(folder / "workspace", folder / "store", no_tvm)

    return make


@pytest.fixture
def workspace(new_workspace: Callable[[], WorkspaceFolder]) -> WorkspaceFolder:
    return new_workspace()
