"""Measuring on devices behind a tracker: the same comparison as on this machine (pipeline.measuring), elsewhere.

    this process   asks the tracker for a device, watches, and waits for one that is away
    child process  one session: links here, uploads, has the device try, compare and time the candidates

A session that is lost says nothing of the candidate that ran: a device may reboot, hang or vanish at any time. It is
counted, and all is done again in another session. Only a candidate at which sessions were lost time and again is put
aside, and only once a session without it came to its end. What was measured in a session that was lost is not used.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from pipeline.config import Device
from pipeline.devices import identity
from pipeline.devices.contract import At, LostError, RefusedError
from pipeline.devices.tracker import Address, Standing, Tracker, serve
from pipeline.errors import DeviceError, TvmakeError
from pipeline.measuring import Comparison, Contender, Expected, expected_of, watched
from pipeline.notices import Wait
from pipeline.types import Cause, TensorSpec, Terms, Trial

if TYPE_CHECKING:
    from pipeline.devices.session import Session

T = TypeVar("T")

_CONNECTING, _ASKING = "connecting to the device", "asking the device what it is"
_REACHING = 15.0  # seconds for a server to answer: one that was handed out may be dead
_SENDING = 60.0  # seconds for what is linked and sent for a candidate, beside the patience with it
_BLAMED = 3  # sessions that are lost at a candidate before it is put aside
_HOPELESS = 12  # sessions that are lost during one measurement
_AGAIN = 0.5  # seconds until a tracker is asked again
_GIVEN_UP = 10.0  # seconds to wait for a device that this process gave up before
_EXPIRED = "RPCSessionTimeoutError"  # what a server says of a session that it ends

_given_up: set[Device] = set()
_served: set[Device] = set()  # those that did something for this process


@dataclass
class Losses:
    """How often a device was lost, and at what."""

    device: Device
    count: int = 0
    at: Counter[str] = field(default_factory=Counter)
    last: str = ""

    def add(self, at: str, said: str) -> None:
        self.count += 1
        self.at[at] += 1
        self.last = f"{at}: {said}"

    @property
    def words(self) -> str:
        """What to say of work that came to its end all the same; "" where nothing was lost."""
        if not self.count:
            return ""
        times = "once" if self.count == 1 else f"{self.count} times"
        return f"the device {self.device.key} was lost {times}, and came back ({self.last})"

    def hopeless(self) -> DeviceError:
        return DeviceError(
            f"the device {self.device.key} at the RPC tracker {self.device.tracker} was lost {self.count} times "
            f"during one measurement ({self.last})",
            hint="see the log of its server, its power supply and its memory; docs/devices.md has the usual causes",
        )


def ask(device: Device, triple: str) -> str:
    """What a device says of itself, now remembered. Raises DeviceError where none comes."""
    from pipeline.devices.session import description

    losses = Losses(device)
    with identity.slot(device):
        while True:
            said, _ = _in_session(losses, (), 0.0, lambda session, at: description(session, triple))
            if said is not None:
                identity.remember(device, said)
                return said
            if losses.count >= _BLAMED:
                raise losses.hopeless()


def measure(
    device: Device,
    known: str,
    triple: str,
    parameters: Sequence[TensorSpec],
    written: Sequence[int],
    contenders: Sequence[Contender],
    terms: Terms,
) -> tuple[dict[str, Trial], str]:
    """What became of each contender but the first, which the others are compared with; and what is to be said of the
    device.

    `known` is what results are keyed by; `triple` what the code is for. Raises DeviceError where no device comes, and
    where it is another than the known one; RuntimeError where the first contender cannot be run.
    """
    reference, *others = contenders
    losses = Losses(device)
    refused: dict[str, Trial] = {}
    # In memory that this process shares with the children that come to know it.
    expected = expected_of(reference, [parameters[i] for i in written], terms.seeds, known)
    work = _Work(device, known, triple, parameters, written, reference, terms, expected)
    with identity.slot(device):
        while True:
            left = [each for each in others if each.name not in refused]
            names = [reference.name, *(each.name for each in left)]
            found, at = _in_session(losses, names, terms.patience, partial(work.done, left=left))
            if found is not None:
                return {**found, **refused}, losses.words
            is_candidate = at != reference.name and at in names
            if losses.count >= _HOPELESS or (losses.at[at] >= _BLAMED and not is_candidate and at != _CONNECTING):
                raise losses.hopeless()
            if losses.at[at] >= _BLAMED and is_candidate:
                said = f"the device was lost {_BLAMED} times while it ran ({losses.last.partition(': ')[2]})"
                refused[at] = Trial(at, refused=said, cause=Cause.CRASHED)


@dataclass(frozen=True)
class _Work:
    """What is done in a session."""

    device: Device
    known: str
    triple: str
    parameters: Sequence[TensorSpec]
    written: Sequence[int]
    reference: Contender
    terms: Terms
    expected: Expected

    def done(self, session: Session, at: At, left: Sequence[Contender]) -> dict[str, Trial]:
        from pipeline.devices.session import Board

        at(_ASKING)
        self._require_known(session)
        board = Board(session, self.parameters, self.written, self.triple, self.terms.patience)
        comparison = Comparison(self.parameters, self.written, self.reference, left, self.terms, self.expected, board)
        try:
            return comparison.run(at)
        except RefusedError as refusal:
            raise RuntimeError(f"the function that candidates are compared with {refusal}") from refusal

    def _require_known(self, session: Session) -> None:
        from pipeline.devices.session import description

        said = description(session, self.triple)
        if identity.named(self.device, said) != self.known:
            identity.remember(self.device, said)
            raise DeviceError(
                f"the device {self.device.key} at the RPC tracker {self.device.tracker} is another than before: it is "
                f"{said}, and results are kept for {self.known!r}",
                hint="run the same command again to go on with this one; give each kind of device a key of its own",
            )


# one session


@dataclass(frozen=True)
class _Done(Generic[T]):
    result: T


@dataclass(frozen=True)
class _Lost:
    said: str


def _in_session(
    losses: Losses, names: Sequence[str], patience: float, work: Callable[[Session, At], T]
) -> tuple[T | None, str]:
    """What comes of a session in a child; or None where it is lost, which is added to the losses, and what it was at.

    Raises what the work raises.
    """
    device = losses.device
    address = _address(losses)

    def run(at: At) -> _Done[T] | _Lost | Exception:
        from pipeline.devices.session import Session

        since = [time.monotonic()]

        def told(name: str) -> None:
            since[0] = time.monotonic()
            at(name)

        told(_CONNECTING)
        try:
            return _Done(work(Session(address, device), told))
        except LostError as error:
            if _EXPIRED in str(error) and time.monotonic() - since[0] < patience:
                return _expired(device, len(names))
            return _Lost(str(error))
        except (TvmakeError, RuntimeError) as error:
            return error

    limits = {_CONNECTING: _REACHING, _ASKING: _SENDING}
    known = list(dict.fromkeys([*limits, *names]))
    outcome, at, said = watched(run, known, lambda name: limits.get(name, _SENDING + 2 * patience))
    if isinstance(outcome, Exception):
        raise outcome
    if isinstance(outcome, _Done):
        _given_up.discard(device)
        _served.add(device)
        return outcome.result, at
    losses.add(at, outcome.said if outcome is not None else said)
    return None, at


def _expired(device: Device, count: int) -> DeviceError:
    return DeviceError(
        f"a session on the device {device.key} did not come to its end within {device.timeout:g} s: "
        f"{count} candidates at once are too many for that",
        hint="raise device.timeout in the target's file, or lower tune.batch",
    )


# waiting for a device


def _address(losses: Losses) -> Address:
    """Where a free device is; waits for one that is away."""
    device = losses.device
    wait = min(device.wait, _GIVEN_UP) if device in _given_up else device.wait
    until = time.monotonic() + wait
    standings: dict[str, Standing] = {}
    was_there = losses.count > 0 or device in _served
    waiting = Wait()

    def tell() -> None:
        place = f"the device {device.key} at the RPC tracker {device.tracker}"
        waiting.tell(f"waiting up to {wait:g} s for {place}: {_who_is_there(standings.get(device.key))}")

    while True:
        try:
            with Tracker(device.tracker) as tracker:
                standings, was_there = tracker.standings(), True
                is_heard_of = losses.count > 0 or _is_heard_of(device, standings)
                left = until - time.monotonic()
                if is_heard_of and (found := tracker.request(device.key, left, tell)) is not None:
                    return found
        except DeviceError:
            # A tracker that was there a moment ago may come back; one that never was is not waited for.
            if not was_there or time.monotonic() > until:
                raise
        else:
            if not is_heard_of:
                raise _unheard_of(device, standings)
        if time.monotonic() > until:
            _given_up.add(device)
            raise _away(device, wait, standings)
        tell()
        time.sleep(_AGAIN)


def _is_heard_of(device: Device, standings: dict[str, Standing]) -> bool:
    """Whether a device of this key is there or ever was: otherwise it is a mistake, and not a device that is away."""
    return standings.get(device.key, Standing(0, 0, 0)).total > 0 or identity.said(device) is not None


def _unheard_of(device: Device, standings: dict[str, Standing]) -> DeviceError:
    there = ", ".join(key for key, each in standings.items() if each.total)
    return DeviceError(
        f"the RPC tracker {device.tracker} has no device {device.key}; it has {there or 'none at all'}",
        hint=f"see device.key in the target's file; {serve(device.tracker, device.key)}",
    )


def _who_is_there(known: Standing | None) -> str:
    if known is None or not known.total:
        return "none is there"
    return "the one that is there is busy" if known.total == 1 else f"all {known.total} that are there are busy"


def _away(device: Device, waited: float, standings: dict[str, Standing]) -> DeviceError:
    they = _who_is_there(standings.get(device.key))
    return DeviceError(
        f"no device {device.key} came free at the RPC tracker {device.tracker} within {waited:g} s: {they}",
        hint=f"{serve(device.tracker, device.key)}; or raise device.wait in the target's file; nothing was recorded",
    )
