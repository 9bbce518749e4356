"""Who waits for a device is told so, and why it takes so long."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline.config import Device
from pipeline.devices import asking, identity
from pipeline.devices.tracker import Tracker
from pipeline.errors import DeviceError
from tests.devices.boards import STARTING, Boards


def test_a_device_that_stays_away_is_waited_for_aloud(boards: Boards) -> None:
    gone = Device(boards.address, "gone", wait=3.0)
    identity.remember(gone, "some board")
    told: list[str] = []
    with pytest.raises(DeviceError, match="no device gone came free"):
        asking.ask(gone, "", told.append)
    assert told == [f"waiting up to 3 s for the device gone at the RPC tracker {boards.address}: none is there"]


def test_a_device_that_others_use_is_waited_for_aloud_and_then_asked(boards: Boards) -> None:
    server = boards.start("popular")
    boards.await_free("popular", 1)
    told: list[str] = []
    asked = Device(boards.address, "popular", wait=STARTING)

    def give_back(sentence: str) -> None:
        told.append(sentence)
        boards.end(server)
        boards.start("popular")

    with Tracker(boards.address) as tracker:
        assert tracker.request("popular", 5.0) is not None
        assert "processors" in asking.ask(asked, "", give_back)
    assert told == [
        f"waiting up to {STARTING:g} s for the device popular at the RPC tracker {boards.address}: "
        "the one that is there is busy"
    ]


def test_who_waits_for_another_of_this_machine_says_so(boards: Boards, device: Device) -> None:
    told: list[str] = []
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with identity.slot(device):
            held.set()
            free.wait()

    other = threading.Thread(target=hold)
    other.start()
    held.wait()

    def stop(sentence: str) -> None:
        told.append(sentence)
        free.set()

    begun = time.monotonic()
    try:
        asking.ask(device, "", stop)
    finally:
        free.set()
        other.join()
    assert told == ["waiting for the device board: 1 at once (device.parallel) are in use"]
    assert time.monotonic() - begun < STARTING
