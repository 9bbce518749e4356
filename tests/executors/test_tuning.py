"""`doit tune --executor`: a night whose posts are the workers of a cluster, and what may befall them."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest
import tuning_runs
from conftest import WorkspaceFolder
from tuning_runs import Night, event, finish, records, running, timed, tune

from pipeline.store import Store
from pipeline.tuning.records import Record
from tests.executors.places import Hands, cluster

pytestmark = pytest.mark.skipif(find_spec("distributed") is None, reason="dask.distributed is not installed")
THREE = ("Relu", "Tanh", "Sigmoid")


@pytest.fixture
def two(tmp_path: Path, _doubles_can_be_imported: None) -> Iterator[Hands]:
    """A cluster of two workers, for a test that does not leave it whole."""
    with cluster(tmp_path / "cluster", "a", "b") as hands:
        yield hands


def at(hands: Hands) -> dict[str, str]:
    """The environment of a driver that tunes on a cluster."""
    return {"TVMAKE_EXECUTOR": hands.address, "TVMAKE_REMOTE": hands.url}


def fill(workspace: WorkspaceFolder, *activations: str, many: bool = False) -> WorkspaceFolder:
    tuning_runs.fill(workspace, *activations, space=tuning_runs.lanes(tuning_runs.MANY) if many else "")
    return workspace


def posts(night: Night) -> Counter[str]:
    """How many batches were measured at each post."""
    return Counter(each["post"] for each in night.of("phase") if each["phase"] == "measuring")


def candidates(found: Sequence[Record]) -> Counter[str]:
    return Counter(trial.candidate for trial in timed(found))


def require_timed_once(workspaces: Sequence[WorkspaceFolder], each: int) -> None:
    """Whoever tuned, of every operator so many candidates were timed, each by one run."""
    found: dict[str, dict[str, set[str]]] = {}
    for workspace in workspaces:
        for key, members in records(workspace).items():
            for trial in timed(members):
                found.setdefault(key, {}).setdefault(trial.candidate, set()).add(trial.run)
            assert set(candidates(members).values()) == {1}
    assert found
    for by_candidate in found.values():
        assert len(by_candidate) == each
        assert all(len(runs) == 1 for runs in by_candidate.values())


def worker_process(hands: Hands, name: str) -> psutil.Process:
    """The process of dask's that works under a name: the nanny that watches over it would start it again."""
    for started in hands.started[1:]:
        if name in psutil.Process(started.pid).cmdline():
            return next(
                each for each in psutil.Process(started.pid).children() if "spawn_main" in " ".join(each.cmdline())
            )
    raise AssertionError(f"there is no worker {name}")


@contextlib.contextmanager
def frozen(worker: psutil.Process) -> Iterator[None]:
    """A worker that does nothing within the block, with all that it started."""
    stopped = [worker, *worker.children(recursive=True)]
    for each in stopped:
        each.suspend()
    yield
    for each in stopped:
        with contextlib.suppress(psutil.NoSuchProcess):  # who watches over it has killed it meanwhile
            each.resume()


def test_the_workers_of_a_cluster_are_the_posts_of_a_night(workspace: WorkspaceFolder, two: Hands) -> None:
    fill(workspace, *THREE).build(TVMAKE_REMOTE=two.url).good()
    blobs = {path.name for path in Path(two.url.removeprefix("file://")).glob("cas/*/*")}
    plan = workspace.doit("tune", "--plan", **at(two)).good()
    assert "3 operators" in plan.out
    night = tune(workspace, **at(two))
    night.done.good()
    assert night.of("begun")[0]["posts"] == ["a", "b"]
    assert set(posts(night)) == {"a", "b"}
    assert night.trials == dict.fromkeys((tuning_runs.RELU, tuning_runs.TANH, tuning_runs.SIGMOID), 4)
    require_timed_once([workspace], 4)
    new = [each for each in Path(two.url.removeprefix("file://")).glob("cas/*/*") if each.name not in blobs]
    assert sum(each.stat().st_size for each in new) < 60_000, "records alone, no candidates"
    workspace.build(TVMAKE_REMOTE=two.url).good()
    assert set(tuning_runs.implementations(workspace).values()) == {"tuned"}
    tuning_runs.right(workspace, tuning_runs.relu, np.tanh, tuning_runs.sigmoid)
    again = tune(workspace, **at(two))
    assert again.done.good().last.startswith("nothing to tune")
    assert not again.events


def test_workers_on_this_machine_compile_and_one_measures(workspace: WorkspaceFolder) -> None:
    night = tune(fill(workspace, "Relu", "Tanh"), "--executor", "dask-local:2")
    night.done.good()
    assert "posts" not in night.of("begun")[0]
    require_timed_once([workspace], 4)


def test_a_worker_that_is_killed_in_the_middle_costs_its_batch(workspace: WorkspaceFolder, two: Hands) -> None:
    fill(workspace, *THREE, many=True).build(TVMAKE_REMOTE=two.url).good()
    with running(workspace, **at(two)) as process:
        event(process, "phase", phase="measuring", post="a")
        worker_process(two, "a").kill()
        lost = event(process, "post", change="lost")
        assert (lost["post"], lost["posts"]) == ("a", 1)
        event(process, "post", change="back", post="a")
        night = finish(process)
    night.done.good()
    assert night.ended["end"] == "done"
    assert set(posts(night)) == {"a", "b"}
    require_timed_once([workspace], len(tuning_runs.MANY))


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["few", "many"])
def test_two_drivers_tune_every_operator_once(
    new_workspace: Callable[[], WorkspaceFolder], two: Hands, many: bool
) -> None:
    count = len(tuning_runs.MANY if many else tuning_runs.FEW)
    ones = [fill(new_workspace(), "Relu", "Tanh", many=many), fill(new_workspace(), "Tanh", "Sigmoid", many=many)]
    for each in ones:
        each.build(TVMAKE_REMOTE=two.url).good()
    with running(ones[0], **at(two)) as first, running(ones[1], **at(two)) as second:
        nights = [finish(first), finish(second)]
    for night in nights:
        night.done.good()
    require_timed_once(ones, count)
    assert sum(len(timed(members)) for members in union(ones).values()) == 3 * count


def union(workspaces: Sequence[WorkspaceFolder]) -> dict[str, list[Record]]:
    """Every record that any of these has, once."""
    found: dict[str, dict[tuple[str, str], Record]] = {}
    for workspace in workspaces:
        for key, members in records(workspace).items():
            for trial in timed(members):
                found.setdefault(key, {})[trial.candidate, trial.run] = trial
    return {key: list(each.values()) for key, each in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "scheduler"])
def test_the_next_night_goes_on_where_one_was_lost(workspace: WorkspaceFolder, two: Hands, victim: str) -> None:
    fill(workspace, *THREE, many=True).build(TVMAKE_REMOTE=two.url).good()
    with running(workspace, **at(two)) as process:
        event(process, "batch")
        began = time.monotonic()
        if victim == "driver":
            process.send_signal(signal.SIGKILL)
            process.wait()
        else:
            two.scheduler.kill()
            night = finish(process)
            assert time.monotonic() - began < 15
            assert night.done.code == 2
            assert "ERROR: the scheduler of" in night.done.err
            assert night.done.last.endswith("start it again and run the same command")
            assert night.ended["end"] == "broken"
    kept = tuning_runs.timed_in_all(workspace)
    assert 0 < kept < 3 * len(tuning_runs.MANY)
    if victim == "scheduler":
        two.again()
    night = tune(workspace, **at(two))
    night.done.good()
    assert sum(night.trials.values()) == 3 * len(tuning_runs.MANY) - kept
    require_timed_once([workspace], len(tuning_runs.MANY))


@pytest.mark.slow
def test_a_worker_that_is_frozen_is_lost_and_another_goes_on(workspace: WorkspaceFolder, two: Hands) -> None:
    fill(workspace, *THREE, many=True).build(TVMAKE_REMOTE=two.url).good()
    with running(workspace, **at(two)) as process:
        event(process, "phase", phase="measuring", post="a")
        with frozen(worker_process(two, "a")):
            began = time.monotonic()
            assert event(process, "post", change="lost")["post"] == "a"
            assert time.monotonic() - began < 60
        night = finish(process)
    night.done.good()
    require_timed_once([workspace], len(tuning_runs.MANY))


@pytest.fixture
def served(workspace: WorkspaceFolder) -> WorkspaceFolder:
    """A workspace whose one target is measured on workers that are labelled `board`."""
    fill(workspace, "Relu", "Tanh")
    text = tuning_runs.target("lanes", more='select = "fastest"')
    workspace.write("targets/native.toml", f'{text}[device]\nlabel = "board"\n')
    return workspace


def test_a_target_is_selected_and_tuned_on_the_workers_that_its_file_names(
    served: WorkspaceFolder, tmp_path: Path
) -> None:
    with cluster(tmp_path / "cluster") as hands:
        hands.work("other")
        hands.work("one", "--label", "board")
        served.build(**at(hands)).good()
        assert measured(served) <= {"default"}
        night = tune(served, **at(hands))
        night.done.good()
        assert night.of("begun")[0]["posts"] == ["one"]
        require_timed_once([served], 4)
        served.build(**at(hands)).good()
        assert measured(served) == {"default", "tuned"}
        devices = {Store(served.cache).sets.about(key)["device"] for key in records(served)}
        assert [str(each).partition(": ")[0] for each in devices] == ["worker board"]
    served.idle_build()
    (served.folder / ".doit.db").unlink()
    served.build().good()
    assert set(tuning_runs.implementations(served).values()) == {"tuned"}, "what was measured is found without a worker"


def measured(workspace: WorkspaceFolder) -> set[str]:
    """The strategies whose functions were timed."""
    operators = workspace.manifest("net")["operators"]
    return {each["strategy"] for operator in operators for each in operator["candidates"] if each.get("seconds")}


def test_a_target_that_no_worker_serves_is_told_at_once(served: WorkspaceFolder, hands: Hands) -> None:
    for command, environment, said in (
        ("build", at(hands), "is labelled board; its workers: a (cuda-sm_90, llvm"),
        ("tune", at(hands), "is labelled board; its workers: a (cuda-sm_90, llvm"),
        ("build", {}, "workers labelled board are wanted, and this machine works alone"),
    ):
        began = time.monotonic()
        done = served.doit(command, **environment)
        assert done.code in (1, 2)
        assert said in done.err
        assert "doit cluster worker" in done.err or "--executor" in done.err
        assert "Traceback" not in done.err
        assert time.monotonic() - began < 20  # with all that can be built without it
