"""`python -m pipeline.run <artifact>`: runs a built artifact and says what comes out and how long it takes.

Needs TVM's runtime only, no compiler and no workspace.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ArtifactError, TvmakeError
from pipeline.samples import seeded_inputs
from pipeline.types import TensorSpec
from pipeline.weightfile import dtype_of

Array = NDArray[np.generic]

_EPILOG = """\
examples:
  python -m pipeline.run artifacts/resnet50
      run on random inputs, the same ones every time
  python -m pipeline.run artifacts/resnet50 --input data=cat.npy --output result.npz
      run on an image and keep the outputs
  python -m pipeline.run artifacts/resnet50 --repeat 100 --threads 1 --json
      measure on one thread, for a program to read

exit status: 0 it ran, 1 it could not, 2 the command line is wrong
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.threads is not None:
        # Read by the runtime when it starts its threads, so before it is loaded.
        os.environ["TVM_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(options.threads)
    try:
        report, outputs = _run(options)
        if options.output is not None:
            _save(options.output, outputs)
    except TvmakeError as error:
        line = f"{error.message} ({error.hint})" if error.hint else error.message
        print("error: " + " ".join(line.split()), file=sys.stderr)
        return 1
    print(json.dumps(asdict(report), indent=2) if options.json else _text(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.run",
        description="Run a built artifact, print what comes out of it and how long a run takes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("artifact", type=Path, help="folder of the artifact: the one with manifest.json")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        type=_input_option,
        metavar="NAME=FILE.npy",
        help="an input from a file; or FILE.npz for all inputs in it, by name; may be given several times; "
        "inputs that are not given are random",
    )
    parser.add_argument("--seed", type=_count, default=0, metavar="N", help="seed of the random inputs (default 0)")
    parser.add_argument(
        "--high", type=_positive, default=2, metavar="N", help="random integers are below N (default 2)"
    )
    parser.add_argument(
        "--repeat", type=_count, default=10, metavar="N", help="runs to time, after one to warm up (default 10)"
    )
    parser.add_argument(
        "--threads", type=_positive, metavar="N", help="threads to run on (sets TVM_NUM_THREADS and OMP_NUM_THREADS)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.npz", help="keep the outputs in this file")
    parser.add_argument("--verify", action="store_true", help="check the digest of every file of the artifact first")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a count")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive count")
    return int(text)


def _input_option(text: str) -> tuple[str, Path]:
    """Name and file; no name for all arrays of a file."""
    name, equals, file = text.rpartition("=")
    if equals and name and file:
        return name, Path(file)
    if not equals and text.endswith(".npz"):
        return "", Path(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither NAME=FILE.npy nor FILE.npz")


@dataclass(frozen=True)
class OutputReport:
    """One output in numbers. None for what is not a finite number, or where there are no elements."""

    name: str
    shape: list[int]
    dtype: str
    min: float | None
    mean: float | None
    max: float | None
    not_finite: int  # elements that are infinite or not a number


@dataclass(frozen=True)
class Report:
    """What one call of the command found out; --json prints its fields. Times are in seconds."""

    model: str
    target: str
    outputs: list[OutputReport]
    load_seconds: float
    median_seconds: float | None
    min_seconds: float | None
    repeat: int


def _run(options: argparse.Namespace) -> tuple[Report, dict[str, Array]]:
    from pipeline import runtime  # after TVM_NUM_THREADS is set, and not for --help

    begin = time.perf_counter()
    model = runtime.load(options.artifact, verify=options.verify)
    loaded = time.perf_counter() - begin
    inputs = seeded_inputs(model.inputs, options.seed, options.high) | _given(options.input, model.inputs)
    outputs = model(**inputs)
    seconds = model.time(inputs, options.repeat) if options.repeat else []
    report = Report(
        model=model.manifest.model,
        target=model.manifest.target,
        outputs=[_output_report(name, array) for name, array in outputs.items()],
        load_seconds=loaded,
        median_seconds=statistics.median(seconds) if seconds else None,
        min_seconds=min(seconds, default=None),
        repeat=len(seconds),
    )
    return report, outputs


def _given(files: Sequence[tuple[str, Path]], specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """The inputs that files were named for."""
    known = {spec.name: spec for spec in specs}
    arrays: dict[str, Array] = {}
    for name, file in files:
        for found, array in _read(name, file).items():
            if found not in known:
                raise ArtifactError(f"{file}: the model has no input {found!r}; its inputs: {', '.join(known)}")
            arrays[found] = _as_dtype(array, known[found])
    return arrays


def _read(name: str, file: Path) -> dict[str, Array]:
    """The array for a name, or with no name all arrays, of a .npy or .npz file."""
    try:
        content: Any = np.load(file, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {name: content}
        with content:
            if name and name not in content.files:
                raise ArtifactError(f"{file} has no array {name!r}; it has: {', '.join(content.files)}")
            return {found: content[found] for found in ([name] if name else content.files)}
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{file} is not a .npy or .npz file: {error}") from error


def _as_dtype(array: Array, spec: TensorSpec) -> Array:
    """.npy files forget the dtypes of ml_dtypes and keep bare bytes of their width; the model tells what they were."""
    dtype = dtype_of(spec.dtype)
    bare = array.dtype.kind == "V" and array.dtype.names is None and array.dtype.itemsize == dtype.itemsize
    return array.view(dtype) if bare and dtype.kind == "V" else array


def _save(file: Path, outputs: dict[str, Array]) -> None:
    """Like numpy.savez, which cannot take every name, and with the same bytes every time."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        try:
            with zipfile.ZipFile(unfinished, "w") as archive:
                for name, array in outputs.items():
                    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
                        bare = array.view(f"V{array.dtype.itemsize}") if array.dtype.kind == "V" else array
                        np.lib.format.write_array(stream, bare, allow_pickle=False)
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise ArtifactError(f"{file} cannot be written: {error.strerror or error}") from error


def _output_report(name: str, array: Array) -> OutputReport:
    values = array.astype(np.float64)
    low, mean, high = (values.min(), values.mean(), values.max()) if values.size else (math.nan,) * 3
    bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    return OutputReport(name, list(array.shape), array.dtype.name, _finite(low), _finite(mean), _finite(high), bad)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _text(report: Report) -> str:
    rows = [("output", "shape", "dtype", "min", "mean", "max", "")]
    for output in report.outputs:
        low, mean, high = (_number(value) for value in (output.min, output.mean, output.max))
        note = f"{output.not_finite} not finite" if output.not_finite else ""
        rows.append((output.name, str(output.shape), output.dtype, low, mean, high, note))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"{report.model} for {report.target}, loaded in {_duration(report.load_seconds)}", ""]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if report.median_seconds is not None and report.min_seconds is not None:
        times = f"median {_duration(report.median_seconds)}, min {_duration(report.min_seconds)}"
        lines += ["", f"time per run: {times} over {report.repeat} runs"]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _duration(seconds: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


if __name__ == "__main__":
    sys.exit(main())
