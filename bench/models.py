"""Nine real networks built for this machine: operators, agreement with onnxruntime, size, speed, time to build.

    python -m bench.models [MODEL...] [--repeat 3] [--seed 0]

Each is built by a `doit build MODEL` of its own, in one workspace with an empty store, so that a model compiles only
what those before it did not have. What is said of the outputs is what manifest.json says.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench import zoo
from bench.cpu import table
from bench.workspaces import BenchError, Run, Scratch, scratch

MODELS = ("squeezenet", "shufflenet", "resnet50", "densenet121", "inception_v1", "magika", "det", "rec", "cls")

_DODO = """\
from functools import partial

from bench import zoo
from pipeline import DOIT_CONFIG, Model, Workspace  # noqa: F401

workspace = Workspace(*(Model.onnx(name, partial(zoo.load, name, {seed})) for name in {names}))
"""
_COLUMNS = (
    "model",
    "operators",
    "calls",
    "compiled",
    "largest error",
    "against",
    "library MB",
    "weights MB",
    "ms a run",
    "build cpu s",
    "build wall s",
)


def build(place: Scratch, name: str, repeat: int) -> tuple[object, ...]:
    """Builds one model, runs it, and returns its row."""
    run = place.doit("build", name)
    artifact = place.folder / "artifacts" / "native" / name
    if run.usage.returncode != 0:
        return _failed(name, run)
    manifest = json.loads((artifact / "manifest.json").read_text())
    reference, operators = manifest["reference"], manifest["operators"]
    return (
        _shown(name),
        len(operators),
        sum(operator["calls"] for operator in operators),
        run.compiled,
        f"{max(reference['errors'].values(), default=float('nan')):.1e}",
        reference["reference"] or reference["state"],
        _megabytes(artifact / "lib.so"),
        _megabytes(artifact / "weights.safetensors"),
        f"{1e3 * _seconds(place, artifact, repeat):.1f}",
        run.usage.cpu,
        run.usage.wall,
    )


def _failed(name: str, run: Run) -> tuple[object, ...]:
    print(f"{name} was not built:\n{run.err[-2000:]}", file=sys.stderr)
    return (_shown(name), *["failed"] * (len(_COLUMNS) - 3), run.usage.cpu, run.usage.wall)


def _shown(name: str) -> str:
    return f"PP-OCR {name}" if name in ("det", "rec", "cls") else name


def _megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6 if path.exists() else 0.0


def _seconds(place: Scratch, artifact: Path, repeat: int) -> float:
    argv = [sys.executable, "-m", "pipeline.run", str(artifact), "--repeat", str(repeat), "--json"]
    report: dict[str, Any] = json.loads(place.run(*argv).require_good().out)
    return float(report["min_seconds"])


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(zoo.NAMES)} (default: nine)")
    parser.add_argument("--repeat", type=int, default=3, help="timed runs of each; the fastest counts (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights that are drawn (default 0)")
    options = parser.parse_args()
    if unknown := [name for name in options.models if name not in zoo.NAMES]:
        parser.error(f"the zoo has no {', '.join(unknown)}; it has {', '.join(zoo.NAMES)}")
    try:
        with scratch() as place:
            place.write(_DODO.format(seed=options.seed, names=tuple(options.models)))
            rows = [build(place, name, options.repeat) for name in options.models]
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table("models built for this machine, each by a build of its own", _COLUMNS, rows)
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(_main())
