"""`doit doctor`: whether this machine can do what tvmake needs, one line a check. Needs no dodo.py."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

from doit.cmd_base import Command
from doit.cmdparse import CmdParseError

from pipeline.doctor import CHECKS, Finding, State, examine

_OPTION_JSON = {
    "name": "json",
    "short": "",
    "long": "json",
    "type": bool,
    "default": False,
    "help": "print one JSON document: ok, and findings with name, state, said, hint",
}
_COLOURS = {State.OK: "green", State.WARNING: "yellow", State.FAULT: "bold red"}
_STATE_WIDTH = max(len(state) for state in State) + 2
_NAME_WIDTH = max(len(check.title) for check in CHECKS) + 2
_INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended


class Doctor(Command):  # type: ignore[misc]  # doit ships no types
    """The command. Its exit status: 0 when there is no fault, 1 when there is one."""

    name = "doctor"
    doc_purpose = "check that this machine has what tvmake needs"
    doc_usage = "[--json]"
    doc_description = (
        "Prints one line for each check: ok, warning or fault, what was found, and what to type where something is "
        "to be done.\nexit status: 0 no fault, 1 at least one"
    )
    cmd_options = (_OPTION_JSON,)

    def execute(self, opt_values: Mapping[str, Any], pos_args: Sequence[str]) -> int:
        if pos_args:
            raise CmdParseError(f"doctor takes no arguments: {' '.join(pos_args)}")
        try:
            with closing(examine()) as findings:
                return _print_json(findings) if opt_values["json"] else _print_lines(findings)
        except KeyboardInterrupt:
            return _INTERRUPTED


def _print_json(findings: Iterable[Finding]) -> int:
    found = list(findings)
    faultless = all(finding.state is not State.FAULT for finding in found)
    print(json.dumps({"ok": faultless, "findings": [asdict(finding) for finding in found]}, indent=2))
    return 0 if faultless else 1


def _print_lines(findings: Iterable[Finding]) -> int:
    write = _writer()
    counts: Counter[State] = Counter()
    for finding in findings:
        counts[finding.state] += 1
        write(finding.state, _line(finding))
    worst = next((state for state in (State.FAULT, State.WARNING) if counts[state]), State.OK)
    write(worst, f"{_counted(counts[State.FAULT], 'fault')}, {_counted(counts[State.WARNING], 'warning')}")
    return 1 if counts[State.FAULT] else 0


def _line(finding: Finding) -> str:
    line = f"{finding.state:<{_STATE_WIDTH}}{finding.name:<{_NAME_WIDTH}}{' '.join(finding.said.split())}"
    return f"{line}\n{' ' * _STATE_WIDTH}→ {finding.hint}" if finding.hint else line


def _counted(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'s' * (count > 1)}"


def _writer() -> Callable[[State, str], None]:
    """Prints a line whose first word is coloured by a state, in a terminal and where rich is installed."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.text import Text
        except ImportError:
            return _write_plain
        console = Console()

        def write(state: State, line: str) -> None:
            word, space, rest = line.partition(" ")
            console.print(Text.assemble((word, _COLOURS[state]), space, rest), soft_wrap=True)

        return write
    return _write_plain


def _write_plain(state: State, line: str) -> None:
    # What a pipe's encoding does not have is no reason to fail.
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "replace").decode(encoding), flush=True)
