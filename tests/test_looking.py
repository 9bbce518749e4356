"""What commands have in common that look at a workspace: exit codes, and which tasks doit makes for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from doit.cmd_base import DoitCmdBase

from pipeline.commands.check import Check
from pipeline.commands.invalidate import Invalidate
from pipeline.commands.looking import ERROR, INTERRUPTED, OK, Looking, print_json, selection_of
from pipeline.commands.records import Records
from pipeline.commands.report import Report
from pipeline.commands.rollback import Rollback
from pipeline.commands.status import Status
from pipeline.commands.why import Why
from pipeline.errors import ConfigError
from pipeline.workspace import Selection, selected


class Named(Looking):
    """Looks at the models that are named."""

    name = "named"

    def asked(self, params: Any, args: list[str]) -> Selection:
        if "nothing" in args:
            raise ConfigError("nothing is there", hint="name something")
        return selection_of(args, params["targets"])


def looked(monkeypatch: pytest.MonkeyPatch, command: type[Looking], did: Callable[[], int], *args: str) -> int:
    """The exit code of a command over some models and one target, which does this in place of its work."""
    monkeypatch.setattr(DoitCmdBase, "execute", lambda *_: did())
    made = object.__new__(command)
    return made.execute({"targets": ["native"]}, [*args])


def test_the_tasks_are_those_of_the_selection_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def see() -> int:
        seen.append(selected())
        return OK

    targets = frozenset({"native"})
    assert looked(monkeypatch, Named, see, "a", "b") == OK
    assert looked(monkeypatch, Named, see) == OK
    assert looked(monkeypatch, type("Bare", (Named,), {"makes_tasks": False}), see, "a") == OK
    assert seen == [
        Selection(models=frozenset({"a", "b"}), targets=targets),
        Selection(targets=targets),
        Selection(models=frozenset(), targets=targets),
    ]
    assert selected() == Selection()


def test_what_goes_wrong_is_a_sentence_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise ConfigError("it is broken", hint="mend it")

    def stop() -> int:
        raise KeyboardInterrupt

    assert looked(monkeypatch, Named, fail) == ERROR
    assert capsys.readouterr().err == f"ERROR: {ConfigError('it is broken', hint='mend it')}\n"
    assert looked(monkeypatch, Named, fail, "nothing") == ERROR
    assert "nothing is there" in capsys.readouterr().err
    assert looked(monkeypatch, Named, stop) == INTERRUPTED
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", [Check, Invalidate, Records, Report, Rollback, Status, Why])
def test_every_command_that_looks_is_one(command: type[Looking]) -> None:
    assert issubclass(command, Looking)
    assert command.execute is Looking.execute
    assert command.asked is not Looking.asked


def test_json_is_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    print_json([{"name": "µ", "seconds": None}])
    assert json.loads(capsys.readouterr().out) == [{"name": "µ", "seconds": None}]
