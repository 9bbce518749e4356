"""What every executor promises: pipeline.executors.contract. On this machine's processes, on a cluster of them that
lives for the build, and on one of workers with stores of their own."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import stage_doubles
from stage_doubles import double

from pipeline.errors import ExecutorError, ModelError, StageError, WorkerDiedError
from pipeline.executors.carrying import LARGE
from pipeline.memoizer import Action
from pipeline.processor import device
from pipeline.stages import Home
from pipeline.store import Store
from tests.executors.places import Place, action, begun, ended, new_key


def test_a_stage_runs_in_another_process_and_its_outputs_are_in_the_store(place: Place) -> None:
    x, key = place.store.put(os.urandom(3_000_000)), new_key()
    entry = place.perform(Action(double(stage_doubles.echo), "cpu:add", {"x": x}), key)
    assert entry.outputs["x"] == x
    assert int(place.blob(entry, "pid")) != os.getpid()
    kept = place.store.lookup(key)
    assert kept is not None
    assert (kept.stage, dict(kept.components), kept.outputs) == ("echo", {"stage": "echo"}, entry.outputs)
    assert not place.executor.stopped


def test_outputs_may_be_many_views_or_empty(place: Place) -> None:
    entry = place.perform(action(double(stage_doubles.give_several)))
    assert {name: place.store.get(digest) for name, digest in entry.outputs.items()} == {
        "a": b"first",
        "b": b"second",
        "none": b"",
    }


def test_an_error_of_ours_comes_back_as_it_was(place: Place) -> None:
    with pytest.raises(ModelError) as caught:
        place.perform(action(double(stage_doubles.refuse)))
    assert (caught.value.message, caught.value.hint) == ("the model is open", "close it")


def test_any_other_error_is_named(place: Place) -> None:
    with pytest.raises(StageError) as caught:
        place.perform(action(double(stage_doubles.fail)), "ab" * 32)
    assert str(caught.value) == "fail of cpu:add (key abababababab) failed: ValueError: the thing itself"


def test_an_error_that_cannot_be_sent_is_named(place: Place) -> None:
    with pytest.raises(StageError, match="the model holds a lambda") as caught:
        place.perform(action(double(stage_doubles.refuse_unsendably)))
    assert (caught.value.stage, caught.value.subject) == ("refuse_unsendably", "cpu:add")


def test_what_is_no_output_is_named(place: Place) -> None:
    key = new_key()
    with pytest.raises(StageError) as caught:
        place.perform(action(double(stage_doubles.give_an_object)), key)
    assert caught.value.subject == "cpu:add"
    assert place.store.lookup(key) is None


def test_a_request_that_cannot_be_sent_is_the_askers_fault(place: Place) -> None:
    with pytest.raises((TypeError, AttributeError)):
        place.perform(action(double(stage_doubles.echo), bad=threading.Lock()))
    assert place.perform(action(double(stage_doubles.echo)))


def test_printing_disturbs_nobody(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    assert place.blob(place.perform(action(double(stage_doubles.chatter))), "out") == b"said"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (stage_doubles.segfault, ("was killed by SIGSEGV",)),
        (stage_doubles.leave, ("ended with exit code 7", "the last words")),
    ],
)
def test_a_death_is_told_and_the_next_call_works(place: Place, stage: object, words: tuple[str, ...]) -> None:
    with pytest.raises(WorkerDiedError) as caught:
        place.perform(action(double(stage)), "cd" * 32)  # type: ignore[arg-type]
    said = str(caught.value)
    assert [word for word in (*words, "of cpu:add", "cdcdcdcdcdcd") if word not in said] == [], said
    assert not caught.value.timed_out
    assert place.perform(action(double(stage_doubles.echo)))


def test_a_process_that_is_killed_while_busy_is_told(place: Place, tmp_path: Path) -> None:
    call = place.later(action(double(stage_doubles.sleep), started=str(tmp_path / "started")))
    os.kill(begun(tmp_path / "started"), signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match="was killed by SIGKILL"):
        call.result(5)


@pytest.mark.parametrize("home", [Home.COMPILER, Home.RUNNER, Home.FRESH])
def test_what_runs_past_its_time_is_stopped(place: Place, tmp_path: Path, home: Home) -> None:
    began = time.monotonic()
    with pytest.raises(WorkerDiedError, match=r"stopped after 0\.8 s") as caught:
        place.perform(action(double(stage_doubles.sleep, home=home), 0.8, started=str(tmp_path / "started")))
    assert time.monotonic() - began < 4
    assert caught.value.timed_out
    assert ended(begun(tmp_path / "started"))


def test_what_is_done_is_told_while_others_go_on(place: Place, tmp_path: Path) -> None:
    """Two at once, and each is answered when it is done."""
    slow = place.later(action(double(stage_doubles.sleep), started=str(tmp_path / "slow"), seconds=30))
    first = begun(tmp_path / "slow")
    quick = [place.later(action(double(stage_doubles.echo))) for _ in range(4)]
    entries = [each.result(10) for each in quick]
    assert {int(place.blob(entry, "pid")) for entry in entries}.isdisjoint({first})
    assert all(entry.seconds < 1 for entry in entries)
    assert not slow.done()
    os.kill(first, signal.SIGKILL)
    with pytest.raises(WorkerDiedError):
        slow.result(5)


def test_many_are_asked_from_many_threads(place: Place) -> None:
    x = [place.store.put(b"%d" % i) for i in range(24)]
    asked = [place.later(Action(double(stage_doubles.echo), "cpu:add", {"x": each})) for each in x]
    assert [each.result(30).outputs["x"] for each in asked] == x


def test_stop_ends_running_and_waiting_calls(place: Place, tmp_path: Path) -> None:
    executor = place.reopen()
    names = [tmp_path / str(i) for i in range(5)]
    stage = double(stage_doubles.sleep)
    calls = [place.later(action(stage, started=str(name)), executor=executor) for name in names]
    deadline = time.monotonic() + 20
    while sum(name.exists() for name in names) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    running = [begun(name) for name in names if name.exists()]
    assert len(running) == 2
    threading.Thread(target=executor.stop, daemon=True).start()
    began = time.monotonic()
    ends = [call.exception(5) for call in calls]
    assert time.monotonic() - began < 2
    assert {type(end).__name__ for end in ends} <= {"KeyboardInterrupt", "StageError"}
    assert all("the build was stopped" in str(end) for end in ends if isinstance(end, StageError))
    assert all(ended(process) for process in running)
    executor.stop()
    assert executor.stopped
    with pytest.raises((KeyboardInterrupt, StageError)):
        executor.perform(action(stage), new_key(), {})
    assert place.perform(action(double(stage_doubles.echo))), "others that share a cluster go on"


def test_another_store_is_worked_for_by_the_same_means(place: Place, tmp_path: Path) -> None:
    """One that is thrown away soon: what is made for it is nobody else's."""
    key = new_key()
    first = place.perform(action(double(stage_doubles.echo)), key)
    made = replace(place.job, store=Store(tmp_path / "scratch", durable=False), remote=None, durable=False)
    other = place.executor.beside(made)
    inputs = {"x": made.store.put(b"only there"), "large": made.store.put(os.urandom(LARGE + 1))}
    entry = other.perform(Action(double(stage_doubles.echo), "cpu:add", inputs), key, {})
    for name, digest in inputs.items():
        assert entry.outputs[name] == digest
        assert place.store.get(digest) is None
    assert made.store.lookup(key) is not None
    if place.job.remote is not None:
        assert place.job.remote.lacks(entry.outputs.values()) == {entry.outputs["x"], entry.outputs["pid"]}
    other.stop()
    assert other.stopped
    assert place.perform(action(double(stage_doubles.echo)), key).outputs.keys() == first.outputs.keys()


def test_who_can_time_something_is_told(place: Place) -> None:
    here, elsewhere = place.executor.posts(device()), place.executor.posts("another")
    assert here == (("a", "b") if place.text.startswith("tcp") else ("this machine",))
    assert elsewhere == ("this machine",)
    if place.text.startswith("tcp"):
        assert place.executor.posts(device(), "cuda-sm_90") == ("a",)
        assert place.executor.posts(device(), "nonesuch") == ()


def test_the_post_that_is_named_performs_an_action(place: Place, tmp_path: Path) -> None:
    made = replace(place.job, store=Store(tmp_path / "scratch", durable=False), remote=None, durable=False)
    other = place.executor.beside(made)
    names = other.posts(device())
    by: dict[str, set[int]] = {}
    for name in (*names, *names):
        entry = other.perform(replace(action(double(stage_doubles.echo)), post=name), new_key(), {})
        by.setdefault(name, set()).add(int(made.store.get(entry.outputs["pid"]) or b""))
    other.stop()
    assert len(by) == len(names)
    assert not set.intersection(*by.values()) or len(names) == 1


def test_what_a_label_is_of_is_told(place: Place) -> None:
    if place.text.startswith("tcp"):
        assert place.executor.serving("cuda-sm_90") == device()
    with pytest.raises(ExecutorError, match="labelled nonesuch") as caught:
        place.executor.serving("nonesuch")
    assert "dask://" in caught.value.hint or "--label nonesuch" in caught.value.hint
