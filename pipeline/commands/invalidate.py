"""`doit invalidate`: throws away what tuning found for some operators, here and wherever the store is shared."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from pipeline.amounts import span_of
from pipeline.commands.arguments import opt_target
from pipeline.commands.build import counted
from pipeline.commands.looking import NOTHING, OK, Looking, print_json, selection_of
from pipeline.commands.operators import Built, look
from pipeline.errors import ConfigError
from pipeline.lock import FILE, Lock, held_back_for, read
from pipeline.types import TUNED
from pipeline.workspace import Selection, Workspace, the_workspace

if TYPE_CHECKING:
    from pipeline.tuning.decisions import Choice, Loss
    from pipeline.tuning.standings import Operators


def _option(name: str, of: type, default: object, told: str) -> dict[str, Any]:
    return {
        "name": name.replace("-", "_"),
        "short": "",
        "long": name,
        "type": of,
        "default": default,
        "help": told,
    }


opt_yes = {
    "name": "yes",
    "short": "y",
    "long": "yes",
    "type": bool,
    "default": False,
    "help": "do it, not only show it",
}


class Invalidate(Looking):
    """Shows what would go, and with --yes has it go."""

    doc_purpose = "throw away what was tuned for some operators, and only for those"
    doc_usage = "[OPERATOR...]"
    doc_description = """\
Shows what would be thrown away and what that costs; with --yes does it. OPERATOR is a name as
`doit status` shows it, with * and ?, or the first digits of a workload digest.

  doit invalidate 'fused_conv2d*'              show: every operator of that name
  doit invalidate 'fused_conv2d*' --yes        do it
  doit invalidate --model squeezenet --yes     the operators of one model
  doit invalidate --older-than 90d             what was tried longer ago
  doit invalidate --toolchain 'tvm 0.26*'      what another version of TVM made
  doit invalidate --implementation tuned       operators that run on a tuned function now
  doit invalidate --gain-below 1.05            gains inside the noise
  doit invalidate --device '*EPYC 7*'          what was measured on another device

What was thrown away counts no longer on any machine that shares the store, and does not come back
when records are merged. The next build takes what is next in the order, unless a tuning.lock names
what was thrown away: then `doit lock` does; `doit tune` tunes these operators again. Nothing else is
touched.

Exit code: 0 shown or done, 1 there is nothing that this means, 2 the workspace is at fault.
"""
    cmd_options = (
        opt_target,
        opt_yes,
        _option("model", list, [], "operators of this model only; may be given several times"),
        _option("implementation", list, [], "operators that run on this now: tuned, onednn, rules, …"),
        _option("older-than", str, "", "records that are older than this: 90d, 12h"),
        _option("toolchain", list, [], "records made with a tool of this version: '0.26*', 'tvm 0.26*'"),
        _option("device", list, [], "records of another device, by its name with * and ?"),
        _option("gain-below", float, 0.0, "operators whose gain is less than this: 1.05"),
        _option("all", bool, False, "every operator"),
        _option("reason", str, "", "why, for whoever asks `doit why` later"),
        _option("json", bool, False, "print JSON instead"),
    )
    name = "invalidate"

    def asked(self, params: Any, args: list[str]) -> Selection:
        self._choice = _choice(params, args)
        self._reason = params["reason"] or f"doit invalidate {' '.join(args)}".strip()
        return selection_of(params["model"], params["targets"])

    def _execute(self, yes: bool, json: bool) -> int:
        workspace = the_workspace(self.loader.namespace)
        try:
            workspace.gather()
            known = look(workspace, self._selection, self.dep_manager)
            if strays := self._choice.strays(each for one in known.operators for each in one.workloads.values()):
                raise ConfigError(f"there is no operator {' '.join(strays)}", hint="`doit status --all` lists them")
            found = [(operators, loss) for operators in known.operators for loss in self._losses(operators, known)]
            lock = read(workspace.folder / FILE) or Lock()
            held = [_is_held_back(operators, loss, lock) for operators, loss in found]
            if json:
                print_json([_plain(loss, is_held) for (_, loss), is_held in zip(found, held, strict=True)])
            else:
                _show([loss for _, loss in found], sum(len(each.workloads) for each in known.operators))
            if not found:
                return NOTHING
            if yes:
                self._do(workspace, found)
                _say_done([loss for _, loss in found], held, sys.stderr if json else sys.stdout)
            elif not json:
                print("Nothing was changed\n  → type the same with --yes to do it")
            return OK
        finally:
            workspace.stop()

    def _losses(self, operators: Operators, known: Built) -> list[Loss]:
        from pipeline.tuning.decisions import losses

        used, seconds = known.used(operators.target), known.seconds(operators.target)
        return [each for each in losses(operators, self._choice, used, seconds, time.time()) if not each.is_empty]

    def _do(self, workspace: Workspace, found: Sequence[tuple[Operators, Loss]]) -> None:
        from pipeline.tuning.decisions import throw_away

        for operators, loss in found:
            throw_away(operators, loss, self._reason)
        if workspace.lanes is not None:
            workspace.lanes.publish()


def _is_held_back(operators: Operators, loss: Loss, lock: Lock) -> bool:
    """Whether a build goes on as if nothing of this was thrown away, as the lock names what goes."""
    from pipeline.tuning.records import RetestRecord, TrialRecord, live

    entry = lock.entry(loss.target, loss.workload.digest)
    if entry is None or loss.key != operators.key(loss.workload):
        return False
    if entry.use != TUNED or not entry.candidate:
        return loss.measured
    members = operators.ledger.members(loss.key)
    left = live({name: each for name, each in members.items() if name not in loss.records})
    tried = {each.candidate for each in left if isinstance(each, TrialRecord)}
    timed = {each.candidate for each in left if isinstance(each, RetestRecord)}
    return loss.measured or entry.candidate not in tried & timed


def _say_done(losses: Sequence[Loss], held: Sequence[bool], out: TextIO) -> None:
    done = counted(len({loss.workload.digest for loss in losses}), "operator")
    build = "" if all(held) else "`doit build` to build without, "
    print(f"Thrown away for {done}\n  → type {build}`doit tune` to tune again", file=out)
    if any(held):
        names = {loss.workload.digest for loss, is_held in zip(losses, held, strict=True) if is_held}
        print(held_back_for(len(names)), file=out)


def _choice(params: Any, patterns: Sequence[str]) -> Choice:
    """Raises ConfigError where nothing says which operators are meant."""
    from pipeline.tuning.decisions import Choice

    choice = Choice(
        patterns=tuple(patterns),
        implementations=tuple(params["implementation"]),
        gain_below=params["gain_below"] or None,
        older_than=span_of(params["older_than"]) if params["older_than"] else None,
        toolchains=tuple(params["toolchain"]),
        devices=tuple(params["device"]),
    )
    if choice == Choice() and not params["model"] and not params["all"]:
        raise ConfigError("`doit invalidate` wants to know which operators", hint="name some, or say --all")
    return choice


def _plain(loss: Loss, is_held: bool) -> dict[str, Any]:
    return {
        "target": loss.target,
        "operator": loss.workload.label,
        "workload": loss.workload.digest,
        "implementation": loss.implementation,
        "device": loss.device,
        "records": len(loss.records),
        "measured": loss.measured,
        "gain": loss.gain,
        "seconds": loss.seconds,
        "spent": loss.spent,
        "held_back": is_held,  # by tuning.lock
    }


def _show(losses: Sequence[Loss], operators: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from pipeline.report import duration

    if not losses:
        print("There is nothing to throw away of the operators that this means")
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("operator")
    table.add_column("runs on")
    for name in ("records", "took", "gain that goes", "slower by"):
        table.add_column(name, justify="right", no_wrap=True)
    for loss in sorted(losses, key=lambda each: (-(each.seconds or 0.0), each.target, each.workload.label)):
        what = [counted(len(loss.records), "record")] if loss.records else []
        what += ["measured times"] if loss.measured else []
        table.add_row(
            f"{loss.target}:{loss.workload.label}",
            loss.implementation,
            ", ".join(what),
            duration(loss.spent) if loss.spent else "",
            f"{loss.gain:.2f}x" if loss.gain != 1 else "",
            duration(loss.seconds) if loss.seconds else "",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    meant = len({(loss.target, loss.workload.digest) for loss in losses})
    spent, slower = sum(loss.spent for loss in losses), sum(loss.seconds or 0.0 for loss in losses)
    print(f"{meant} of {counted(operators, 'operator')}; tuning of {duration(spent)} goes", end="")
    print(f", an inference of all models gets slower by {duration(slower)}" if slower else "")
