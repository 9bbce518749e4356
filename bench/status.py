"""What `doit status` costs: the first time, when nothing changed, and when one operator was tuned since.

    python -m bench.status [--sizes 200,1000,10000] [--trials 8] [--repeat 5]

For each size a workspace is made up of one model of that many operators: a real manifest, a plan, a profile, and for
each operator a real set of records, of `trials` candidates and one retest. The command runs in a fresh process, with
the import of TVM made an error. Times of later calls are minima.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.cpu import Usage, table
from bench.workspaces import BenchError, Run, Scratch, scratch
from tests import made_up

_DODO = 'from pipeline import DOIT_CONFIG, Model, Workspace\n\nworkspace = Workspace(Model.onnx("net", "net.onnx"))\n'

# Python as it is, but an attempt to import TVM or its FFI ends the process. To look where TVM lies is allowed.
_WITHOUT_TVM = """
import os, sys

def audit(event, arguments):
    if event == "import" and arguments[0] in ("tvm", "tvm_ffi"):
        os._exit(97)

sys.addaudithook(audit)
from doit.__main__ import main
main()
"""


def operators(count: int, trials: int) -> Iterator[made_up.Made]:
    """Operators of which every fifth has grown old and every seventh was never tuned."""
    tools, now = made_up.today(), time.time()
    for i in range(count):
        at = now - (100 if i % 5 == 0 else 3) * 86400
        tried = [made_up.trial(f"{i} {j}", 1 + j / trials, at, tools=tools) for j in range(trials)]
        last = made_up.retest(f"{i} {trials - 1}", 1.5, at, tools=tools)
        records = [*tried, last] if i % 7 else []
        yield made_up.Made(f"fused_conv2d_add_relu{i}", "tuned" if records else "rules", 1e-3 / (i + 1), records)


def fill(place: Scratch, count: int, trials: int) -> made_up.Made:
    """Makes a workspace up. Returns one of its operators."""
    place.write(_DODO)
    target = place.folder / "targets" / "native.toml"
    target.write_text(target.read_text() + "[stale]\ndays = 60\n")
    made = list(operators(count, trials))
    made_up.build(place.folder, place.store, made, at=time.time())
    return made[1]


def shown(place: Scratch, count: int, *arguments: str) -> Run:
    """`doit status` once. Raises BenchError where it does not tell of all operators."""
    run = place.run(sys.executable, "-c", _WITHOUT_TVM, "status", *arguments).require_good()
    if f"{count} operators" not in run.out:
        raise BenchError(f"the table is not of {count} operators:\n{run.out[-1000:]}")
    return run


def measured(count: int, trials: int, repeat: int) -> list[tuple[object, ...]]:
    """The rows of one size."""
    with scratch() as place:
        one = fill(place, count, trials)
        files = sum(1 for path in (place.store / "sets").rglob("*") if path.is_file())
        time.sleep(0.05)  # what was written a moment ago is read again: see RACY_NS
        first = shown(place, count)
        again = [shown(place, count).usage for _ in range(repeat)]
        changed = []
        for i in range(repeat):
            made_up.tune(place.store, [made_up.Made(one.name, records=[made_up.trial(f"new {i}", 1.1, time.time())])])
            time.sleep(0.05)
            changed.append(shown(place, count).usage)
        lines = len(first.out.splitlines())
        size = sum(path.stat().st_size for path in Path(place.store, "summaries").iterdir())
        rows = (("first", [first.usage]), ("nothing changed", again), ("one set changed", changed))
        return [(f"{count:,}", f"{files:,}", f"{size / 1e6:.1f}", lines, name, *_figures(used)) for name, used in rows]


def _figures(used: list[Usage]) -> tuple[str, str]:
    return f"{min(each.wall for each in used):.2f}", f"{min(each.cpu for each in used):.2f}"


_COLUMNS = ("operators", "files of records", "summary MB", "lines shown", "call", "wall s", "cpu s")


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.status", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", default="200,1000,10000", help="operators of each workspace, with commas between")
    parser.add_argument("--trials", type=int, default=8, help="records of each operator (default 8)")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each call after the first (default 5)")
    options = parser.parse_args()
    try:
        rows = [row for size in options.sizes.split(",") for row in measured(int(size), options.trials, options.repeat)]
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table(f"doit status, minima of {options.repeat}; importing TVM is an error", _COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
