"""`doit build`: every model's library for every target. Never tunes."""

from __future__ import annotations

import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from doit.cmd_run import Run
from doit.control import TaskControl
from doit.dependency import Dependency
from doit.exceptions import InvalidDodoFile
from doit.globals import Globals
from doit.runner import MThreadRunner
from doit.task import Stream

from pipeline.commands.arguments import OptionsAnywhere
from pipeline.errors import TvmakeError
from pipeline.workspace import Part, Selection, Use, Workspace, selecting, the_workspace

OK, FAILED, ERROR, INTERRUPTED = 0, 1, 2, 130

_ROWS = 12  # of a model's table; the rest is summed up, and `doit report` shows all

opt_target = {
    "name": "targets",
    "short": "t",
    "long": "target",
    "type": list,
    "default": [],
    "help": "build for this target only; may be given several times",
}
opt_jobs = {
    "name": "jobs",
    "short": "j",
    "long": "jobs",
    "type": int,
    "default": 0,
    "help": "how many actions run at once [default: TVMAKE_JOBS, or the number of processors]",
}
opt_executor = {
    "name": "executor",
    "short": "",
    "long": "executor",
    "type": str,
    "default": "",
    "env_var": "TVMAKE_EXECUTOR",
    "help": "what runs stages: local, dask-local:4, dask://host:8786, slurm:… [default: TVMAKE_EXECUTOR, or local]",
}
opt_locked = {
    "name": "locked",
    "short": "",
    "long": "locked",
    "type": bool,
    "default": False,
    "help": "build exactly what tuning.lock says, and fail where that cannot be",
}
opt_dump = {
    "name": "dump",
    "short": "",
    "long": "dump",
    "type": str,
    "default": "",
    "help": "also write the IR after each stage into this folder, as TVMScript",
}


class Build(OptionsAnywhere, Run):
    """doit's own run, over a workspace's tasks, in two rounds: operators are known only after extraction."""

    doc_purpose = "build the models' libraries; never tunes"
    doc_usage = "[MODEL...]"
    doc_description = """\
Builds artifacts/<target>/<model> for every model that dodo.py names and every target in targets/,
or for the models that are named here. Only what changed is compiled; the rest comes from the store.

  doit build                         everything
  doit build squeezenet              one model, for all targets
  doit build -t native               all models, for one target
  doit build --locked                exactly as tuning.lock says, or not at all
  doit build --executor dask://host:8786
                                     on the workers of a cluster; see: doit help cluster
  doit build --dump ir               also write the IR after each stage into ir/

Where there is a tuning.lock (see: doit help lock), it is followed; what cannot be is chosen anew,
with a warning. --locked makes that an error.

Exit code: 0 built or nothing to do, 1 some model failed (the others are built), 2 the workspace or
the machine is at fault, 130 interrupted. What was done is kept in every case.
"""
    cmd_options: tuple[dict[str, Any], ...] = (opt_target, opt_jobs, opt_executor, opt_locked, opt_dump)
    name = "build"
    dep_manager: Any

    def execute(self, params: Any, args: list[str]) -> int:
        models = frozenset(args) or None
        use = Use.REQUIRE if params["locked"] else Use.FOLLOW
        self._selection = Selection(Part.FRONT, models, frozenset(params["targets"]) or None, use, params["executor"])
        return self._executed(params)

    def _executed(self, params: Any) -> int:
        """Runs the command over the selection; what goes wrong becomes a sentence and an exit code."""
        interruptible = _Interruptible()
        try:
            with selecting(self._selection), interruptible:
                code: int = super().execute(params, [])
                return code
        except BaseException as error:
            if interruptible.happened:
                print(
                    f"interrupted; what was finished is kept, and `doit {self.name}` goes on from there",
                    file=sys.stderr,
                )
                return INTERRUPTED
            if isinstance(error, TvmakeError | InvalidDodoFile):
                print(f"ERROR: {error}", file=sys.stderr)
                return ERROR
            raise

    def _execute(self, jobs: int, dump: str) -> int:  # type: ignore[override]
        workspace = the_workspace(self.loader.namespace)
        if not workspace.pairs(self._selection):
            raise TvmakeError("there is no model to build", hint="write: Workspace(Model.onnx('name', 'model.onnx'))")
        session = Session(self, workspace, self._selection, jobs)
        try:
            self._build(session)
            if dump:
                self._dump(workspace, Path(dump))
            session.send()
            session.remember()
        finally:
            workspace.stop()
            self.dep_manager.close()
        session.report()
        session.sum_up()
        return session.code

    def _build(self, session: Session) -> None:
        """The two rounds: operators are known only after extraction."""
        session.run(self.task_list)
        with selecting(replace(self._selection, part=Part.BACK)):
            back = self.loader.load_tasks(cmd=self, pos_args=[])
        session.run(back)

    def save(self) -> None:
        """Writes doit's database, and opens it again: a round that is over is not lost when the next one is killed."""
        done = self.dep_manager
        done.close()
        self._open_database(done, done.backend.name)

    def _open_database(self, like: Any, name: str) -> None:
        self.dep_manager = Globals.dep_manager = Dependency(
            like.db_class, name, type(like.checker), type(like.backend.codec)
        )

    def _dump(self, workspace: Workspace, folder: Path) -> None:
        for target, model in workspace.pairs(self._selection):
            count = workspace.build.dump(target, model, folder / target / model.name)
            print(
                f"wrote the IR of {target}:{model.name} to {folder / target / model.name} ({count} files)",
                file=sys.stderr,
            )


class Session:
    """One run of the command: rounds of doit tasks, in threads that wait for worker processes."""

    def __init__(self, command: Build, workspace: Workspace, selection: Selection, wanted: int) -> None:
        from pipeline.progress import Progress

        self.command = command
        self.workspace = workspace
        self.selection = selection
        self.progress = Progress()
        self.failures: list[str] = []
        self.begun: set[str] = set()  # names of the tasks that there were
        self.code = OK
        self._wanted = wanted
        self._told: set[str] = set()

    def run(self, tasks: list[Any]) -> None:
        """Runs tasks. One that fails stops only what depends on it; `code` says the worst that happened."""
        ours = [task for task in tasks if any(isinstance(action, _stage_action()) for action in task.actions)]
        if not ours:
            return
        self.workspace.build.memoizer.watcher = self.progress
        if (remote := self.workspace.build.memoizer.remote) is not None:
            remote.show(lambda sentence: self.progress.say(f"WARNING {sentence}"), self.progress.tell)
        executor = self.workspace.build.memoizer.workers
        executor.limit = self._wanted or executor.limit
        executor.say = lambda sentence: self.progress.say(f"WARNING {sentence}")
        control = TaskControl([*ours, *(task for task in tasks if task.has_subtask)])
        control.process([task.name for task in ours])
        runner = MThreadRunner(
            self.command.dep_manager, _Reporter(self), True, False, Stream(0), num_process=executor.limit
        )
        self.begun.update(task.name for task in ours)
        self.progress.start(len(ours))
        try:
            runner.run_tasks(control.task_dispatcher())
        finally:
            self.progress.stop()
            runner.teardown()
            self.command.save()

    def is_known(self, message: str) -> bool:
        """Whether a failure is that of all tasks after what ran them was lost, and was told once."""
        known = message in self._told and self.workspace.build.memoizer.workers.stopped
        self._told.add(message)
        return known

    def send(self) -> None:
        """Waits until what was made is on the remote, where there is one."""
        remote = self.workspace.build.memoizer.remote if self.workspace.has_built else None
        if remote is None or not (remote.waiting() or remote.counts.dropped):
            return
        with self.progress.telling(f"sending to {remote.remote.name}") as tell:
            remote.finish(lambda left: tell(f"{counted(left, 'entry')} left"))

    def report(self) -> None:
        """What each model that was built now runs on, and what could not be used for it."""
        build = self.workspace.build if self.workspace.has_built else None
        pairs = self.workspace.pairs(self.selection) if build is not None else []
        built = [pair for pair in pairs if build is not None and build.is_published(*pair)]
        if build is None or not built:
            return
        from pipeline.manifests import read_manifest
        from pipeline.report import report, table
        from pipeline.upgrade import upgrade

        made = [report(read_manifest(self.workspace.artifact(*pair)), build.profile(*pair)) for pair in built]
        if len(made) == 1:
            self.progress.show(table(made[0], _ROWS))
        for target in dict.fromkeys(target for target, _ in built):
            for problem in build.problems(target, [m for t, m in built if t == target]):
                self.progress.say(f"WARNING {target}: {problem}")
            for line in upgrade(build, target, [m for t, m in built if t == target]).lines():
                self.progress.say(line)
        for each in made:
            self.progress.say(each.line())

    def sum_up(self) -> None:
        """The last line."""
        pairs = self.workspace.pairs(self.selection)
        count = counted(len(pairs), "artifact")
        if self.workspace.has_built:
            missing = [pair for pair in pairs if f"extract:{pair[0]}:{pair[1].name}" in self.begun]
            missing = [pair for pair in missing if not self.workspace.build.is_published(*pair)]
            if missing:
                count = f"{len(pairs) - len(missing)} of {count}"
            tally = self.workspace.build.memoizer.tally
            # An operator may have several functions compiled: candidates, and what lays out its weights.
            compiled = len(tally.subjects.get("codegen", ()))
            cached = len(tally.found.get("codegen", set()) - tally.subjects.get("codegen", set()))
            corrupt = self._corrupt()
            notes = f"; {counted(corrupt, 'corrupt entry')} of the store set aside" if corrupt else ""
            failed = f", {counted(len(self.failures), 'task')} failed" if self.failures else ""
            self.progress.say(
                f"{count}{failed}: {counted(compiled, 'operator')} compiled, {cached} cached, "
                f"{counted(tally.ran['link'], 'library')} linked, in {self.progress.elapsed:.1f} s"
                f"{self._with_remote()}{notes}"
            )
        else:
            self.progress.say(f"{count} up to date, nothing to do")

    def _with_remote(self) -> str:
        """What came from the remote and what went there."""
        remote = self.workspace.build.memoizer.remote
        if remote is None:
            return ""
        counts = remote.counts
        parts = [f"{counts.hits} of {counts.hits + counts.misses} found on the remote"] if remote.policy.reads else []
        parts += [f"{counts.published} sent"] if remote.policy.writes else []
        parts += [counted(counts.errors, "error")] if counts.errors else []
        return "; " + ", ".join(parts)

    def remember(self) -> None:
        """Notes what this run found and made, for `doit cache stats`."""
        if self.workspace.has_built:
            from pipeline.sharing import usage
            from pipeline.store.usage import Usage

            Usage(self.workspace.store.root).add(usage(self.workspace.build.memoizer))

    def _corrupt(self) -> int:
        """Files of the store that were damaged, or did not belong there, and were set aside: here or in workers."""
        memoizer = self.workspace.build.memoizer
        return memoizer.store.counts.corrupt + memoizer.store.counts.torn + memoizer.workers.corrupt


def counted(number: int, thing: str) -> str:
    """1 operator, 2 operators, 2 entries."""
    plural = thing.removesuffix("y") + "ies" if thing.endswith("y") else thing + "s"
    return f"{number} {thing if number == 1 else plural}"


def _stage_action() -> type:
    from pipeline.tasks import StageAction

    return StageAction


class _Reporter:
    """doit's reports: failures in words, the rest is the progress's to show."""

    desc = "tvmake"

    def __init__(self, session: Session) -> None:
        self._session = session

    def add_failure(self, task: Any, fail: Any) -> None:
        self._session.progress.task_done()
        if fail.get_name() != "UnmetDependency":
            self._session.failures.append(task.name)
            self._session.code = max(self._session.code, FAILED if fail.get_name() == "TaskFailed" else ERROR)
            if not self._session.is_known(fail.message):
                self._session.progress.say(f"FAILED {task.name}: {fail.message}")

    def add_success(self, task: Any) -> None:
        self._session.progress.task_done()

    skip_uptodate = skip_ignore = add_success

    def runtime_error(self, message: str) -> None:
        self._session.code = ERROR
        self._session.progress.say(f"ERROR: {message}")

    def cleanup_error(self, exception: Any) -> None:
        self._session.progress.say(f"ERROR: {exception.get_msg()}")

    def _ignored(self, *_: Any) -> None:
        return None

    initialize = get_status = execute_task = teardown_task = complete_run = _ignored


class _Interruptible:
    """Within the block SIGINT and SIGTERM raise KeyboardInterrupt, and `happened` tells of it.

    Some extensions turn an interrupt that comes while they are imported into an error of their own.
    """

    def __init__(self) -> None:
        self.happened = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Interruptible:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _interrupt(self, *_: object) -> None:
        self.happened = True
        raise KeyboardInterrupt
