"""The journal of a workspace: what each build of an artifact was made of, so that two builds can be compared later.

    .tvmake/journal/<target>/<model>.jsonl      one line for each build that published or checked the artifact anew

It lies beside doit's database and not in artifacts/: what is shipped carries no history of a machine, and where
somebody deleted the artifacts it can still be told that this is why they were made again. A line holds what changed
since the line before (`patch`), so that one with nothing new is short:

    {"format": 1, "build": 7, "at": …, "news": {everything}}           a whole line: the first that is kept
    {…, "build": 8, "on": 7, "news": {"tools": {"tvm": "…"}}}          what is new since build 7
    {…, "build": 9, "on": 8, "artifact": {"lib.so": "missing"}}

What the keys were made of is not copied: the store has it, in the entry of each. A line that is torn, or that another
version wrote, is passed over; what was told on top of it as well, until the next whole line.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from pipeline.hashing import Digest
from pipeline.types import Trial

FORMAT = 1
FOLDER = ".tvmake"
KEPT = 50  # builds of an artifact that are remembered
SHORT = 16  # digits of a key that tell it from the others of a build
_SLACK = 14  # more of them before the file is written anew
_PATIENCE = 5.0  # seconds that a build waits for another one's line

Tree = dict[str, Any]


class Origin(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where an entry of the store came from: this machine ran it, or a remote had it.

    remote   the remote's name, "" where it was run here
    signer   the public key whose signature it carries, "" where there is none
    checked  whether that signature was required and holds
    """

    remote: str = ""
    signer: str = ""
    checked: bool = False


class Operator(msgspec.Struct, frozen=True, omit_defaults=True):
    """One workload of a build: what it is, what was decided, and its actions' keys by what they are for:
    "apply:<strategy>", "codegen:<strategy>", "measure", …"""

    name: str
    workload: Digest
    shapes: tuple[str, ...]
    calls: int = 0
    implementation: str = ""
    reason: str = ""
    candidates: tuple[Trial, ...] = ()
    actions: dict[str, str] = {}

    @property
    def label(self) -> str:
        return f"{self.name}-{self.workload.hash[:8]}"


class State(msgspec.Struct, frozen=True):
    """What an artifact was made of.

    tvmake      the version that built it
    tools       those of the machine, by name
    attributes  the target as TVM understands it
    settings    what the target's file says that stands in no key, with the device and the lock
    sources     the workspace's Python files that strategies are made of, by path
    model       what dodo.py declares and what was read: digests of the skeleton, of each weight, of the files
    actions     keys of the actions that are no operator's, by stage
    operators   by label, in the plan's order as far as it did not change
    origins     where entries came from, by the beginning of the key, where a build that is noted saw it: see `origin`
    """

    tvmake: str = ""
    tools: dict[str, str] = {}
    attributes: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    sources: dict[str, Digest] = {}
    model: dict[str, Any] = {}
    actions: dict[str, str] = {}
    operators: dict[str, Operator] = {}
    origins: dict[str, Origin] = {}

    @property
    def keys(self) -> set[str]:
        """The keys of all its actions."""
        return {*self.actions.values(), *(key for each in self.operators.values() for key in each.actions.values())}

    def origin(self, key: str) -> Origin | None:
        """Where an entry came from; None where it was in the store before any build that is noted."""
        return self.origins.get(key[:SHORT])


class Events(msgspec.Struct, frozen=True, omit_defaults=True):
    """What happened in one build that is no property of what it made.

    again     actions that were run though their key had been run before, by key: why
    refused   entries of a remote that were not believed, by key: why
    artifact  files of the artifact that was there and were not as it said: "missing", "changed", "alien"
    """

    again: dict[str, str] = {}
    refused: dict[str, str] = {}
    artifact: dict[str, str] = {}


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    format: int
    build: int
    at: float
    on: int = 0
    news: Tree = {}
    again: dict[str, str] = {}
    refused: dict[str, str] = {}
    artifact: dict[str, str] = {}

    @property
    def events(self) -> Events:
        return Events(self.again, self.refused, self.artifact)


@dataclass(frozen=True)
class Noted:
    """One build as the journal has it; `at` in Unix time, `tree` its state as JSON has it."""

    number: int
    at: float
    tree: Tree
    events: Events

    @cached_property
    def state(self) -> State:
        """Read when it is asked for: of ten thousand operators that takes its time. Nothing where it makes no sense."""
        try:
            return msgspec.convert(self.tree, State)
        except msgspec.ValidationError:
            return State()

    def has_news_of(self, key: str, before: State | None) -> bool:
        """Whether an action was run, or fetched, in this build, and not found in this machine's store."""
        origin = self.state.origin(key)
        known = before.origin(key) if before is not None else None
        return key in self.events.again or (origin is not None and origin != known)


class Journal:
    """The journal of one artifact. Any number of processes may append at once."""

    def __init__(self, folder: Path, target: str, model: str) -> None:
        """`folder`: the workspace's."""
        self.path = folder / FOLDER / "journal" / target / f"{model}.jsonl"
        self._home = folder / FOLDER

    def builds(self) -> list[Noted]:
        """The builds that are remembered, the latest last. One whose state is not known is left out."""
        return [Noted(line.build, line.at, tree, line.events) for line, tree in _folded(self._lines())]

    def append(self, state: State, events: Events, at: float) -> None:
        """Notes a build. A journal that cannot be written is no reason for a build to fail: it goes without."""
        from filelock import FileLock, Timeout

        with contextlib.suppress(OSError, NotImplementedError, Timeout):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _ignore(self._home)
            with FileLock(self._home / "lock", timeout=_PATIENCE):
                self._append(plain(state), events, at)

    def remove(self) -> None:
        """Forgets every build."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _append(self, tree: Tree, events: Events, at: float) -> None:
        known = self._lines()
        folded = list(_folded(known))
        number = max((line.build for line in known), default=0) + 1
        before, on = (folded[-1][1], folded[-1][0].build) if folded and folded[-1][0] is known[-1] else ({}, 0)
        line = _Line(FORMAT, number, at, on, patch(before, tree), events.again, events.refused, events.artifact)
        if len(folded) >= KEPT + _SLACK:
            self._rewrite([*_cut(folded[-KEPT + 1 :]), line])
        else:
            self._write(line)

    def _write(self, line: _Line) -> None:
        """One write at the file's end, after whatever a build that died left there."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, b"\n" * is_torn + msgspec.json.encode(line) + b"\n")
        finally:
            os.close(descriptor)

    def _rewrite(self, lines: Sequence[_Line]) -> None:
        with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=".", delete=False) as stream:
            stream.writelines(msgspec.json.encode(line) + b"\n" for line in lines)
        os.chmod(stream.name, 0o644)
        os.replace(stream.name, self.path)

    def _lines(self) -> list[_Line]:
        try:
            text = self.path.read_bytes()
        except OSError:
            return []
        found = []
        for line in text.splitlines():
            with contextlib.suppress(msgspec.MsgspecError):
                found.append(_decoder.decode(line))
        return [line for line in found if line.format == FORMAT]


_decoder = msgspec.json.Decoder(_Line)


def _folded(lines: Sequence[_Line]) -> Iterator[tuple[_Line, Tree]]:
    """Each line whose state is known, with it."""
    tree: Tree = {}
    last = None
    for line in lines:
        if line.on not in (0, last):
            continue  # what it is told on top of is lost
        tree = patched({} if line.on == 0 else tree, line.news)
        last = line.build
        yield line, tree


def _cut(kept: Sequence[tuple[_Line, Tree]]) -> Iterator[_Line]:
    """The lines that are kept, the first of them made whole, and each told on top of the one before."""
    before: Tree = {}
    on = 0
    for line, tree in kept:
        yield msgspec.structs.replace(line, on=on, news=patch(before, tree))
        before, on = tree, line.build


def _ignore(home: Path) -> None:
    """Has git leave the folder alone: it is this machine's."""
    path = home / ".gitignore"
    if not path.exists():
        path.write_text("*\n")


def plain(state: State) -> Tree:
    """A state as JSON has it, without what is none."""
    tree: Tree = _without_none(msgspec.json.decode(msgspec.json.encode(state)))
    return tree


def _without_none(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _without_none(each) for name, each in value.items() if each is not None}


def patch(before: Mapping[str, Any], after: Mapping[str, Any]) -> Tree:
    """What makes `after` of `before`: values of what is new or other, None for what is gone (RFC 7396).

    {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 2, "d": 4}}  →  {"a": None, "b": {"d": 4}}
    """
    made: Tree = dict.fromkeys(name for name in before if name not in after)
    for name, value in after.items():
        if name not in before:
            made[name] = value
        elif before[name] != value:
            nested = isinstance(value, dict) and isinstance(before[name], dict)
            made[name] = patch(before[name], value) if nested else value
    return made


def patched(before: Mapping[str, Any], news: Mapping[str, Any]) -> Tree:
    """The tree that `patch` was made for. Nothing that was given is changed."""
    made = dict(before)
    for name, value in news.items():
        if value is None:
            made.pop(name, None)
        elif isinstance(value, dict):
            known = made.get(name)
            made[name] = patched(known if isinstance(known, dict) else {}, value)
        else:
            made[name] = value
    return made
