"""Stages become cached ones: real stores, real workers, stages small enough to see what ran."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import stage_doubles
from stage_doubles import Double, double

from pipeline.errors import ModelError, StageError, StoreError, TvmakeError, WorkerDiedError
from pipeline.hashing import Digest, key_of
from pipeline.memoizer import Action, Memoizer
from pipeline.stages import Home, Kind
from pipeline.store import Store
from pipeline.toolchain import Toolchain
from pipeline.workers import Workers

TESTS = Path(__file__).resolve().parent
TOOLS = Toolchain({"cc": "1"})


@pytest.fixture(autouse=True)
def _doubles_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def workers(store: Store) -> Iterator[Workers]:
    crew = Workers(store.root, 2)
    yield crew
    crew.stop()


@pytest.fixture
def memoizer(store: Store, workers: Workers) -> Memoizer:
    return Memoizer(store, workers, TOOLS)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    folder = tmp_path / "ran"
    folder.mkdir()
    return folder


def counting(ran: Path, kind: Kind = Kind.BINARY, home: Home = Home.INLINE, **options: object) -> Action:
    stage = double(stage_doubles.count, kind=kind, home=home, tools=("cc",))
    return Action(stage, "cpu:add", options={"ran": str(ran), **options})


def runs(ran: Path) -> int:
    return len(list(ran.iterdir()))


def again(memoizer: Memoizer, toolchain: Toolchain = TOOLS) -> Memoizer:
    """A memoizer that remembers nothing, as in the next build."""
    return Memoizer(Store(memoizer.store.root), memoizer.workers, toolchain)


def failing(memoizer: Memoizer, action: Action) -> TvmakeError:
    with pytest.raises(TvmakeError) as caught:
        memoizer.run(action)
    return caught.value


@pytest.mark.parametrize("home", Home)
def test_a_miss_runs_and_a_hit_does_not(memoizer: Memoizer, ran: Path, home: Home) -> None:
    action = counting(ran, home=home)
    assert memoizer.found(action) is None
    entry = memoizer.run(action)
    assert memoizer.blob(entry.outputs["out"]) == b"made" * 100
    assert runs(ran) == 1
    assert memoizer.run(action) is entry
    later = again(memoizer)
    assert later.found(action) is not None
    assert later.run(action).outputs == entry.outputs
    assert runs(ran) == 1
    assert (memoizer.tally.ran["count"], memoizer.tally.hits["count"]) == (1, 0)
    assert (later.tally.ran["count"], later.tally.hits["count"]) == (0, 1)
    assert later.tally.saved_seconds["count"] == pytest.approx(entry.seconds, abs=1e-6)


def test_the_entry_says_what_it_was_made_from(memoizer: Memoizer, ran: Path) -> None:
    action = replace(counting(ran), inputs={"x": memoizer.store.put(b"x")})
    memoizer.run(action)
    kept = memoizer.store.lookup(key_of(action.components(TOOLS)))
    assert kept is not None
    assert kept.components == {
        "stage": "count",
        "version": 1,
        "inputs": {"x": Digest.of(b"x").hash},
        "options": {"ran": str(ran)},
        "tools": {"cc": "1"},
    }


def test_another_option_runs_again(memoizer: Memoizer, ran: Path) -> None:
    assert memoizer.run(counting(ran)).outputs != memoizer.run(counting(ran, out="other")).outputs
    assert runs(ran) == 2


@pytest.mark.parametrize("home", [Home.COMPILER, Home.INLINE])
def test_the_same_action_from_many_threads_runs_once(memoizer: Memoizer, ran: Path, home: Home) -> None:
    action = counting(ran, home=home, seconds=0.3)
    gate = threading.Barrier(4)

    def work(_: int) -> dict[str, Digest]:
        gate.wait()
        return dict(memoizer.run(action).outputs)

    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(work, range(4)))
    assert made == [made[0]] * 4
    assert runs(ran) == 1


def test_two_builds_at_once_run_a_slow_action_once(tmp_path: Path, ran: Path) -> None:
    def build(_: int) -> None:
        store = Store(tmp_path / "store")
        workers = Workers(store.root, 1)
        memoizer = Memoizer(store, workers, TOOLS)
        memoizer.run(counting(ran, home=Home.COMPILER, seconds=0.5))
        workers.stop()
        ran.with_name(f"tally-{memoizer.tally.ran['count']}-{memoizer.tally.hits['count']}-{os.getpid()}").touch()

    processes = [multiprocessing.get_context("fork").Process(target=build, args=(i,)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert runs(ran) == 1
    assert sorted(path.name[:9] for path in tmp_path.glob("tally-*")) == ["tally-0-1", "tally-1-0"]


@pytest.mark.parametrize(("kind", "expected"), [(Kind.BINARY, 2), (Kind.DECISION, 1)])
def test_a_new_tool_rebuilds_binaries_and_keeps_decisions(
    memoizer: Memoizer, ran: Path, kind: Kind, expected: int
) -> None:
    memoizer.run(counting(ran, kind))
    again(memoizer, Toolchain({"cc": "2"})).run(counting(ran, kind))
    assert runs(ran) == expected
    again(memoizer, Toolchain({"cc": "1", "onnx": "9"})).run(counting(ran, kind))
    assert runs(ran) == expected


def test_a_source_is_read_every_time_and_never_looked_up(memoizer: Memoizer, ran: Path) -> None:
    action = counting(ran, Kind.SOURCE, function=b"a pickle")
    first = memoizer.run(action)
    assert memoizer.run(action).outputs == first.outputs
    assert runs(ran) == 2
    assert memoizer.found(action) is None
    assert memoizer.blob(first.outputs["out"])
    assert not list((memoizer.store.root / "ac").rglob("*"))
    assert memoizer.tally.ran["count"] == 2


@pytest.mark.parametrize("home", [Home.COMPILER, Home.INLINE])
def test_a_failure_leaves_no_entry_and_is_tried_again(memoizer: Memoizer, home: Home) -> None:
    for stage in (stage_doubles.refuse, stage_doubles.fail, stage_doubles.give_an_object):
        action = Action(double(stage, home=home), "cpu:add")
        for _ in range(2):
            failing(memoizer, action)
        assert memoizer.found(action) is None
    assert not list((memoizer.store.root / "ac").rglob("*"))
    assert sum(memoizer.tally.ran.values()) == sum(memoizer.tally.hits.values()) == 0


@pytest.mark.parametrize("home", [Home.COMPILER, Home.INLINE])
def test_a_failure_names_stage_subject_and_key(memoizer: Memoizer, home: Home) -> None:
    action = Action(double(stage_doubles.fail, home=home), "cpu:add")
    error = failing(memoizer, action)
    key = key_of(action.components(TOOLS))
    assert type(error) is StageError
    assert str(error) == f"fail of cpu:add (key {key[:12]}) failed: ValueError: the thing itself"
    assert (error.stage, error.subject, error.key) == ("fail", "cpu:add", key)


@pytest.mark.parametrize("home", [Home.COMPILER, Home.INLINE])
def test_an_error_of_ours_is_not_wrapped(memoizer: Memoizer, home: Home) -> None:
    error = failing(memoizer, Action(double(stage_doubles.refuse, home=home), "cpu:add"))
    assert type(error) is ModelError
    assert str(error) == "the model is open\n  → close it"


def test_a_death_names_stage_subject_and_key(memoizer: Memoizer) -> None:
    action = Action(double(stage_doubles.segfault), "cpu:add")
    error = failing(memoizer, action)
    assert isinstance(error, WorkerDiedError)
    assert (error.stage, error.subject, error.key) == ("segfault", "cpu:add", key_of(action.components(TOOLS)))
    assert memoizer.found(action) is None


def test_an_input_that_vanished_is_named(memoizer: Memoizer) -> None:
    action = Action(double(stage_doubles.echo, home=Home.INLINE), "cpu:add", {"weights": Digest.of(b"gone")})
    assert "input weights" in str(failing(memoizer, action))


@pytest.mark.parametrize("damage", ["flipped", "gone", "entry flipped"])
def test_a_damaged_output_is_made_again(memoizer: Memoizer, ran: Path, damage: str) -> None:
    action = counting(ran)
    entry = memoizer.run(action)
    path = memoizer.store.path(entry.outputs["out"])
    assert path is not None
    if damage == "entry flipped":
        key = key_of(action.components(TOOLS))
        path = memoizer.store.root / "ac" / key[:2] / key
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    later = again(memoizer)
    assert later.run(action).outputs == entry.outputs
    assert later.blob(entry.outputs["out"]) == b"made" * 100
    assert runs(ran) == 2
    assert later.tally.ran["count"] == 1
    assert later.store.counts.corrupt == (damage != "gone")


def test_a_blob_that_is_gone_says_what_to_do(memoizer: Memoizer) -> None:
    with pytest.raises(TvmakeError, match="is missing from the store") as caught:
        memoizer.blob(Digest.of(b"never"))
    assert "again" in caught.value.hint


def test_a_store_that_refuses_is_an_error_of_the_store(
    memoizer: Memoizer, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", refuse)
    error = failing(memoizer, counting(ran))
    assert isinstance(error, StoreError)
    assert "free some space" in error.hint
    monkeypatch.undo()
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    assert memoizer.run(counting(ran))
    assert runs(ran) == 2


def test_an_option_that_cannot_be_a_key_is_refused_before_anything_runs(memoizer: Memoizer, ran: Path) -> None:
    with pytest.raises(TypeError, match="a key cannot hold"):
        memoizer.run(counting(ran, bad={1, 2}))
    assert runs(ran) == 0


def test_a_version_runs_again(memoizer: Memoizer, ran: Path) -> None:
    action = counting(ran)
    memoizer.run(action)
    memoizer.run(replace(action, stage=replace(action.stage, version=2)))
    assert runs(ran) == 2
    memoizer.run(replace(action, subject="another name", timeout=1.0))
    assert runs(ran) == 2


def test_a_hit_is_quick(memoizer: Memoizer, ran: Path) -> None:
    actions = [counting(ran, n=n) for n in range(100)]
    for action in actions:
        memoizer.run(action)
    later, begun = again(memoizer), time.perf_counter()
    for action in actions:
        later.run(action)
    assert (time.perf_counter() - begun) / len(actions) < 0.005  # it takes about 0.1 ms
    assert isinstance(actions[0].stage, Double)
