"""What measuring behind TVM's RPC tracker decides, beside what measuring here does: the same winners within the noise?

    python -m bench.devices [MODEL] [--minutes 3] [--undisturbed]

A tracker and two servers run on loopback, so that the processor is the same one. The model is built (`select =
"fastest"`), tuned and built again, first here, then over the tracker. While it is tuned over the tracker, one server is
killed at a third of the time and the other at two thirds, and each is started again after some seconds. Everything
computes in one thread. Where the winners of an operator differ, the table has how much slower the other's choice was
timed to be in each place, and that is what noise has to explain.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import zoo
from bench.cpu import table
from bench.workspaces import BenchError, Scratch, scratch
from pipeline.manifests import read_manifest
from pipeline.types import Operator
from tests.devices.boards import Boards

_TARGET = 'order = ["tuned", "rules", "default"]\nselect = "fastest"\n'
_KEY = "board"
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1"}
_AWAY = 5.0  # seconds until a killed server is started again
Winners = dict[str, Operator]  # by workload


def winners(place: Scratch) -> Winners:
    """Builds, and says what each operator runs on."""
    place.doit("build").require_good()
    manifest = read_manifest(place.folder / "artifacts" / "native" / "model")
    return {each.workload: each for each in manifest.operators if each.calls}


@contextmanager
def disturbed(boards: Boards, servers: list, seconds: float) -> Iterator[None]:
    """Within the block each server is killed once, and started again."""
    ended = threading.Event()

    def disturb() -> None:
        for server in list(servers):
            if ended.wait(seconds / 3):
                return
            boards.end(server)
            time.sleep(_AWAY)
            boards.start(_KEY)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def compared(when: str, here: Winners, there: Winners) -> list[tuple[object, ...]]:
    """A row for how many winners are the same, and one for each operator that has two."""
    others = [key for key in here if here[key].implementation != there[key].implementation]
    rows: list[tuple[object, ...]] = [(f"{when}: {len(here) - len(others)} of {len(here)} the same", "", "", "", "")]
    for key in others:
        one, other = here[key], there[key]
        slower = [_slower(each, by) for each, by in ((one, other), (other, one))]
        rows.append((f"  {one.name}", one.implementation, other.implementation, *slower))
    return rows


def _slower(chosen: Operator, other: Operator) -> str:
    """How much slower, where one was chosen, the other's choice was timed to be."""
    timed = {each.strategy: each.seconds for each in chosen.candidates}
    own, its = timed.get(chosen.implementation), timed.get(other.implementation)
    return f"{its / own - 1:+.1%}" if own and its else "not timed"


def measured(name: str, minutes: float, is_disturbed: bool) -> list[tuple[object, ...]]:
    model = zoo.load(name).SerializeToString(deterministic=True)
    with (
        tempfile.TemporaryDirectory(prefix="tvmake-bench-") as folder,
        scratch(**_ONE_THREAD) as here,
        scratch(**_ONE_THREAD) as there,
    ):
        here.hold(model, _TARGET)
        first = winners(here)
        here.doit("tune", "--budget", f"{minutes}m").require_good()
        tuned = winners(here)
        boards = Boards(Path(folder))
        try:
            device = f'[device]\ntracker = "{boards.address}"\nkey = "{_KEY}"\nwait = 120\n'
            there.hold(model, _TARGET + device)
            servers = [boards.start(_KEY) for _ in range(2)]
            boards.await_free(_KEY, 2)
            over = winners(there)
            if is_disturbed:
                with disturbed(boards, servers, minutes * 60):
                    there.doit("tune", "--budget", f"{minutes}m").require_good()
            else:
                there.doit("tune", "--budget", f"{minutes}m").require_good()
            return [*compared("untuned", first, over), *compared("tuned", tuned, winners(there))]
        finally:
            boards.close()


_COLUMNS = ("operators", "winner here", "over the tracker", "slower here", "slower there")


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.devices", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default="squeezenet", help=f"of {', '.join(zoo.NAMES)}")
    parser.add_argument("--minutes", type=float, default=3, help="of tuning in each place (default 3)")
    parser.add_argument("--undisturbed", action="store_true", help="kill no server")
    options = parser.parse_args()
    try:
        rows = measured(options.model, options.minutes, not options.undisturbed)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table(f"{options.model}, measured here and over a tracker", _COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
