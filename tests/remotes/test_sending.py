"""What is sent behind the work: blobs before what names them, and what cannot go keeps nothing else from it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pipeline.errors import StoreError
from pipeline.hashing import key_of
from pipeline.store import ActionEntry
from tests.remotes.machines import KEY, Machine, away


def test_blobs_are_there_before_the_entry_that_names_them(tmp_path: Path, between: Path) -> None:
    calls: list[str] = []
    machine = Machine(tmp_path / "m", between, fault=calls.append)
    machine.make()
    machine.finish()
    assert calls.index("put_action") > max(i for i, call in enumerate(calls) if call == "put_blob")

    def no_blobs(what: str) -> None:
        if what == "put_blob":
            away(what)

    other = Machine(tmp_path / "n", between, fault=no_blobs)
    other.make(key_of({"x": 1}), b"never sent")
    other.finish()
    assert not (between / "ac" / key_of({"x": 1})).exists()


def test_closing_drops_what_was_not_sent(tmp_path: Path, between: Path) -> None:
    stop = threading.Event()
    machine = Machine(tmp_path / "m", between, fault=lambda what: stop.wait(10) and None)
    machine.make()
    machine.cache.close()
    stop.set()
    machine.cache.close()


def test_what_cannot_be_sent_does_not_keep_the_rest_from_being_sent(one: Machine, other: Machine) -> None:
    blob = one.store.put(b"code")
    one.cache.publish(key_of({"x": 1}), ActionEntry("codegen", {}, {"\ud800": blob}, 1.0))
    one.finish()
    assert any("cannot be sent" in said for said in one.said)
    entry = one.make()
    one.finish()
    assert other.cache.find(KEY) == entry


def test_one_that_is_closed_says_nothing_more(tmp_path: Path, between: Path) -> None:
    asked, stop = threading.Event(), threading.Event()

    def fault(what: str) -> None:
        asked.set()
        stop.wait(10)
        away(what)

    machine = Machine(tmp_path / "m", between, fault=fault)
    machine.make()
    assert asked.wait(10)
    machine.cache.close()
    stop.set()
    machine.finish()
    assert not machine.said


def test_only_what_is_missing_is_sent(one: Machine, other: Machine) -> None:
    one.make(KEY, b"same", b"first")
    one.finish()
    other.make(key_of({"x": 1}), b"same", b"second")
    other.finish()
    assert other.cache.counts.sent == len(b"second")


# what cannot be sent


def _unmade() -> ActionEntry:
    raise ValueError("it cannot be made")


def _unstored() -> ActionEntry:
    raise StoreError("there is no room")


@pytest.mark.parametrize("how", ["made", "stored", "sent"])
def test_one_of_a_batch_that_cannot_be_sent_drops_no_other(tmp_path: Path, between: Path, how: str) -> None:
    go = threading.Event()
    one = Machine(tmp_path / "one", between, fault=lambda what: go.wait(10) and None)
    made = {KEY: one.make()}  # whoever sends waits with it until the others stand in line
    for i in range(20):
        if i == 7:
            unsent = ActionEntry("codegen", {}, {"\ud800": one.store.put(b"code")}, 1.0)
            one.cache.publish(key_of({"bad": i}), {"made": _unmade, "stored": _unstored, "sent": unsent}[how])
        key = key_of({"i": i})
        made[key] = one.make(key, b"%d" % i)
    go.set()
    one.finish()
    assert one.cache.counts.dropped == 1
    assert one.cache.counts.published == len(made) == 21
    assert sum("cannot be sent" in said for said in one.said) == (how != "stored"), "the store told of it already"
    other = Machine(tmp_path / "other", between)
    assert all(other.cache.find(key) == entry for key, entry in made.items())


def test_what_is_yet_to_be_made_is_made_when_it_is_sent(one: Machine, other: Machine) -> None:
    entry = ActionEntry("codegen", {}, {"o": one.store.put(b"code")}, 1.0)
    makers: list[str] = []

    def make() -> ActionEntry:
        makers.append(threading.current_thread().name)
        return entry

    one.cache.publish(KEY, make)
    one.finish()
    assert makers == ["remote-sender"]
    assert other.cache.find(KEY) == entry
