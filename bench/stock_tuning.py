"""MetaSchedule's own tuning of a model's operators, as `tune_relax` does it once it has extracted its tasks.

    python -m bench.stock_tuning FOLDER TARGET MODEL WORK_DIR [--unaided]

FOLDER is a workspace in which the model is built: the tasks are its workloads, each weighted by its calls, so that both
ways tune the same functions. Runs until it is killed; its JSON database lies in WORK_DIR.

Unless it is unaided, it is kept from importing the intrinsics of other processors, which takes every builder process
longer than it may live; and it searches with a population of 64 in rounds of 16 trials: with its own 512 and 64 the
first round over the operators of a model takes longer than most have patience for, and nothing is written before.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def spare_imports() -> None:
    """Has `tvm.s_tir.tensor_intrin` be a package with the intrinsics of this processor alone."""
    import importlib

    import tvm

    name = "tvm.s_tir.tensor_intrin"
    package = ModuleType(name)
    package.__path__ = [str(Path(tvm.__file__).parent / "s_tir" / "tensor_intrin")]
    sys.modules[name] = package
    importlib.import_module(f"{name}.x86")


def _small_population() -> Any:
    from tvm.s_tir.meta_schedule import search_strategy

    return search_strategy.EvolutionarySearch(population_size=64)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.stock_tuning", description="MetaSchedule's own tuning.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("target")
    parser.add_argument("model")
    parser.add_argument("work_dir")
    parser.add_argument("--unaided", action="store_true")
    options = parser.parse_args()
    if not options.unaided:
        spare_imports()
    from tvm.s_tir import meta_schedule

    from pipeline.compiler import ir, targets

    workspace = runpy.run_path(str(options.folder / "dodo.py"))["workspace"]
    build = workspace.build
    plan = build.plan(options.target, workspace.model(options.model))
    # MetaSchedule wants to be told how many cores there are.
    attributes = {"num-cores": len(os.sched_getaffinity(0)), **build.target(options.target).attributes}
    target = targets.load(attributes)
    functions = {w.label: ir.load(build.memoizer.blob(w.function)) for w in plan.workloads if w.calls}
    weights = [float(w.calls) for w in plan.workloads if w.calls]
    workspace.stop()
    tasks = [
        meta_schedule.TuneContext(
            func,
            target=target,
            space_generator="post-order-apply",
            search_strategy="evolutionary" if options.unaided else _small_population(),
            task_name=label,
        ).clone()
        for label, func in functions.items()
    ]
    meta_schedule.tune.tune_tasks(
        tasks=tasks,
        task_weights=weights,
        work_dir=options.work_dir,
        max_trials_global=1_000_000,
        num_trials_per_iter=64 if options.unaided else 16,
        builder=meta_schedule.builder.LocalBuilder(initializer=None if options.unaided else spare_imports),
    )


if __name__ == "__main__":
    _main()
