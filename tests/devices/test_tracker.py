"""What a tracker says, and what says nothing or nonsense in its place."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.devices.tracker import Tracker, serve, start
from pipeline.doctor import State, surroundings
from pipeline.errors import DeviceError
from tests.devices.boards import HOST, Boards, free_port

_MAGIC = struct.pack("<i", 0x2F271)


def said(text: bytes) -> bytes:
    return struct.pack("<i", len(text)) + text


@pytest.fixture
def impostor(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of what answers each message with the next of some bytes."""
    answers: list[bytes] = list(request.param)
    listening = socket.create_server((HOST, 0))

    def answer() -> None:
        connection, _ = listening.accept()
        with connection:
            for each in answers:
                connection.recv(1 << 16)
                connection.sendall(each)
            connection.recv(1)  # until the other end has had enough

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    yield f"{HOST}:{listening.getsockname()[1]}"
    listening.close()


def test_it_tells_keys_free_and_busy_and_hands_out_each_server_once(boards: Boards) -> None:
    boards.await_free("board", 2)
    with Tracker(boards.address) as tracker:
        assert (tracker.standings()["board"].total, tracker.standings()["board"].busy) == (2, 0)
        first, second = tracker.request("board", 5.0), tracker.request("board", 5.0)
        assert first is not None
        assert second is not None
        assert first.port != second.port
        assert tracker.standings()["board"].busy == 2
        begun = time.monotonic()
        assert tracker.request("board", 0.3) is None
        assert time.monotonic() - begun < 3
    boards.await_free("board", 2)  # nobody came, so they offer themselves again


@pytest.mark.parametrize(
    "impostor",
    [
        pytest.param([b"HTTP"], id="another protocol"),
        pytest.param([_MAGIC, said(b"[0, {}]")], id="a summary without servers"),
        pytest.param([_MAGIC, said(b"[0, [1]]")], id="a summary that is none"),
        pytest.param([_MAGIC, said(b"[-1, {}]")], id="a failure"),
        pytest.param([_MAGIC, said(b"{")], id="no JSON"),
        pytest.param([_MAGIC, struct.pack("<i", -5)], id="a length below zero"),
        pytest.param([_MAGIC, struct.pack("<i", 1 << 30)], id="a length beyond all reason"),
    ],
    indirect=True,
)
def test_what_is_no_tracker_is_told_so(impostor: str) -> None:
    with (
        pytest.raises(DeviceError, match=f"what answers at {impostor} is no RPC tracker"),
        Tracker(impostor) as tracker,
    ):
        tracker.standings()


@pytest.mark.parametrize("impostor", [pytest.param([], id="says nothing")], indirect=True)
def test_what_says_nothing_is_not_waited_for(impostor: str) -> None:
    begun = time.monotonic()
    with pytest.raises(DeviceError, match=f"the RPC tracker {impostor} is not there"):
        Tracker(impostor)
    assert time.monotonic() - begun < 5


def test_what_to_type() -> None:
    assert start("desk:9190") == "on desk: python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port 9190 --port-end 9191"
    assert serve("desk:9190", "pi").endswith("python -m tvm.exec.rpc_server --tracker desk:9190 --key pi")


# doit doctor


def targets(folder: Path, **trackers: str) -> None:
    (folder / "targets").mkdir()
    for key, tracker in trackers.items():
        text = f'target = "native"\n[device]\ntracker = "{tracker}"\nkey = "{key}"\n'
        (folder / "targets" / f"{key}.toml").write_text(text)


def test_the_doctor_tells_who_is_there(boards: Boards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert surroundings.devices().said == "no target of this folder is measured on devices behind a tracker"
    targets(tmp_path, board=boards.address)
    boards.await_free("board", 2)
    found = surroundings.devices()
    assert (found.state, found.said) == (State.OK, f"board at {boards.address}: 2 there, 2 free, 0 busy")


def test_the_doctor_misses_a_key_and_a_tracker(boards: Boards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nowhere = f"{HOST}:{free_port()}"
    targets(tmp_path, board=boards.address, pi=boards.address, far=nowhere)
    begun = time.monotonic()
    found = surroundings.devices()
    assert time.monotonic() - begun < 5
    assert found.state is State.WARNING
    assert "2 there" in found.said
    assert f"the RPC tracker {boards.address} has no device pi; it has board" in found.said
    assert f"the RPC tracker {nowhere} is not there" in found.said
    assert found.hint
