"""Nights of a workspace: which operators, on what terms, with which engine."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.composition import names
from pipeline.config import Device, TargetFile, load_target
from pipeline.devices import asking
from pipeline.errors import TvmakeError
from pipeline.manifests import read_manifest
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.operators import Left, Model, chosen
from pipeline.tuning.scheduler import Scheduler
from pipeline.tuning.states import Operator, Terms
from pipeline.types import Workload

if TYPE_CHECKING:
    from pipeline.tasks import Built
    from pipeline.tuning.events import Watcher
    from pipeline.tuning.night import Night
    from pipeline.workspace import Workspace


def operators(
    workspace: Workspace, built: Iterable[Built], patterns: Sequence[str] = ()
) -> tuple[list[Operator], list[Left]]:
    """The operators of built models to tune, and those that are left as they are."""
    models = []
    for each in built:
        manifest = read_manifest(workspace.artifact(each.target, each.model))
        file = _file(workspace, each.target)
        place = (each.model.name, workspace.folder, each.target)
        models.append(Model(*place, manifest.target_spec, file, each.plan, manifest, each.profile))

    def ask(device: Device, triple: str) -> None:
        asking.require_known(device, triple, workspace.build.memoizer.workers)

    return chosen(models, patterns, workspace.store, ask)


def terms(
    workspace: Workspace, operators: Iterable[Operator], budget: float | None = None, trials: int | None = None
) -> Terms:
    """What was asked for, and for the rest what the targets' files say: the largest of several. Asks a cluster, where
    one is to be used, who is there; raises ExecutorError where nobody is."""
    from pipeline.tuning.engine import posts_of

    targets = sorted({each.target for each in operators})
    files = [_file(workspace, name) for name in targets] or [TargetFile(target="native")]
    posts: set[str] = set()
    if workspace.executor or any(file.device is not None for file in files):
        by = workspace.build.memoizer.workers
        posts = {post for name in targets for post in posts_of(workspace.build.target(name), by)}
    return Terms(
        budget=budget,
        trials=trials or max(file.tune.trials for file in files),
        batch=max(file.tune.batch for file in files),
        noise=max(file.measure.noise for file in files),
        patience=max(file.tune.patience for file in files),
        posts=max(1, len(posts)),
    )


def scheduler(workspace: Workspace, operators: Sequence[Operator], terms: Terms) -> Scheduler:
    """What a night begun now would do. Needs no TVM."""
    return Scheduler(operators, Ledger.here(workspace.store, terms.noise).standing, terms)


def night(workspace: Workspace, operators: Sequence[Operator], terms: Terms, jobs: int, watcher: Watcher) -> Night:
    """A night that is ready to run."""
    from pipeline.tuning.engine import StageEngine
    from pipeline.tuning.night import Night

    engine = StageEngine(workspace.build, sorted({each.target for each in operators}), jobs)
    ledger = Ledger.here(workspace.store, terms.noise, workspace.lanes)
    return Night(operators, engine, ledger, terms, watcher, secrets.token_hex(8))


def sum_up(workspace: Workspace, operators: Sequence[Operator]) -> None:
    """Writes down what the records of operators come to now: whoever lists them next need not open them."""
    from pipeline.tuning.summaries import Summaries

    for target in {each.target for each in operators}:
        known = Summaries.here(workspace.store, _file(workspace, target).measure.noise)
        for each in operators:
            if each.target == target:
                known.of(each.key)
        known.save()


def tune_one(
    workspace: Workspace, built: Sequence[Built], target: str, workload: Workload, jobs: int
) -> dict[str, Any]:
    """A night over one operator of built models. Returns what came of it; raises TvmakeError where nothing could be
    measured, or the operator cannot be tuned."""
    from pipeline.tuning import face

    found, left = operators(workspace, built, [workload.digest])
    found = [each for each in found if each.target == target]
    if not found:
        raise TvmakeError(
            f"{target}:{workload.label} is left as it is: {left[0].reason if left else 'it is not built'}"
        )
    ended = night(workspace, found, terms(workspace, found), jobs, face.lines()).run()
    if ended.end not in ("done", "stopped"):
        raise TvmakeError(f"tuning {target}:{workload.label}: {ended.end}", hint=ended.said)
    (figures,) = ended.operators
    return {"trials": figures.trials, "gain": figures.gain}


def _file(workspace: Workspace, target: str) -> TargetFile:
    return load_target(workspace.target_file(target), names(workspace.folder))
