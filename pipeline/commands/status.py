"""`doit status`: where each operator of the built models stands, and what to do next. Builds nothing, tunes nothing."""

from __future__ import annotations

import fnmatch
import gc
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline.commands.arguments import opt_json, opt_target
from pipeline.commands.looking import NOTHING, OK, Looking, print_json, selection_of
from pipeline.errors import ConfigError
from pipeline.workspace import Selection, Workspace, the_workspace

if TYPE_CHECKING:
    from pipeline.tuning.status import Row, Standing

_WIDTH, _HEIGHT = 200, 40  # where the output is no terminal
_FEW = 12  # characters of shapes that are better than none
_AROUND = 6  # lines of a model that are no operator: head, sum, its line
_FEWEST = 3  # operators of a model that are shown whatever the height

opt_all = {"name": "all", "short": "a", "long": "all", "type": bool, "default": False, "help": "show every operator"}


class Status(Looking):
    """Reads the manifests of artifacts, the times that the last build took down, and tuning records."""

    doc_purpose = "show where each operator stands, and what to do next"
    doc_usage = "[MODEL | OPERATOR...]"
    doc_description = """\
Shows the operators of each model as it is built: what each runs on, its share of the time, what
was tuned for it, whether that is still good, and what to type where something needs doing. What
needs doing is first, by the time that it is about; what does not fit on the screen is summed up.

  doit status                        every model, one screen
  doit status squeezenet             one model
  doit status 'fused_conv2d*'        operators by name, with * and ?
  doit status --all                  every operator
  doit status --json                 the same for programs

  fresh         tuned, or nothing faster was found   stale     by [stale] in targets/<name>.toml
  not built in  a build would use what was found     failed    nothing of what was tried can be used
  never tuned   nothing was tried on this machine    locked    tuning.lock says what is used
  rolled back   somebody chose what is used          left      tuning would change nothing

"gain" is over the default where that was timed, otherwise over what is used without tuning.

Exit code: 0 shown, 1 a model is not built yet, 2 the workspace is at fault.
"""
    cmd_options = (opt_target, opt_all, opt_json)
    name = "status"
    makes_tasks = False

    def asked(self, params: Any, args: list[str]) -> Selection:
        self._names = args  # of models or operators: which, only the workspace knows
        return selection_of((), params["targets"])

    def _execute(self, all: bool, json: bool) -> int:
        from pipeline.tuning.status import look

        gc.disable()  # thousands of records make no cycles, and the process ends
        workspace = the_workspace(self.loader.namespace)
        models, patterns = _split(workspace, self._names)
        standings = look(workspace, replace(self._selection, models=models), self.dep_manager.get_values)
        standings = _only(standings, patterns)
        if json:
            print_json(list(map(_plain, standings)))
        else:
            _show(standings, is_whole=all, is_part=bool(patterns))
        missing = [each for each in standings if each.problem]
        for each in missing:
            print(f"{each.name}: {each.problem}\n  → type `doit build {each.model}`", file=sys.stderr)
        return NOTHING if missing else OK


def _split(workspace: Workspace, names: Sequence[str]) -> tuple[frozenset[str] | None, list[str]]:
    """The models that are named (None: all), and the patterns of operators."""
    known = {model.name for model in workspace.models}
    return frozenset(known & set(names)) or None, [name for name in names if name not in known]


def _only(standings: Sequence[Standing], patterns: Sequence[str]) -> list[Standing]:
    """The models with the operators that are meant alone. Raises ConfigError where there is none of a name."""
    if not patterns:
        return list(standings)
    wanted = {
        id(row)
        for standing in standings
        for row in standing.rows
        if any(_matches(row, standing.target, pattern) for pattern in patterns)
    }
    if not wanted and any(standing.rows for standing in standings):
        raise ConfigError(
            f"no model or operator is named {', '.join(patterns)}", hint="see their names with: doit status --all"
        )
    chosen = [replace(each, rows=[row for row in each.rows if id(row) in wanted]) for each in standings]
    return [each for each in chosen if each.rows or each.problem]


def _matches(row: Row, target: str, pattern: str) -> bool:
    if ":" in pattern:
        return fnmatch.fnmatchcase(f"{target}:{row.operator}", pattern)
    names = (row.operator, row.operator.rpartition("-")[0], row.workload)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _plain(standing: Standing) -> dict[str, Any]:
    from pipeline.tuning.status import by_urgency

    return {
        "target": standing.target,
        "model": standing.model,
        "problem": standing.problem,
        "seconds": standing.seconds,
        "operators_seconds": standing.total(),
        "implementations": standing.implementations(),
        "states": standing.states(),
        "tuned": standing.tuned(),
        "operators": [msgspec.to_builtins(row) for row in by_urgency(standing.rows)],
    }


# --- for people -------------------------------------------------------------------------------------------------------


def _show(standings: Sequence[Standing], is_whole: bool, is_part: bool) -> None:
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    console = Console(width=None if is_terminal else _WIDTH)
    built = [each for each in standings if not each.problem]
    height = console.size.height if is_terminal else _HEIGHT
    most = max(_FEWEST, height // max(1, len(built)) - _AROUND)
    for each in built:
        console.print(_table(each, console.width, None if is_whole else most))
        if not is_part:
            console.print(line(each), markup=False, highlight=False, soft_wrap=True)


_COLUMNS = (
    "operator",
    "shapes",
    "calls",
    "share",
    "time",
    "runs on",
    "gain",
    "trials",
    "valid",
    "age",
    "state",
    "next",
)
_RIGHT = frozenset({"calls", "share", "time", "gain", "trials", "valid", "age"})
# Columns that give way where the screen is narrow: how many characters each gets at first, then, and at last.
_ELASTIC = {"operator": (18, 28, 48), "state": (18, 44, 100), "shapes": (0, 24, 60)}
_NEEDED = 60  # characters that they shall have together: as long as there are fewer, another column goes
_LEAST_WANTED = ("valid", "trials", "calls", "age", "gain")
_GAP = 2


def _table(standing: Standing, width: int, most: int | None) -> Any:
    """The operators, what needs doing first; beyond `most` they are summed up. Each takes one line."""
    from rich.table import Table
    from rich.text import Text

    from pipeline.tuning.status import by_urgency

    rows = by_urgency(standing.rows)
    shown = rows if most is None or len(rows) <= most + 1 else rows[:most]
    cells = [_cells(row) for row in shown]
    if len(shown) < len(rows):
        cells.append(_rest(rows[len(shown) :]))
    widths = _widths(cells, width)
    made = Table(title=standing.name, title_justify="left", box=None, padding=(0, _GAP, 0, 0), pad_edge=False)
    for name, wide in widths.items():
        if wide:
            made.add_column(
                name, justify="right" if name in _RIGHT else "left", no_wrap=True, width=wide, overflow="ellipsis"
            )
    for row in cells:
        made.add_row(*(Text(row[name]) for name, wide in widths.items() if wide))
    return made


def _widths(cells: Sequence[dict[str, str]], width: int) -> dict[str, int]:
    """How wide each column is; 0 for one that is left out."""
    wanted = {name: max(len(name), *(len(row[name]) for row in cells)) if cells else len(name) for name in _COLUMNS}
    widths = {name: wide for name, wide in wanted.items() if name not in _ELASTIC}
    left = width - sum(widths.values()) - _GAP * len(_COLUMNS)
    for name in _LEAST_WANTED:
        if left < _NEEDED:
            left += widths.pop(name) + _GAP
    given = dict.fromkeys(_ELASTIC, 0)
    for stage in range(3):
        for name, limits in _ELASTIC.items():
            more = max(0, min(left, min(wanted[name], limits[stage]) - given[name]))
            given[name] += more
            left -= more
    if given["shapes"] < _FEW:
        given["shapes"] = 0
    return {name: given.get(name, widths.get(name, 0)) for name in _COLUMNS}


def _cells(row: Row) -> dict[str, str]:
    from pipeline.report import duration

    texts = (
        row.operator,
        " ".join(row.shapes),
        str(row.calls),
        f"{row.share:.1%}" if row.share is not None else "",
        duration(row.seconds) if row.seconds is not None else "",
        row.implementation,
        f"{row.gain:.2f}" if row.gain is not None else "",
        str(row.trials or ""),
        {True: "yes", False: "no", None: ""}[row.validated],
        _age(row.age),
        f"{row.state}: {row.why}" if row.why else str(row.state),
        row.next,
    )
    return dict(zip(_COLUMNS, texts, strict=True))


def _rest(rows: Sequence[Row]) -> dict[str, str]:
    """Many operators in one row."""
    from pipeline.report import duration

    states = Counter(str(row.state) for row in rows)
    shares = [row.share for row in rows if row.share is not None]
    seconds = [row.seconds for row in rows if row.seconds is not None]
    return dict.fromkeys(_COLUMNS, "") | {
        "operator": f"{len(rows)} more",
        "calls": str(sum(row.calls for row in rows)),
        "share": f"{sum(shares):.1%}" if shares else "",
        "time": duration(sum(seconds)) if seconds else "",
        "trials": str(sum(row.trials for row in rows) or ""),
        "state": ", ".join(f"{count} {state}" for state, count in states.most_common()),
        "next": "doit status --all",
    }


def _age(age: float | None) -> str:
    """0.004 → "6 min", 0.5 → "12 h", 40.2 → "40 d"."""
    if age is None:
        return ""
    if age >= 2:
        return f"{age:.0f} d"
    return f"{age * 24:.0f} h" if age * 24 >= 2 else f"{age * 1440:.0f} min"


def line(standing: Standing) -> str:
    """A model in one line: how long it takes, what it runs on, and how much of that needs doing something about."""
    from pipeline.report import duration
    from pipeline.tuning.status import State

    count = f"{len(standing.rows)} operator{'' if len(standing.rows) == 1 else 's'}"
    timed = f"{duration(standing.seconds)} an inference" if standing.seconds is not None else "not timed"
    used = ", ".join(f"{name} {share:.0%}" for name, share in standing.implementations().items())
    tuned = [row for row in standing.rows if row.validated is not None]
    valid = f"{sum(bool(row.validated) for row in tuned)} of {len(tuned)} tuned functions validated" if tuned else ""
    about: list[str] = []
    for state in (State.FAILED, State.STALE, State.NEVER, State.READY):
        rows = [row for row in standing.rows if row.state is state]
        seconds = sum(row.seconds or 0.0 for row in rows)
        about += [f"{len(rows)} {state}{f' ({duration(seconds)})' if seconds else ''}"] if rows else []
    parts = [timed, count, used, valid, *(about or ["nothing to do"])]
    return f"{standing.name}: {'; '.join(filter(None, parts))}"
