"""`doit lock`: chooses for every operator as if there were no tuning.lock, and writes down in it what was chosen."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline.commands.build import FAILED, Build, Session, counted, opt_jobs, opt_target
from pipeline.commands.tune import opt_models
from pipeline.errors import ConfigError, TvmakeError
from pipeline.hashing import Stamp
from pipeline.lock import FILE, Entry, Following, pin_of, pins_of, write
from pipeline.lock import Lock as Lines
from pipeline.workspace import Part, Selection, Use, Workspace, selecting, the_workspace

if TYPE_CHECKING:
    from pipeline.types import Workload

opt_dry_run = {
    "name": "dry_run",
    "short": "n",
    "long": "dry-run",
    "type": bool,
    "default": False,
    "help": "show what would change; write neither the file nor artifacts",
}
opt_json = {"name": "json", "short": "", "long": "json", "type": bool, "default": False, "help": "show it as JSON"}

_DECIDING = ("apply", "dispatch", "codegen")


@dataclass(frozen=True)
class Change:
    """One line of the file that is new (`before` is None), gone (`after` is None) or another decision."""

    target: str
    operator: str
    before: Entry | None
    after: Entry | None


def changes(before: Lines, after: Lines) -> list[Change]:
    """What became of the decisions of a lock; what was measured of the same decision since is no change."""
    found = []
    for target in sorted({*before.targets, *after.targets}):
        old, new = before.targets.get(target, {}), after.targets.get(target, {})
        for label in sorted({*old, *new}):
            one, other = old.get(label), new.get(label)
            if one is None or not one.same(other):
                found.append(Change(target, label, one, other))
    return found


class Lock(Build):
    """A build that chooses freely, then one by what it chose, and the file in between."""

    doc_purpose = f"write down what each operator is compiled from, in {FILE}"
    doc_usage = "[OPERATOR...]"
    doc_description = f"""\
Chooses for every operator of all models and targets, or for those
named here (with * and ?), as if there were no {FILE}; builds what
that takes, and writes the choice down beside dodo.py. Tunes nothing.
From then on `doit build` uses exactly that, whatever is tuned, and
says what it holds back.

  doit lock                takes the best that is known by now
  doit lock -n             shows what that would change
  doit lock 'conv2d*'      for some operators; the others stay locked
  git diff {FILE}     a line for each operator that changed
  doit build --locked      builds that anywhere, or says what is missing

Tuning records of other machines come through the remote. What is
locked stays in the store, whatever `doit cache gc` is told.

Exit code: 0 written, or nothing changed, 1 a model fails and nothing
was written, 2 the workspace or the machine is at fault,
130 interrupted.
"""
    cmd_options: tuple[dict[str, Any], ...] = (opt_target, opt_models, opt_dry_run, opt_json, opt_jobs)
    name = "lock"

    def execute(self, params: Any, args: list[str]) -> int:
        self._patterns = args
        models = frozenset(params["models"]) or None
        self._selection = Selection(Part.FRONT, models, frozenset(params["targets"]) or None, Use.WRITE)
        return self._executed(params)

    def _execute(self, dry_run: bool, json: bool, jobs: int) -> int:  # type: ignore[override]
        workspace = the_workspace(self.loader.namespace)
        if not workspace.pairs(self._selection):
            raise TvmakeError("there is no model to lock", hint="write: Workspace(Model.onnx('name', 'model.onnx'))")
        session = Session(self, workspace, self._selection, jobs)
        try:
            before = workspace.build.following.lock or Lines()
            after = self._chosen(session, before)
            if after is None:
                print(f"{FILE} was left as it is: not everything can be built", file=sys.stderr)
                return session.code or FAILED
            if not dry_run:
                self._write(session, after)
        finally:
            workspace.stop()
            self.dep_manager.close()
        _show(changes(before, after), json)
        _sum_up(session, before, after, dry_run)
        return session.code

    def _is_meant(self, workload: Workload) -> bool:
        return not self._patterns or any(map(workload.matches, self._patterns))

    def _chosen(self, session: Session, before: Lines) -> Lines | None:
        """The lock that follows from a free choice, once everything was built by it; None where that fails."""
        workspace = session.workspace
        workspace.follow(Following(before, anew=self._is_meant))
        session.run(self.task_list)
        with self._tried_out():
            self._run(session, _DECIDING)
            if session.code:
                return None
            after = self._lines(workspace, before)
            workspace.follow(Following(after))
            self._run(session, (*_DECIDING, "pack", "link", "check", "profile"))
        self._say_problems(session)
        if session.code or self._not_made_again(session, before, after):
            return None
        return _with_times(workspace, self._selection, after)

    @contextlib.contextmanager
    def _tried_out(self) -> Iterator[None]:
        """Within the block doit remembers what it does in a copy of its database, which is thrown away: what it kept of
        the artifacts that there are, their times say, stays theirs until they are written anew."""
        own = self.dep_manager
        own.close()
        place = Path(own.backend.name)
        with tempfile.TemporaryDirectory(prefix="tvmake-lock-") as folder:
            for file in place.parent.glob(f"{place.name}*"):
                shutil.copy(file, folder)
            self._open_database(own, str(Path(folder) / place.name))
            try:
                yield
            finally:
                self.dep_manager.close()
                self._open_database(own, str(place))

    def _run(self, session: Session, stages: Sequence[str]) -> None:
        """Runs these stages of what was extracted; where none are named, all."""
        with selecting(replace(self._selection, part=Part.BACK)):
            tasks = self.loader.load_tasks(cmd=self, pos_args=[])
        session.run([task for task in tasks if not stages or task.name.partition(":")[0] in stages])

    def _lines(self, workspace: Workspace, before: Lines) -> Lines:
        """The lines for what this build decided. What the selection leaves out stays, and what no model has goes."""
        is_all = self._selection.targets is None
        targets = {
            target: entries
            for target, entries in before.targets.items()
            if not is_all or target in workspace.target_names()
        }
        found = _workloads(workspace, self._selection)
        if self._patterns and not any(self._is_meant(each) for of in found.values() for each in of.values()):
            raise ConfigError(
                f"no operator is named {', '.join(self._patterns)}", hint="see their names with: doit list --all"
            )
        for target, workloads in found.items():
            targets[target] = self._of_target(workspace, target, workloads, before.targets.get(target, {}))
        return Lines(targets)

    def _of_target(
        self, workspace: Workspace, target: str, workloads: Mapping[str, Workload], before: Mapping[str, Entry]
    ) -> dict[str, Entry]:
        known = {entry.workload: entry for entry in before.values()}
        meant = [workload for workload in workloads.values() if self._is_meant(workload)]
        made = dict(zip([each.digest for each in meant], _entries(workspace, target, meant, known), strict=True))
        lines = {w.label: made.get(w.digest) or known.get(w.digest) for w in workloads.values()}
        if self._selection.models is not None:
            lines |= {label: entry for label, entry in before.items() if entry.workload not in workloads}
        return {label: entry for label, entry in lines.items() if entry is not None}

    def _not_made_again(self, session: Session, before: Lines, after: Lines) -> bool:
        """Whether some of what was chosen now could not be built by the lock itself, which is told."""
        following = session.workspace.build.following
        lost = [
            f"{each.target}:{each.operator}: {why}"
            for each in changes(before, after)
            if each.after is not None and (why := following.is_broken(each.target, each.after.workload))
        ]
        for line in lost:
            session.progress.say(f"FAILED what was chosen cannot be made again: {line}")
        return bool(lost)

    def _say_problems(self, session: Session) -> None:
        build = session.workspace.build
        pairs = session.workspace.pairs(self._selection)
        if session.code:
            return
        for target in dict.fromkeys(target for target, _ in pairs):
            for problem in build.problems(target, [m for t, m in pairs if t == target]):
                session.progress.say(f"WARNING {target}: {problem}")

    def _write(self, session: Session, after: Lines) -> None:
        """Writes the file, and the artifacts that follow from it."""
        workspace = session.workspace
        path = workspace.folder / FILE
        write(path, after)
        stamp = Stamp.of(path)
        if stamp is not None and path.read_bytes() == after.text().encode():
            workspace.written[str(path)] = stamp.content
        self._run(session, ())
        _unpin(workspace)
        session.send()
        session.remember()


def _workloads(workspace: Workspace, selection: Selection) -> dict[str, dict[str, Workload]]:
    """The operators that models call, by target and digest; one that has several names, by the first of them."""
    found: dict[str, dict[str, Workload]] = {}
    for target, model in workspace.pairs(selection):
        of = found.setdefault(target, {})
        for workload in workspace.build.plan(target, model).workloads:
            if workload.calls and (workload.digest not in of or workload.label < of[workload.digest].label):
                of[workload.digest] = workload
    return found


def _entries(
    workspace: Workspace, target: str, workloads: Sequence[Workload], known: Mapping[str, Entry]
) -> list[Entry]:
    """The lines for what was decided freely; `known` are those until now, by workload."""
    from pipeline import locking

    build = workspace.build
    composition, dispatcher = build.composition(target), build.dispatcher(target)

    def line(workload: Workload) -> Entry:
        decision = build.decision(target, workload)
        before = known.get(workload.digest)
        return locking.entry(composition, lambda offer: dispatcher.ask(workload, offer), workload, decision, before)

    with ThreadPoolExecutor(build.memoizer.workers.limit) as threads:
        return list(threads.map(line, workloads))


def _with_times(workspace: Workspace, selection: Selection, lock: Lines) -> Lines:
    """A lock with the times of the models' profiles where there is no better one."""
    seconds: dict[tuple[str, str], float] = {}
    for target, model in workspace.pairs(selection):
        profile = workspace.build.profile(target, model)
        for workload in workspace.build.plan(target, model).workloads:
            total = profile.operators.get(workload.symbol) if profile is not None else None
            if total and workload.calls:
                place = (target, workload.digest)
                seconds[place] = min(total / workload.calls, seconds.get(place, total))
    targets = {}
    for target, entries in lock.targets.items():
        targets[target] = {
            label: entry if entry.seconds else replace(entry, seconds=seconds.get((target, entry.workload)))
            for label, entry in entries.items()
        }
    return Lines(targets)


def _unpin(workspace: Workspace) -> None:
    """Ends the pins of artifacts that the workspace has no more."""
    from pipeline.store import Pins

    pins, folder = Pins(workspace.store.root), workspace.folder
    wanted = {pin_of(folder, target, model.name) for target, model in workspace.pairs(Selection())}
    for name in pins.names():
        if name.startswith(pins_of(folder)) and name not in wanted:
            pins.remove(name)


# what one sees


def _show(found: Sequence[Change], json: bool) -> None:
    if json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
    elif found:
        _show_table(found)


def _show_table(found: Iterable[Change]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from pipeline.report import duration

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("operator", "from → to", "time", "gain"):
        table.add_column(name, justify="right" if name in ("time", "gain") else "left", no_wrap=True)
    for each in found:
        pair = (each.before, each.after)
        table.add_row(
            f"{each.target}:{each.operator}",
            _from_to("not locked" if entry is None else _called(entry) for entry in pair),
            _from_to(duration(entry.seconds) if entry and entry.seconds else "" for entry in pair),
            _from_to(f"{entry.gain:.2f}x" if entry and entry.gain else "" for entry in pair),
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _called(entry: Entry) -> str:
    return f"{entry.use} {entry.version or entry.candidate[:8]}".strip()


def _from_to(pair: Iterable[str]) -> str:
    """("a", "b") → "a → b"; ("", "b") → "b"; ("a", "a") → "a"."""
    return " → ".join(dict.fromkeys(filter(None, pair)))


def _sum_up(session: Session, before: Lines, after: Lines, dry_run: bool) -> None:
    found = changes(before, after)
    counts = {
        "changed": sum(each.before is not None and each.after is not None for each in found),
        "new": sum(each.before is None for each in found),
        "gone": sum(each.after is None for each in found),
    }
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing changed"
    total = counted(sum(map(len, after.targets.values())), "operator")
    note = "; not written, as this is a dry run" if dry_run and before.text() != after.text() else ""
    session.progress.say(f"{FILE}: {total}, {told}{note}")
