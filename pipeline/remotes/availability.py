"""Whether a remote is there: asked again from time to time, and complained of once.

    answers ──AWAY──▶ left alone for 5 s, then 10, 20, … 60 ──an answer──▶ answers
            ──REFUSED──▶ not read, or not written, any more in this process
            ──FULL, three times in a row──▶ not written any more: one blob may be too large and others not

While a remote is left alone nobody waits for it. Whoever is in a call when it goes away ends within the terms of that
call; the first tells, the others keep quiet. One that goes away is neither read nor written, until each way is tried
again: one that can be read and not written, as a folder that nobody can make, is read, and complained of once.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable

from pipeline.errors import RemoteError, Trouble

_FIRST, _LONGEST = 5.0, 60.0  # seconds that a remote is left alone
_GARBLED = 8  # answers in a row that are none, after which nothing is believed any more
_FULL = 3  # refusals in a row for want of room, after which nothing is sent any more


class Way(enum.Enum):
    """What a remote is asked to do."""

    READ = "reading from"
    WRITE = "writing to"


class Availability:
    """What is known of one remote. Every method may be called from any thread.

    `say` is told, in a sentence, when the remote goes away, comes back, or is not used any more.
    """

    def __init__(self, name: str, say: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._say = say
        self._now = now
        self._lock = threading.Lock()
        self._until = dict.fromkeys(Way, 0.0)  # when it may be asked again
        self._pause = dict.fromkeys(Way, 0.0)
        self._probing: set[Way] = set()  # ways that somebody tries, to see whether it is back
        self._away: set[Way] = set()  # ways in which it was not there since it was complained of
        self._garbled = self._full = 0
        self._closed: set[Way] = set()
        self._told: set[str] = set()  # complaints

    def may(self, way: Way) -> bool:
        """Whether the remote may be asked now. Of many threads that ask after a pause one is let through at a time."""
        with self._lock:
            if way in self._closed or self._now() < self._until[way]:
                return False
            if self._pause[way]:
                if way in self._probing:
                    return False
                self._probing.add(way)
            return True

    def is_closed(self, way: Way) -> bool:
        """Whether the remote is not used that way any more, so that to wait for it is of no use."""
        with self._lock:
            return way in self._closed

    def answered(self, way: Way) -> None:
        """It did what it was asked to do, or said that it has nothing."""
        with self._lock:
            is_back = way in self._away
            if is_back:
                self._away.clear()
            self._pause[way] = self._until[way] = 0.0
            self._probing.discard(way)
            self._full = 0
        if is_back:
            self._say(f"the remote {self._name} answers again")

    def made_sense(self) -> None:
        """What it gave was what it should be. A page that asks to sign in is an answer as well."""
        with self._lock:
            self._garbled = 0

    def failed(self, way: Way, error: RemoteError) -> None:
        """It did not do its part. One that fails while others wait is told of once."""
        with self._lock:
            self._probing.discard(way)
            if error.trouble is Trouble.AWAY:
                told = not self._away
                self._away.add(way)
                for each in Way:
                    if told or each is way or self._pause[each]:  # else it answered that way since
                        self._leave(each)
            elif error.trouble is Trouble.GARBLED:
                self._garbled += 1
                told = self._garbled == _GARBLED and way not in self._closed
                if told:
                    self._closed.update(Way)
            elif error.trouble is Trouble.FULL:
                self._full += 1
                told = self._full == 1
                if self._full == _FULL:
                    self._closed.add(way)
            else:
                told = way not in self._closed
                self._closed.add(way)
        if told and (error.trouble is Trouble.AWAY or error.message not in self._told):
            self._told.add(error.message)
            self._say(_complaint(error, way))

    def _leave(self, way: Way) -> None:
        """Leaves it alone for a while; those that were in a call when it went away count as one."""
        if self._now() >= self._until[way]:
            self._pause[way] = min(_LONGEST, self._pause[way] * 2) if self._pause[way] else _FIRST
            self._until[way] = self._now() + self._pause[way]


def _complaint(error: RemoteError, way: Way) -> str:
    # With a hint of the remote's own there is more to say than what becomes of the build.
    hint = f"\n  → {error.hint}" if error.hint else ""
    if error.trouble is Trouble.AWAY:
        return f"{error.message}; going on without it until it answers again{hint}"
    if error.trouble is Trouble.GARBLED:
        return f"{error.message}; {_GARBLED} answers in a row make no sense: it is left alone{hint}"
    if error.trouble is Trouble.FULL:
        return f"{error.message}; what does not fit stays here{hint}"
    return f"{error.message}; no more {way.value} it in this run{hint}"
