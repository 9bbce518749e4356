"""One, two and four workers of dask's on this machine: a night whose builder and runner wait, and real code generation.

    python -m bench.executors                  both
    python -m bench.executors waiting          trials a minute; workers only wait, so that cores do not count
    python -m bench.executors compiling        the operators of a model, each compiled; as many workers as cores at most
    python -m bench.executors compiling --model densenet121 --repeat 5

Waiting goes all the way: our night, scheduler and executor, dask, a worker's process, and in it a stage that sleeps for
as long as the real one takes. Compiling begins with processes that have imported TVM; beside it stands what as many
processes come to that only count, as two processors of a shared machine are seldom worth twice one. Turns of one, two
and more workers follow one another, and the best turn of each is shown.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench import zoo
from bench.cpu import table
from bench.night import operators
from bench.workspaces import ROOT, scratch
from pipeline import stages
from pipeline.build import Build
from pipeline.executors import Executor, Job, open_executor
from pipeline.hashing import Digest, key_of
from pipeline.memoizer import Action, Memoizer
from pipeline.models import Model
from pipeline.stages import Home, Inputs, Kind, Options, Outputs, Stage
from pipeline.store import Store
from pipeline.toolchain import detect
from pipeline.tuning.fakes import NO_FAULTS, MemoryLedger, Told, WaitingEngine
from pipeline.tuning.night import Night
from pipeline.tuning.states import Terms

_DODO = """\
from pipeline import DOIT_CONFIG, Model, Workspace  # noqa: F401

workspace = Workspace(Model.onnx("model", "model.onnx"))
"""
_TARGET = """\
target = "native"
order = ["rules", "default"]
[check]
enabled = false
[measure]
profile = false
"""
_COUNTING = 3.0  # seconds
_PACE = 0.25  # real seconds of one second of the fake engine's costs


@dataclass(frozen=True)
class _Waiting(Stage):
    def load(self) -> Callable[[Inputs, Options], Outputs]:
        return _wait


def _wait(inputs: Inputs, options: Options) -> Outputs:
    time.sleep(float(str(options["seconds"])))
    return {"waited": b"yes"}


WAIT = _Waiting("wait", 1, Kind.BINARY, Home.RUNNER)


@dataclass
class _Cluster(WaitingEngine):
    """A fake engine whose waiting is done by an executor's workers."""

    executor: Executor | None = None
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def wait(self, seconds: float) -> None:
        assert self.executor is not None
        action = Action(WAIT, "a batch", options={"seconds": seconds, "number": next(self._numbers)})
        self.executor.perform(action, key_of(action.options), {})


@contextmanager
def _opened(workers: int) -> Iterator[tuple[Executor, Store]]:
    """dask-local with so many workers, and an empty store."""
    with tempfile.TemporaryDirectory(prefix="tvmake-bench-") as name:
        store = Store(Path(name, "store"))
        executor = open_executor(f"dask-local:{workers}", Job(store, detect(), workers))
        try:
            yield executor, store
        finally:
            executor.stop()


def waiting(workers: Sequence[int], seconds: float, repeat: int) -> None:
    """Trials a minute, and of how many workers' worth that is."""
    best: dict[int, float] = {}
    for _ in range(repeat):
        for count in workers:
            with _opened(count) as (executor, _):
                _warm(executor, count)
                engine = _Cluster(posts=count, workers=2 * count, pace=_PACE, faults=NO_FAULTS, executor=executor)
                terms = Terms(budget=seconds / _PACE, trials=1000)
                ended = Night(operators(60, 5, 0), engine, MemoryLedger(), terms, Told(), "bench").run()
                best[count] = max(best.get(count, 0.0), 60 * ended.trials / (ended.elapsed * _PACE))
    rows = [(count, rate, rate / (count * best[workers[0]] / workers[0])) for count, rate in best.items()]
    table(f"dask-local, work that waits, {seconds:g} s a turn", ("workers", "trials/min", "of k times one"), rows)


def _warm(executor: Executor, workers: int) -> None:
    """Has every worker start its processes."""
    with ThreadPoolExecutor(2 * workers) as threads:
        for i in range(2 * workers):
            action = Action(WAIT, "warm", options={"seconds": 1.0, "number": -1 - i})
            threads.submit(executor.perform, action, key_of(action.options), {})


def compiling(model: str, workers: Sequence[int], repeat: int) -> None:
    """Operators of a model a second."""
    with scratch() as place:
        (place.folder / "model.onnx").write_bytes(zoo.load(model).SerializeToString(deterministic=True))
        place.write(_DODO, check=False)
        (place.folder / "targets" / "native.toml").write_text(_TARGET)
        place.doit("build").require_good()
        kept = Store(place.store)
        actions = _actions(place.folder, kept)
        best: dict[int, float] = {}
        plain: dict[int, float] = {}
        for _ in range(repeat):
            for count in workers:
                best[count] = max(best.get(count, 0.0), _rate(kept, actions, count))
                plain[count] = max(plain.get(count, 0.0), _counted(count))
    first = workers[0]
    rows = [(count, best[count], best[count] / best[first], plain[count] / plain[first]) for count in workers]
    columns = ("workers", "operators/s", f"times {first}", "plain processes")
    table(f"dask-local, {len(actions)} operators of {model} compiled, {os.cpu_count()} cores", columns, rows)


def _counted(processes: int) -> float:
    """What so many processes that only count come to in a second: what more of them can be worth here and now."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return float(sum(pool.map(_count, [_COUNTING] * processes, chunksize=1))) / _COUNTING


def _count(seconds: float) -> int:
    rounds, until = 0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        sum(number * number for number in range(2000))
        rounds += 1
    return rounds


def _actions(folder: Path, store: Store) -> list[Action]:
    """What compiles the operators of a model that was built."""
    job = Job(store, detect(), 1)
    executor = open_executor("local", job)
    try:
        build = Build(folder, Memoizer(store, executor, job.toolchain))
        target, plan = build.target("native"), build.plan("native", Model.onnx("model", "model.onnx"))
        chosen = {w.digest: (w, build.decision("native", w).candidate) for w in plan.workloads if w.calls}
    finally:
        executor.stop()
    return [
        Action(
            stages.CODEGEN,
            workload.label,
            {"function": candidate.function},
            {"symbol": workload.symbol, "target": target.attributes},
        )
        for workload, candidate in chosen.values()
    ]


def _rate(kept: Store, actions: Sequence[Action], workers: int) -> float:
    with _opened(workers) as (executor, store):
        for digest in {digest for action in actions for digest in action.inputs.values()}:
            _copy(kept, store, digest)
        for warm in ("warm", ""):  # at first under other keys: the processes import TVM
            begun = time.perf_counter()
            with ThreadPoolExecutor(2 * workers) as threads:
                list(threads.map(lambda each, warm=warm: _compile(executor, each, warm), actions))
        return len(actions) / (time.perf_counter() - begun)


def _copy(kept: Store, store: Store, digest: Digest) -> None:
    path = kept.path(digest)
    assert path is not None
    store.put_file(path)


def _compile(executor: Executor, action: Action, turn: str) -> None:
    executor.perform(action, key_of({"function": action.inputs["function"].hash, **action.options, "turn": turn}), {})


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["waiting", "compiling"])
    parser.add_argument("--model", default="densenet121", help=f"of {', '.join(zoo.NAMES)} (default densenet121)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a turn that waits (default 20)")
    parser.add_argument("--repeat", type=int, default=3, help="turns of each number of workers (default 3)")
    return parser.parse_args()


def _main() -> None:
    given = _parsed()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    if "waiting" in given.what:
        waiting((1, 2, 4), given.seconds, given.repeat)
    if "compiling" in given.what:
        compiling(given.model, tuple(range(1, min(4, os.cpu_count() or 1) + 1)), given.repeat)


if __name__ == "__main__":
    from bench import executors  # workers know the stage by this name

    executors._main()
