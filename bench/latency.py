"""How long an inference takes: real networks as tvmake builds them, against onnxruntime, OpenVINO and TVM's own way.

    python -m bench.latency [MODEL...] [--orders first,fastest,rules,unscheduled] [--others openvino,tvm]
                            [--rounds 5] [--threads 2] [--json FILE]

Each model is built for one target file for each of `--orders`, in a temporary workspace, with the user's store (so a
second run builds little):

    first        the default order, the first strategy that applies: libraries before rules
    fastest      the default order, measured
    rules        no library: rules, then loops as they are
    unscheduled  loops as they are

and by TVM itself, its usual passes and its default pipeline (bench.own_tvm). When everything is built, each model is
run by every engine, each in a process of its own (bench.engines), turn by turn; the fastest run of all rounds counts.
Engines that take more than 20 times onnxruntime's time get one round, or only their first run if that took a second.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from bench import zoo
from bench.cpu import table
from bench.engines import SLOW, Engine, error_of, seeded, started
from bench.workspaces import ROOT, BenchError, Scratch

ORDERS = {
    "first": "",
    "fastest": 'select = "fastest"\n',
    "rules": 'order = ["rules", "default"]\n',
    "unscheduled": 'order = ["default"]\n',
}
BASE = "onnxruntime"
OTHERS = ("openvino", "tvm")
_TURN = 0.3  # seconds of a turn
_LONG = 1.0  # seconds after which a slow engine is not run again
_DODO = """\
from pipeline import DOIT_CONFIG, Model, Workspace  # noqa: F401

workspace = Workspace(*(Model.onnx(name, f"{{name}}.onnx") for name in {names}))
"""


@dataclass(frozen=True)
class Figure:
    """What one engine made of one model: least seconds, the number of runs, the error against onnxruntime."""

    seconds: float
    runs: int
    error: float


Figures = dict[str, dict[str, Figure]]  # by model, then engine


def workspace(folder: Path, names: Sequence[str], targets: Mapping[str, str], threads: int) -> Scratch:
    """A workspace of the ONNX files in its folder, with these target files and the user's own store."""
    from pipeline.store import default_root

    (folder / "targets").mkdir()
    folder.joinpath("dodo.py").write_text(_DODO.format(names=tuple(names)))
    for name, keys in targets.items():
        folder.joinpath("targets", f"{name}.toml").write_text(f'target = "native"\n{keys}')
    # Times that operators are chosen by hold for a number of threads: a build's own is all cores.
    cores = len(os.sched_getaffinity(0))
    return Scratch(folder, default_root(), {} if threads == cores else {"OMP_NUM_THREADS": str(threads)})


def build(place: Scratch, *names: str) -> None:
    """Builds models, all where none is named, for all targets; says what failed and lets the rest count."""
    run = place.doit("build", *names)
    said(": ".join((*names, run.last_line)))
    if run.usage.returncode != 0:
        said("".join(f"  FAILED {task}: {message}\n" for task, message in run.failures.items()) or run.err[-2000:])


def said(text: str) -> None:
    """Progress, away from the table."""
    print(text.rstrip(), file=sys.stderr, flush=True)


_OWN = """\
import sys
from pathlib import Path
from bench import own_tvm
own_tvm.compile_model(Path(sys.argv[1]), Path(sys.argv[2]), own_tvm.TVM_PASSES, simplify=True)
"""


def build_own(place: Scratch, names: Sequence[str]) -> None:
    """TVM's own libraries, <model>.tvm.so, as many at once as there are cores: their build is not what is timed."""

    def one(name: str) -> None:
        argv = [sys.executable, "-c", _OWN, str(place.folder / f"{name}.onnx"), str(place.folder / f"{name}.tvm.so")]
        ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        said(f"{name}: built by TVM" if ran.returncode == 0 else f"{name}: TVM's own build failed: {ran.stderr[-600:]}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, names))


def engines_of(place: Scratch, name: str, orders: Sequence[str], others: Sequence[str]) -> dict[str, tuple[str, Path]]:
    """The engines that there are for a model, by name: their kind and what they load."""
    model = place.folder / f"{name}.onnx"
    found = {BASE: (BASE, model)}
    for order in orders:
        found[order] = ("artifact", place.folder / "artifacts" / order / name)
    if "openvino" in others:
        found["openvino"] = ("openvino", model)
    if "tvm" in others:
        found["tvm"] = ("tvm", place.folder / f"{name}.tvm.so")
    return {engine: (kind, file) for engine, (kind, file) in found.items() if file.exists()}


def measure(
    engines: Mapping[str, tuple[str, Path]], inputs: Path, rounds: int, threads: int, turn: float = _TURN
) -> dict[str, Figure]:
    """Starts all engines and gives them their turns; one that fails is left out, in words."""
    figures: dict[str, Figure] = {}
    with ExitStack() as stack:
        running: dict[str, Engine] = {}
        for name, (kind, file) in engines.items():
            try:
                engine = stack.enter_context(started(name, kind, file, inputs, threads))
                engine.first()
                running[name] = engine
            except BenchError as error:
                said(f"  {error}")
        if BASE not in running:
            raise BenchError(f"{BASE} does not run the model")
        taking_turns(running, rounds, turn)
        reference = running[BASE].outputs()
        for name, engine in running.items():
            figures[name] = Figure(engine.best, len(engine.seconds), error_of(engine.outputs(), reference))
    return figures


def taking_turns(running: Mapping[str, Engine], rounds: int, turn: float) -> None:
    """Rounds in which each engine has a turn, another one first each time; slow ones leave early."""
    base = running[BASE].turn(turn)
    left = [each for each in running.values() if not (each.best > SLOW * base and each.best > _LONG)]
    for number in range(rounds):
        start = number % len(left)
        for engine in (*left[start:], *left[:start]):
            engine.turn(turn)
        left = [each for each in left if each.best <= SLOW * running[BASE].best]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _columns(figures: Figures, wanted: Sequence[str]) -> list[str]:
    return [name for name in wanted if any(name in row for row in figures.values())]


def _ratios(figures: Figures, engine: str) -> list[float]:
    return [row[engine].seconds / row[BASE].seconds for row in figures.values() if engine in row]


def show(figures: Figures, wanted: Sequence[str], title: str) -> None:
    """Two tables: times, and times and errors against onnxruntime's."""
    columns = _columns(figures, wanted)
    times = [
        (model, *(f"{1e3 * row[name].seconds:.3g}" if name in row else "—" for name in columns))
        for model, row in figures.items()
    ]
    table(f"ms an inference; {title}", ("model", *columns), times)
    against = [name for name in columns if name != BASE]
    rows = [
        (
            model,
            *(f"{row[n].seconds / row[BASE].seconds:.2f}  {row[n].error:.0e}" if n in row else "—" for n in against),
        )
        for model, row in figures.items()
    ]
    summary = {"geometric mean": geometric_mean, "worst": max, "best": min}
    rows += [
        (label, *(f"{of(_ratios(figures, name)):.2f}       " for name in against)) for label, of in summary.items()
    ]
    table(f"time / {BASE}'s, and the largest error against it", ("model", *against), rows)


def _listed(known: Sequence[str], text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}; choose of {', '.join(known)}")
    return names


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", default=list(zoo.NAMES), help=f"of {', '.join(zoo.NAMES)} (default: all)")
    orders, others = ",".join(ORDERS), ",".join(OTHERS)
    parser.add_argument("--orders", type=lambda text: _listed(tuple(ORDERS), text), default=orders, help="of ours")
    parser.add_argument("--others", type=lambda text: _listed(OTHERS, text), default=others, help=f"beside {BASE}")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each engine (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="of each engine (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    if unknown := [name for name in options.models if name not in zoo.NAMES]:
        parser.error(f"the zoo has no {', '.join(unknown)}; it has {', '.join(zoo.NAMES)}")
    with tempfile.TemporaryDirectory(prefix="tvmake-bench-") as folder:
        figures = _all(Path(folder), options)
    if not figures:
        return 1
    versions = f"onnxruntime {version('onnxruntime')}, openvino {version('openvino')}, tvm {version('apache-tvm')}"
    title = f"{options.threads} threads, minima of {options.rounds} rounds in turn; {versions}"
    show(figures, (BASE, *OTHERS[:1], *options.orders, *OTHERS[1:]), title)
    if options.json:
        plain = {model: {name: asdict(figure) for name, figure in row.items()} for model, row in figures.items()}
        options.json.write_text(json.dumps({"title": title, "models": plain}, indent=1) + "\n")
    return 0


def _all(folder: Path, options: argparse.Namespace) -> Figures:
    """Builds everything, ours alone on the machine, then measures model by model."""
    place = workspace(folder, options.models, {name: ORDERS[name] for name in options.orders}, options.threads)
    for name in options.models:
        folder.joinpath(f"{name}.onnx").write_bytes(zoo.load(name).SerializeToString(deterministic=True))
        build(place, name)
    if "tvm" in options.others:
        build_own(place, options.models)
    figures: Figures = {}
    for name in options.models:
        inputs = folder / f"{name}.npz"
        seeded(folder / f"{name}.onnx", inputs)
        try:
            figures[name] = measure(
                engines_of(place, name, options.orders, options.others), inputs, options.rounds, options.threads
            )
        except BenchError as error:
            said(f"{name}: {error}")
            continue
        said(f"{name}: " + ", ".join(f"{engine} {1e3 * f.seconds:.3g} ms" for engine, f in figures[name].items()))
    return figures


if __name__ == "__main__":
    sys.exit(_main())
