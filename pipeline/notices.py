"""What a stage says while it runs: that it waits itself, and for what.

A stage runs in a process of its own. What is told there goes to whoever listens in that process, who hands it to the
process that asked for the stage (pipeline.workers, pipeline.devices.asking), and there it is shown as a warning. What
nobody listens to is dropped: nothing depends on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_FIRST, _AGAIN = 2.0, 60.0  # seconds


def _dropped(sentence: str) -> None:
    pass


_listener: Callable[[str], None] = _dropped


def listen(listener: Callable[[str], None]) -> None:
    """Has all that is told in this process go there, from any thread."""
    global _listener
    _listener = listener


class Wait:
    """One thing that is waited for: told of once it has taken so many seconds, and again every minute."""

    def __init__(self, first: float = _FIRST) -> None:
        self._due = time.monotonic() + first

    def tell(self, sentence: str) -> None:
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + _AGAIN
            _listener(sentence)
