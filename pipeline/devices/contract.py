"""What it takes to try candidates somewhere: `pipeline.measuring` compares and times them, a site runs them.

    probe   each candidate once, where what crashes or hangs takes nothing else with it
    load    a candidate to be called: arrays of all parameters in, the arrays that it writes out
    timer   seconds of one of so many calls in a row, taken where it runs

This machine is a site, and so is a device behind a tracker (see pipeline.devices.session). A third is one more class.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pipeline.measuring import Contender
    from pipeline.tensors import Array
    from pipeline.types import Cause

At = Callable[[str], None]  # is told what a child is at, by name


class MeasuredOn(enum.Enum):
    """Where candidates of a target can be tried."""

    LOCAL = "local"  # on this machine
    RPC = "rpc"  # on devices that a tracker knows
    WORKER = "worker"  # on workers of a cluster
    NOWHERE = "nowhere"


class RefusedError(Exception):
    """A candidate is put aside; the message says why."""

    def __init__(self, message: str, cause: Cause) -> None:
        super().__init__(message)
        self.cause = cause


class LostError(Exception):
    """A site is gone in the middle of the work: whose fault that is, is not known yet."""


class Loaded(Protocol):
    """A candidate that is ready to be called. Its methods raise RefusedError where it fails."""

    def __call__(self, given: Sequence[Array]) -> list[Array]: ...

    def timer(self, given: Sequence[Array]) -> Callable[[int], float]: ...


class Site(Protocol):
    """Where candidates run. Any method may raise LostError where the site is gone."""

    def probe(self, contenders: Sequence[Contender], given: Sequence[Array], at: At) -> Mapping[str, RefusedError]:
        """Those of the contenders that cannot be run without harm, by name, and why."""

    def load(self, contender: Contender) -> Loaded:
        """Raises RefusedError where it cannot be loaded."""

    def is_quiet(self, limit: float) -> bool:
        """Whether nothing disturbs what is timed, waited for so many seconds at most."""
