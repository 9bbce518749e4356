"""Two machines that tune one model at once through one remote: what each tries, what the union holds, what is double.

    python -m bench.together [MODEL] [--minutes 5] [--remote folder|nginx|casd|gateway]

A machine is a folder, a store and a home of its own, and half of this machine's processors, so that both are of one
device and neither slows the other. Before, one builds and the other finds everything on the remote. Afterwards a third
machine builds, and by that has the records of both. A budget holds for all runs on the same operators together, so the
two get twice the minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from bench import zoo
from bench.cpu import table
from bench.sharing import KINDS, running
from bench.workspaces import BenchError, Run, Scratch, scratch
from pipeline.store import Store
from pipeline.tuning.records import Outcome, TrialRecord, filed

_TUNED = 'order = ["tuned", "rules", "default"]\n'  # no library, so that there is something to tune
_EVENTS = "events.jsonl"
# doit on some of the processors: what it starts stays there.
_PINNED = """
import os, sys
os.sched_setaffinity(0, set(map(int, sys.argv[1].split(","))))
os.execv(sys.executable, [sys.executable, "-m", "doit", *sys.argv[2:]])
"""
Members = dict[tuple[str, str], bytes]  # by set and digest


def pinned(place: Scratch, processors: list[int], *arguments: str) -> Run:
    return place.run(sys.executable, "-c", _PINNED, ",".join(map(str, processors)), *arguments)


def members(place: Scratch) -> Members:
    """All tuning records of a store."""
    sets = Store(place.store).sets
    return {(key, name): data for key in sets.all_keys() for name, data in sets.read(key)}


def measured_twice(found: Members) -> int:
    """Trials beyond the first of a candidate, but for those that were tried again because the machine may have been
    at fault."""
    trials = ((key, filed(data)) for (key, _), data in found.items())
    counts = Counter((key, each.candidate) for key, each in trials if _is_timed(each))
    return sum(count - 1 for count in counts.values())


def _is_timed(record: object) -> bool:
    return isinstance(record, TrialRecord) and record.outcome is Outcome.TIMED


def ended(place: Scratch) -> dict:
    """What a night said at its end."""
    return json.loads(place.folder.joinpath(_EVENTS).read_text().splitlines()[-1])


def tuned(name: str, kind: str, minutes: float) -> list[tuple[object, ...]]:
    """A row for each machine."""
    processors = sorted(os.sched_getaffinity(0))
    half = len(processors) // 2
    if not half:
        raise BenchError("two machines want two processors")
    halves = processors[:half], processors[half : 2 * half]
    model = zoo.load(name).SerializeToString(deterministic=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tvmake-bench-")))
        remote = stack.enter_context(running(kind, folder))
        if remote is None:
            raise BenchError(f"{kind} is not installed")
        environment = {"TVMAKE_REMOTE": remote.url, **remote.environment}
        homes = [str(folder / f"home {number}") for number in range(3)]
        one, other, third = (stack.enter_context(scratch(HOME=home, **environment)) for home in homes)
        for place in (one, other, third):
            place.hold(model, _TUNED)
        for place, cores in zip((one, other), halves, strict=True):
            pinned(place, cores, "build").require_good()
        budget = f"{2 * minutes:g}m"
        with ThreadPoolExecutor(2) as threads:
            both = [
                threads.submit(pinned, place, cores, "tune", "--budget", budget, "--events", _EVENTS)
                for place, cores in zip((one, other), halves, strict=True)
            ]
            runs = [each.result().require_good() for each in both]
        pinned(third, halves[0], "build").require_good()
        union = members(third)
        rows = []
        for title, place, run in zip(("one", "other"), (one, other), runs, strict=True):
            said, has = ended(place), members(place)
            missing = len(has.keys() - union.keys())
            rows.append((title, run.usage.wall / 60, said["trials"], said["timed"], len(has), missing, ""))
        rows.append(("third, after its build", "", "", "", len(union), 0, measured_twice(union)))
        return rows


_COLUMNS = ("machine", "minutes", "trials", "timed", "records it has", "of them not in the third", "timed twice")


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.together", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default="squeezenet", help=f"of {', '.join(zoo.NAMES)}")
    parser.add_argument("--minutes", type=float, default=5, help="of tuning on each machine (default 5)")
    parser.add_argument("--remote", default="folder", choices=KINDS)
    options = parser.parse_args()
    try:
        rows = tuned(options.model, options.remote, options.minutes)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table(f"{options.model} tuned by two machines at once over {options.remote}", _COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
