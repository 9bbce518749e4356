"""Asks TVM's RPC tracker who is there and for a device, over its own protocol (see tvm/rpc/tracker.py), without TVM.

A message is its length in four bytes, little-endian, then JSON. A tracker hands out an address only once: whoever gets
it connects soon, or the server there offers itself again after some seconds.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pipeline.errors import DeviceError

_MAGIC = 0x2F271
_REQUEST, _SUMMARY = 4, 6  # of tvm.rpc.base.TrackerCode
_SUCCESS = 0
_LARGEST = 1 << 24  # bytes that an answer may have: what says more is no tracker
_CONNECTING = 3.0  # seconds


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Address:
    """Where a server waits for whoever shows the match key."""

    host: str
    port: int
    match: str


@dataclass(frozen=True)
class Standing:
    """The servers of one key: all, those that are free, and requests that wait for one."""

    total: int
    free: int
    waiting: int

    @property
    def busy(self) -> int:
        return max(0, self.total - self.free)


class Tracker:
    """One connection to a tracker, given as "host:port". Raises DeviceError where it is not there or is no tracker."""

    def __init__(self, address: str) -> None:
        self._address = address
        host, _, port = address.rpartition(":")
        try:
            self._socket = socket.create_connection((host.strip("[]"), int(port)), _CONNECTING)
            self._socket.sendall(struct.pack("<i", _MAGIC))
            answer = self._received(4)
        except (OSError, ValueError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DeviceError(f"the RPC tracker {address} is not there: {reason}", hint=start(address)) from error
        if struct.unpack("<i", answer)[0] != _MAGIC:
            raise self._no_tracker()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def standings(self) -> dict[str, Standing]:
        """Every key that a server has, or had, or that somebody asks for."""
        summary = self._asked([_SUMMARY])
        try:
            servers = [str(each["key"]).removeprefix("server:") for each in summary["server_info"]]
            queues = {
                str(key): (int(each["free"]), int(each["pending"])) for key, each in summary["queue_info"].items()
            }
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise self._no_tracker() from error
        found = {key: Standing(servers.count(key), *queues.get(key, (0, 0))) for key in {*servers, *queues}}
        return {key: found[key] for key in sorted(found)}

    def request(self, key: str, patience: float, meanwhile: Callable[[], None] = _nothing) -> Address | None:
        """The address of a device that is free, waited for so many seconds at most; None where none came. Calls
        `meanwhile` every second.

        Afterwards the connection is of no more use where it is None: the tracker would answer it later.
        """
        until = time.monotonic() + patience
        try:
            self._send([_REQUEST, key, "", 1])
            while not select.select([self._socket], [], [], max(0.0, min(1.0, until - time.monotonic())))[0]:
                if time.monotonic() > until:
                    return None
                meanwhile()
            host, port, match = self._answer()
            return Address(str(host), int(port), str(match))
        except OSError as error:
            raise self._gone(error) from error
        except (TypeError, ValueError) as error:
            raise self._no_tracker() from error

    def _asked(self, question: list[object]) -> Any:
        try:
            self._send(question)
            return self._answer()
        except OSError as error:
            raise self._gone(error) from error

    def _send(self, message: list[object]) -> None:
        data = json.dumps(message).encode()
        self._socket.sendall(struct.pack("<i", len(data)) + data)

    def _answer(self) -> Any:
        (length,) = struct.unpack("<i", self._received(4))
        if not 0 < length <= _LARGEST:
            raise self._no_tracker()
        try:
            code, answer = json.loads(self._received(length))
        except (ValueError, TypeError) as error:
            raise self._no_tracker() from error
        if code != _SUCCESS:
            raise self._no_tracker()
        return answer

    def _received(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self._socket.recv(length - len(data))
            if not piece:
                raise OSError(0, "it closed the connection")
            data += piece
        return data

    def _gone(self, error: OSError) -> DeviceError:
        return DeviceError(
            f"the RPC tracker {self._address} does not answer: {error.strerror or error}", hint=start(self._address)
        )

    def _no_tracker(self) -> DeviceError:
        return DeviceError(
            f"what answers at {self._address} is no RPC tracker of TVM's", hint="see `tracker` in the target's file"
        )


def start(address: str) -> str:
    """What to type where a tracker is missing."""
    host, _, port = address.rpartition(":")
    return f"on {host}: python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {port} --port-end {int(port or 0) + 1}"


def serve(address: str, key: str) -> str:
    """What to type on a device that a tracker does not know."""
    return f"on the device: python -m tvm.exec.rpc_server --tracker {address} --key {key}"
