"""A simulated cluster of up to 1,000 hosts that tune 100,000 operators: what each part of it carries, and what breaks.

Real: the night, its scheduler, the memoizer and its store, the DaskExecutor, a scheduler process of dask's, and one
`distributed.Worker` for each host, which talks TCP. Fake: the work. A worker that gets an order waits as long as the
stage would take on one core, and answers with blobs as large as the real ones.

    driver ── orders ──▶ dask's scheduler ── orders ──▶ hosts         each line a process, hosts in a few of them
           ◀─ answers ──                  ◀─ answers ──

    python -m bench.scale                                   rows for 1, 10, 100, 300 and 1,000 workers
    python -m bench.scale --workers 300 --drivers 2         two drivers, each with half of the operators
    python -m bench.scale --workers 300 --drivers 2 --schedulers 2     … each with its scheduler and half of the workers
    python -m bench.scale --workers 300 --batch 64          larger batches
    python -m bench.scale --workers 300 --together 1        each candidate compiled by an order of its own
    python -m bench.scale --claims 100 1000 10000           only this: requests to the remote for one claim
    python -m bench.scale --decisions                       only this: our scheduler alone
    python -m bench.scale --paper                           only this: what so many workers take, by arithmetic

All processes share the processors of this machine, so a rate is a lower bound of what the parts can do on machines of
their own. What is counted as a message is one that dask's scheduler reads or writes on TCP; it puts several into one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from bench.cpu import table
from bench.scale import claims, decisions, paper, row
from bench.scale.given import Given
from bench.scale.simulation import simulate

_BATCHES = 1000  # that our scheduler is timed with when it is alone


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = Given()
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 100, 300, 1000])
    for name in ("operators", "batch", "together", "hosts", "drivers", "schedulers", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(usual, name))
    parser.add_argument("--at-once", type=int, default=0, help="batches in preparation; 0: as the executor says")
    for name in ("seconds", "warm", "speed", "search", "codegen", "measure", "learn"):
        parser.add_argument(f"--{name}", type=float, default=getattr(usual, name))
    parser.add_argument("--log", type=int, default=0, help="messages of each connection that dask keeps; 0: as usual")
    parser.add_argument("--paper", action="store_true", help="only this: what workers take, by arithmetic")
    parser.add_argument("--decisions", action="store_true", help="only this: our scheduler alone")
    parser.add_argument("--claims", type=int, nargs="+", help="only this: claims in stores of so many sets")
    parser.add_argument("--others", type=int, nargs="+", default=[0, 1], help="… shared with so many other stores")
    return parser.parse_args()


def main() -> None:
    asked = vars(_parsed())
    sizes, sets, others = (asked.pop(name) for name in ("workers", "claims", "others"))
    on_paper, alone = asked.pop("paper"), asked.pop("decisions")
    given = Given(**asked)
    if sets:
        table("one claim with lanes on a folder", claims.HEADS, claims.claims(sets, others))
    elif on_paper:
        table("on paper", paper.HEADS, [paper.paper(given, count) for count in sizes])
    elif alone:
        line = decisions.decisions(given.operators, _BATCHES, given.seed)
        table("our scheduler alone", decisions.HEADS, [line])
    else:
        simulations(given, sizes)


def simulations(given: Given, sizes: Sequence[int]) -> None:
    """A row for each number of workers: in words as soon as it is there, all of them as a table in the end."""
    rows = []
    for count in sizes:
        made = simulate(replace(given, workers=count), lambda sentence: print(sentence, file=sys.stderr, flush=True))
        print(*row.words(made), sep="\n", flush=True)
        rows.append(row.cells(made))
    table(f"{given.operators} operators, batches of {given.batch}, {given.seconds:g} s each", row.HEADS, rows)


if __name__ == "__main__":
    main()
