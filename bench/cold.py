"""A build from nothing against TVM's own import, lowering, build and export of the same file, side by side.

    python -m bench.cold [MODEL...] [--repeat 3] [--check on|off|both]

Both run as processes of their own, in turn, on the same processors. TVM's own way is timed twice: with its usual
passes after onnxsim, which leaves them less to fold; and with our passes (see bench.own_tvm) on what ours starts from,
the model as it is, unless the importer cannot do without onnxsim. Ours is `doit build` with an empty store: everything
counts, as it does for TVM, the import of TVM included.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import zoo
from bench.cpu import Usage, measure, table
from bench.workspaces import ROOT, BenchError, Scratch, scratch

_DODO = """\
from pipeline import DOIT_CONFIG, Model, Workspace  # noqa: F401

workspace = Workspace(Model.onnx("model", "model.onnx"))
"""
WAYS = ("ours, checked", "ours, unchecked", "TVM's, its passes", "TVM's, our passes")


def compare(name: str, repeat: int, ways: list[str]) -> list[tuple[object, ...]]:
    """Builds a model of the zoo in every way, `repeat` times in turn; returns a row for each."""
    runs: dict[str, list[Usage]] = {way: [] for way in ways}
    with scratch() as place:
        file = place.folder / "model.onnx"
        file.write_bytes(zoo.load(name).SerializeToString(deterministic=True))
        needed = ["--no-onnxsim"] if _imports_as_it_is(file) else []
        for _ in range(repeat):
            for way in ways:
                if way.startswith("ours"):
                    runs[way].append(_ours(place, way == WAYS[0]))
                else:
                    runs[way].append(_own(file, "ours", needed) if way == WAYS[3] else _own(file, "tvm", []))
    bases = [min(run.wall for run in runs[way]) for way in WAYS[2:]]
    rows: list[tuple[object, ...]] = []
    for way, used in runs.items():
        wall, cpu = min(run.wall for run in used), min(run.cpu for run in used)
        rows.append((name, way, cpu, wall, *(wall / base for base in bases)))
    return rows


def _ours(place: Scratch, check: bool) -> Usage:
    place.start_over()
    place.write(_DODO, check=check)
    return place.doit("build").require_good().usage


def _own(file: Path, passes: str, options: list[str]) -> Usage:
    argv = [sys.executable, "-m", "bench.own_tvm", str(file), "--json", "--passes", passes, *options]
    with open("/dev/null", "w") as nowhere:
        usage = measure(argv, cwd=ROOT, stdout=nowhere.fileno())
    if usage.returncode != 0:
        raise BenchError(f"TVM's own way with {passes} passes ended with {usage.returncode}")
    return usage


def _imports_as_it_is(file: Path) -> bool:
    program = (
        "import sys, onnx; from tvm.relax.frontend.onnx import from_onnx; "
        "from_onnx(onnx.load(sys.argv[1]), keep_params_in_input=False)"
    )
    with open("/dev/null", "w") as nowhere:
        argv = [sys.executable, "-c", program, str(file)]
        return measure(argv, stdout=nowhere.fileno(), stderr=nowhere.fileno()).returncode == 0


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cold", description=(__doc__ or "").partition("\n")[0])
    names = ", ".join(zoo.NAMES)
    parser.add_argument("models", nargs="*", default=["densenet121"], help=f"of {names} (default densenet121)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each way (default 3)")
    parser.add_argument("--check", choices=("on", "off", "both"), default="both", help="our reference check")
    options = parser.parse_args()
    if unknown := [name for name in options.models if name not in zoo.NAMES]:
        parser.error(f"the zoo has no {', '.join(unknown)}; it has {names}")
    ours = {"on": [WAYS[0]], "off": [WAYS[1]], "both": [*WAYS[:2]]}[options.check]
    try:
        rows = [row for name in options.models for row in compare(name, options.repeat, [*ours, *WAYS[2:]])]
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    columns = ("model", "way", "cpu s", "wall s", "wall / TVM's, its passes", "wall / TVM's, our passes")
    table(f"builds from nothing, minima of {options.repeat} in turn", columns, rows)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
