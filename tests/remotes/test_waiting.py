"""Waiting no longer than agreed."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from pipeline.remotes.waiting import LEAST_RATE, Beat, Pace, StalledError, connected, within
from tests.remotes.doubles import deaf
from tests.servers import free_port


def test_a_job_returns_and_raises_as_if_it_were_called() -> None:
    assert within(1.0, lambda _: 5) == 5
    with pytest.raises(KeyError, match="x"):
        within(1.0, lambda _: {}["x"])


def test_a_job_that_shows_nothing_is_given_up() -> None:
    ended = threading.Event()
    began = time.monotonic()
    with pytest.raises(StalledError):
        within(0.1, lambda _: ended.wait(5))
    assert time.monotonic() - began < 1.0
    ended.set()


def test_a_job_may_take_long_as_long_as_it_moves() -> None:
    def job(beat: Beat) -> str:
        for _ in range(8):
            time.sleep(0.05)
            beat()
        return "done"

    assert within(0.2, job) == "done"


def test_pace_counts_only_what_was_waited_for() -> None:
    pace = Pace(stall=10.0)
    for _ in range(100):
        pace.moved(LEAST_RATE, 1.0)
    pace.moved(1, 9.0)
    with pytest.raises(StalledError, match="only 2 bytes"):
        pace.moved(1, 9.0)


def test_pace_forgives_no_stall_for_what_came_before_it() -> None:
    pace = Pace(stall=10.0)
    pace.moved(10_000_000, 10.0)
    with pytest.raises(StalledError):
        pace.moved(0, 10.0)


def test_a_connection_to_who_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connected("localhost", listener.getsockname()[1], 1.0).close()


def test_nobody_who_listens() -> None:
    with pytest.raises(ConnectionRefusedError):
        connected("127.0.0.1", free_port(), 1.0)
    began = time.monotonic()
    with deaf() as port, pytest.raises(TimeoutError):
        connected("127.0.0.1", port, 0.2)
    assert time.monotonic() - began < 1.0


def test_a_dead_address_does_not_use_up_the_time_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with deaf() as dead, socket.create_server(("127.0.0.1", 0)) as listener:
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
            for port in (dead, listener.getsockname()[1])
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        connected("cache.example", 80, 0.6).close()


def test_a_name_that_is_looked_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ended.wait(5))
    began = time.monotonic()
    with pytest.raises(StalledError):
        connected("cache.example", 80, 0.2)
    assert time.monotonic() - began < 1.0
    ended.set()
