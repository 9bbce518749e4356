"""`doit records`: what tuning left behind for each operator; takes MetaSchedule's databases in, and gives them out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.arguments import Verb, opt_target, the_verb
from pipeline.commands.build import counted
from pipeline.commands.looking import NOTHING, OK, Looking, print_json, selection_of
from pipeline.errors import ConfigError
from pipeline.tasks import remembered_plan
from pipeline.workspace import Selection, Workspace, the_workspace

if TYPE_CHECKING:
    from pipeline.models import Model
    from pipeline.tuning.databases import Given, Taken
    from pipeline.tuning.standings import Row
    from pipeline.types import Plan

opt_json = {"name": "json", "short": "", "long": "json", "type": bool, "default": False, "help": "list as JSON"}


@dataclass(frozen=True)
class Asked:
    """What was typed, beside the selection."""

    folder: Path
    json: bool


Act = Callable[[Workspace, Selection, Asked], int]


class Records(Looking):
    """One command with three verbs."""

    doc_purpose = "list tuning records; take in and give out databases of MetaSchedule's"
    doc_usage = "list [MODEL...] | import FOLDER [MODEL...] | export FOLDER [MODEL...]"
    doc_description = """\
Tuning records are kept in the store, a set for each operator, target
and machine. A database is MetaSchedule's: the work_dir of a tuning run.

  doit records list              what is known of each operator
  doit records list --json       the same for programs
  doit records import work_dir   takes a database in
  doit records export work_dir   writes one, which JSONDatabase loads
  doit records export w -t cpu net    of one model, for one target

What is imported are claims: `doit tune` tries them here before they
can win. Records measured on another target are counted and left out.
A database is written for one target, as MetaSchedule does not look at
the target when it looks up a record.

Exit code: 0 done, 1 there was nothing to do it with, 2 the workspace
or the folder is at fault, 130 interrupted.
"""
    cmd_options = (opt_target, opt_json)
    name = "records"
    _act: Act
    _asked: Asked

    def asked(self, params: Any, args: list[str]) -> Selection:
        self._act, folder, names = the_verb(self, VERBS, args)
        self._asked = Asked(Path(folder), params["json"])
        return selection_of(names, params["targets"])

    def _execute(self) -> int:
        workspace = the_workspace(self.loader.namespace)
        try:
            return self._act(workspace, self._selection, self._asked)
        finally:
            workspace.stop()


# import


def _import(workspace: Workspace, selection: Selection, asked: Asked) -> int:
    from pipeline.tuning import databases, standings

    database = databases.read(workspace.store, asked.folder)
    codes = [NOTHING]
    for operators in standings.operators(workspace, selection, workspace.build.plan):
        if operators.is_here:
            taken = databases.take(workspace.build.memoizer, operators, database, asked.folder.name)
            codes.append(_say_taken(operators.target, taken))
        else:
            _say(
                f"{operators.target}: left out, as nothing can be tried here for it\n  → to apply the records as they "
                f'are, write records = ["{asked.folder}"] into targets/{operators.target}.toml'
            )
    return min(codes)


def _say_taken(target: str, taken: Taken) -> int:
    _say(f"{target}: {counted(taken.new, 'record')} taken, {taken.known} known already")
    for why, count in taken.left.items():
        if count:
            _say(f"  left out: {count} {why}")
    if taken.new:
        _say("  → type `doit tune`: what is claimed is tried here before it can win")
    return OK if taken.new or taken.known else NOTHING


# export


def _export(workspace: Workspace, selection: Selection, asked: Asked) -> int:
    from pipeline.tuning import databases, standings

    databases.require_free(asked.folder)
    found = standings.operators(workspace, selection, workspace.build.plan)
    if len(found) > 1:
        raise ConfigError(
            f"a database is for one target, and there are {', '.join(each.target for each in found)}",
            hint=f"say which: doit records export {asked.folder} -t {found[0].target}",
        )
    given = databases.give(workspace.build.memoizer, found[0], asked.folder)
    return _say_given(found[0].target, given, asked.folder)


def _say_given(target: str, given: Given, folder: Path) -> int:
    if given.others:
        _say(f"{target}: {counted(given.others, 'candidate')} of other spaces than MetaSchedule's left out")
    left = f"; {given.broken} that this TVM cannot read left out" if given.broken else ""
    if not given.records:
        _say(f"{target}: there are no records to export{left}\n  → type `doit tune`, or see `doit records list`")
        return NOTHING
    told = f"{counted(given.records, 'record')} of {counted(given.operators, 'operator')}"
    _say(f"{target}: {told} written to {folder}{left}")
    return OK


# list


def _list(workspace: Workspace, selection: Selection, asked: Asked) -> int:
    from pipeline.tuning import standings

    def plan(target: str, model: Model) -> Plan:
        return remembered_plan(target, model) or workspace.build.plan(target, model)

    rows = [row for operators in standings.operators(workspace, selection, plan) for row in operators.rows()]
    told = sorted((row for row in rows if not row.is_empty), key=lambda row: -row.spent)
    if asked.json:
        print_json(told)
    elif told:
        _show(told)
    if len(told) < len(rows):
        _say(f"{counted(len(rows) - len(told), 'operator')} without records\n  → type `doit tune` to find some")
    return OK if told else NOTHING


def _show(rows: Sequence[Row]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from pipeline.report import duration

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("operator")
    for name in ("trials", "timed", "failed", "claimed", "winners", "baseline", "gain", "spent"):
        table.add_column(name, justify="left" if name == "failed" else "right", no_wrap=name != "failed")
    for row in rows:
        failed = [f"{count} {cause}" for cause, count in sorted(row.failures.items())]
        table.add_row(
            f"{row.target}:{row.operator}",
            str(row.trials),
            str(row.timed),
            ", ".join([*failed, *([f"{row.unread} unread"] if row.unread else [])]),
            str(row.claims or ""),
            str(row.winners),
            duration(row.baseline) if row.baseline else "",
            f"{row.gain:.2f}x",
            duration(row.spent),
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)


VERBS: dict[str, Verb[Act]] = {
    "list": Verb(_list, frozenset({"targets", "json"}), takes_names=True),
    "import": Verb(_import, frozenset({"targets"}), "a folder", takes_names=True),
    "export": Verb(_export, frozenset({"targets"}), "a folder", takes_names=True),
}


def _say(text: str) -> None:
    print(text, file=sys.stderr)
