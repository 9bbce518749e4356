"""`doit records`: what tuning left behind for each operator; takes MetaSchedule's databases in, and gives them out."""

from __future__ import annotations

import contextlib
import getopt
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from doit.cmd_base import DoitCmdBase
from doit.exceptions import InvalidDodoFile

from pipeline.errors import ConfigError, StageError, TvmakeError, explain_os_error
from pipeline.workspace import Selection, Workspace, selecting, the_workspace

if TYPE_CHECKING:
    from pipeline.hashing import Digest
    from pipeline.models import Model
    from pipeline.tuning.ledger import Ledger
    from pipeline.tuning.records import Standing, TrialRecord
    from pipeline.types import Plan, Workload

OK, NOTHING, ERROR, INTERRUPTED = 0, 1, 2, 130

# The two files of MetaSchedule's JSONDatabase.
WORKLOADS, RECORDS = "database_workload.json", "database_tuning_record.json"
SPACE = "post-order-apply"  # whose decisions are MetaSchedule's traces

opt_json = {"name": "json", "short": "", "long": "json", "type": bool, "default": False, "help": "list as JSON"}
opt_target = {
    "name": "targets",
    "short": "t",
    "long": "target",
    "type": list,
    "default": [],
    "help": "for this target only; may be given several times",
}


class Records(DoitCmdBase):
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
    _verb: Callable[[Workspace, Selection, bool], int]

    def parse_execute(self, in_args: list[str]) -> int:
        """Takes options wherever they stand, also after the names of models."""
        parser = self.cmdparser
        with contextlib.suppress(getopt.error):  # doit says it in words of its own
            given, names = getopt.gnu_getopt(in_args, parser.get_short(), parser.get_long())
            options = [[name] if parser.get_option(name)[0].type is bool else [name, value] for name, value in given]
            in_args = [*itertools.chain(*options), "--", *names]
        code: int = super().parse_execute(in_args)
        return code

    def execute(self, params: Any, args: list[str]) -> int:
        try:
            verb, folder, models = _asked(args)
            self._verb = lambda *given: _VERBS[verb](self.dep_manager, folder, *given)
            self._selection = Selection(models=frozenset(models) or None, targets=frozenset(params["targets"]) or None)
            with selecting(self._selection):
                code: int = super().execute(params, [])
                return code
        except (TvmakeError, InvalidDodoFile) as error:
            print(f"ERROR: {error}", file=sys.stderr)
            return ERROR
        except KeyboardInterrupt:
            return INTERRUPTED

    def _execute(self, json: bool) -> int:
        workspace = the_workspace(self.loader.namespace)
        try:
            return self._verb(workspace, self._selection, json)
        finally:
            workspace.stop()


def _asked(args: Sequence[str]) -> tuple[str, Path, list[str]]:
    """The verb, its folder and the models. Raises ConfigError where that makes no sense."""
    if not args or args[0] not in _VERBS:
        said = f"`doit records {args[0]}` is unknown" if args else "`doit records` wants to know what to do"
        raise ConfigError(said, hint="type `doit records list`, `doit records import FOLDER` or `… export FOLDER`")
    verb, rest = args[0], list(args[1:])
    if verb == "list":
        return verb, Path(), rest
    if not rest:
        raise ConfigError(f"`doit records {verb}` wants a folder", hint=f"type `doit records {verb} FOLDER`")
    return verb, Path(rest[0]), rest[1:]


@dataclass
class _Operators:
    """The operators of one target's models, each once: the plans' workloads, and the keys of their records."""

    target: str
    attributes: Mapping[str, Any]
    is_here: bool
    ledger: Ledger
    workloads: dict[str, Workload] = field(default_factory=dict)
    models: dict[str, list[str]] = field(default_factory=dict)  # those that call it, by workload

    def key(self, workload: Workload) -> str:
        from pipeline.processor import device

        return self.ledger.key_of(workload.digest, self.attributes, device())

    def about(self, workload: Workload) -> dict[str, object]:
        """What a set says of itself."""
        from pipeline.processor import device

        return {
            "operator": workload.name,
            "shapes": workload.shapes,
            "workload": workload.digest,
            "target": dict(self.attributes),
            "device": device(),
        }


def _operators(workspace: Workspace, selection: Selection, plan: Callable[[str, Model], Plan]) -> list[_Operators]:
    """The operators of each target that is selected."""
    from pipeline.tuning.ledger import Ledger

    found: dict[str, _Operators] = {}
    for target, model in workspace.pairs(selection):
        if target not in found:
            resolved = workspace.build.target(target)
            ledger = Ledger(workspace.build.memoizer.store, resolved.file.measure.noise)
            found[target] = _Operators(target, resolved.attributes, resolved.is_here, ledger)
        for workload in plan(target, model).workloads:
            if workload.calls:
                found[target].workloads[workload.digest] = workload
                found[target].models.setdefault(workload.digest, []).append(model.name)
    if not found:
        raise ConfigError("there is no model to look at", hint="write: Workspace(Model.onnx('name', 'model.onnx'))")
    return list(found.values())


# import


def _import(_: Any, folder: Path, workspace: Workspace, selection: Selection, json: bool) -> int:
    database = _database(workspace, folder)
    codes = []
    for operators in _operators(workspace, selection, workspace.build.plan):
        if not operators.is_here:
            _say(
                f"{operators.target}: left out, as nothing can be tried here for it\n  → to apply the records as they "
                f'are, write records = ["{folder}"] into targets/{operators.target}.toml'
            )
            continue
        codes.append(_take(workspace, operators, database, folder))
    return min(codes, default=NOTHING)


def _database(workspace: Workspace, folder: Path) -> dict[str, Digest]:
    """The blobs of a database's two files. Raises ConfigError where they are not there."""
    store = workspace.build.memoizer.store
    try:
        return {part: store.put_file(folder / name) for part, name in _FILES.items()}
    except OSError as error:
        raise ConfigError(
            f"{folder} has no database of MetaSchedule's: {Path(str(error.filename)).name}: {error.strerror}",
            hint=f"name the work_dir of a tuning run, a folder with {WORKLOADS} and {RECORDS}",
        ) from error


_FILES = {"workloads": WORKLOADS, "records": RECORDS}


def _take(workspace: Workspace, operators: _Operators, database: Mapping[str, Digest], folder: Path) -> int:
    """Takes in what a database has of a target's operators, and says what became of it."""
    from pipeline import stages
    from pipeline.memoizer import Action

    memoizer = workspace.build.memoizer
    functions = {f"f{each.digest}": each.function for each in operators.workloads.values()}
    entry = memoizer.run(Action(stages.RECORDS, f"{operators.target}:{folder.name}", {**database, **functions}))
    groups = {name[1:]: digest for name, digest in entry.outputs.items() if name[0] == "g"}
    left: Counter[str] = Counter()
    left["that cannot be read"] = int(memoizer.blob(entry.outputs["unread"]))
    left["of operators that no model has"] = int(memoizer.blob(entry.outputs["foreign"]))

    def claims(digest: str) -> list[TrialRecord]:
        return _claims(workspace, operators, operators.workloads[digest], groups[digest], left)

    taken = known = 0
    with ThreadPoolExecutor(memoizer.workers.limit) as threads:
        for digest, records in zip(groups, threads.map(claims, groups), strict=True):
            key = operators.key(operators.workloads[digest])
            before = memoizer.store.sets.names(key)
            operators.ledger.add(key, operators.about(operators.workloads[digest]), records)
            new = len(memoizer.store.sets.names(key) - before)
            taken, known = taken + new, known + len(records) - new
    _say(f"{operators.target}: {_counted(taken, 'record')} taken, {known} known already")
    for why, count in left.items():
        if count:
            _say(f"  left out: {count} {why}")
    if taken:
        _say("  → type `doit tune`: what is claimed is tried here before it can win")
    return OK if taken or known else NOTHING


def _claims(
    workspace: Workspace, operators: _Operators, workload: Workload, group: Digest, left: Counter[str]
) -> list[TrialRecord]:
    """The records of one operator as claims; those that are left out are counted in `left`, by why."""
    from pipeline import stages
    from pipeline.compiler import search
    from pipeline.memoizer import Action
    from pipeline.tuning.records import TrialRecord

    memoizer = workspace.build.memoizer
    options = {"target": operators.attributes, "space version": search.by_name(SPACE).version}
    inputs = {"function": workload.function, "group": group}
    try:
        outputs = memoizer.run(Action(stages.CLAIM, f"{operators.target}:{workload.label}", inputs, options)).outputs
    except StageError as error:
        if memoizer.workers.stopped:
            raise
        left[f"operator, {workload.label}: {error.message}"] += 1
        return []
    counts = {name: msgspec.json.decode(memoizer.blob(outputs[name])) for name in ("others", "broken", "failed")}
    left["that failed when they were measured"] += counts["failed"]
    for target, count in counts["others"].items():
        left[f"measured on another target: {target}"] += count
    for reason, count in counts["broken"].items():
        left[f"that do not replay: {reason}"] += count
    return msgspec.json.decode(memoizer.blob(outputs["claims"]), type=list[TrialRecord])


# export


def _export(_: Any, folder: Path, workspace: Workspace, selection: Selection, json: bool) -> int:
    there = [name for name in _FILES.values() if (folder / name).exists()]
    if there:
        raise ConfigError(f"{folder} has a database already ({there[0]})", hint="name a new folder")
    found = _operators(workspace, selection, workspace.build.plan)
    if len(found) > 1:
        raise ConfigError(
            f"a database is for one target, and there are {', '.join(each.target for each in found)}",
            hint=f"say which: doit records export {folder} -t {found[0].target}",
        )
    return _give(workspace, found[0], folder)


def _give(workspace: Workspace, operators: _Operators, folder: Path) -> int:
    from pipeline import stages
    from pipeline.memoizer import Action

    memoizer = workspace.build.memoizer
    inputs: dict[str, Digest] = {}
    written = others = 0
    for workload in operators.workloads.values():
        standing = operators.ledger.standing(operators.key(workload))
        candidates = exported(standing)
        others += sum(trial.space != SPACE for trial in standing.trials if trial.seconds)
        if candidates:
            inputs[f"f{len(inputs) // 2}"] = workload.function
            inputs[f"t{len(inputs) // 2}"] = memoizer.store.put(msgspec.json.encode(candidates))
            written += len(candidates)
    if others:
        _say(f"{operators.target}: {_counted(others, 'candidate')} of other spaces than MetaSchedule's left out")
    if not written:
        _say(f"{operators.target}: there are no records to export\n  → type `doit tune`, or see `doit records list`")
        return NOTHING
    options = {"target": operators.attributes}
    outputs = memoizer.run(Action(stages.EXPORT, f"{operators.target}:{folder.name}", inputs, options)).outputs
    broken = int(memoizer.blob(outputs["broken"]))
    _write(folder, {name: memoizer.blob(outputs[part]) for part, name in _FILES.items()})
    left = f"; {broken} that this TVM cannot read left out" if broken else ""
    operators_said = _counted(len(inputs) // 2, "operator")
    _say(f"{operators.target}: {_counted(written - broken, 'record')} of {operators_said} written to {folder}{left}")
    return OK


def exported(standing: Standing) -> list[tuple[Any, float]]:
    """Decisions and seconds of the candidates that a database of MetaSchedule's shall hold, the fastest first.

    All seconds are as if measured beside the fastest baseline, so that drift between two nights decides nothing. Who
    reads a database takes the fastest: so what seems faster than the best winner and was never confirmed stays here.
    """
    from pipeline.tuning.records import ratio

    baseline = standing.baseline or 1.0
    winners = {winner.trial.candidate: winner.gain for winner in standing.winners}
    limit = standing.best.gain if standing.best is not None else float("inf")
    ratios = [(trial, winners.get(trial.candidate, ratio(trial))) for trial in standing.trials if trial.space == SPACE]
    kept = [(trial, gain) for trial, gain in ratios if 0 < gain <= limit]
    kept.sort(key=lambda each: (-each[1], each[0].candidate not in winners, each[0].candidate))
    return [(trial.decisions, baseline / gain) for trial, gain in kept]


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    from pipeline.store.files import written_atomically

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            with written_atomically(folder / name, folder) as stream:
                stream.write(data)
            (folder / name).chmod(0o644)  # whoever loads it may add to it
    except OSError as error:
        raise explain_os_error(error, f"writing {folder}") from error


# list


def _list(done: Any, _: Path, workspace: Workspace, selection: Selection, json: bool) -> int:
    def plan(target: str, model: Model) -> Plan:
        return _remembered(done, workspace, target, model) or workspace.build.plan(target, model)

    rows = [row for operators in _operators(workspace, selection, plan) for row in _rows(operators)]
    told = [row for row in rows if row["trials"] or row["claims"] or row["unread"]]
    told.sort(key=lambda row: -row["spent"])
    if json:
        print(msgspec.json.format(msgspec.json.encode(told)).decode())
    elif told:
        _show(told)
    if len(told) < len(rows):
        _say(f"{_counted(len(rows) - len(told), 'operator')} without records\n  → type `doit tune` to find some")
    return OK if told else NOTHING


def _remembered(done: Any, workspace: Workspace, target: str, model: Model) -> Plan | None:
    """The plan of the last extraction, where doit remembers it: so that a list needs no TVM."""
    from pipeline.hashing import Digest
    from pipeline.types import Plan

    kept = (done.get_values(f"extract:{target}:{model.name}") or {}).get("plan")
    data = workspace.build.memoizer.store.get(Digest(*kept)) if kept else None
    try:
        return msgspec.json.decode(data, type=Plan) if data is not None else None
    except msgspec.DecodeError:
        return None  # of another version of tvmake


def _rows(operators: _Operators) -> Iterable[dict[str, Any]]:
    for workload in operators.workloads.values():
        key = operators.key(workload)
        standing = operators.ledger.standing(key)
        best = standing.best
        yield {
            "target": operators.target,
            "operator": workload.label,
            "shapes": workload.shapes,
            "models": operators.models[workload.digest],
            "key": key,
            "trials": len(standing.trials),
            "timed": standing.timed,
            "failures": dict(standing.failures),
            "claims": len(standing.claims),
            "unread": operators.ledger.unread(key),
            "winners": len(standing.winners),
            "gain": standing.gain,
            "baseline": standing.baseline,
            "best": best.retest.seconds if best is not None else None,
            "spent": standing.spent,
        }


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from pipeline.report import duration

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("operator")
    for name in ("trials", "timed", "failed", "claimed", "winners", "baseline", "gain", "spent"):
        table.add_column(name, justify="left" if name == "failed" else "right", no_wrap=name != "failed")
    for row in rows:
        failed = ", ".join(f"{count} {cause}" for cause, count in sorted(row["failures"].items()))
        unread = f"{row['unread']} unread" if row["unread"] else ""
        table.add_row(
            f"{row['target']}:{row['operator']}",
            str(row["trials"]),
            str(row["timed"]),
            ", ".join(filter(None, (failed, unread))),
            str(row["claims"] or ""),
            str(row["winners"]),
            duration(row["baseline"]) if row["baseline"] else "",
            f"{row['gain']:.2f}x",
            duration(row["spent"]),
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)


_VERBS: dict[str, Callable[..., int]] = {"list": _list, "import": _import, "export": _export}


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing if number == 1 else thing + 's'}"
