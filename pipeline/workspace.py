"""A workspace: the models that dodo.py names, the targets beside it, and the doit tasks that they make.

    workspace = Workspace(Model.onnx("squeezenet", "squeezenet.onnx"), …)     in dodo.py

doit finds the object by its method `create_doit_tasks`. The folder of dodo.py is the workspace's folder.
"""

from __future__ import annotations

import contextlib
import enum
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, TvmakeError
from pipeline.models import Model

if TYPE_CHECKING:
    from pipeline.build import Build
    from pipeline.lock import Following
    from pipeline.remotes.cache import RemoteCache
    from pipeline.remotes.lanes import Lanes
    from pipeline.remotes.settings import Settings
    from pipeline.store import Store

# When this process began to look at files: one that changes later may have been read before or after.
BEGUN_NS = time.time_ns()

# SQLite keeps what two runs at once write; doit's other files lose it.
# Without a name doit's `forget` crashes where no default tasks are declared; so it asks for one.
# What `doit` alone runs is a build: whatever an artifact needs, and no tuning.
DOIT_CONFIG = {
    "backend": "sqlite3",
    "dep_file": ".doit.db",
    "verbosity": 1,
    "forget_disable_default": True,
    "default_tasks": ["artifact"],
}


class Part(enum.Enum):
    """Which tasks a command wants."""

    ALL = "all"  # everything that is known: to list, to show, to clean, to run one by name
    FRONT = "front"  # up to extraction, of what is not fresh
    BACK = "back"  # after extraction, of what is not fresh


class Use(enum.Enum):
    """What a command does about tuning.lock."""

    FOLLOW = "follow"  # as far as that is possible
    REQUIRE = "require"  # it must be there, and be followed in all
    WRITE = "write"  # what is fresh by the one that is there is looked at again


@dataclass(frozen=True)
class Selection:
    """What a command asks for: a part of the tasks, of some models and targets (None for all), built as tuning.lock
    says, by what runs stages: see pipeline.executors."""

    part: Part = Part.ALL
    models: frozenset[str] | None = None
    targets: frozenset[str] | None = None
    use: Use = Use.FOLLOW
    executor: str = ""


_EVERYTHING = Selection()
_selection: ContextVar[Selection] = ContextVar("selection", default=_EVERYTHING)


@contextlib.contextmanager
def selecting(selection: Selection) -> Iterator[None]:
    """Within the block, workspaces make only the tasks that are selected."""
    token = _selection.set(selection)
    try:
        yield
    finally:
        _selection.reset(token)


def selected() -> Selection:
    return _selection.get()


class Workspace:
    """Models and targets. Making one does nothing but remember; what is wrong with it is said when tasks are made.

    Methods raise ConfigError for models of one name, for targets/ without a target, and for names that are not there.
    """

    def __init__(self, *models: Model) -> None:
        self.models = models
        caller = sys._getframe(1).f_globals.get("__file__")
        self.folder = Path(caller).resolve().parent if caller else Path.cwd()
        self._build: Build | None = None
        self._store: Store | None = None
        self._remote: RemoteCache | None = None
        self._lanes: Lanes | None = None
        self._leaving = contextlib.ExitStack()  # what ends with the process's work
        self._settings: Settings | None = None
        self.use = Use.FOLLOW
        self.executor = ""
        self.written: dict[str, str] = {}  # files of the workspace that this process wrote, and hashes of their bytes
        # doit takes whatever in dodo.py has this attribute for a maker of tasks: the class must not have it.
        self.create_doit_tasks = self._tasks

    def _tasks(self) -> Iterator[Any]:
        """What doit asks for."""
        from doit.exceptions import InvalidDodoFile

        from pipeline.tasks import create

        self.use, self.executor = selected().use, selected().executor
        try:
            yield from create(self, selected())
        except TvmakeError as error:
            raise InvalidDodoFile(str(error)) from error

    def model(self, name: str) -> Model:
        return next(model for model in self.models if model.name == name)

    def target_names(self) -> list[str]:
        """The names of the files in targets/, in alphabetical order."""
        names = sorted(path.stem for path in (self.folder / "targets").glob("*.toml"))
        if not names:
            raise ConfigError(
                f"{self.folder.name}/targets has no target",
                hint='write targets/native.toml with the line: target = "native"',
            )
        return names

    def pairs(self, selection: Selection) -> list[tuple[str, Model]]:
        """The targets and models to build, as the targets' files and the selection leave them."""
        self._require_good_names(selection)
        chosen = []
        for target in self.target_names():
            if selection.targets is not None and target not in selection.targets:
                continue
            wanted = self._models_of(target)
            for model in self.models:
                named = selection.models is None or model.name in selection.models
                if named and (wanted is None or model.name in wanted):
                    chosen.append((target, model))
        return chosen

    def artifact(self, target: str, model: Model) -> Path:
        return self.folder / "artifacts" / target / model.name

    def target_file(self, target: str) -> Path:
        return self.folder / "targets" / f"{target}.toml"

    @property
    def build(self) -> Build:
        """The build of this process, made when it is first needed."""
        if self._build is None:
            from pipeline.build import Build
            from pipeline.executors import Job, open_executor
            from pipeline.memoizer import Memoizer
            from pipeline.toolchain import detect

            self._leaving.enter_context(self.store.in_use())
            toolchain = detect()
            job = Job(self.store, toolchain, jobs(), self.remote, self.settings.url or "")
            memoizer = Memoizer(self.store, open_executor(self.executor, job), toolchain, self.remote)
            self._build = Build(self.folder, memoizer, self.use is Use.REQUIRE)
        return self._build

    def follow(self, following: Following) -> None:
        """From here on this process builds by another lock than that of the file."""
        self._build = self.build.by(following)

    @property
    def settings(self) -> Settings:
        """Which remote is used, how, and whom to trust."""
        if self._settings is None:
            from pipeline.remotes.settings import load

            self._settings = load(self.folder)
        return self._settings

    @property
    def remote(self) -> RemoteCache | None:
        """The remote behind the store, where the settings name one."""
        if self._remote is None and self.settings.uses_remote:
            from pipeline.remotes.cache import opened

            self._remote = opened(self.store, self.settings)
        return self._remote

    @property
    def store(self) -> Store:
        """The user's store."""
        if self._store is None:
            from pipeline.store import Store, default_root

            self._store = Store(default_root())
        return self._store

    @property
    def lanes(self) -> Lanes | None:
        """The tuning records of other machines, where there is a remote."""
        if self._lanes is None and self.remote is not None:
            from pipeline.remotes.lanes import Lanes

            self._lanes = Lanes(self.remote, self.store)
        return self._lanes

    def gather(self) -> None:
        """Brings in the tuning records that other machines have found, where there is a remote that answers."""
        if self.lanes is not None:
            self.lanes.gather()

    @property
    def has_built(self) -> bool:
        """Whether this process had anything to do."""
        return self._build is not None

    def stop(self) -> None:
        """Ends the processes that work for this workspace's build, and what goes on with the remote, if there are any.
        What was not sent by then is not: see RemoteCache.finish."""
        if self._build is not None:
            self._build.memoizer.workers.stop()
        if self._remote is not None:
            self._remote.close()
        self._leaving.close()

    def _models_of(self, target: str) -> tuple[str, ...] | None:
        """The models that a target's file restricts it to. The file is parsed only where the word stands in it."""
        path = self.target_file(target)
        try:
            if "models" not in path.read_text():
                return None
        except (OSError, UnicodeDecodeError):
            return None  # reading it in earnest says what is wrong
        from pipeline.config import load_target

        wanted = load_target(path).models
        for name in wanted or ():
            if all(name != model.name for model in self.models):
                raise ConfigError(f"targets/{target}.toml: models names {name!r}", hint=self._model_hint())
        return wanted

    def _require_good_names(self, selection: Selection) -> None:
        for model in self.models:
            if not isinstance(model, Model):
                raise ConfigError(
                    f"Workspace was given a {type(model).__name__}", hint="give models: Model.onnx('name', 'a.onnx')"
                )
            model.require_valid()
        names = [model.name for model in self.models]
        for model in self.models:
            if names.count(model.name) > 1:
                raise ConfigError(f"two models are called {model.name!r}", hint="give each model a name of its own")
        for name in selection.models or ():
            if name not in names:
                raise ConfigError(f"there is no model {name!r}", hint=self._model_hint())
        for name in selection.targets or ():
            if name not in self.target_names():
                raise ConfigError(f"there is no target {name!r}", hint=f"targets: {', '.join(self.target_names())}")

    def _model_hint(self) -> str:
        return f"models in dodo.py: {', '.join(model.name for model in self.models) or 'none'}"


def the_workspace(namespace: Mapping[str, object]) -> Workspace:
    """The one workspace that dodo.py makes. Raises TvmakeError where there is none, or several."""
    found = {id(value): value for value in namespace.values() if isinstance(value, Workspace)}
    if len(found) != 1:
        many = "no Workspace" if not found else "several Workspaces"
        raise TvmakeError(f"dodo.py has {many}", hint="write: workspace = Workspace(Model.onnx('name', 'model.onnx'))")
    return next(iter(found.values()))


def jobs() -> int:
    """How many actions run at once: TVMAKE_JOBS, or the processors that this process may use."""
    chosen = os.environ.get("TVMAKE_JOBS", "")
    if chosen:
        if not chosen.isdigit() or int(chosen) < 1:
            raise ConfigError(f"TVMAKE_JOBS is {chosen!r}", hint="give a number of 1 or more")
        return int(chosen)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
