"""What a change costs: densenet121 built again after one layer, the weights, the names, a comment or nothing changed.

    python -m bench.incremental [--rounds 2] [--check on|off|both]

Each round starts with an empty store: our cold build, then one change after the other, each a `doit build` in a fresh
process; and TVM's own way with the whole changed model (bench.own_tvm), which has no check of its own. Minima over the
rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bench import zoo
from bench.cpu import Usage, measure, table
from bench.workspaces import ROOT, BenchError, Run, Scratch, scratch

if TYPE_CHECKING:
    import onnx

_DODO = """\
from pipeline import DOIT_CONFIG, Model, Workspace  # noqa: F401

workspace = Workspace(Model.onnx("densenet121", "model.onnx"))
"""


@dataclass
class Figures:
    """What the runs of one step used, and the operators that the first of them compiled and the libraries it linked."""

    compiled: int | None = None
    linked: int | None = None
    runs: list[Usage] = field(default_factory=list)

    def add(self, run: Run) -> None:
        if self.compiled not in (None, run.compiled):
            raise BenchError(f"{run.compiled} operators were compiled where it was {self.compiled} before")
        self.compiled, self.linked = run.compiled, run.linked
        self.runs.append(run.usage)

    @property
    def cpu(self) -> float:
        return min(run.cpu for run in self.runs)

    @property
    def wall(self) -> float:
        return min(run.wall for run in self.runs)


@dataclass(frozen=True)
class Models:
    """The files that steps put in the model's place, in a folder of their own."""

    folder: Path

    def write(self) -> None:
        self._put("A", zoo.light("densenet121"))
        self._put("B", zoo.densenet121_changed())
        self._put("retrained", zoo.light("densenet121", seed=1))
        self._put("renamed", _renamed(zoo.light("densenet121")))

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.onnx"

    def _put(self, name: str, model: onnx.ModelProto) -> None:
        self.path(name).write_bytes(model.SerializeToString(deterministic=True))


def _renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with another name for every layer and every value between layers, and other remarks."""
    kept = {value.name for value in (*model.graph.input, *model.graph.output, *model.graph.initializer)}
    for i, node in enumerate(model.graph.node):
        node.name, node.doc_string = f"layer_{i}", f"number {i}"
        for names in (node.input, node.output):
            names[:] = [name if not name or name in kept else f"renamed/{name}" for name in names]
    del model.graph.value_info[:]
    return model


def _steps(place: Scratch, models: Models) -> list[tuple[str, Callable[[], None]]]:
    """What is done before each build, in order. The name says what the build then is."""

    def model(name: str) -> Callable[[], None]:
        return lambda: _replace(place, models.path(name))

    def comment() -> None:
        place.folder.joinpath("dodo.py").write_text("# a remark\n" + _DODO)

    def without_database() -> None:
        place.forget()

    return [
        ("cold build (A)", lambda: _start(place, models)),
        ("nothing changed", lambda: None),
        ("one layer changed (A → B)", model("B")),
        ("back again (B → A)", model("A")),
        ("other weights", model("retrained")),
        ("those weights back (to A)", model("A")),
        ("every layer renamed", model("renamed")),
        ("names back (to A)", model("A")),
        ("doit's database deleted", without_database),
        ("a comment in dodo.py", comment),
    ]


def _start(place: Scratch, models: Models) -> None:
    place.start_over()
    place.folder.joinpath("dodo.py").write_text(_DODO)
    _replace(place, models.path("A"))


def _replace(place: Scratch, model: Path) -> None:
    place.folder.joinpath("model.onnx").write_bytes(model.read_bytes())


def own_way(model: Path) -> Usage:
    """TVM's own way, in a process of its own: everything of it counts."""
    argv = [sys.executable, "-m", "bench.own_tvm", str(model), "--json"]
    with open("/dev/null", "w") as nowhere:
        usage = measure(argv, cwd=ROOT, stdout=nowhere.fileno())
    if usage.returncode != 0:
        raise BenchError(f"TVM's own way ended with {usage.returncode}")
    return usage


def compare(rounds: int, checks: list[bool]) -> None:
    """Runs everything `rounds` times in turn and prints a table for each setting of the check."""
    own = Figures()
    ours: dict[bool, dict[str, Figures]] = {check: {} for check in checks}
    with scratch() as place:
        models = Models(place.folder.parent)
        models.write()
        for _ in range(rounds):
            for check in checks:
                place.write(_DODO, check=check)
                for name, prepare in _steps(place, models):
                    prepare()
                    ours[check].setdefault(name, Figures()).add(place.doit("build").require_good())
            own.runs.append(own_way(models.path("B")))
    for check, steps in ours.items():
        state = "with the reference check" if check else "without the reference check"
        _print(f"densenet121, {state}, minima of {rounds} rounds", steps, own)


def _print(title: str, steps: dict[str, Figures], own: Figures) -> None:
    cold = next(iter(steps.values()))
    columns = ("", "compiled", "linked", "cpu s", "wall s", "cold / this, cpu", "TVM / this, cpu", "TVM / this, wall")
    rows: list[tuple[object, ...]] = []
    for name, step in steps.items():
        ratios = (cold.cpu / step.cpu, own.cpu / step.cpu, own.wall / step.wall)
        rows.append((name, step.compiled, step.linked, step.cpu, step.wall, *ratios))
    rows.append(("TVM's own way, all of B", "all", 1, own.cpu, own.wall, cold.cpu / own.cpu, 1.0, 1.0))
    table(title, columns, rows)


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.incremental", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="how often everything is done (default 2)")
    parser.add_argument("--check", choices=("on", "off", "both"), default="both", help="the reference check")
    options = parser.parse_args()
    checks = {"on": [True], "off": [False], "both": [True, False]}[options.check]
    try:
        compare(options.rounds, checks)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
