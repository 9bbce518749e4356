"""What only a cluster of dask's can go through: workers, schedulers and drivers that are lost, or are not alike."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import stage_doubles
from stage_doubles import double

from pipeline.doctor import surroundings
from pipeline.errors import ConfigError, ExecutorError, SetupError, StageError, TvmakeError, WorkerDiedError
from pipeline.executors import open_executor, require_meant
from pipeline.executors.serving import run_scheduler
from pipeline.memoizer import Action
from pipeline.processor import device
from pipeline.store import Store
from pipeline.toolchain import Toolchain, detect
from tests.executors.places import (
    Hands,
    Place,
    action,
    begun,
    cluster,
    ended,
    job,
    new_key,
    opened_place,
    worker_of,
)
from tests.servers import free_port

pytest.importorskip("distributed")
AT_ONCE = 5.0  # seconds


@contextlib.contextmanager
def soon() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < AT_ONCE


def refused(text: str, folder: Path, url: str = "", toolchain: Toolchain | None = None) -> TvmakeError:
    """What is said at once where an executor cannot be opened."""
    made = job(folder, url, toolchain)
    with soon(), pytest.raises(TvmakeError) as caught:
        open_executor(text, made).stop()
    return caught.value


@pytest.mark.parametrize("text", ["foo", "dask://nowhere", "dask-local:x", "slurm:jobs=0", "slurm:colour=red"])
def test_what_cannot_be_meant_is_told_without_asking_anybody(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with soon(), pytest.raises(ConfigError):
        require_meant(text)
    monkeypatch.setenv("TVMAKE_EXECUTOR", text)
    with pytest.raises(ConfigError):
        surroundings.executor()


def test_a_scheduler_that_cannot_listen_says_so() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match="--port is 99999"):
            run_scheduler("127.0.0.1", 99999, print)
        with soon(), pytest.raises(SetupError, match=f"no scheduler can listen at 127.0.0.1, port {port}: ") as caught:
            run_scheduler("127.0.0.1", port, print)
    assert "--port 0" in caught.value.hint


# lost


def test_the_work_of_a_worker_that_is_killed_is_done_by_another(daskly: Place, tmp_path: Path) -> None:
    call = daskly.later(action(double(stage_doubles.sleep), started=str(tmp_path / "started"), seconds=1))
    first = begun(tmp_path / "started")
    worker_of(first).kill()
    assert daskly.blob(call.result(20), "out") == b"slept"
    assert begun(tmp_path / "started") != first
    assert ended(first)
    assert not daskly.executor.stopped


@pytest.mark.slow
def test_work_that_costs_every_worker_its_life_is_given_up_by_name(places: object, tmp_path: Path) -> None:
    place = opened_place("dask-local:2", tmp_path / "store")
    try:
        call = place.later(action(double(stage_doubles.sleep), started=str(tmp_path / "started")), "ab" * 32)
        killed = 0
        for _ in range(4):
            killed = begun(tmp_path / "started", but=killed)
            worker_of(killed).kill()
        with pytest.raises(WorkerDiedError, match="4 workers of dask-local:2 died") as caught:
            call.result(20)
        assert "sleep of cpu:add (key abababababab)" in str(caught.value)
        assert place.perform(action(double(stage_doubles.echo)))
    finally:
        place.executor.stop()


def test_what_nobody_waits_for_any_more_is_killed(daskly: Place, tmp_path: Path) -> None:
    executor = daskly.reopen()
    call = daskly.later(action(double(stage_doubles.sleep), started=str(tmp_path / "started")), executor=executor)
    running = begun(tmp_path / "started")
    executor.stop()
    assert isinstance(call.exception(5), StageError)
    assert ended(running)


def test_a_scheduler_that_is_lost_is_told_of_within_seconds(tmp_path: Path) -> None:
    with cluster(tmp_path / "cluster", "only") as hands:
        place = opened_place(hands.address, tmp_path / "store", hands.url)
        done, key = new_key(), new_key()
        place.perform(action(double(stage_doubles.echo)), done)
        calls = [
            place.later(action(double(stage_doubles.sleep), started=str(tmp_path / name)), key) for name in ("a", "b")
        ]
        begun(tmp_path / "a") if (tmp_path / "a").exists() else time.sleep(1)
        hands.scheduler.kill()
        began = time.monotonic()
        for call in calls:
            with pytest.raises(ExecutorError, match=r"the scheduler of tcp://.* is gone") as caught:
                call.result(10)
            assert "run the same command" in caught.value.hint
        assert time.monotonic() - began < 8
        assert place.executor.stopped
        with soon(), pytest.raises(ExecutorError, match="is gone"):
            place.perform(action(double(stage_doubles.echo)))
        assert place.store.lookup(done) is not None, "what was finished is kept"
        with soon():
            place.executor.stop()


def test_what_a_worker_finishes_is_on_the_remote_when_its_driver_is_gone(hands: Hands, tmp_path: Path) -> None:
    """And the next driver that asks has nothing run."""
    program = (
        "import sys, stage_doubles; from pathlib import Path; from tests.executors import places\n"
        "place = places.opened_place(*sys.argv[1:2], Path(sys.argv[2]), sys.argv[3])\n"
        "count = stage_doubles.double(stage_doubles.count)\n"
        "place.perform(places.action(count, ran=sys.argv[4], seconds=2), sys.argv[5])"
    )
    ran, key = tmp_path / "ran", new_key()
    ran.mkdir()
    given = [hands.address, str(tmp_path / "driver"), hands.url, str(ran), key]
    root = str(Path(__file__).resolve().parent.parent.parent)
    path = os.pathsep.join([os.environ["PYTHONPATH"], root])
    driver = subprocess.Popen([sys.executable, "-c", program, *given], env={**os.environ, "PYTHONPATH": path})
    place = opened_place(hands.address, tmp_path / "other", hands.url)
    try:
        time.sleep(3.0)
        again = place.later(action(double(stage_doubles.count), ran=str(ran), seconds=2), key)
        time.sleep(0.3)
        driver.kill()
        again.result(20)
        assert len(list(ran.iterdir())) == 1
        late = opened_place(hands.address, tmp_path / "late", hands.url)
        late.perform(action(double(stage_doubles.count), ran=str(ran)), key)
        late.executor.stop()
        assert len(list(ran.iterdir())) == 1
    finally:
        driver.wait()
        place.executor.stop()


def test_two_drivers_that_want_the_same_have_it_run_once(hands: Hands, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    ran.mkdir()
    keys = [new_key() for _ in range(4)]
    drivers = [opened_place(hands.address, tmp_path / name, hands.url) for name in ("one", "two")]
    try:
        asked = [
            driver.later(
                Action(
                    double(stage_doubles.count), f"by {driver.store.root.name}", {}, {"ran": str(ran), "seconds": 0.5}
                ),
                key,
            )
            for key in keys
            for driver in drivers
        ]
        entries = [call.result(30) for call in asked]
    finally:
        for driver in drivers:
            driver.executor.stop()
    assert len(list(ran.iterdir())) == len(keys)
    assert all(a.outputs == b.outputs for a, b in zip(entries[::2], entries[1::2], strict=True))
    assert all(driver.store.lookup(key) is not None for driver in drivers for key in keys)


# not there, or not alike


def test_a_wrong_address_is_told_at_once(tmp_path: Path) -> None:
    port = free_port()
    error = refused(f"dask://127.0.0.1:{port}", tmp_path, f"file://{tmp_path}/remote")
    assert isinstance(error, ExecutorError)
    assert f"no scheduler answers at tcp://127.0.0.1:{port}" in error.message
    assert "doit cluster scheduler" in error.hint


@pytest.mark.parametrize("text", ["dask://", "dask://host", "tcp://host:one", "dask://me:secret@host:8786"])
def test_an_address_that_is_none_is_told(text: str, tmp_path: Path) -> None:
    error = refused(text, tmp_path, f"file://{tmp_path}/remote")
    assert isinstance(error, ConfigError)
    assert "dask://HOST:8786" in error.hint


@pytest.mark.parametrize("text", ["dask-local", "dask-local:", "dask-local:none", "dask-local:0"])
def test_a_number_of_workers_that_is_none_is_told(text: str, tmp_path: Path) -> None:
    error = refused(text, tmp_path)
    assert isinstance(error, ConfigError)
    assert "dask-local" in error.hint


def test_other_machines_need_a_remote(tmp_path: Path) -> None:
    error = refused("dask://127.0.0.1:8786", tmp_path)
    assert "through a remote, and none is named" in error.message
    assert "TVMAKE_REMOTE" in error.hint


def test_a_cluster_without_workers_is_told_at_once(tmp_path: Path) -> None:
    with cluster(tmp_path / "cluster") as hands:
        error = refused(hands.address, tmp_path, hands.url)
        assert error.message.endswith("has no workers")
        assert error.hint == f"start one: doit cluster worker {hands.address}"


def test_a_label_that_no_worker_has_is_told_at_once_with_those_that_are_there(daskly: Place) -> None:
    asked = action(double(stage_doubles.echo), needs=("vulkan-adreno",))
    with soon(), pytest.raises(ExecutorError) as caught:
        daskly.perform(asked)
    assert "echo of cpu:add needs a worker labelled vulkan-adreno, and none is there" in caught.value.message
    assert "llvm" in caught.value.message
    assert "--label vulkan-adreno" in caught.value.hint
    assert daskly.perform(action(double(stage_doubles.echo))), "others are performed"


def test_a_label_chooses_the_worker(places: object, hands: Hands, tmp_path: Path) -> None:
    place = opened_place(hands.address, tmp_path / "store", hands.url)
    try:
        asked = [
            place.later(action(double(stage_doubles.echo), needs=("cuda-sm_90",), number=i), new_key())
            for i in range(6)
        ]
        ran = {int(place.blob(each.result(20), "pid")) for each in asked}
        labelled = hands.started[1].pid
        assert ran
        assert all(labelled in (parent.pid for parent in psutil.Process(pid).parents()) for pid in ran)
    finally:
        place.executor.stop()


def fake_tvm(folder: Path) -> str:
    """A path on which the metadata say that another TVM is installed."""
    metadata = folder / "apache_tvm-0.27.0.post9.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: apache-tvm\nVersion: 0.27.0.post9\n")
    return str(folder)


def test_a_worker_with_another_tvm_is_told_with_both_versions(tmp_path: Path) -> None:
    with cluster(tmp_path / "cluster") as hands:
        hands.work("old", PYTHONPATH=fake_tvm(tmp_path / "fake"))
        error = refused(hands.address, tmp_path / "store", hands.url)
        assert isinstance(error, ExecutorError)
        assert "old has tvm 0.27.0.post9, not 0.27.0.post1" in error.message
        hands.work("right")
        place = opened_place(hands.address, tmp_path / "store", hands.url)
        try:
            assert any("not used: old has tvm 0.27.0.post9" in said for said in place.said)
            ran = {int(place.blob(place.perform(action(double(stage_doubles.echo))), "pid")) for _ in range(4)}
            right = hands.started[2].pid
            assert all(right in (parent.pid for parent in psutil.Process(pid).parents()) for pid in ran)
        finally:
            place.executor.stop()


def test_what_no_worker_can_do_as_this_machine_is_done_here_and_said_once(hands: Hands, tmp_path: Path) -> None:
    """A tool in the key that the workers have in another version."""
    own = detect()
    newer = replace(own, identities={**own.identities, "onnx": "99.0"})
    made = replace(job(tmp_path / "store", hands.url, newer), say=(said := []).append)
    executor = open_executor(hands.address, made)
    try:
        for _ in range(2):
            asked = Action(double(stage_doubles.echo, tools=("onnx",)), "cpu:add")
            entry = executor.perform(asked, new_key(), {})
            pid = Store(tmp_path / "store").get(entry.outputs["pid"])
            assert pid is not None
            assert os.getpid() in (parent.pid for parent in psutil.Process(int(pid)).parents())
        assert len(said) == 1
        assert "onnx" in said[0]
        assert "99.0" in said[0]
        assert "echo is done here" in said[0]
        assert executor.runs_here(asked)
        assert not executor.runs_here(Action(double(stage_doubles.echo), "cpu:add"))
    finally:
        executor.stop()


def test_a_worker_that_came_with_other_tools_than_it_said_is_asked_nothing_twice(hands: Hands, tmp_path: Path) -> None:
    """It looks itself: what it announced may be old."""
    place = opened_place(hands.address, tmp_path / "store", hands.url)
    executor = place.executor
    try:
        for worker in executor._crew._all.values():  # type: ignore[attr-defined]
            worker.identities["cc"] = "another"  # type: ignore[index]
        executor._own["cc"] = "another"  # type: ignore[attr-defined]
        executor._crew.look = lambda: None  # type: ignore[attr-defined]
        entry = executor.perform(Action(double(stage_doubles.echo, tools=("cc",)), "cpu:add"), new_key(), {})
        assert os.getpid() in (parent.pid for parent in psutil.Process(int(place.blob(entry, "pid"))).parents())
        assert any("cc" in said for said in place.said)
    finally:
        executor.stop()


def test_a_queue_whose_commands_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dask_jobqueue")
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    error = refused("slurm:jobs=2", tmp_path, f"file://{tmp_path}/remote", Toolchain({}))
    assert isinstance(error, SetupError)
    assert "no command 'sbatch'" in error.message
    assert isinstance(refused("slurm:walrus=2", tmp_path, "", Toolchain({})), ConfigError)


def test_an_executor_that_there_is_not(tmp_path: Path) -> None:
    error = refused("kubernetes:2", tmp_path)
    assert isinstance(error, ConfigError)
    assert "dask-local" in error.hint


# stops of what is timed


def test_what_is_timed_on_a_worker_has_it_to_itself(hands: Hands, tmp_path: Path) -> None:
    timed = replace(double(stage_doubles.sleep), alone=True)
    place = opened_place(hands.address, tmp_path / "store", hands.url)
    try:
        calls = [
            place.later(action(timed, needs=("cuda-sm_90",), started=str(tmp_path / str(i)), seconds=0.5))
            for i in range(3)
        ]
        began = time.monotonic()
        for call in calls:
            call.result(20)
        assert time.monotonic() - began > 1.2, "one after another on the one worker"
    finally:
        place.executor.stop()


def test_threads_of_a_driver_that_want_the_same_are_all_answered(daskly: Place) -> None:
    key, asked = new_key(), action(double(stage_doubles.echo))
    barrier = threading.Barrier(6)

    def ask() -> None:
        barrier.wait()
        found.append(daskly.executor.perform(asked, key, {}).outputs["pid"])

    found: list[object] = []
    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 6


def test_who_asks_again_gets_a_new_answer(daskly: Place) -> None:
    """The same key, at once after it failed: what the scheduler knows of it is forgotten."""
    for _ in range(20):
        with pytest.raises(StageError, match="ValueError"):
            daskly.perform(action(double(stage_doubles.fail)), "ef" * 32)
        assert daskly.perform(action(double(stage_doubles.give_several)), "ef" * 32).stage == "give_several"


@pytest.mark.slow
def test_jobs_of_a_queue_are_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's commands are stood in for by scripts that run a job at once: the rest is dask-jobqueue as it is."""
    pytest.importorskip("dask_jobqueue")
    commands = tmp_path / "bin"
    commands.mkdir()
    pids = tmp_path / "pids"
    (commands / "sbatch").write_text(
        f'#!/bin/sh\ncp "$1" {tmp_path}/job.sh\nsetsid sh {tmp_path}/job.sh > {tmp_path}/log 2>&1 &\n'
        f"echo $! >> {pids}\necho Submitted batch job $!\n"
    )
    (commands / "scancel").write_text('#!/bin/sh\nkill -TERM -- "-$1"\n')
    for each in commands.iterdir():
        each.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(commands), os.environ["PATH"]]))
    monkeypatch.setenv("TVMAKE_CACHE", str(tmp_path / "store-worker"))
    place = opened_place(
        "slurm:jobs=1,cores=2,memory=2GB,interface=lo", tmp_path / "store", f"file://{tmp_path}/remote"
    )
    try:
        x = place.store.put(b"given")
        entry = place.perform(Action(double(stage_doubles.echo), "cpu:add", {"x": x}))
        assert place.blob(entry, "x") == b"given"
        assert place.executor.posts(device()) != ("this machine",), "the job's environment leaves the device as it is"
        assert "waiting for a job of slurm" in place.said[0]
    finally:
        place.executor.stop()
    assert ended(int(pids.read_text().split()[0]), 10)
