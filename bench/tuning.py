"""What tuning gives in a given time: `doit tune` against MetaSchedule's own, of the same operators.

    python -m bench.tuning [MODEL...] [--seconds 600] [--together] [--unaided] [--json FILE]

Each model is built once, untuned. Then both ways tune it for so many seconds of wall-clock, one after the other with
the whole machine, or with --together at once, each on its half of the processors, so that whatever else the machine
does befalls both. At each quarter of the time what either has found is set aside. Afterwards the model is built of each
and all are timed in turn, together with onnxruntime:

    tvmake     order tuned, rules, default: as it is used; a record is taken where it beats the rules
    stock      MetaSchedule's records, and loops as they are where there is none: as TVM applies them
    stock+     MetaSchedule's records or the rules, whichever is measured to be faster: the best to be made of them

Trials are those that got a time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import zoo
from bench.cpu import table
from bench.engines import seeded
from bench.latency import BASE, Figure, build, measure, said
from bench.workspaces import ROOT, BenchError, Scratch

QUARTERS = (1, 2, 3, 4)
_DODO = """\
from pipeline import DOIT_CONFIG, Model, Workspace  # noqa: F401

workspace = Workspace(Model.onnx({name!r}, "{name}.onnx"))
"""
_KEYS = {
    "tvmake": 'order = ["tuned", "rules", "default"]\n',
    "stock": 'order = ["tuned", "default"]\nrecords = ["stock"]\n',
    "stock+": 'order = ["tuned", "rules", "default"]\nselect = "fastest"\nrecords = ["stock"]\n',
}
_OFF = "[check]\nenabled = false\n[measure]\nprofile = false\n"


@dataclass(frozen=True)
class Tuned:
    """What became of one model: trials of both ways, and the figures of each engine."""

    trials: dict[str, int]
    seconds: dict[str, float]
    figures: dict[str, Figure]


def tune(name: str, seconds: float, together: bool, unaided: bool, rounds: int) -> Tuned:
    with tempfile.TemporaryDirectory(prefix="tvmake-bench-") as scratch:
        folder = Path(scratch, "workspace")
        (folder / "targets").mkdir(parents=True)
        halves = _halves() if together else (None, None)
        threads = len(halves[0] or os.sched_getaffinity(0))
        place = Scratch(folder, Path(scratch, "store"), {})
        folder.joinpath("dodo.py").write_text(_DODO.format(name=name))
        folder.joinpath(f"{name}.onnx").write_bytes(zoo.load(name).SerializeToString(deterministic=True))
        folder.joinpath("targets", "tvmake.toml").write_text(f'target = "native"\n{_KEYS["tvmake"]}')
        with _on(halves[0]):
            build(place, name)
            shutil.copytree(folder / "artifacts" / "tvmake" / name, folder / "artifacts" / "untuned" / name)
        trials, took = _both(place, name, seconds, halves, unaided)
        with _on(halves[0]):
            artifacts = _built(place, name)
        inputs = folder / f"{name}.npz"
        seeded(folder / f"{name}.onnx", inputs)
        engines = {BASE: (BASE, folder / f"{name}.onnx")}
        engines |= {engine: ("artifact", path) for engine, path in artifacts.items()}
        with _on(halves[0]):
            return Tuned(trials, took, measure(engines, inputs, rounds, threads))


def _halves() -> tuple[set[int], set[int]]:
    usable = sorted(os.sched_getaffinity(0))
    return set(usable[: len(usable) // 2]), set(usable[len(usable) // 2 :])


class _on:  # noqa: N801 - reads as a word
    """Within the block this process, and what it starts, has these processors only."""

    def __init__(self, processors: set[int] | None) -> None:
        self._processors = processors

    def __enter__(self) -> None:
        self._before = os.sched_getaffinity(0)
        if self._processors:
            os.sched_setaffinity(0, self._processors)

    def __exit__(self, *_: object) -> None:
        os.sched_setaffinity(0, self._before)


def _both(
    place: Scratch, name: str, seconds: float, halves: Sequence[set[int] | None], unaided: bool
) -> tuple[dict[str, int], dict[str, float]]:
    """Runs both ways, and keeps what they had at each quarter under quarters/."""
    events, work = place.folder / "events.jsonl", place.folder / "stock-work"
    work.mkdir()
    ours = [sys.executable, "-m", "doit", "tune", "--budget", f"{seconds:g}s", "--events", str(events)]
    stock = [sys.executable, "-m", "bench.stock_tuning", str(place.folder), "tvmake", name, str(work)]
    stock += ["--unaided"] if unaided else []
    ways = [("tvmake", ours, halves[0]), ("stock", stock, halves[1])]
    took: dict[str, float] = {}
    if halves[0] is None:
        for way in ways:
            took |= _watched(place, [way], seconds)
    else:
        took |= _watched(place, ways, seconds)
    measured = [json.loads(line) for line in events.read_text().splitlines()]
    timed = sum(each["timed"] for each in measured if each["event"] == "batch")
    return {"tvmake": timed, "stock": _timed_by_stock(work)}, took


def _watched(
    place: Scratch, ways: Sequence[tuple[str, list[str], set[int] | None]], seconds: float
) -> dict[str, float]:
    """Runs some ways at once for so many seconds each, and returns how long each ran."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TVMAKE_CACHE": str(place.store)}
    running = {}
    begun = time.monotonic()
    for way, argv, processors in ways:
        with _on(processors), open(place.folder / f"{way}.log", "wb") as log:
            running[way] = subprocess.Popen(
                argv, cwd=place.folder, env=environment, stdout=log, stderr=log, process_group=0
            )
    ended: dict[str, float] = {}
    for quarter in QUARTERS:
        while time.monotonic() - begun < seconds * quarter / len(QUARTERS):
            time.sleep(0.2)
            for way, process in running.items():
                if way not in ended and process.poll() is not None:
                    ended[way] = time.monotonic() - begun
        for way in running:
            _keep(place, way, quarter)
    said(f"{', '.join(running)}: {seconds:g} s are over")
    for way, process in running.items():
        if process.poll() not in (None, 0):
            raise BenchError(f"{way} failed:\n{(place.folder / f'{way}.log').read_text()[-3000:]}")
        if process.poll() is None:
            # Ours ends with its budget; the batch that was running then does not count.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        ended.setdefault(way, seconds)
    return ended


def _keep(place: Scratch, way: str, quarter: int) -> None:
    into = place.folder / "quarters" / f"{way}-{quarter}"
    into.mkdir(parents=True)
    if way == "tvmake":
        if (place.store / "sets").exists():
            shutil.copytree(place.store / "sets", into / "sets", ignore_dangling_symlinks=True)
        return
    for path in (place.folder / "stock-work").glob("database_*.json"):
        shutil.copy(path, into)


def _timed_by_stock(work: Path) -> int:
    path = work / "database_tuning_record.json"
    lines = path.read_text().splitlines() if path.exists() else []
    runs = [json.loads(line)[1][1] for line in lines]
    return sum(bool(each) and min(each) < 1e9 for each in runs)


def _built(place: Scratch, name: str) -> dict[str, Path]:
    """The artifacts of both ways at each quarter, and of none."""
    found = {"untuned": place.folder / "artifacts" / "untuned" / name}
    for quarter in QUARTERS:
        kept = place.folder / "quarters"
        shutil.rmtree(place.store / "sets", ignore_errors=True)
        if (kept / f"tvmake-{quarter}" / "sets").exists():
            shutil.copytree(kept / f"tvmake-{quarter}" / "sets", place.store / "sets")
        found |= _at(place, name, quarter, {"tvmake": _KEYS["tvmake"]})
        shutil.rmtree(place.store / "sets", ignore_errors=True)
        shutil.rmtree(place.folder / "stock", ignore_errors=True)
        shutil.copytree(kept / f"stock-{quarter}", place.folder / "stock")
        found |= _at(place, name, quarter, {way: _KEYS[way] for way in ("stock", "stock+")})
    return found


def _at(place: Scratch, name: str, quarter: int, targets: dict[str, str]) -> dict[str, Path]:
    """Builds the model for these targets and puts the artifacts aside."""
    for path in (place.folder / "targets").glob("*.toml"):
        path.unlink()
    for way, keys in targets.items():
        place.folder.joinpath("targets", f"{way}.toml").write_text(f'target = "native"\n{keys}{_OFF}')
    place.forget()
    build(place, name)
    made = {}
    for way in targets:
        artifact = place.folder / "artifacts" / way / name
        if artifact.exists():
            aside = place.folder / "aside" / f"{way}-{quarter}" / name
            shutil.copytree(artifact, aside)
            made[f"{way} {quarter}/4"] = aside
    return made


def show(models: dict[str, Tuned], seconds: float) -> None:
    rows = []
    for name, tuned in models.items():
        rate = {way: 60 * count / max(tuned.seconds[way], 1e-9) for way, count in tuned.trials.items()}
        ratio = f"{rate['tvmake'] / rate['stock']:.1f}" if rate["stock"] else "—"
        ours, stock = f"{tuned.trials['tvmake']}", f"{tuned.trials['stock']}"
        rows.append((name, ours, stock, f"{rate['tvmake']:.0f}", f"{rate['stock']:.0f}", ratio))
    columns = ("model", "trials", "stock's", "a minute", "stock's", "ratio")
    table(f"{seconds:g} s for each model and way", columns, rows)
    for name, tuned in models.items():
        shown = []
        for way in ("tvmake", "stock", "stock+"):
            at = [tuned.figures.get(f"{way} {quarter}/4") for quarter in QUARTERS]
            shown.append((way, *(f"{1e3 * each.seconds:.3g}" if each else "—" for each in at)))
        before, base = tuned.figures["untuned"].seconds, tuned.figures[BASE].seconds
        title = f"{name}: ms an inference; untuned {1e3 * before:.3g}, {BASE} {1e3 * base:.3g}"
        table(title, ("", *(f"{quarter}/4" for quarter in QUARTERS)), shown)


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tuning", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", default=["squeezenet", "magika", "cls"], help=f"of {', '.join(zoo.NAMES)}")
    parser.add_argument("--seconds", type=float, default=600, help="for each model and way (default 600)")
    parser.add_argument("--together", action="store_true", help="both at once, each on half of the processors")
    parser.add_argument("--unaided", action="store_true", help="let MetaSchedule import what it imports")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each engine at the end (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    models = {}
    for name in options.models:
        models[name] = tune(name, options.seconds, options.together, options.unaided, options.rounds)
        show({name: models[name]}, options.seconds)
        if options.json:
            plain = {n: [t.trials, {k: f.seconds for k, f in t.figures.items()}] for n, t in models.items()}
            options.json.write_text(json.dumps(plain, indent=1) + "\n")
    if len(models) > 1:
        show(models, options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
