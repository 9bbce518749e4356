"""tuning.lock: which function each operator is compiled from, in a file that people review; what a build makes of it.

    format = 1
    [native]                                                    a table for each target, a line for each operator
    "conv2d-5b31ae9d" = { use = "tuned", us = 211.0, gain = 1.42, function = "…", candidate = "…", workload = "…" }

One line changes where one decision did: lines are sorted, times are rounded, and there is no path and no date in it.
`doit lock` alone writes the file (pipeline.locking); who reads it changes nothing. Needs no TVM.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import threading
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pipeline.errors import ConfigError, StageError, TvmakeError, explain_os_error
from pipeline.hashing import is_sha256
from pipeline.types import Workload

FILE = "tuning.lock"
FORMAT = 1
REASON = FILE  # of a decision

_HEADER = f"""\
# {FILE}: the function that each operator is compiled from. `doit build` follows it, and never picks another silently.
# Written by `doit lock`, which shows what would be better by now; keep it in git. Not to be edited by hand.
"""
_BARE = re.compile(r"[A-Za-z0-9_-]+").fullmatch
_CONFLICT = re.compile(r"^(<{7} |={7}$|>{7} |\|{7} )", re.MULTILINE).search

Amount = Annotated[float, msgspec.Meta(gt=0)]


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry as the file has it."""

    use: str
    function: str
    workload: str
    version: str = ""
    us: Amount | None = None
    gain: Amount | None = None
    candidate: str = ""


@dataclass(frozen=True)
class Entry:
    """One operator's decision.

    use        the strategy or library
    function   SHA-256 of the function that is compiled, as it stands before its weights' layouts are parted from it
    workload   the operator's full digest
    candidate  of what was tuned: its digest in the tuning records; "" where it is of a database of MetaSchedule's
    seconds    of one call, and `gain`: how many times as fast as what it is in place of; None where that is not known
    version    of the library, whose files lie in the artifact
    """

    use: str
    function: str
    workload: str
    candidate: str = ""
    seconds: float | None = None
    gain: float | None = None
    version: str = ""

    def same(self, other: Entry | None) -> bool:
        """Whether both are the same decision, whatever was measured of it."""
        return other is not None and self._decision() == other._decision()

    def _decision(self) -> tuple[str, ...]:
        return self.use, self.version, self.function, self.candidate, self.workload


@dataclass(frozen=True)
class Lock:
    """Entries by target and label."""

    targets: Mapping[str, Mapping[str, Entry]] = field(default_factory=dict)

    def entry(self, target: str, workload: str) -> Entry | None:
        """That of an operator, by the digest of its workload; None where there is none."""
        return self._by_workload.get(target, {}).get(workload)

    @functools.cached_property
    def _by_workload(self) -> dict[str, dict[str, Entry]]:
        return {target: {each.workload: each for each in of.values()} for target, of in self.targets.items()}

    def text(self) -> str:
        """The file. Equal locks have equal texts."""
        parts = [_HEADER, f"format = {FORMAT}\n"]
        for target in sorted(name for name, entries in self.targets.items() if entries):
            parts.append(f"\n[{_key(target)}]\n")
            parts += [f"{_quoted(label)} = {_line(entry)}\n" for label, entry in sorted(self.targets[target].items())]
        return "".join(parts)


def read(path: Path) -> Lock | None:
    """The lock of a file; None where there is none. Raises ConfigError for what no version up to this one wrote."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"{path.name} cannot be read: {said}", hint=_mend(path)) from error
    if _CONFLICT(text):
        raise ConfigError(
            f"{path.name} has the marks of a merge that is not resolved",
            hint=f"take one side: git checkout --ours {path.name}; then type: doit lock",
        )
    try:
        return _lock(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ValueError) as error:
        raise ConfigError(f"{path.name} is broken: {error}", hint=_mend(path)) from error


def write(path: Path, lock: Lock) -> bool:
    """Has the file say so, whole or not at all; whether it said anything else before. Raises StoreError where it cannot
    be written."""
    if "format" in lock.targets:
        raise ConfigError(f"{path.name} has no place for a target called format", hint="give the target another name")
    data = lock.text().encode()
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        if path.exists() and path.read_bytes() == data:
            return False
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise explain_os_error(error, f"writing {path.name}") from error
    return True


def _lock(table: dict[str, Any]) -> Lock:
    """Raises ValueError, and ConfigError for a newer format."""
    found = table.pop("format", None)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError("it does not say its format")
    if found > FORMAT:
        raise ConfigError(
            f"{FILE} has format {found}, this version of tvmake reads format {FORMAT}",
            hint="use the version of tvmake that wrote it",
        )
    lines = msgspec.convert(table, dict[str, dict[str, _Line]])
    return Lock(
        {target: {label: _entry(label, line) for label, line in each.items()} for target, each in lines.items()}
    )


def _entry(label: str, line: _Line) -> Entry:
    digests = [line.function, line.workload, *([line.candidate] if line.candidate else [])]
    if not all(map(is_sha256, digests)):
        raise ValueError(f"{label}: what should be a digest has not 64 digits, 0-9 a-f")
    seconds = line.us / 1e6 if line.us is not None else None
    return Entry(line.use, line.function, line.workload, line.candidate, seconds, line.gain, line.version)


def _line(entry: Entry) -> str:
    said = [f"use = {_quoted(entry.use)}"]
    if entry.version:
        said.append(f"version = {_quoted(entry.version)}")
    if entry.seconds is not None:
        said.append(f"us = {microseconds(entry.seconds)!r}")
    if entry.gain is not None:
        said.append(f"gain = {max(0.01, round(entry.gain, 2))!r}")
    digests = (("function", entry.function), ("candidate", entry.candidate), ("workload", entry.workload))
    said += [f"{name} = {_quoted(digest)}" for name, digest in digests if digest]
    return f"{{ {', '.join(said)} }}"


def microseconds(seconds: float) -> float:
    """Three digits of them, as the file has them: 0.00021134 → 211.0."""
    return float(f"{max(seconds * 1e6, 1e-3):.3g}")


def _key(name: str) -> str:
    return name if _BARE(name) else _quoted(name)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _mend(path: Path) -> str:
    return f"take it from git: git checkout {path.name}; or remove it, and write another with: doit lock"


def pins_of(folder: Path) -> str:
    """What the names of the pins begin with that keep what the lock of a workspace's folder is built of."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name)[:32]
    return f"lock-{name}-{_short(str(folder.resolve()))}-"


def pin_of(folder: Path, target: str, model: str) -> str:
    """The name of the pin for one artifact."""
    return pins_of(folder) + _short(f"{target}:{model}")


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# what is told of it


def better_held_back(ratios: Sequence[float]) -> str:
    """That so many operators could be so many times as fast as what the lock names; "" where none could."""
    if not ratios:
        return ""
    winners = f"{len(ratios)} better winners" if ratios[1:] else "a better winner"
    return f"{FILE} holds back {winners} ({'up to ' * bool(ratios[1:])}{max(ratios):.2g} times): doit lock"


def held_back_for(count: int) -> str:
    """That builds do not follow for so many operators what was decided just now."""
    return f"{FILE} holds this back for {count} operator{'s' * (count != 1)}: doit lock"


# what a build makes of it


class Following:
    """How one build follows a lock, and what is to be told of it. Every method may be called from any thread.

    lock    None where there is none: everything is chosen freely
    strict  what cannot be as the lock says is an error
    anew    operators for which a choice is to be made as if there were no lock; where this is given, one is being
            written, and nothing is said of operators that it has not
    """

    def __init__(self, lock: Lock | None, strict: bool = False, anew: Callable[[Workload], bool] | None = None) -> None:
        self.lock = lock
        self.strict = strict
        self.anew = anew
        self._guard = threading.Lock()
        self._absent: dict[str, dict[str, str]] = {}  # by target and workload: the label
        self._broken: dict[str, dict[str, str]] = {}  # by target and workload: why, in words
        self._better: dict[str, dict[str, float]] = {}  # by target and workload: how many times as fast

    @classmethod
    def of(cls, folder: Path, strict: bool = False) -> Following:
        """By the lock of a workspace's folder. Raises ConfigError where it cannot be read, or must be there and is
        not."""
        lock = read(folder / FILE)
        if lock is None and strict:
            raise ConfigError(f"there is no {FILE} to build by", hint="write one with: doit lock")
        return cls(lock, strict)

    @property
    def is_followed(self) -> bool:
        """Whether there is a lock."""
        return self.lock is not None

    def is_chosen_anew(self, workload: Workload) -> bool:
        return self.anew is not None and self.anew(workload)

    def entry(self, target: str, workload: Workload) -> Entry | None:
        """What the lock says of an operator; None where it is chosen freely. Raises StageError where it must not be."""
        if self.lock is None or self.is_chosen_anew(workload):
            return None
        entry = self.lock.entry(target, workload.digest)
        if entry is None and self.anew is None and workload.calls:
            self._note(self._absent, target, workload, workload.label)
            if self.strict:
                raise self._error(target, workload, f"it is not in {FILE}")
        return entry

    def cannot(self, target: str, workload: Workload, error: TvmakeError) -> None:
        """Notes why an entry cannot be followed. Raises StageError where it must be."""
        said = str(error).partition("\n")[0]
        self._note(self._broken, target, workload, said)
        if self.strict:
            raise self._error(target, workload, f"{FILE} cannot be followed: {said}") from error

    def better(self, target: str, workload: Workload, ratio: float) -> None:
        """Notes that there is a function so many times as fast, which the lock holds back."""
        if ratio > 1:
            self._note(self._better, target, workload, ratio)

    def is_broken(self, target: str, digest: str) -> str:
        """Why an operator's entry could not be followed; "" where it was."""
        return self._broken.get(target, {}).get(digest, "")

    def is_whole(self, target: str, digests: Iterable[str]) -> bool:
        """Whether all of these operators were built as the lock says."""
        apart = {*self._absent.get(target, {}), *self._broken.get(target, {})}
        return self.is_followed and self.anew is None and apart.isdisjoint(digests)

    def problems(self, target: str, workloads: Mapping[str, Workload]) -> list[str]:
        """What is to be told of these operators, by digest."""
        absent = [label for digest, label in self._absent.get(target, {}).items() if digest in workloads]
        ratios = [ratio for digest, ratio in self._better.get(target, {}).items() if digest in workloads]
        reasons: dict[str, list[str]] = {}
        for digest, why in self._broken.get(target, {}).items():
            if digest in workloads:
                reasons.setdefault(why, []).append(workloads[digest].label)
        said = [
            f"{FILE} is not followed for {_some(labels)}, another function was chosen: {why}\n  → type: doit lock"
            for why, labels in reasons.items()
        ]
        if absent:
            said.append(
                f"{f'{len(absent)} operators are' if absent[1:] else f'{absent[0]} is'} not in {FILE}: doit lock"
            )
        return [*said, *filter(None, [better_held_back(ratios)])]

    def _note(self, notes: dict[str, dict[str, Any]], target: str, workload: Workload, said: Any) -> None:
        with self._guard:
            notes.setdefault(target, {})[workload.digest] = said

    def _error(self, target: str, workload: Workload, said: str) -> StageError:
        return StageError(
            said,
            stage="dispatch",
            subject=f"{target}:{workload.label}",
            hint=f"to choose for it anew: doit lock '{workload.label}'; to build without: doit build",
        )


def _some(labels: list[str]) -> str:
    return f"{', '.join(labels[:5])}{f' and {len(labels) - 5} more' if labels[5:] else ''}"
