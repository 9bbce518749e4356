"""Waiting no longer than agreed, for what has no time limit of its own.

Two means: a call that is given up when it shows no progress (`within`), and a bound on how slowly bytes may trickle
(`Pace`). A system call that hangs cannot be ended from outside: its thread is left behind, which does not keep the
process from ending.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Bytes in a second, below which a transfer counts as stalled, however regularly its bytes come.
LEAST_RATE = 1024


class StalledError(TimeoutError):
    """Nothing moved for as long as was agreed."""


class Beat:
    """When something last moved. Whoever works calls it; whoever waits reads it."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self) -> None:
        self._last = time.monotonic()

    def left(self, seconds: float) -> float:
        """How long may still be waited for the next beat; negative when it is overdue."""
        return self._last + seconds - time.monotonic()


def within(seconds: float, job: Callable[[Beat], T]) -> T:
    """What `job` returns or raises, or StalledError once it has gone on for `seconds` without a beat.

    The job runs in a thread of its own, and may well end after it was given up; nobody learns of it then.
    """
    beat = Beat()
    ended = threading.Event()
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(job(beat))
        except BaseException as error:
            failure.append(error)
        finally:
            ended.set()

    threading.Thread(target=run, name="remote", daemon=True).start()
    while not ended.wait(max(beat.left(seconds), 0.0)):
        if beat.left(seconds) <= 0:
            raise StalledError(f"nothing moved for {seconds:g} s")
    if failure:
        raise failure[0]
    return outcome[0]


class Pace:
    """Whether bytes come fast enough. Only the time that was spent waiting for them counts, not what was done between.

    After each `stall` seconds of waiting, LEAST_RATE must have been kept up in them.
    """

    def __init__(self, stall: float) -> None:
        self._stall = stall
        self._waited = 0.0
        self._count = 0

    def moved(self, count: int, waited: float) -> None:
        """`count` bytes came after `waited` seconds. Raises StalledError where that is too slow."""
        self._waited += waited
        self._count += count
        if self._waited >= self._stall:
            if self._count < LEAST_RATE * self._waited:
                raise StalledError(f"only {self._count} bytes came in {self._waited:.0f} s")
            self._waited, self._count = 0.0, 0


def connected(host: str, port: int, seconds: float) -> socket.socket:
    """A TCP connection to the first address of a host that takes one; name look-up and all addresses in that time.

    Each address gets a fair share of what is left, so that a dead one does not use up the time of the next. Raises
    OSError, of which StalledError is one.
    """
    until = time.monotonic() + seconds

    def connect(_: Beat) -> socket.socket:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        failure: OSError = OSError(f"{host} has no address")
        for tried, (family, kind, protocol, _name, address) in enumerate(addresses):
            share = (until - time.monotonic()) / (len(addresses) - tried)
            if share <= 0:
                break
            made = socket.socket(family, kind, protocol)
            try:
                made.settimeout(share)
                made.connect(address)
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return made
            except OSError as error:
                made.close()
                failure = error
        raise failure

    return within(seconds, connect)
