"""`doit tune`: searches for better functions for the operators of built models. What it finds, the next build uses."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from pipeline.amounts import span_of
from pipeline.commands.build import FAILED, INTERRUPTED, OK, Build, Session, counted, opt_executor, opt_jobs, opt_target
from pipeline.config import load_target
from pipeline.errors import ConfigError, TvmakeError
from pipeline.lock import FILE, Lock, better_held_back, read
from pipeline.workspace import Part, Selection, Workspace, the_workspace
from pipeline.workspace import jobs as usual_jobs

if TYPE_CHECKING:
    from pipeline.models import Model
    from pipeline.tasks import Built
    from pipeline.tuning.ledger import Ledger
    from pipeline.tuning.night import Night
    from pipeline.tuning.operators import Left
    from pipeline.tuning.states import Operator, Terms

NOTHING_MEASURED, VALIDATION_FAILED = 3, 4


_CODES = {
    "done": OK,
    "stopped": INTERRUPTED,
    "nothing measured": NOTHING_MEASURED,
    "no post left": NOTHING_MEASURED,
    "validation failed": VALIDATION_FAILED,
    "broken": FAILED,
}


def _option(name: str, kind: type, default: Any, said: str, short: str = "", long: str = "") -> dict[str, Any]:
    return {"name": name, "short": short, "long": long or name, "type": kind, "default": default, "help": said}


opt_budget = _option("budget", str, "", "time for all operators together, earlier runs included: 90s, 30m, 8h", "b")
opt_trials = _option("trials", int, 0, "candidates of each operator at most [default: tune.trials of the target]")
opt_models = _option("models", list, [], "operators of this model only; may be given several times", "m", "model")
opt_top = _option("top", int, 0, "only so many operators, those that take longest")
opt_plan = _option("plan", bool, False, "show what would be tuned and how long it would take; tune nothing")
opt_events = _option("events", str, "", "also write every event as a line of JSON to this file; - for standard output")


class Tune(Build):
    """A night over the operators of a workspace's models, after what of them is not built yet was."""

    doc_purpose = "search for faster functions; what is found, the next build uses"
    doc_usage = "[OPERATOR...]"
    doc_description = """\
Searches for faster functions for the operators of all models and targets, or for those named here
(as `doit list --all` shows them, with * and ?). Models that are not built are built first.

  doit tune                          until every operator's curve is flat
  doit tune --budget 8h              for eight hours at most; again: nothing; --budget 10h: two more
  doit tune --plan                   what would be tuned, what is there, how long it will take
  doit tune 'conv2d*' --trials 64    some operators, few candidates each
  doit tune -m squeezenet --top 5    the five operators of one model that take longest
  doit tune --executor dask://host:8786
                                     on the workers of a cluster; see: doit help cluster
  doit build                         uses what was found: recompiles only operators whose best changed

Every finished batch is kept: it may be stopped at any time (Ctrl-C ends after the running batch,
twice at once) and goes on from there. Nothing is measured twice. Every candidate is compared with
the operator as it is before it may win. Where there is a tuning.lock, a build uses what was found
once `doit lock` has taken it over.

Exit code: 0 done, 1 given up, or some model could not be built, 2 the workspace or the machine is
at fault, 3 nothing could be measured, 4 all candidates of some operator were wrong, 130 stopped.
"""
    cmd_options: tuple[dict[str, Any], ...] = (
        *(opt_target, opt_models, opt_budget, opt_trials, opt_top),
        *(opt_plan, opt_events, opt_jobs, opt_executor),
    )
    name = "tune"

    def execute(self, params: Any, args: list[str]) -> int:
        self._patterns = args
        models = frozenset(params["models"]) or None
        targets = frozenset(params["targets"]) or None
        self._selection = Selection(Part.FRONT, models, targets, executor=params["executor"])
        return self._executed(params)

    def _execute(  # type: ignore[override]
        self, budget: str, trials: int, top: int, plan: bool, events: str, jobs: int, executor: str
    ) -> int:
        from pipeline.tuning import local

        workspace = the_workspace(self.loader.namespace)
        seconds = _seconds(budget)
        try:
            workspace.gather()
            operators, left = self._operators(workspace, jobs)
            operators = operators[: top or None]
            if not operators and not left:
                raise ConfigError(
                    f"no operator is named {', '.join(self._patterns)}" if self._patterns else "there is no operator",
                    hint="see their names with: doit list --all",
                )
            terms = local.terms(workspace, operators, seconds, trials)
            lock = read(workspace.folder / FILE) or Lock()  # one that is broken is told before the night
            if plan:
                return _show_plan(workspace, operators, left, terms)
            with _events(events) as stream:
                code = _run(workspace, operators, left, terms, jobs or usual_jobs(), stream)
                _say_held_back(workspace, operators, lock)
                return code if code or self._is_whole else FAILED
        finally:
            workspace.stop()
            self.dep_manager.close()

    def _operators(self, workspace: Workspace, jobs: int) -> tuple[list[Operator], list[Left]]:
        """The operators to tune. Builds first what of their models is not built."""
        from pipeline import tasks
        from pipeline.tuning import local

        pairs = workspace.pairs(self._selection)
        if not pairs:
            raise TvmakeError("there is no model to tune", hint="write: Workspace(Model.onnx('name', 'model.onnx'))")
        built = tasks.built(workspace, pairs)
        if len(built) < len(pairs):
            session = Session(self, workspace, self._selection, jobs)
            self._build(session)
            session.send()
            session.remember()
            session.sum_up()
            workspace.build.memoizer.watcher = None  # from here on the night says what happens
            built = tasks.built(workspace, pairs)
        missing = [f"{target}:{model.name}" for target, model in pairs if not _holds(built, target, model)]
        if missing and not built:
            raise TvmakeError("no model could be built", hint="see what fails with: doit build")
        if missing:
            print(f"left out, as they could not be built: {', '.join(missing)}; see: doit build", file=sys.stderr)
        self._is_whole = not missing
        return local.operators(workspace, built, self._patterns)


def _holds(built: Sequence[Built], target: str, model: Model) -> bool:
    return any(each.target == target and each.model is model for each in built)


def _seconds(budget: str) -> float | None:
    """ "90s", "30m", "8h", "1.5h" → seconds; a bare number is minutes. None where none is given."""
    if not budget:
        return None
    text = budget.strip()
    try:
        seconds = span_of(f"{text} m" if text.replace(".", "", 1).isdigit() else text)
    except ConfigError:
        seconds = 0.0
    if seconds <= 0:
        raise ConfigError(f"--budget is {budget!r}", hint="give a time such as 90s, 30m, 8h or 1.5h")
    return seconds


@contextlib.contextmanager
def _events(path: str) -> Iterator[TextIO | None]:
    """Where events go as lines of JSON; None where nobody asked for them."""
    if path == "-":
        yield sys.stdout
    elif path:
        try:
            stream = open(path, "a")  # noqa: SIM115 - closed below
        except OSError as error:
            raise ConfigError(f"--events {path} cannot be written: {error.strerror}") from error
        with stream:
            yield stream
    else:
        yield None


def _run(
    workspace: Workspace,
    operators: Sequence[Operator],
    left: Sequence[Left],
    terms: Terms,
    jobs: int,
    events: TextIO | None,
) -> int:
    """A night over these operators, and its exit code."""
    from pipeline import sharing
    from pipeline.tuning import face, local
    from pipeline.tuning.ledger import Ledger
    from pipeline.tuning.scheduler import Scheduler

    for each in left:
        print(f"left as they are: {_some(each.labels)}: {each.reason}", file=sys.stderr)
    aside = workspace.store.counts.torn  # what was found torn when the operators were looked through
    ledger = Ledger.here(workspace.store, terms.noise)
    scheduler = Scheduler(operators, ledger.standing, terms)
    if not scheduler.plan().seconds and not scheduler.owed_retests():
        _say_unread(ledger, operators, aside)
        print(face.nothing_to_do(scheduler), file=sys.stderr)
        return OK
    watcher = face.watcher(sys.stderr, events)
    with _stopping(local.night(workspace, operators, terms, jobs, watcher)) as night:
        ended = night.run()
    sharing.remember_tuning(workspace.store, ended.trials, ended.elapsed)
    local.sum_up(workspace, operators)
    if workspace.lanes is not None:
        workspace.lanes.publish()
    _say_unread(ledger, operators, aside)
    return _CODES[ended.end]


def _say_unread(ledger: Ledger, operators: Sequence[Operator], aside: int) -> None:
    """How many records count for nothing, where there are any. `aside` were set aside before the ledger looked."""
    unread, newer = (sum(ask(each.key) for each in operators) for ask in (ledger.unread, ledger.newer))
    unread += aside
    if unread:
        told = f" ({newer} of a newer version of tvmake)" if newer else ""
        print(f"{counted(unread, 'tuning record')} could not be read{told}; set aside", file=sys.stderr)


def _say_held_back(workspace: Workspace, operators: Sequence[Operator], lock: Lock) -> None:
    """How many operators a build goes on with as the lock says, though something better is known of them."""
    from pipeline import locking
    from pipeline.tuning.ledger import Ledger

    ratios = []
    for target in dict.fromkeys(each.target for each in operators):
        file = load_target(workspace.target_file(target))
        ledger = Ledger.here(workspace.store, file.measure.noise)
        for each in operators:
            if each.target == target and (entry := lock.entry(target, each.workload.digest)) is not None:
                ratios.append(locking.times_as_fast(ledger.standing(each.key), file, each.workload, entry))
    if told := better_held_back([ratio for ratio in ratios if ratio > 1]):
        print(told, file=sys.stderr)


def _some(labels: Sequence[str]) -> str:
    return f"{labels[0]} and {len(labels) - 1} more" if len(labels) > 1 else labels[0]


@contextlib.contextmanager
def _stopping(night: Night) -> Iterator[Night]:
    """Within the block SIGINT and SIGTERM stop a night: at its next safe point, the second time at once."""

    def stop(*_: object) -> None:
        night.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield night
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_plan(workspace: Workspace, operators: Sequence[Operator], left: Sequence[Left], terms: Terms) -> int:
    """What a night would do."""
    from pipeline.tuning import face, local

    face.show_plan(local.scheduler(workspace, operators, terms).plan(), sys.stdout)
    for each in left:
        print(f"left as they are: {_some(each.labels)}: {each.reason}")
    return OK
