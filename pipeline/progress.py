"""What one sees while a build works: a live line in a terminal, plain lines elsewhere, and a last line that sums up."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from pipeline.memoizer import Action, Watcher

# Stages whose every run is worth a line where there is no terminal. The others take microseconds.
_TOLD = ("read", "extract", "shim", "codegen", "measure", "pack", "link", "check", "profile")
_DONE = {
    "resolve": "resolved",
    "read": "read",
    "extract": "extracted",
    "shim": "compiled the calls of",
    "codegen": "compiled",
    "measure": "timed the candidates of",
    "pack": "packed",
    "link": "linked",
    "check": "checked",
    "profile": "timed",
}


_OFTEN = 2.0  # seconds between lines on what takes long, where there is no terminal
_REFRESH = 0.1  # and where there is one
_WIDTH = 160  # of a table where there is no terminal


class Progress(Watcher):
    """Watches a memoizer. Every method may be called from any thread."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._running: dict[int, str] = {}
        self._begun = self._told = time.monotonic()
        self._done = Counter[str]()
        self._total = 0
        self._bar: Any = None
        self._task: Any = None

    def start(self, total: int) -> None:
        """Begins a phase in which `total` tasks will be done."""
        with self._lock:
            self._total, self._done = total, Counter()
            if self._stream.isatty() and total:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

                self._bar = Progress(
                    TextColumn("{task.description:<48.48}"),
                    BarColumn(bar_width=24),
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[cached]} cached"),
                    TimeRemainingColumn(),
                    console=Console(file=self._stream),
                    transient=True,
                )
                self._task = self._bar.add_task("", total=total, cached=0)
                self._bar.start()

    def stop(self) -> None:
        """Ends the phase. Called in every case, also when it was interrupted."""
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    @contextlib.contextmanager
    def telling(self, what: str) -> Iterator[Callable[[str], None]]:
        """A phase in which nothing is built: the block is given what to call with how far it is, as often as it likes.
        A live line in a terminal, elsewhere a line from time to time."""
        told = time.monotonic()
        live = contextlib.ExitStack()
        shown: Any = None
        if self._stream.isatty():
            from rich.console import Console

            shown = live.enter_context(Console(file=self._stream).status(what))

        def tell(how_far: str) -> None:
            nonlocal told
            if time.monotonic() - told < (_REFRESH if shown is not None else _OFTEN):
                return
            told = time.monotonic()
            if shown is not None:
                shown.update(f"{what}: {how_far}")
            else:
                self.say(f"{what}: {how_far}")

        with live:
            yield tell

    def task_done(self) -> None:
        """One more of the phase's tasks is done."""
        with self._lock:
            self._done["tasks"] += 1
            self._refresh()

    def started(self, action: Action) -> None:
        with self._lock:
            self._running[id(action)] = f"{action.stage.name} {action.subject}"
            self._refresh()

    def finished(self, action: Action, hit: bool, seconds: float) -> None:
        with self._lock:
            self._running.pop(id(action), None)
            self._done["cached" if hit else "ran"] += 1
            if self._bar is None and not hit and action.stage.name in _TOLD:
                count = f"[{self._done['tasks']}/{self._total}] " if self._total else ""
                self._write(f"{count}{_DONE[action.stage.name]} {action.subject} ({seconds:.2f} s)")
            self._refresh()

    def failed(self, action: Action) -> None:
        with self._lock:
            self._running.pop(id(action), None)

    def tell(self, how_far: str) -> None:
        """How far something is that takes long: in the live line, or where there is none a line from time to time."""
        with self._lock:
            if self._bar is not None:
                self._bar.update(self._task, description=how_far)
            elif time.monotonic() - self._told > _OFTEN:
                if self._told > self._begun:  # what is over sooner is not worth a line
                    self._write(how_far)
                self._told = time.monotonic()

    def say(self, text: str) -> None:
        """One line, above the live one where there is a terminal."""
        with self._lock:
            self._write(text)

    def show(self, table: Any) -> None:
        """A table of rich's, at the end of everything."""
        from rich.console import Console

        with self._lock:
            Console(file=self._stream, width=None if self._stream.isatty() else _WIDTH).print(table)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._begun

    def _write(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def _refresh(self) -> None:
        if self._bar is not None:
            now = next(reversed(self._running.values()), "")
            self._bar.update(self._task, completed=self._done["tasks"], description=now, cached=self._done["cached"])
