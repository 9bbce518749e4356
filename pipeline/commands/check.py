"""`doit check`: whether the built models keep what [policy] of their targets asks for. For CI; builds nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.commands.arguments import opt_json, opt_target
from pipeline.commands.looking import OK, Looking, print_json, selection_of
from pipeline.errors import ConfigError
from pipeline.workspace import Selection, the_workspace

if TYPE_CHECKING:
    from pipeline.tuning.policy import Breach
    from pipeline.tuning.status import Standing

    Judged = tuple[Standing, list[Breach]]

BROKEN, NOT_BUILT = 1, 3

_SHOWN = 5  # operators that are named for one rule; JSON has all

opt_markdown = {
    "name": "markdown",
    "short": "",
    "long": "markdown",
    "type": bool,
    "default": False,
    "help": "print a table in Markdown, for a comment on a pull request",
}


class Check(Looking):
    """Looks at what `doit status` shows, and judges it."""

    doc_purpose = "hold the built models against [policy] of their targets, for CI"
    doc_usage = "[MODEL...]"
    doc_description = """\
Says whether every model, as it is built, keeps what [policy] in targets/<name>.toml asks for:

  [policy]
  tuned = 0.9          this share of the operators' time on what was tuned, written by hand or
                       taken from a library, not on "rules" or "default"
  validated = true     every tuned function in use validated with the tools that are installed
  younger = 180        … within so many days
  regression = true    no operator, nor a model, slower than tuning.lock says, beyond the noise

  doit check                   every model of every target that has a policy
  doit check net -t cpu        one model, one target
  doit check --markdown        a table for a pull request
  doit check --json            the same for programs

Exit code: 0 all kept, 1 a rule is broken, 2 the workspace is at fault or no target has a policy,
3 a model is not built.
"""
    cmd_options = (opt_target, opt_markdown, opt_json)
    name = "check"
    makes_tasks = False

    def asked(self, params: Any, args: list[str]) -> Selection:
        return selection_of(args, params["targets"])

    def _execute(self, markdown: bool, json: bool) -> int:
        from pipeline.tuning.policy import asks, breaches
        from pipeline.tuning.status import look

        standings = look(the_workspace(self.loader.namespace), self._selection, self.dep_manager.get_values)
        asked = [each for each in standings if asks(each.file.policy)]
        if not asked:
            raise ConfigError(
                "no target has a policy to check", hint="write into targets/<name>.toml: [policy] with tuned = 0.9"
            )
        judged = [(each, [] if each.problem else breaches(each)) for each in asked]
        if json:
            print_json([_plain(*each) for each in judged])
        else:
            print("\n".join(_markdown(judged) if markdown else _text(judged)))
        if any(found for _, found in judged):
            return BROKEN
        return NOT_BUILT if any(each.problem for each in asked) else OK


def _plain(standing: Standing, found: Sequence[Breach]) -> dict[str, Any]:
    return {
        "target": standing.target,
        "model": standing.model,
        "problem": standing.problem,
        "is_kept": not found and not standing.problem,
        "tuned": standing.tuned(),
        "broken": [
            {"rule": each.rule, "asked": each.asked, "is": each.is_, "operators": each.operators, "next": each.next}
            for each in found
        ],
    }


def _text(judged: Sequence[Judged]) -> list[str]:
    """A line for each model that keeps everything, and for each rule that is broken."""
    lines: list[str] = []
    for standing, found in judged:
        if standing.problem:
            lines += [f"{standing.name}: {standing.problem}", f"  → type `doit build {standing.model}`"]
        elif not found:
            lines.append(f"{standing.name}: kept; {_sum(standing)}")
        for each in found:
            names = f": {_some(each.operators)}" if each.operators else ""
            lines.append(f"{standing.name}: {each.rule}: {each.is_}; asked: {each.asked}{names}")
            lines.append(f"  → type `{each.next}`")
    return lines


def _sum(standing: Standing) -> str:
    tuned = [row for row in standing.rows if row.validated is not None]
    valid = f", {sum(bool(row.validated) for row in tuned)} of {len(tuned)} tuned functions validated" if tuned else ""
    return f"{standing.tuned():.0%} tuned or of a library{valid}"


def _markdown(judged: Sequence[Judged]) -> list[str]:
    lines = ["| model | rule | asked | is | operators | next |", "|---|---|---|---|---|---|"]
    for standing, found in judged:
        if standing.problem:
            lines.append(_row(standing.name, "❌ built", "", standing.problem, "", f"`doit build {standing.model}`"))
        elif not found:
            lines.append(_row(standing.name, "✅ all", "", _sum(standing), "", ""))
        for each in found:
            named = _some([f"`{name}`" for name in each.operators])
            lines.append(_row(standing.name, f"❌ {each.rule}", each.asked, each.is_, named, f"`{each.next}`"))
    return lines


def _row(*cells: str) -> str:
    escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{rest}"
