"""What a command costs: wall time, and the processor time of every process that came of it.

Owns the measuring and the printing of tables; knows nothing of builds. The shell's `time` misses workers that outlive
their parent, such as those of multiprocessing's fork server. Here a small process of its own starts the command,
declares itself the one that orphans fall to (PR_SET_CHILD_SUBREAPER of Linux's prctl(2)), waits for all of them and
adds up what wait4(2) reports; a reaped process carries what it reaped itself. The process in between also keeps the
caller's other children and the caller's peak memory out of the figures.

Not seen: children of a process that ignores SIGCHLD, which the kernel accounts to nobody.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_PATIENCE = 120.0


@dataclass(frozen=True)
class Usage:
    """What a command used. Times in seconds, memory in bytes."""

    wall: float  # until the command itself ended
    cpu: float  # user and system time of all its processes, those that outlived it included
    max_rss: int  # of the largest single process; never less than the measuring process's own
    returncode: int  # negative: the signal that ended it
    killed: int  # processes that still ran when patience was out, and were killed


def measure(
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    *,
    stdout: int | None = None,
    stderr: int | None = None,
    patience: float = _PATIENCE,
) -> Usage:
    """Runs a command and says what it used. `env` replaces the environment; `stdout` and `stderr` are file
    descriptors.

    Processes that the command leaves behind are waited for, `patience` seconds at most, then killed. A command that
    cannot be started raises what subprocess raises.
    """
    reading, writing = os.pipe()
    harness = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(writing), str(patience), *argv]
    with os.fdopen(reading) as report:
        try:
            child = subprocess.Popen(harness, env=env, cwd=cwd, stdout=stdout, stderr=stderr, pass_fds=(writing,))
        finally:
            os.close(writing)
        answer = report.read()
        child.wait()
    if not answer:
        raise RuntimeError(f"the measuring process ended with {child.returncode} and no report")
    fields = json.loads(answer)
    if "errno" in fields:
        raise OSError(fields["errno"], os.strerror(fields["errno"]), argv[0])
    return Usage(**fields)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints rows under columns: the first column left, the others right, floats with two decimals."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table()
    for position, column in enumerate(columns):
        drawn.add_column(column, justify="right" if position else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 200)  # a pipe has no edge to wrap at
    console.print(title, style="bold", highlight=False)
    console.print(drawn)


def _reap(argv: Sequence[str], patience: float) -> Usage:
    """Runs in the process between: starts the command and waits for everything that came of it."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    signal.signal(signal.SIGINT, lambda *_: None)  # the command decides what an interrupt means
    started = time.perf_counter()
    command = subprocess.Popen(argv)
    wall, cpu, rss, code, killed = 0.0, 0.0, 0, 0, 0
    deadline = float("inf")
    while True:
        try:
            pid, status, usage = os.wait4(-1, 0 if deadline == float("inf") else os.WNOHANG)
        except ChildProcessError:
            return Usage(wall, cpu, rss, code, killed)
        if not pid:
            if time.perf_counter() > deadline:
                killed += _kill_children()
            time.sleep(0.005)
            continue
        cpu += usage.ru_utime + usage.ru_stime
        rss = max(rss, usage.ru_maxrss * 1024)
        if pid == command.pid:
            now = time.perf_counter()
            wall, code, deadline = now - started, os.waitstatus_to_exitcode(status), now + patience


def _kill_children() -> int:
    """Kills the processes that this one has adopted. Their own children come next, once they are orphans too."""
    children = [int(pid) for pid in Path("/proc/thread-self/children").read_text().split()]
    for pid in children:
        os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
    time.sleep(0.05)
    return len(children)


def _main(channel: str, patience: str, *argv: str) -> None:
    os.set_inheritable(int(channel), False)
    try:
        report: dict[str, object] = asdict(_reap(argv, float(patience)))
    except OSError as error:
        report = {"errno": error.errno}
    with os.fdopen(int(channel), "w") as stream:
        json.dump(report, stream)


if __name__ == "__main__":
    _main(*sys.argv[1:])
