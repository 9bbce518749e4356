"""What commands have in common that look at a workspace, or decide about its operators, and run no task."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from doit.cmd_base import DoitCmdBase
from doit.exceptions import InvalidDodoFile

from pipeline.commands.arguments import OptionsAnywhere
from pipeline.errors import NotBuiltError, TvmakeError
from pipeline.types import Profile
from pipeline.workspace import Selection, Workspace, selecting

if TYPE_CHECKING:
    from pipeline.models import Model

OK, NOTHING, ERROR, INTERRUPTED = 0, 1, 2, 130


class Looking(OptionsAnywhere, DoitCmdBase):
    """A command over a selection; what goes wrong becomes a sentence and an exit code.

    makes_tasks  whether doit first makes the tasks of the selection. To make those of ten thousand operators takes
                 longer than all the rest of a command that needs none
    """

    makes_tasks = True
    dep_manager: Any
    _selection: Selection

    def asked(self, params: Any, args: list[str]) -> Selection:
        """What was typed is about; a command keeps here what else it was told. Raises ConfigError where that makes no
        sense."""
        raise NotImplementedError

    def execute(self, params: Any, args: list[str]) -> int:
        try:
            self._selection = self.asked(params, args)
            tasks = self._selection if self.makes_tasks else replace(self._selection, models=frozenset())
            with selecting(tasks):
                code: int = super().execute(params, [])
                return code
        except (TvmakeError, InvalidDodoFile) as error:
            print(f"ERROR: {error}", file=sys.stderr)
            return ERROR
        except KeyboardInterrupt:
            return INTERRUPTED

    def profile(self, target: str, model: str) -> Profile | None:
        return profile_of(self.dep_manager, target, model)


def profile_of(manager: Any, target: str, model: str) -> Profile | None:
    """The times that the last build of a model took down, as doit remembers them; None where it took none."""
    kept = (manager.get_values(f"profile:{target}:{model}") or {}).get("profile")
    return msgspec.convert(kept, Profile) if kept else None


def require_built(workspace: Workspace, target: str, model: Model) -> Path:
    """The folder of an artifact. Raises NotBuiltError where there is none yet."""
    folder = workspace.artifact(target, model)
    if not folder.exists():
        raise NotBuiltError(f"{target}:{model.name} is not built", hint=f"type `doit build {model.name}`")
    return folder


def selection_of(models: Iterable[str], targets: Iterable[str]) -> Selection:
    """These models and targets; all where none is named."""
    return Selection(models=frozenset(models) or None, targets=frozenset(targets) or None)


def print_json(value: object) -> None:
    """For programs, on standard output."""
    print(msgspec.json.format(msgspec.json.encode(value)).decode())
