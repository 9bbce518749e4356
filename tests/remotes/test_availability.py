"""A remote that goes away: left alone for a while, complained of once."""

from __future__ import annotations

import pytest

from pipeline.errors import RemoteError, Trouble
from pipeline.remotes.availability import Availability, Way

AWAY = RemoteError("the remote r does not answer", trouble=Trouble.AWAY)


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def available(clock: Clock, said: list[str]) -> Availability:
    return Availability("r", said.append, clock)


def test_one_that_is_away_is_asked_again_after_longer_and_longer(
    available: Availability, clock: Clock, said: list[str]
) -> None:
    pauses = []
    for _ in range(6):
        assert available.may(Way.READ)
        available.failed(Way.READ, AWAY)
        begun = clock.seconds
        while not available.may(Way.WRITE):
            clock.seconds += 1
        pauses.append(clock.seconds - begun)
        available.failed(Way.WRITE, AWAY)
        clock.seconds += 200
    assert pauses[0] == 5
    assert max(pauses) == 60
    assert len(said) == 1, "complained of once"
    assert available.may(Way.READ)
    available.answered(Way.READ)
    assert said[1:] == ["the remote r answers again"]
    assert available.may(Way.READ)


def test_one_that_is_read_and_cannot_be_written_is_complained_of_once(
    available: Availability, clock: Clock, said: list[str]
) -> None:
    written = []
    for second in range(200):
        if available.may(Way.READ):
            available.answered(Way.READ)
        if available.may(Way.WRITE):
            available.failed(Way.WRITE, AWAY)
            written.append(second)
        assert available.may(Way.READ) == (second >= 5), "it answers, once it was asked"
        if second >= 5:
            available.answered(Way.READ)
        clock.seconds += 1
    assert written == [0, 5, 15, 35, 75, 135, 195]
    assert len(said) == 1
    assert available.may(Way.WRITE) is False
    clock.seconds += 60
    assert available.may(Way.WRITE)
    available.answered(Way.WRITE)
    assert said[1:] == ["the remote r answers again"]


def test_many_that_fail_at_once_count_as_one(available: Availability, clock: Clock, said: list[str]) -> None:
    assert all(available.may(Way.READ) for _ in range(16))
    for _ in range(16):
        available.failed(Way.READ, AWAY)
    clock.seconds += 5
    assert available.may(Way.READ), "the pause did not double for each"
    assert len(said) == 1


def test_after_a_pause_one_asks_for_all(available: Availability, clock: Clock) -> None:
    available.failed(Way.READ, AWAY)
    clock.seconds += 5
    assert [available.may(Way.READ) for _ in range(3)] == [True, False, False]
    available.answered(Way.READ)
    assert all(available.may(Way.READ) for _ in range(3))


def test_one_blob_that_does_not_fit_does_not_keep_others_here(available: Availability, said: list[str]) -> None:
    full = RemoteError("the remote r takes no blob as large as that", trouble=Trouble.FULL)
    for _ in range(2):
        available.failed(Way.WRITE, full)
        available.failed(Way.WRITE, full)
        available.answered(Way.WRITE)
    assert available.may(Way.WRITE)
    assert said == ["the remote r takes no blob as large as that; what does not fit stays here"]
    for _ in range(3):
        available.failed(Way.WRITE, full)
    assert not available.may(Way.WRITE)
    assert available.may(Way.READ)
    assert len(said) == 1


def test_what_will_not_change_is_not_asked_again(available: Availability, said: list[str]) -> None:
    for _ in range(3):
        available.failed(Way.WRITE, RemoteError("the remote r wants none", trouble=Trouble.REFUSED, hint="pay"))
    assert not available.may(Way.WRITE)
    assert available.is_closed(Way.WRITE)
    assert available.may(Way.READ), "to read is another matter"
    assert said == ["the remote r wants none; no more writing to it in this run\n  → pay"]


def test_one_that_talks_nonsense_is_left_alone_in_the_end(available: Availability, said: list[str]) -> None:
    garbled = RemoteError("the remote r talks nonsense", trouble=Trouble.GARBLED)
    for _ in range(7):
        available.failed(Way.READ, garbled)
    available.made_sense()
    for _ in range(7):
        available.failed(Way.READ, garbled)
        available.answered(Way.READ)
    assert available.may(Way.READ)
    assert not said, "now and then something is broken anywhere"
    available.failed(Way.READ, garbled)
    assert not available.may(Way.READ)
    assert not available.may(Way.WRITE)
    assert len(said) == 1
