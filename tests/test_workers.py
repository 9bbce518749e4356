"""Real worker processes, and everything that can happen to one."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import stage_doubles
from stage_doubles import Double, double

from pipeline import workers as workers_module
from pipeline.errors import ModelError, SetupError, StageError, WorkerDiedError
from pipeline.hashing import Digest
from pipeline.memoizer import Action
from pipeline.stages import Home
from pipeline.store import ActionEntry, Store
from pipeline.workers import Workers

TESTS = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def _doubles_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def crew(store: Store) -> Iterator[Workers]:
    workers = Workers(store.root, 2)
    yield workers
    workers.stop()
    assert children() == []


@pytest.fixture(scope="module", autouse=True)
def _others() -> None:
    """Other tests may have started servers that still run."""
    STRANGERS.update(child.pid for child in psutil.Process().children())


STRANGERS: set[int] = set()


def children() -> list[psutil.Process]:
    ours = [child for child in psutil.Process().children() if child.pid not in STRANGERS]
    return [child for child in ours if child.status() != psutil.STATUS_ZOMBIE]


def action(stage: Double, timeout: float = 30, **options: object) -> Action:
    return Action(stage, "cpu:add", options=options, timeout=timeout)


def perform(crew: Workers, asked: Action) -> ActionEntry:
    return crew.perform(asked, "ab" * 32, {"stage": asked.stage.name})


def pid(crew: Workers, store: Store, home: Home = Home.COMPILER) -> int:
    """The process that answers next."""
    said = store.get(perform(crew, action(double(stage_doubles.echo, home=home))).outputs["pid"])
    assert said is not None
    return int(said)


def begun(path: Path) -> int:
    """What a stage wrote there when it began."""
    deadline = time.monotonic() + 10
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, "the stage never began"
        time.sleep(0.005)
    return int(path.read_text())


def ended(process: int, within: float = 2) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


def in_background(crew: Workers, asked: Action) -> Future[ActionEntry]:
    future: Future[ActionEntry] = Future()

    def work() -> None:
        try:
            future.set_result(perform(crew, asked))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


# answers


def test_a_stage_runs_in_another_process_and_its_outputs_are_in_the_store(crew: Workers, store: Store) -> None:
    x = store.put(b"some bytes")
    asked = Action(double(stage_doubles.echo), "cpu:add", {"x": x})
    entry = crew.perform(asked, "ab" * 32, {"stage": "echo"})
    assert entry.outputs["x"] == x
    assert store.get(entry.outputs["pid"]) != b"%d" % os.getpid()
    kept = store.lookup("ab" * 32)
    assert kept is not None
    assert (kept.stage, kept.components, kept.outputs) == (entry.stage, entry.components, entry.outputs)


def test_outputs_may_be_many_views_or_empty(crew: Workers, store: Store) -> None:
    outputs = perform(crew, action(double(stage_doubles.give_several))).outputs
    assert {name: store.get(digest) for name, digest in outputs.items()} == {"a": b"first", "b": b"second", "none": b""}


def test_a_worker_is_used_again_and_a_fresh_one_is_not(crew: Workers, store: Store) -> None:
    first = pid(crew, store)
    fresh = [perform(crew, action(double(stage_doubles.echo, home=Home.FRESH))).outputs["pid"] for _ in range(2)]
    assert len({Digest.of(b"%d" % first), *fresh}) == 3
    assert pid(crew, store) == first
    assert [child.pid for child in children()] == [first]


def test_a_runner_is_used_again_and_is_no_compiler(crew: Workers, store: Store) -> None:
    """What it remembers of a reference serves the next candidates, and its children inherit none of TVM's threads."""
    compiler, runner = pid(crew, store), pid(crew, store, Home.RUNNER)
    assert runner != compiler
    for _ in range(2):
        assert pid(crew, store, Home.RUNNER) == runner
        assert pid(crew, store) == compiler
    assert {child.pid for child in children()} == {compiler, runner}


def test_a_runner_starts_while_all_compilers_are_busy(crew: Workers, store: Store, tmp_path: Path) -> None:
    crew.limit = 1
    busy = in_background(crew, action(double(stage_doubles.sleep), started=str(tmp_path / "started"), seconds=1.5))
    compiler = begun(tmp_path / "started")
    assert pid(crew, store, Home.RUNNER) != compiler
    assert not busy.done()
    busy.result(5)
    assert pid(crew, store) == compiler


def test_a_runner_that_dies_is_replaced_and_the_compiler_stays(crew: Workers, store: Store) -> None:
    compiler, runner = pid(crew, store), pid(crew, store, Home.RUNNER)
    with pytest.raises(WorkerDiedError) as caught:
        perform(crew, action(double(stage_doubles.segfault, home=Home.RUNNER)))
    assert not caught.value.timed_out
    assert pid(crew, store, Home.RUNNER) not in (compiler, runner)
    assert pid(crew, store) == compiler


def test_what_a_worker_set_aside_of_the_store_is_counted(crew: Workers, store: Store) -> None:
    """Blobs, and members of sets."""
    torn = store.root / "sets" / "ab" / "abc" / ("0" * 64)
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"torn")
    digest = store.put(b"a blob")
    damaged = store.root / "cas" / digest.hash[:2] / digest.hash
    damaged.chmod(0o644)
    damaged.write_bytes(b"another")
    for _ in range(2):
        with pytest.raises(StageError, match="vanished"):
            perform(crew, Action(double(stage_doubles.read_set), "cpu:add", {"x": digest}, {"set": "abc"}))
        assert crew.corrupt == 2, "each once"


def test_an_error_of_ours_comes_back_as_it_was(crew: Workers, store: Store) -> None:
    first = pid(crew, store)
    with pytest.raises(ModelError) as caught:
        perform(crew, action(double(stage_doubles.refuse)))
    assert (caught.value.message, caught.value.hint) == ("the model is open", "close it")
    assert pid(crew, store) == first


def test_any_other_error_is_named(crew: Workers) -> None:
    with pytest.raises(StageError) as caught:
        perform(crew, action(double(stage_doubles.fail)))
    assert str(caught.value) == "fail of cpu:add (key abababababab) failed: ValueError: the thing itself"


def test_an_error_that_cannot_be_sent_is_named(crew: Workers, store: Store) -> None:
    first = pid(crew, store)
    with pytest.raises(StageError) as caught:
        perform(crew, action(double(stage_doubles.refuse_unsendably)))
    assert (caught.value.stage, caught.value.subject) == ("refuse_unsendably", "cpu:add")
    assert "the model holds a lambda" in str(caught.value)
    assert pid(crew, store) == first


@pytest.mark.parametrize("stage", [stage_doubles.give_an_object, stage_doubles.give_nothing])
def test_what_is_no_output_is_named(crew: Workers, store: Store, stage: object) -> None:
    with pytest.raises(StageError) as caught:
        perform(crew, action(double(stage)))  # type: ignore[arg-type]
    assert caught.value.subject == "cpu:add"
    assert store.lookup("ab" * 32) is None


def test_a_request_that_cannot_be_sent_costs_no_worker(crew: Workers, store: Store) -> None:
    first = pid(crew, store)
    with pytest.raises((TypeError, AttributeError)):
        perform(crew, action(double(stage_doubles.echo), bad=threading.Lock()))
    assert pid(crew, store) == first


def test_printing_disturbs_nobody(crew: Workers, store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert store.get(perform(crew, action(double(stage_doubles.chatter))).outputs["out"]) == b"said"
    assert capfd.readouterr() == ("", "")


# deaths


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (stage_doubles.segfault, ("was killed by SIGSEGV", "Segmentation fault", "ctypes")),
        (stage_doubles.leave, ("ended with exit code 7", "the last words")),
        (stage_doubles.vanish, ("ended with exit code 0",)),
    ],
)
def test_a_death_is_told_and_the_next_call_works(
    crew: Workers, store: Store, stage: object, words: tuple[str, ...]
) -> None:
    first = pid(crew, store)
    with pytest.raises(WorkerDiedError) as caught:
        perform(crew, action(double(stage)))  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in (*words, "of cpu:add", "abababababab", "doit doctor"))
    assert pid(crew, store) != first


def test_what_was_printed_before_is_not_blamed(crew: Workers) -> None:
    perform(crew, action(double(stage_doubles.chatter)))
    with pytest.raises(WorkerDiedError) as caught:
        perform(crew, action(double(stage_doubles.vanish)))
    assert "xxx" not in str(caught.value)
    assert "yyy" not in str(caught.value)


def test_a_worker_killed_while_idle_is_replaced(crew: Workers, store: Store) -> None:
    first = pid(crew, store)
    os.kill(first, signal.SIGKILL)
    while any(worker.lives() for worker in crew._all):
        time.sleep(0.005)
    assert pid(crew, store) != first


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGRTMIN + 3])
def test_a_worker_killed_while_busy_is_told(crew: Workers, store: Store, tmp_path: Path, number: int) -> None:
    call = in_background(crew, action(double(stage_doubles.sleep), started=str(tmp_path / "started")))
    os.kill(begun(tmp_path / "started"), number)
    with pytest.raises(WorkerDiedError, match="was killed by") as caught:
        call.result(2)
    assert ("for want of memory" in str(caught.value)) == (number == signal.SIGKILL)
    pid(crew, store)


def test_a_death_is_noticed_while_what_it_left_behind_holds_the_pipe(crew: Workers, tmp_path: Path) -> None:
    call = in_background(crew, action(double(stage_doubles.daemonize_and_die), started=str(tmp_path / "started")))
    with pytest.raises(WorkerDiedError, match="exit code 3"):
        call.result(5)
    assert ended(begun(tmp_path / "started"))


@pytest.mark.parametrize("home", [Home.COMPILER, Home.RUNNER, Home.FRESH])
def test_what_runs_past_its_time_is_stopped(crew: Workers, store: Store, tmp_path: Path, home: Home) -> None:
    asked = action(double(stage_doubles.sleep, home=home), 0.5, started=str(tmp_path / "started"))
    began = time.monotonic()
    with pytest.raises(WorkerDiedError, match=r"stopped after 0\.5 s") as caught:
        perform(crew, asked)
    assert time.monotonic() - began < 2
    assert "timeout" in caught.value.hint
    assert caught.value.timed_out
    assert pickle.loads(pickle.dumps(caught.value)).timed_out
    assert ended(begun(tmp_path / "started"), 0.1)
    pid(crew, store)


def test_what_a_stage_started_ends_with_it(crew: Workers, tmp_path: Path) -> None:
    with pytest.raises(WorkerDiedError, match="stopped after"):
        perform(crew, action(double(stage_doubles.sleep_in_a_tool), 0.8, started=str(tmp_path / "started")))
    assert ended(begun(tmp_path / "started"))


def test_no_process_can_be_started(crew: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(SetupError, match="cannot be started: No such file"):
        perform(crew, action(double(stage_doubles.echo)))


# the crew


def test_another_worker_starts_only_after_a_moment(
    crew: Workers, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "_PATIENCE", 0.4)
    first = pid(crew, store)
    busy = in_background(crew, action(double(stage_doubles.sleep), started=str(tmp_path / "a"), seconds=0.15))
    begun(tmp_path / "a")
    assert pid(crew, store) == first  # a moment's wait is cheaper than a process
    assert busy.result(5)
    busy = in_background(crew, action(double(stage_doubles.sleep), started=str(tmp_path / "b"), seconds=1.2))
    begun(tmp_path / "b")
    waiting = in_background(crew, action(double(stage_doubles.sleep), started=str(tmp_path / "c"), seconds=0))
    time.sleep(0.2)
    assert len(children()) == 1
    waiting.result(5)
    assert not busy.done()
    assert begun(tmp_path / "c") != first
    busy.result(5)
    assert len(children()) == 2


def test_a_crew_never_outgrows_its_limit(crew: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "_PATIENCE", 0.0)
    most = []
    with ThreadPoolExecutor(8) as threads:
        options = [{"started": str(tmp_path / str(i)), "seconds": 0.1} for i in range(8)]
        for home in (Home.COMPILER, Home.FRESH):
            stage = double(stage_doubles.sleep, home=home)
            calls = [threads.submit(perform, crew, action(stage, 30, **each)) for each in options]
            while not all(call.done() for call in calls):
                most.append(len(children()))
                time.sleep(0.01)
            assert all(call.result() for call in calls)
    assert max(most) == 4  # two that stay, and two that are used once
    assert len(children()) == 2


def test_stop_ends_running_and_waiting_calls_at_once(crew: Workers, tmp_path: Path) -> None:
    names = [str(tmp_path / str(i)) for i in range(4)]
    calls = [in_background(crew, action(double(stage_doubles.sleep), started=name)) for name in names]
    fresh = in_background(crew, action(double(stage_doubles.sleep, home=Home.FRESH), started=str(tmp_path / "fresh")))
    begun(tmp_path / "fresh")
    deadline = time.monotonic() + 10
    while sum(Path(name).exists() for name in names) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    began = time.monotonic()
    crew.stop()
    ends = [call.exception(2) for call in (*calls, fresh)]
    assert time.monotonic() - began < 1
    assert sorted(type(end).__name__ for end in ends) == ["KeyboardInterrupt"] * 2 + ["StageError"] * 3
    assert all("the build was stopped" in str(end) for end in ends if isinstance(end, StageError))
    assert children() == []
    crew.stop()
    with pytest.raises(KeyboardInterrupt):
        perform(crew, action(double(stage_doubles.echo)))


_PARENT = """
import os, sys, signal, threading, time
import stage_doubles
from pathlib import Path
from pipeline.memoizer import Action
from pipeline.workers import Workers
folder = Path(sys.argv[1])
workers = Workers(folder / "store", 2)
echo = Action(stage_doubles.double(stage_doubles.echo), "cpu:echo")
workers.perform(echo, "ab" * 32, {})
if sys.argv[2] == "interrupt":
    signal.signal(signal.SIGINT, lambda *_: None)
    os.killpg(0, signal.SIGINT)
    time.sleep(0.2)
    (folder / "pids").write_text(" ".join(str(w._process.pid) for w in workers._all))
    before = set(workers._all)
    workers.perform(echo, "ab" * 32, {})
    print("same" if before == workers._all else "other")
    workers.stop()
    sys.exit()
seconds = {"started": str(folder / "started"), "seconds": 60}
sleep = Action(stage_doubles.double(stage_doubles.sleep), "s", options=seconds)
threading.Thread(target=workers.perform, args=(sleep, "cd" * 32, {})).start()
time.sleep(0.7)
print(*(worker._process.pid for worker in workers._all), flush=True)
time.sleep(60)
"""


def start_parent(folder: Path, what: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    argv = [sys.executable, "-c", _PARENT, str(folder), what]
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_an_interrupt_of_the_process_group_leaves_workers_to_their_parent(tmp_path: Path) -> None:
    with start_parent(tmp_path, "interrupt") as parent:
        said, _ = parent.communicate(timeout=20)
    assert (said, parent.returncode) == ("same\n", 0)


def test_workers_end_when_their_parent_is_killed_idle_or_busy(tmp_path: Path) -> None:
    with start_parent(tmp_path, "kill") as parent:
        busy = begun(tmp_path / "started")
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert busy in pids
        parent.kill()
    assert all(ended(process, 1.5) for process in pids)


def test_an_idle_worker_ends_when_its_parent_ends(store: Store) -> None:
    workers = Workers(store.root, 1)
    first = pid(workers, store)
    for worker in workers._all:
        worker._pipe.close()
    assert ended(first)
    workers.stop()


def test_a_worker_ignores_an_interrupt(crew: Workers, store: Store) -> None:
    first = pid(crew, store)
    os.kill(first, signal.SIGINT)
    assert pid(crew, store) == first
