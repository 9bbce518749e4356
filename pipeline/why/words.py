"""One change in words: a table of paths, and a small function for each.

    ("codegen", "tools", "tvm")                "0.26.0" → "0.27.0"    TVM 0.26.0 → 0.27.0
    ("apply", "options", "target", "num-cores")       4 → 8           target attribute num-cores: 4 → 8
    ("apply", "options", "what nobody knew")          1 → 2           option what nobody knew of stage apply: 1 → 2

A function gets the change and what it is about, and answers with a sentence, or with "" where the change follows from
another that is told. The first line of the table that matches counts, and the last matches everything.
"""

from __future__ import annotations

import fnmatch
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.journal import Noted, Operator
from pipeline.report import duration
from pipeline.tuning.records import BEST, NONE, PreferredRecord, WithdrawnRecord
from pipeline.why.changes import ABSENT, Change
from pipeline.why.evidence import Evidence, Records, records_of, rules_for

_LONGEST = 60  # characters of a value that are shown


@dataclass(frozen=True)
class About:
    """What a change is about: two builds, and where there is one the operator and which of its actions."""

    evidence: Evidence
    before: Noted
    after: Noted
    operator: Operator | None = None
    slot: str = ""
    beside: tuple[Change, ...] = ()  # all that changed in the same action

    @property
    def strategy(self) -> str:
        """What the action is for: of an apply the strategy."""
        return self.slot.partition(":")[2]

    @cached_property
    def records(self) -> Records:
        return records_of(self.evidence, self.after, self.operator) if self.operator is not None else Records({})


Say = Callable[[Change, About], str]


@dataclass(frozen=True)
class Cause:
    """A change that explains something: of which kind it is, and what is said of it."""

    kind: str
    said: str
    path: tuple[str, ...]
    before: object
    after: object


def cause(change: Change, about: About) -> Cause | None:
    """A change in words; None where it follows from another."""
    say = next(say for pattern, say in TABLE if _matches(change.path, pattern))
    said = say(change, about)
    return Cause(say.__name__.strip("_").replace("_", " "), said, change.path, *_plain(change)) if said else None


def _matches(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if pattern and pattern[-1] == "**":
        pattern = pattern[:-1]
        path = path[: len(pattern)]
    return len(path) == len(pattern) and all(map(fnmatch.fnmatchcase, path, pattern))


def _plain(change: Change) -> tuple[object, object]:
    return tuple(None if value is ABSENT else value for value in (change.before, change.after))  # type: ignore[return-value]


# what everything rests on


def tool(change: Change, about: About) -> str:
    name = change.path[2]
    if name == "libtvm":
        others = about.before.state.tools.get("tvm"), about.after.state.tools.get("tvm")
        return "" if others[0] != others[1] else "TVM's compiler library is another build of the same version"
    if name == "host":
        return "this machine's processor, or what the system tells of it, is another"
    return f"{_TOOLS.get(name, name)} {_change(change)}"


_TOOLS = {"tvm": "TVM", "tvm-ffi": "TVM's FFI", "cc": "the C++ compiler:"}


def stage_version(change: Change, about: About) -> str:
    return f"stage {change.path[0]}: version {_change(change)}"


def strategy_version(change: Change, about: About) -> str:
    return f"strategy {about.strategy}: version {_change(change)}"


def target_attribute(change: Change, about: About) -> str:
    if len(change.path) == 3:
        return f"target: {_change(change)}"
    return f"target attribute {'.'.join(change.path[3:])}: {_change(change)}"


def host_attribute(change: Change, about: About) -> str:
    name = ".".join(change.path[3:])
    return f"this machine as a target{f', attribute {name}' if name else ''}: {_change(change)}"


def library(change: Change, about: About) -> str:
    """Identities are a version, that of the project's part, and the files: "2023.2.0; 3; libdnnl.so.3 build ID, …"."""
    if not (isinstance(change.before, str) and isinstance(change.after, str)):
        return ""  # the strategy that has it came or went
    old, new = (each.split("; ") for each in (change.before, change.after))
    if old[:1] != new[:1]:
        return f"library {about.strategy}: {old[0]} → {new[0]}"
    if old[1:2] != new[1:2]:
        return f"how library {about.strategy} is called: version {old[1]} → {new[1]}"
    return f"library {about.strategy} {new[0]} is another build of the same version"


def patterns(change: Change, about: About) -> str:
    old, new = (dict(each) if isinstance(each, list) else {} for each in (change.before, change.after))
    said = []
    for name in sorted({*old, *new}):
        if name in old and name in new:
            part = Change((*change.path, name), old[name], new[name])
            said.append(library(part, About(about.evidence, about.before, about.after, slot=f"shim:{name}")))
        else:
            said.append(f"library {name}, which groups operators of its own, {'came' if name in new else 'went'}")
    return "; ".join(filter(None, said))


def processor(change: Change, about: About) -> str:
    return f"the processor that candidates are timed on, or its threads: {_change(change)}"


def linker(change: Change, about: About) -> str:
    return f"what links for the target: {_change(change)}"


# files of the workspace


def source_file(change: Change, about: About) -> str:
    """`change`: of the digest of a file of manual/, strategies/, libraries/ or spaces/."""
    names = {digest.hash: name for build in (about.before, about.after) for name, digest in build.state.sources.items()}
    old, new = change.before, change.after
    name = names.get(str(new)) or names.get(str(old)) or f"the file of {about.strategy or change.path[-1]}"
    if old is ABSENT or new is ABSENT:
        return f"{name} {'came' if old is ABSENT else 'went'}"
    if names.get(str(old), name) != name:
        return f"{name} is used in place of {names[str(old)]}"
    count = about.evidence.lines_changed(str(old), str(new))
    lines = f": {count} {'line' if count == 1 else 'lines'}" if count is not None else ""
    return f"{name} changed{lines}"


def model_file(change: Change, about: About) -> str:
    declared = about.after.state.model.get("declared", {})
    return f"{declared.get('source', 'the model')} changed{_for_nothing(about)}"


def weight_file(change: Change, about: About) -> str:
    return f"the model's file of weights {change.path[-1]} changed{_for_nothing(about)}"


def recorded_cases(change: Change, about: About) -> str:
    return "the recorded cases that the model is checked against changed"


def input_shapes(change: Change, about: About) -> str:
    name = f" of {change.path[3]}" if len(change.path) > 3 else "s of the model's inputs"
    return f"in dodo.py, the shape{name}: {_change(change)}"


def function_file(change: Change, about: About) -> str:
    """`change`: of a file that a function in dodo.py, which makes the model, depends on."""
    state = "came" if change.before is ABSENT else "went" if change.after is ABSENT else "changed"
    return f"{change.path[-1]} {state}{_for_nothing(about)}"


def _for_nothing(about: About) -> str:
    old, new = (dict(build.state.model) for build in (about.before, about.after))
    if all(old.get(part) == new.get(part) for part in ("skeleton", "weights", "cases")):
        return ", but what it says is the same: nothing was made again for it"
    operators = [list(build.state.operators) for build in (about.before, about.after)]
    is_alike = operators[0] == operators[1] and old.get("weights") == new.get("weights")
    return ", but its operators and weights are the same" if is_alike else ""


def skeleton(change: Change, about: About) -> str:
    return "the model has another structure"


def weights(change: Change, about: About) -> str:
    return f"weight {change.path[-1]} of the model changed"


# tuning records


def record(change: Change, about: About) -> str:
    """`change`: of the record that a candidate was made of. Where another is behind the best one, nothing changed."""
    old, new = (about.evidence.trial(value) for value in (change.before, change.after))
    now = _seconds(new, about)
    if new is not None and old is not None and new.candidate == old.candidate:
        return "the record of the same candidate was written anew"
    decided = _decided(old, about)
    if decided:
        return decided + (f"; what runs now: {duration(now[0])}" if now is not None else "")
    if new is None and old is not None:
        return "its tuning record counts no longer"
    was = _seconds(old, about)
    if was is None:
        timed = f": {duration(now[1])} → {duration(now[0])}" if now is not None else ""
        return f"a tuning record won{timed}"
    return f"another tuning record won: {duration(was[0])}" + (f" → {duration(now[0])}" if now is not None else "")


def _seconds(trial: Any, about: About) -> tuple[float, float] | None:
    return about.records.seconds(trial.candidate, about.after.at) if trial is not None else None


def _decided(old: Any, about: About) -> str:
    """What a person did to the record that was used, in words; "" where nobody did anything."""
    gone = about.records.withdrawn(old.candidate, about.after.at) if old is not None else None
    if gone is not None:
        return f"the record that it ran on was invalidated{_by(gone)}"
    preferred = about.records.preferred(about.before.at, about.after.at)
    if preferred is None:
        return ""
    if preferred.candidate == BEST:
        return f"a rollback was taken back{_by(preferred)}"
    what = "to no tuned candidate" if preferred.candidate == NONE else "to another candidate"
    return f"it was rolled back {what}{_by(preferred)}"


def runner_up(change: Change, about: About) -> str:
    is_told = any(each.path[-1] == "winner0" for each in about.beside)
    return (
        "" if is_told else "a tuning record behind the best one changed: it is applied where that cannot be made again"
    )


def database(change: Change, about: About) -> str:
    return "the records of a database that the target's file names changed for it"


def measured_anew(change: Change, about: About) -> str:
    gone = about.records.measured_anew(about.after.at)
    return f"what had been measured of it was invalidated{_by(gone) if gone is not None else ''}"


def _by(record: WithdrawnRecord | PreferredRecord) -> str:
    """on 2026-01-02 03:04 by ada: too old"""
    who, why = (f" by {record.by}" if record.by else ""), (f": {record.reason}" if record.reason else "")
    return f" on {moment(record.at)}{who}{why}"


def moment(at: float) -> str:
    """A time of Unix as people write it, here."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


# what a build follows and no key holds


def order(change: Change, about: About) -> str:
    return f"the order of strategies changed: {_change(change)}"


def rules(change: Change, about: About) -> str:
    """Of [[operators]] what is for this operator; of a model any change."""
    if about.operator is None:
        return "the [[operators]] of the target's file changed"
    if rules_for(about.operator, change.before) == rules_for(about.operator, change.after):
        return ""
    return "the [[operators]] of the target's file that match it changed"


def lock(change: Change, about: About) -> str:
    old, new = (value if isinstance(value, str) else "" for value in (change.before, change.after))
    word = "changed" if old and new else "came" if new else "went"
    if about.operator is None:
        return f"tuning.lock {word}"
    was, now = (about.evidence.lines_with(each, about.operator.label) for each in (old, new))
    if was == now:
        return "" if old and new else f"tuning.lock {word}"
    before, after = (" / ".join(map(_locked, lines)) or "nothing" for lines in (was, now))
    return f"tuning.lock {word}; of this operator it says: {before} → {after}"


def _locked(line: str) -> str:
    """A line of tuning.lock in short: what the operator is called and what it is are told already."""
    said = re.sub(r", workload = \S+|[{}]", "", line.partition(" = ")[2])
    return re.sub(r'"([0-9a-f]{8})[0-9a-f]{56}"', r"\1", said).strip()


def setting(change: Change, about: About) -> str:
    return f"{'.'.join(change.path[1:])} of the target's file: {_change(change)}"


def calls(change: Change, about: About) -> str:
    return f"calls in one inference: {_change(change)}"


def decision(change: Change, about: About) -> str:
    return f"{'it runs on' if change.path[1] == 'implementation' else 'why'}: {_change(change)}"


def version_of_tvmake(change: Change, about: About) -> str:
    return f"tvmake {_change(change)}"


# what became of files


def artifact_file(change: Change, about: About) -> str:
    name, wrong = change.path[1], str(change.after)
    if not name:
        return "the artifact was not there any more: it was put there again"
    words = {"missing": "was deleted", "changed": "was changed", "alien": "does not belong there"}
    return f"{name} of the artifact {words.get(wrong, wrong)}: the artifact was put there again"


def made_again(change: Change, about: About) -> str:
    return f"{change.after}, and {change.path[1].replace(':', ' ')} made again"


def refused(change: Change, about: About) -> str:
    return f"what the remote has for {change.path[1]} was refused: {change.after}"


# what nobody has words for


def follows(change: Change, about: About) -> str:
    return ""


def input_(change: Change, about: About) -> str:
    if change.before is ABSENT or change.after is ABSENT:
        return f"stage {change.path[0]} {'gets' if change.before is ABSENT else 'no longer gets'} {change.path[2]}"
    return f"{change.path[2]}, which stage {change.path[0]} gets, changed"


def option(change: Change, about: About) -> str:
    return f"option {'.'.join(change.path[2:])} of stage {change.path[0]}: {_change(change)}"


def anything(change: Change, about: About) -> str:
    return f"{'.'.join(change.path)}: {_change(change)}"


# What a library takes and gives, as the stages that run it are told: it follows from extraction and from decisions.
SIGNATURE = ("inputs", "outputs", "arguments", "libraries")

# A path begins with a stage, as the entries of its keys go on, or with a part of what a build notes.
TABLE: tuple[tuple[tuple[str, ...], Say], ...] = (
    (("*", "tools", "*"), tool),
    (("*", "version"), stage_version),
    (("*", "options", "strategy version"), strategy_version),
    (("*", "options", "target", "**"), target_attribute),
    (("extract", "options", "host", "**"), host_attribute),
    (("extract", "options", "patterns"), patterns),
    (("*", "options", "library"), library),
    (("shim", "options", "identity"), library),
    (("*", "options", "device"), processor),
    (("*", "options", "driver"), linker),
    (("*", "options", "nvcc"), linker),
    (("measure", "options", "anew"), measured_anew),
    (("measure", "options", "seconds"), follows),  # a setting, which is told as such
    (("measure", "options", "patience"), follows),
    (("measure", "options", "contenders"), follows),
    (("measure", "inputs", "**"), follows),
    *(((stage, "options", name), follows) for stage in ("check", "profile") for name in SIGNATURE),
    (("pack", "options", "*"), follows),
    (("link", "options", "libraries"), follows),
    (("apply", "inputs", "source"), source_file),
    (("shim", "inputs", "source"), source_file),
    (("apply", "inputs", "space.*"), source_file),
    (("apply", "inputs", "winner0"), record),
    (("apply", "inputs", "winner*"), runner_up),
    (("apply", "inputs", "records*"), database),
    (("read", "options", "file"), model_file),
    (("read", "options", "beside", "*"), weight_file),
    (("read", "options", "recorded"), recorded_cases),
    (("read", "options", "shapes", "**"), input_shapes),
    (("extract", "inputs", "skeleton"), skeleton),
    (("model", "files", "*"), function_file),
    (("model", "weights", "*"), weights),
    (("model", "skeleton"), skeleton),
    (("settings", "order"), order),
    (("settings", "operators"), rules),
    (("settings", "lock"), lock),
    (("settings", "device"), processor),
    (("settings", "**"), setting),
    (("operator", "calls"), calls),
    (("operator", "*"), decision),
    (("tvmake",), version_of_tvmake),
    (("artifact", "*"), artifact_file),
    (("again", "*"), made_again),
    (("refused", "*"), refused),
    (("*", "inputs", "**"), input_),
    (("*", "options", "**"), option),
    (("**",), anything),
)


def _change(change: Change) -> str:
    """4 → 8"""
    return f"{_shown(change.before)} → {_shown(change.after)}"


def _shown(value: object) -> str:
    if value is ABSENT:
        return "nothing"
    if isinstance(value, str):
        text = value or '""'
    elif isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        text = ", ".join(value) or "nothing"
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def joined(names: Iterable[str]) -> str:
    """a, b and c"""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
