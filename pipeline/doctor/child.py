"""The process that checks with TVM share, because a wrong pair of TVM and FFI, or code for another processor, kills the
process that tries it.

It writes one JSON object a line. A finding that was written before it died stands; the death itself is the finding of
the check that was running.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO

from pipeline.doctor.findings import AGAIN, Check, Finding, Place, State


class Child:
    """The process that runs the checks with TVM, and what it says. It is killed when the block ends."""

    def __init__(self, command: Sequence[str], limit: float) -> None:
        self._limit = limit
        self._late = False
        self._over = False
        self._answers: IO[str] = io.StringIO()
        # In memory, because the temporary folder may be what is wrong here.
        self._log: IO[bytes] = os.fdopen(os.memfd_create("tvmake-doctor"), "w+b")
        self._process: subprocess.Popen[str] | None = None
        self._refused = ""
        self._alarm = threading.Timer(limit, self._stop)
        self._alarm.daemon = True
        try:
            self._start(command)
        except OSError as error:
            self._refused = f"no process can be started: {error.strerror}"

    def _start(self, command: Sequence[str]) -> None:
        # The child finds this package where the parent found it, installed or not.
        package = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # so that a compiler that hangs is killed with it
        )
        assert self._process.stdout is not None
        self._answers = self._process.stdout
        self._alarm.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._alarm.cancel()
        if self._process is not None:
            self._kill(self._process)
            self._process.wait()
        self._answers.close()
        self._log.close()

    def finding(self, check: Check) -> Finding:
        """What the child says of the next of its checks, or what its end means for it. Waits for it."""
        while not self._over:
            line = self._answers.readline()
            if not line:
                self._over = True
                if cause := self._cause_of_death():
                    return Finding(check.title, State.FAULT, cause, check.hint)
            # What a library prints is not a finding.
            with contextlib.suppress(ValueError, TypeError, KeyError):
                read = json.loads(line)
                if read["name"] == check.title:
                    return Finding(read["name"], State(read["state"]), read["said"], read["hint"])
        return Finding(check.title, State.WARNING, "not checked, because of the fault before", AGAIN)

    def _cause_of_death(self) -> str:
        """Why the child has said its last; empty where it ended because it had nothing more to say."""
        if self._process is None:
            return self._refused
        code = self._process.wait()
        if self._late:
            return f"had not ended after {self._limit:g} s"
        if code < 0:
            return f"the process that tried it was killed by {_signal_name(-code)}"
        if code == 0:
            return ""
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
        return ": ".join([f"the process that tried it ended with exit code {code}", *last])

    def _stop(self) -> None:
        self._late = True
        if self._process is not None:
            self._kill(self._process)

    @staticmethod
    def _kill(process: subprocess.Popen[str]) -> None:
        if process.returncode is None:  # one that was waited for has given its number back
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)


def _signal_name(number: int) -> str:
    try:
        found = signal.Signals(number)
    except ValueError:
        return f"signal {number}"
    meanings = {
        signal.SIGSEGV: "a segmentation fault",
        signal.SIGILL: "an illegal instruction",
        signal.SIGKILL: "perhaps for want of memory",
    }
    return f"{found.name} ({meanings[found]})" if found in meanings else found.name


def tell(checks: Iterable[Check], stream: IO[str]) -> None:
    """The child's life: each of its checks, each finding written before the next check starts.

    Ends after the first one where TVM cannot be loaded: all others would say only that again.
    """
    for number, check in enumerate(check for check in checks if check.place is Place.CHILD):
        finding = check.finding()
        print(json.dumps(asdict(finding)), file=stream, flush=True)
        if number == 0 and finding.state is State.FAULT:
            return
