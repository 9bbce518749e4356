"""Measuring over TVM's RPC: what is right and how fast as on this machine; whose fault it is when something dies."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from pipeline import measuring
from pipeline.config import Device
from pipeline.devices import identity, rpc
from pipeline.errors import DeviceError
from pipeline.measuring import Contender
from pipeline.toolchain import driver_for
from pipeline.types import Cause, Terms, Trial
from tests.devices.boards import BUSY, DOUBLE, SPECS, Boards, free_port

COMPARED = Terms(seeds=(0, 1), seconds=0.0, patience=3.0)
TIMED = Terms(seeds=(0, 1), seconds=0.02, patience=3.0)

Compiled = Callable[..., Contender]


def tried(device: Device, contenders: Sequence[Contender], terms: Terms = COMPARED) -> tuple[dict[str, Trial], str]:
    said = identity.said(device) or rpc.ask(device, "")
    return rpc.measure(device, identity.named(device, said), "", SPECS, [1], contenders, terms)


def test_a_device_says_what_it_is_and_that_is_remembered(device: Device) -> None:
    said = rpc.ask(device, "")
    assert "processors" in said
    assert "TVM_NUM_THREADS=1" in said, "it is the server's environment that counts"
    assert identity.said(device) == said
    assert identity.named(device, said) == f"rpc board: {said}"


def test_the_winner_is_that_of_this_machine(device: Device, compiled: Compiled) -> None:
    quick, slow = compiled("quick", BUSY % 20_000), compiled("slow", BUSY % 400_000)
    trials, lost = tried(device, [slow, slow, quick], TIMED)
    assert not lost
    assert trials["quick"].seconds is not None
    assert trials["slow"].seconds is not None
    here = measuring.measure(SPECS, [1], slow, [slow, quick], TIMED)
    assert here["quick"].seconds is not None
    assert here["slow"].seconds is not None
    there_ratio, here_ratio = (
        trials["slow"].seconds / trials["quick"].seconds,
        here["slow"].seconds / here["quick"].seconds,
    )
    assert there_ratio == pytest.approx(here_ratio, rel=0.6), "20 times as much work"
    assert trials["quick"].error == 0.0


def test_what_dies_hangs_or_errs_is_put_aside_by_name_and_the_others_are_timed(
    boards: Boards, device: Device, compiled: Compiled
) -> None:
    right = compiled("right", DOUBLE)
    bad = {
        "aborts": compiled("aborts", "abort();"),
        "loops": compiled("loops", "for (volatile int go = 1; go;) {}"),
        "leaves": compiled("leaves", "_exit(3);"),
        "wrong": compiled("wrong", DOUBLE.replace("2 *", "3 *")),
        "raises": compiled("raises", 'TVMFFIErrorSetRaisedFromCStr("ValueError", "not today"); return -1;'),
        "unlinkable": compiled("unlinkable", "extern void nowhere(float*); nowhere(y);"),
    }
    trials, lost = tried(device, [right, *bad.values(), right], TIMED)
    assert trials["right"].seconds
    assert {name: trials[name].cause for name in bad} == {
        "aborts": Cause.CRASHED,
        "loops": Cause.TIMED_OUT,
        "leaves": Cause.CRASHED,
        "wrong": Cause.WRONG,
        "raises": Cause.FAILED,
        "unlinkable": Cause.FAILED,
    }
    assert "SIGABRT" in trials["aborts"].refused
    assert "3 s" in trials["loops"].refused
    assert "not today" in trials["raises"].refused
    assert "nowhere" in trials["unlinkable"].refused
    assert not lost, "none of them took a session with it"
    boards.await_free("board", 2)


def test_a_reference_that_dies_is_no_fault_of_the_device(device: Device, compiled: Compiled) -> None:
    with pytest.raises(RuntimeError, match="compared with crashed with SIGABRT"):
        tried(device, [compiled("dead", "abort();"), compiled("right", DOUBLE)])


def test_what_crashes_only_when_called_again_is_blamed_after_three_sessions(boards: Boards, compiled: Compiled) -> None:
    """The stock server in Python does not come back from that: it is started again, as a supervisor would."""
    key = Device(boards.address, "frail", wait=60.0)
    server = boards.start("frail")
    boards.await_free("frail", 1)
    ends = threading.Event()

    def supervise() -> None:
        nonlocal server
        while not ends.wait(0.2):
            if boards.standing("frail").total == 0:
                boards.end(server)
                server = boards.start("frail")
                boards.await_server("frail")

    thread = threading.Thread(target=supervise)
    thread.start()
    try:
        second = compiled("second", "static int calls = 0; if (calls++) abort(); " + DOUBLE)
        right = compiled("right", DOUBLE)
        trials, lost = tried(key, [right, right, second], COMPARED)
    finally:
        ends.set()
        thread.join()
        boards.end(server)
    assert trials["second"].cause is Cause.CRASHED
    assert "lost 3 times while it ran" in trials["second"].refused
    assert trials["right"].cause is None
    assert "lost 3 times" in lost


def test_a_device_that_is_killed_and_comes_back_is_waited_for_and_no_candidate_is_blamed(
    boards: Boards, compiled: Compiled
) -> None:
    key = Device(boards.address, "reboots", wait=60.0)
    server = boards.start("reboots")
    boards.await_free("reboots", 1)
    rpc.ask(key, "")
    boards.await_free("reboots", 1)
    lasts = compiled("lasts", "usleep(20000); " + DOUBLE)
    found: list[tuple[dict[str, Trial], str]] = []
    terms = Terms((0,), 1.5, 10.0)
    thread = threading.Thread(target=lambda: found.append(tried(key, [lasts, lasts], terms)))
    thread.start()
    end = time.monotonic() + 60
    while boards.standing("reboots").busy == 0 and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(1.0)
    boards.end(server)
    time.sleep(0.5)  # no server at all for a while
    server = boards.start("reboots")
    thread.join(120)
    boards.end(server)
    ((trials, lost),) = found
    assert trials["lasts"].seconds == pytest.approx(0.02, rel=0.5)
    assert not trials["lasts"].refused
    assert "the device reboots was lost" in lost
    assert "came back" in lost


def test_a_device_that_freezes_is_left_and_another_takes_its_place(
    boards: Boards, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "_REACHING", 2.0)
    key = Device(boards.address, "freezes", wait=60.0)
    frozen = boards.start("freezes")
    boards.await_free("freezes", 1)
    rpc.ask(key, "")
    boards.await_free("freezes", 1)
    frozen.signal(signal.SIGSTOP)
    other = boards.start("freezes")
    right = compiled("right", DOUBLE)
    try:
        trials, lost = tried(key, [right, right])
    finally:
        boards.end(frozen)
        boards.end(other)
    assert not trials["right"].refused
    assert "lost once" in lost


def test_a_device_that_is_known_and_stays_away_is_named_after_the_wait(boards: Boards, compiled: Compiled) -> None:
    gone = Device(boards.address, "gone", wait=1.0)
    identity.remember(gone, "some board")
    right = compiled("right", DOUBLE)
    with pytest.raises(DeviceError, match=f"no device gone came free at the RPC tracker {boards.address}") as caught:
        tried(gone, [right, right])
    assert "--key gone" in caught.value.hint
    assert "nothing was recorded" in caught.value.hint


def test_a_wrong_key_is_said_at_once_with_what_is_there(boards: Boards) -> None:
    begun = time.monotonic()
    with pytest.raises(DeviceError, match=r"has no device raspi9; it has board"):
        rpc.ask(Device(boards.address, "raspi9"), "")
    assert time.monotonic() - begun < 5


def test_a_tracker_that_is_not_there_is_said_at_once() -> None:
    address = f"127.0.0.1:{free_port()}"
    begun = time.monotonic()
    with pytest.raises(DeviceError, match=f"the RPC tracker {address} is not there") as caught:
        rpc.ask(Device(address, "board"), "")
    assert time.monotonic() - begun < 5
    assert "tvm.exec.rpc_tracker" in caught.value.hint


def test_another_device_under_the_same_key_is_said_and_its_times_are_kept_apart(
    device: Device, compiled: Compiled
) -> None:
    identity.remember(device, "another board")
    right = compiled("right", DOUBLE)
    with pytest.raises(DeviceError, match="is another than before"):
        tried(device, [right, right])
    assert identity.said(device) != "another board"
    assert not tried(device, [right, right])[0]["right"].refused


def test_a_device_that_cannot_load_what_is_built_says_so(device: Device, compiled: Compiled) -> None:
    triple = "aarch64-linux-gnu"
    if driver_for(triple) is None:
        pytest.skip("nothing here links for aarch64")
    with pytest.raises(DeviceError, match="the device board cannot load what is built for aarch64-linux-gnu"):
        rpc.ask(device, triple)
