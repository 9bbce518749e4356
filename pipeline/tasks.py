"""The doit tasks of a workspace: a face for each stage of a build, under names that a person recognises.

    resolve:<target>    read:<model>    extract:<target>:<model>
    apply:  dispatch:  codegen:<target>:<operator>-<short key>
    pack:   link:  check:  profile:  artifact:<target>:<model>
    tune:<target>:<operator>-<short key>    apart from all others: a build never waits for it

doit gives order, parallel runs and what is up to date. A task's action asks the build for its stage's result, and the
build knows what that needs, so a task run alone does what it takes. The tasks of operators are known from the last
extraction, whose plan is remembered by digest; before the first build there are none.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doit.action import BaseAction
from doit.exceptions import TaskError, TaskFailed
from doit.globals import Globals

from pipeline import freshness
from pipeline.errors import TvmakeError
from pipeline.models import Model
from pipeline.workspace import BEGUN_NS, Part, Selection, Use, Workspace, jobs

if TYPE_CHECKING:
    from pipeline.types import Plan, Profile, Workload

DOCS = {
    "resolve": "targets as TVM understands them",
    "read": "models read: structure and weights apart",
    "extract": "models lowered: the unique operators and how they are called",
    "apply": "what the strategies offer for each operator",
    "dispatch": "which of them each operator gets: the first, or the fastest",
    "codegen": "one object file for each operator",
    "pack": "weights as the libraries take them",
    "link": "one shared library for each model",
    "check": "outputs compared with a reference's",
    "profile": "where the time of an inference goes",
    "artifact": "artifacts/<target>/<model>: library, weights, manifest.json",
}
FRONT = ("resolve", "read", "extract")
TUNE = "tune"
_FOLLOWS_LOCK = "follows lock"  # in an artifact's record: whether all of it is as tuning.lock says


class StageAction(BaseAction):
    """A doit action that asks a build for something. It leaves the process's output streams alone, so that any number
    may run in threads; what goes wrong becomes doit's kind of failure, in one sentence."""

    def __init__(self, ask: Callable[[], dict[str, Any] | None]) -> None:
        self._ask = ask
        self.task: Any = None
        self.out: str | None = None
        self.err: str | None = None
        self.result: dict[str, Any] | None = None
        self.values: dict[str, Any] = {}

    def execute(self, out: Any = None, err: Any = None) -> TaskFailed | TaskError | None:
        try:
            self.values = self._ask() or {}
        except TvmakeError as error:
            return TaskFailed(str(error))
        except Exception as error:
            return _unexpected(error)
        return None

    def __str__(self) -> str:
        return "runs the stage, or finds its result in the store"


def _unexpected(error: Exception) -> TaskFailed | TaskError:
    """What another machine stored may be whole and yet nothing that was ever made: that is no fault of the program."""
    import msgspec

    said = f"{type(error).__name__}: {error}"
    if not isinstance(error, KeyError | msgspec.MsgspecError):
        return TaskError(said, error)
    mend = "if it came from a remote, build with TVMAKE_REMOTE=off and another TVMAKE_CACHE"
    return TaskFailed(f"what is stored for it makes no sense: {said}\n  → {mend}")


def create(workspace: Workspace, selection: Selection) -> Iterator[dict[str, Any]]:
    """The tasks that a selection asks for."""
    pairs = workspace.pairs(selection)
    if selection.part is Part.FRONT:
        workspace.gather()  # a build takes the best records that anybody has
    known = _Known(workspace, pairs)
    if selection.part is not Part.ALL:
        pairs = [pair for pair in pairs if not known.is_fresh(*pair)]
    if selection.part is Part.FRONT and pairs:
        _ = workspace.build.following  # what is wrong with tuning.lock is said once, before anything is built
    if selection.part is Part.BACK:
        # What could not be extracted has failed already, in words.
        pairs = [pair for pair in pairs if workspace.build.is_extracted(*pair)]
    with_front, with_back = selection.part is not Part.BACK, selection.part is not Part.FRONT
    for name, doc in DOCS.items():
        if with_front if name in FRONT else with_back:
            yield {"basename": name, "name": None, "doc": doc}
    if with_front:
        yield from _front(workspace, pairs, known)
    if with_back:
        yield from _back(workspace, pairs, known, with_deps=selection.part is Part.ALL)
    if selection.part is Part.ALL:
        yield from _tuning(workspace, pairs)


def _front(workspace: Workspace, pairs: list[tuple[str, Model]], known: _Known) -> Iterator[dict[str, Any]]:
    for target in dict.fromkeys(target for target, _ in pairs):
        fresh = all(known.is_fresh(*pair) for pair in pairs if pair[0] == target)
        yield _task("resolve", target, fresh, _asks(workspace, "target", target))
    for model in {model.name: model for _, model in pairs}.values():
        fresh = all(known.is_fresh(*pair) for pair in pairs if pair[1] is model)
        yield _task("read", model.name, fresh, _asks(workspace, "source", model))
    for target, model in pairs:
        yield _task(
            "extract",
            f"{target}:{model.name}",
            known.is_fresh(target, model),
            partial(known.plan_values, target, model),
            [f"resolve:{target}", f"read:{model.name}"],
        )


def _back(
    workspace: Workspace, pairs: list[tuple[str, Model]], known: _Known, with_deps: bool
) -> Iterator[dict[str, Any]]:
    plans = {(target, model.name): remembered_plan(target, model) for target, model in pairs}
    # In a build, what the store has needs no task: to look it up is all that there would be to do.
    listed = {
        (target, model.name): list(plan.workloads) if with_deps else _missing(workspace, target, plan)
        for target, model in pairs
        if (plan := plans[target, model.name]) is not None
    }
    fresh = {(target, model.name): known.is_fresh(target, model) for target, model in pairs}
    operators = {(pair[0], w.digest): (w, fresh[pair]) for pair, workloads in listed.items() for w in workloads}
    # What is timed comes after all that is compiled: to be timed it must have the machine to itself.
    for stage, method, before in _OPERATOR_STAGES:
        for (target, _), (workload, is_fresh) in operators.items():
            yield _operator(workspace, target, workload, is_fresh, stage, method, before)
    for target, model in pairs:
        pair, is_fresh = f"{target}:{model.name}", fresh[target, model.name]
        objects = [f"codegen:{target}:{workload.label}" for workload in listed.get((target, model.name), ())]
        extracted = [f"extract:{pair}"] if with_deps else []
        for stage, method, before in _MODEL_STAGES:
            deps = [f"{before}:{pair}"] if before else [*extracted, *objects]
            yield _task(stage, pair, is_fresh, _asks(workspace, method, target, model), deps)
        yield _task("profile", pair, is_fresh, partial(_profile, workspace, target, model), [f"check:{pair}"])
        yield {
            **_task("artifact", pair, is_fresh, partial(known.finish, target, model, with_deps), [f"profile:{pair}"]),
            "clean": [
                (_remove, [workspace.artifact(target, model)]),
                (_forget, [workspace.folder, target, model.name]),
            ],
        }


def _tuning(workspace: Workspace, pairs: list[tuple[str, Model]]) -> Iterator[dict[str, Any]]:
    """A task for each operator that is known. No other depends on it, and no command runs it unless it is named."""
    yield {
        "basename": TUNE,
        "name": None,
        "doc": "a search for a faster function for each operator; never part of a build",
    }
    operators = {
        (target, workload.digest): workload
        for target, model in pairs
        if (plan := remembered_plan(target, model)) is not None
        for workload in plan.workloads
        if workload.calls
    }
    for (target, _), workload in operators.items():
        yield {
            "basename": TUNE,
            "name": f"{target}:{workload.label}",
            "actions": [StageAction(partial(_tune, workspace, target, workload))],
            "uptodate": [False],
            "doc": " ".join((workload.name, *workload.shapes)),
        }


def _tune(workspace: Workspace, target: str, workload: Workload) -> dict[str, Any]:
    """A night over one operator, of models that are built. Returns what is remembered of it."""
    from pipeline.tuning.local import tune_one

    pairs = [pair for pair in workspace.pairs(Selection()) if pair[0] == target]
    models = built(workspace, [pair for pair in pairs if _uses(*pair, workload)])
    if not models:
        raise TvmakeError(f"a model of {target}:{workload.label} is not built", hint="run: doit build")
    return tune_one(workspace, models, target, workload, jobs())


def _uses(target: str, model: Model, workload: Workload) -> bool:
    plan = remembered_plan(target, model)
    return plan is not None and any(each.digest == workload.digest for each in plan.workloads)


def _missing(workspace: Workspace, target: str, plan: Plan) -> list[Workload]:
    """The workloads of a plan that the store has no objects of."""
    build = workspace.build
    return [each for each in build.compiled_for_target(target, plan) if not build.is_compiled(target, each)]


# Stage, the build's method, and the stage before.
_OPERATOR_STAGES = (
    ("apply", "candidates", ""),
    ("dispatch", "decision", "apply"),
    ("codegen", "compiled", "dispatch"),
)
_MODEL_STAGES = (
    ("pack", "packed", ""),
    ("link", "linked", "pack"),
    ("check", "reference", "link"),
)


def _profile(workspace: Workspace, target: str, model: Model) -> dict[str, Any]:
    """Times a model, and returns what to remember of it."""
    profile = workspace.build.profile(target, model)
    return {"profile": {"seconds": profile.seconds, "operators": profile.operators} if profile else None}


def _operator(
    workspace: Workspace, target: str, workload: Workload, fresh: bool, stage: str, method: str, before: str
) -> dict[str, Any]:
    name = f"{target}:{workload.label}"
    deps = [f"{before}:{name}"] if before else []
    return {
        **_task(stage, name, fresh, _asks(workspace, method, target, workload), deps),
        "doc": " ".join((workload.name, *workload.shapes)),
    }


def _task(
    basename: str, name: str, fresh: bool, ask: Callable[[], dict[str, Any] | None], task_dep: Iterable[str] = ()
) -> dict[str, Any]:
    return {
        "basename": basename,
        "name": name,
        "actions": [StageAction(ask)],
        "uptodate": [fresh],
        "task_dep": list(task_dep),
        "doc": DOCS[basename],
    }


def _asks(workspace: Workspace, method: str, *arguments: Any) -> Callable[[], None]:
    return lambda: _nothing(getattr(workspace.build, method)(*arguments))


def _nothing(_: object) -> None:
    return None


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _forget(folder: Path, target: str, model: str) -> None:
    from pipeline.journal import Journal

    Journal(folder, target, model).remove()


@dataclass(frozen=True)
class Built:
    """A model as the last build left it: `profile` is None where it was not timed."""

    target: str
    model: Model
    plan: Plan
    profile: Profile | None


def built(workspace: Workspace, pairs: list[tuple[str, Model]]) -> list[Built]:
    """Those of the models that are built, as they were last, by this process or an earlier one: not those that would be
    built anew for another reason than that there are new tuning records. Does nothing, and needs no TVM."""
    import msgspec

    from pipeline.types import Profile

    known = _Known(workspace, pairs)
    found = []
    for target, model in pairs:
        if workspace.has_built and workspace.build.is_published(target, model):
            found.append(
                Built(target, model, workspace.build.plan(target, model), workspace.build.profile(target, model))
            )
            continue
        plan = remembered_plan(target, model)
        if plan is not None and known.is_built(target, model):
            kept = _values(f"profile:{target}:{model.name}").get("profile")
            found.append(Built(target, model, plan, msgspec.convert(kept, Profile) if kept else None))
    return found


def is_fresh(workspace: Workspace, target: str, model: Model) -> bool:
    """Whether a model's artifact is what a build would make now, as far as the last build's record tells."""
    return _Known(workspace, [(target, model)]).is_fresh(target, model)


def remembered_plan(target: str, model: Model) -> Plan | None:
    """The plan of the last extraction, where doit remembers it and the store still has it. Needs no TVM."""
    kept = _values(f"extract:{target}:{model.name}").get("plan")
    if kept is None:
        return None
    import msgspec

    from pipeline.hashing import Digest
    from pipeline.store import Store, default_root
    from pipeline.types import Plan

    data = Store(default_root()).get(Digest(*kept))
    try:
        return msgspec.json.decode(data, type=Plan) if data is not None else None
    except msgspec.DecodeError:
        return None  # from another version of tvmake


class _Known:
    """What is known of a workspace's artifacts without doing anything: their records in doit's database."""

    def __init__(self, workspace: Workspace, pairs: list[tuple[str, Model]]) -> None:
        self._workspace = workspace
        self._loaded = freshness.loaded_user_files()
        composed = freshness.composed(workspace.folder)
        self._declared = {(t, m.name): freshness.declaration(m, t, composed) for t, m in pairs}
        self._fresh: dict[tuple[str, str], bool] = {}

    def is_fresh(self, target: str, model: Model) -> bool:
        """Whether the artifact is what a build would make now."""
        pair = (target, model.name)
        if pair not in self._fresh:
            kept = _values(f"artifact:{target}:{model.name}").get("record")
            holds = self._workspace.use is not Use.WRITE and freshness.holds(kept, self._declared[pair])
            is_enough = self._workspace.use is not Use.REQUIRE or (kept or {}).get(_FOLLOWS_LOCK, False)
            self._fresh[pair] = holds and is_enough
        return self._fresh[pair]

    def is_built(self, target: str, model: Model) -> bool:
        """Whether the artifact is what a build would make, new tuning records left aside."""
        from pipeline.store import Store, default_root

        records = Store(default_root()).sets.changed
        kept = _values(f"artifact:{target}:{model.name}").get("record")
        return freshness.holds(kept, self._declared[target, model.name], but=[str(records)])

    def plan_values(self, target: str, model: Model) -> dict[str, Any]:
        """Extracts, and returns what to remember of it."""
        digest = self._workspace.build.plan_blob(target, model)
        return {"plan": [digest.hash, digest.size]}

    def finish(self, target: str, model: Model, alone: bool = False) -> dict[str, Any]:
        """Writes the artifact, and returns the record by which the next build knows that it is fresh. `alone`: in no
        command that would wait until a remote has it."""
        build = self._workspace.build
        folder = build.artifact(target, model)
        if alone and build.memoizer.remote is not None:
            build.memoizer.remote.finish()
        files = [
            *self._loaded,
            *build.files_read(model),
            *(self._workspace.folder / path for path in model.depends),
            *freshness.machine_files(),
            self._workspace.target_file(target),
            *build.files_composed(target),
        ]
        made = sorted(folder.iterdir())
        record = freshness.record(self._declared[target, model.name], files, made, BEGUN_NS, self._workspace.written)
        if record is not None:
            record[_FOLLOWS_LOCK] = build.follows_lock(target, model)
        return {"record": record}


def _values(task: str) -> dict[str, Any]:
    manager = Globals.dep_manager
    return (manager.get_values(task) or {}) if manager is not None else {}
