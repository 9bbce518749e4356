"""What devices are, in words and in keys; and how many are used at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from pipeline.composition import measured_on
from pipeline.config import Device, TargetFile
from pipeline.devices import identity, probes
from pipeline.devices.contract import MeasuredOn
from pipeline.processor import device as this_machine
from pipeline.store import Store, default_root
from pipeline.types import Cause

PI = Device("desk:9190", "pi")
ARM = {"kind": "llvm", "mtriple": "aarch64-linux-gnu"}
CUDA = {"kind": "cuda", "host": {"kind": "llvm"}}
SAID = "machine\taarch64\nboard\tRaspberry Pi 5\nprocessors\t4\nFeatures\tfp asimd\nBogoMIPS\t108.00\n"


def file(device: Device | None) -> TargetFile:
    return TargetFile(target="native", device=device)


def test_a_target_without_devices_is_of_this_machine() -> None:
    assert identity.device_of(file(None)) == this_machine()
    assert measured_on({"kind": "llvm"}, file(None)) is MeasuredOn.LOCAL
    assert measured_on({"kind": "llvm", "mtriple": "sparc64-linux-gnu"}, file(None)) is MeasuredOn.NOWHERE


def test_a_target_with_devices_is_theirs_whatever_it_is_for() -> None:
    assert measured_on(ARM, file(PI)) is MeasuredOn.RPC
    assert measured_on({"kind": "llvm"}, file(PI)) is MeasuredOn.RPC
    assert measured_on(CUDA, file(PI)) is MeasuredOn.NOWHERE, "what runs on a GPU is not measured over RPC"


def test_what_a_device_said_is_remembered_by_tracker_and_key() -> None:
    assert identity.said(PI) is None
    assert identity.device_of(file(PI)) == "rpc pi: not asked yet what it is"
    identity.remember(PI, "a board")
    assert identity.device_of(file(PI)) == "rpc pi: a board"
    assert identity.said(Device("desk:9190", "pi", parallel=4, timeout=1.0, wait=1.0)) == "a board"
    assert identity.said(Device("desk:9190", "other")) is None
    assert identity.said(Device("desk:9191", "pi")) is None
    identity.remember(PI, "another")
    assert identity.said(PI) == "another"
    assert Store(default_root()).root == default_root(), "it is a store all the same"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"said": 3}', "\x00"])
def test_what_was_written_by_nobody_is_not_believed(content: str) -> None:
    identity.remember(PI, "a board")
    (path,) = (default_root() / "locks" / "devices").glob("*.json")
    path.unlink()
    path.write_text(content)
    assert identity.said(PI) is None


def test_so_many_are_used_at_once_and_no_more() -> None:
    two = Device("desk:9190", "pi", parallel=2)
    inside, most, lock = 0, 0, threading.Lock()

    def use() -> None:
        nonlocal inside, most
        with identity.slot(two):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.1)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=use) for _ in range(5)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(20)
    assert most == 2


def test_a_device_is_described_by_its_kind_and_not_by_its_day() -> None:
    described = probes.description(SAID)
    assert described.startswith("Raspberry Pi 5 (")
    assert described.endswith("), 4 processors")
    assert probes.description(SAID.replace("108.00", "54.00")) == described
    assert probes.description(SAID.replace("fp asimd", "asimd fp")) == described
    for other in (
        SAID.replace("Pi 5", "Pi 4"),
        SAID.replace("fp asimd", "fp asimd sve"),
        SAID.replace("\t4", "\t2"),
        SAID + "TVM_NUM_THREADS\t1\n",
        SAID + "CPU part\t0xd0b\n",
    ):
        assert probes.description(other) != described


def test_a_status_says_whose_fault_it_was() -> None:
    assert probes.fault(0, 2.0) is None
    assert probes.fault(77 << 8, 2.0) is None, "it says so itself when it is called"
    assert probes.fault(-2, 2.0) is None
    assert probes.fault(-1, 2.0) == ("had not ended after 2 s", Cause.TIMED_OUT)
    assert probes.fault(signal.SIGSEGV, 2.0) == ("crashed with SIGSEGV", Cause.CRASHED)
    assert probes.fault(3 << 8, 2.0) == ("ended the process with exit code 3", Cause.CRASHED)
    assert probes.fault(40, 2.0) == ("crashed with signal 40", Cause.CRASHED) or os.name != "posix"


def test_only_what_has_processes_as_here_is_guarded() -> None:
    assert probes.can_guard("")
    assert probes.can_guard("aarch64-linux-gnu")
    assert probes.can_guard("arm64-apple-macos")
    assert not probes.can_guard("x86_64-pc-windows-msvc")
    assert not probes.can_guard("wasm32-unknown-unknown")


def test_the_probes_are_packed_with_the_package() -> None:
    assert Path(probes.__file__).with_name("probes.c").is_file()
