"""`doit rollback`: an operator goes back to another tuned function, or to none."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from pipeline.commands.arguments import opt_target
from pipeline.commands.looking import NOTHING, OK, Looking, selection_of
from pipeline.commands.operators import look
from pipeline.config import load_target
from pipeline.errors import ConfigError
from pipeline.lock import FILE, Lock, held_back_for, read
from pipeline.workspace import Selection, Workspace, the_workspace

if TYPE_CHECKING:
    from pipeline.tuning.standings import Operators
    from pipeline.types import Workload

opt_to = {
    "name": "to",
    "short": "",
    "long": "to",
    "type": str,
    "default": "previous",
    "help": "previous, best, none, or the first digits of a candidate [default: previous]",
}
opt_list = {
    "name": "only_list",
    "short": "",
    "long": "list",
    "type": bool,
    "default": False,
    "help": "show the history",
}
opt_reason = {
    "name": "reason",
    "short": "",
    "long": "reason",
    "type": str,
    "default": "",
    "help": "why, for whoever asks `doit why` later",
}


class Rollback(Looking):
    """Writes down which candidate is to be applied."""

    doc_purpose = "go back to another tuned function of an operator, or to none"
    doc_usage = "OPERATOR"
    doc_description = """\
Has builds apply another candidate than the best that tuning found. It stays so, whatever is tuned
later, until it is undone.

  doit rollback conv2d-ca43c360 --list         which ones there were, since when and why
  doit rollback conv2d-ca43c360                to the one before
  doit rollback conv2d-ca43c360 --to 3fa9      to a certain one
  doit rollback conv2d-ca43c360 --to none      to what is next in the target's order
  doit rollback conv2d-ca43c360 --to best      undo: to the best again

The decision travels with the records, to all who share the store. The next build follows it, unless
there is a tuning.lock that names another function: then `doit lock` takes it over.

Exit code: 0 done, 1 there is nothing to go back to, 2 the workspace is at fault.
"""
    cmd_options = (opt_target, opt_to, opt_list, opt_reason)
    name = "rollback"

    def asked(self, params: Any, args: list[str]) -> Selection:
        if not args:
            raise ConfigError("`doit rollback` wants an operator", hint="`doit status` shows their names")
        self._patterns = args
        return selection_of((), params["targets"])

    def _execute(self, to: str, only_list: bool, reason: str) -> int:
        workspace = the_workspace(self.loader.namespace)
        try:
            workspace.gather()
            operators, workload = look(workspace, self._selection, self.dep_manager).only(self._patterns)
            if only_list:
                return _list(operators, workload)
            return _go(workspace, operators, workload, to, reason)
        finally:
            workspace.stop()


def _go(workspace: Workspace, operators: Operators, workload: Workload, to: str, reason: str) -> int:
    from pipeline.tuning.decisions import candidate_of, go_back

    key = operators.key(workload)
    try:
        wanted = candidate_of(operators.ledger.standing(key), operators.ledger.history(key), to)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return NOTHING
    lock = read(workspace.folder / FILE) or Lock()  # one that is broken is told before anything is done
    before = _applied(operators, workload)
    go_back(operators, workload, wanted, reason)
    if workspace.lanes is not None:
        workspace.lanes.publish()
    print(f"{operators.target}:{workload.label}: {before} → {_applied(operators, workload)}")
    if _is_held_back(workspace, operators, workload, lock):
        print(held_back_for(1))
    else:
        print("  → type `doit build` to build with it")
    return OK


def _is_held_back(workspace: Workspace, operators: Operators, workload: Workload, lock: Lock) -> bool:
    """Whether a build goes on with the function that the lock names, whatever was decided now."""
    from pipeline.locking import is_decided_otherwise

    entry = lock.entry(operators.target, workload.digest)
    if entry is None:
        return False
    file = load_target(workspace.target_file(operators.target))
    return is_decided_otherwise(operators.ledger.standing(operators.key(workload)), file, workload, entry)


def _applied(operators: Operators, workload: Workload) -> str:
    """What a build would apply now, in words."""
    from pipeline.report import duration

    applied, _ = operators.ledger.standing(operators.key(workload)).applied()
    if not applied:
        return "no tuned function"
    best = applied[0]
    return f"{best.trial.candidate[:12]} ({duration(best.retest.seconds)}, {best.gain:.2f}x)"


def _list(operators: Operators, workload: Workload) -> int:
    from pipeline.report import duration
    from pipeline.tuning.records import PreferredRecord, RetestRecord

    reigns = operators.ledger.history(operators.key(workload))
    if not reigns:
        print("nothing was ever tuned for it\n  → type `doit tune`", file=sys.stderr)
        return NOTHING
    for reign in reigns:
        if reign.winner is None:
            what = "no tuned function"
        else:
            best = reign.winner
            what = f"{best.trial.candidate[:12]}  {duration(best.retest.seconds)}  {best.gain:.2f}x"
        if isinstance(reign.by, RetestRecord):
            why = "tuned"
        else:
            done = "rolled back" if isinstance(reign.by, PreferredRecord) else "invalidated"
            why = f"{done} by {reign.by.by or 'somebody'}" + (f": {reign.by.reason}" if reign.by.reason else "")
        print(f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(reign.at))}  {what}  {why}")
    print(f"now: {_applied(operators, workload)}")
    return OK
