"""What is known of keys, blobs and tuning records that two builds name: read where it lies, None where it is gone."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pipeline.hashing import Digest, is_sha256
from pipeline.journal import Noted, Operator
from pipeline.store import ActionEntry, Store
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.records import PreferredRecord, Record, RetestRecord, TrialRecord, WithdrawnRecord, decoded


@dataclass
class Evidence:
    """What a store knows. Entries and blobs are read once."""

    store: Store
    ledger: Ledger
    _entries: dict[str, ActionEntry | None] = field(default_factory=dict)

    def entry(self, key: str) -> ActionEntry | None:
        """An action's entry, whether its blobs are here or not."""
        if key not in self._entries:
            document = self.store.document(key) if is_sha256(key) else None
            self._entries[key] = ActionEntry.from_bytes(key, document) if document is not None else None
        return self._entries[key]

    def blob(self, name: str) -> bytes | None:
        """A blob by its SHA-256 alone, which is what components hold."""
        if not is_sha256(name):
            return None
        try:
            data = (self.store.root / "cas" / name[:2] / name).read_bytes()
        except OSError:
            return None
        return data if Digest.of(data).hash == name else None

    def lines_changed(self, before: str, after: str) -> int | None:
        """How many lines differ between two texts; None where one of them is gone."""
        old, new = self.blob(before), self.blob(after)
        if old is None or new is None:
            return None
        a, b = (text.decode(errors="replace").splitlines() for text in (old, new))
        codes = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
        return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in codes if tag != "equal")

    def lines_with(self, name: str, word: str) -> tuple[str, ...]:
        """The lines of a text in which a word stands."""
        text = self.blob(name) if name else None
        return tuple(line for line in text.decode(errors="replace").splitlines() if word in line) if text else ()

    def trial(self, name: object) -> TrialRecord | None:
        """The tuning record that lies in a blob."""
        data = self.blob(name) if isinstance(name, str) else None
        try:
            record = decoded(data) if data is not None else None
        except ValueError:
            return None
        return record if isinstance(record, TrialRecord) else None


@dataclass(frozen=True)
class Records:
    """The tuning records of one operator."""

    members: Mapping[str, Record]

    def seconds(self, candidate: str, at: float) -> tuple[float, float] | None:
        """Seconds of a candidate and of the baseline, timed in turn, as they were known at a time."""
        retests = [
            each for each in self.members.values() if isinstance(each, RetestRecord) and each.candidate == candidate
        ]
        known = [each for each in retests if each.at <= at] or retests
        latest = max(known, key=lambda each: each.at, default=None)
        return (latest.seconds, latest.baseline) if latest is not None else None

    def withdrawn(self, candidate: str, at: float) -> WithdrawnRecord | None:
        """Who withdrew a candidate's records, before a time."""
        own = {name for name, each in self.members.items() if getattr(each, "candidate", None) == candidate}
        found = [
            each
            for each in self.members.values()
            if isinstance(each, WithdrawnRecord) and own & {*each.records} and each.at <= at
        ]
        return max(found, key=lambda each: each.at, default=None)

    def preferred(self, after: float, at: float) -> PreferredRecord | None:
        """What somebody decided last, between two times."""
        found = [each for each in self.members.values() if isinstance(each, PreferredRecord) and after < each.at <= at]
        return max(found, key=lambda each: each.at, default=None)

    def measured_anew(self, at: float) -> WithdrawnRecord | None:
        """Who withdrew what had been measured, before a time."""
        found = [
            each
            for each in self.members.values()
            if isinstance(each, WithdrawnRecord) and each.measured and each.at <= at
        ]
        return max(found, key=lambda each: each.at, default=None)


def records_of(evidence: Evidence, build: Noted, operator: Operator) -> Records:
    """The tuning records of an operator of a build."""
    key = evidence.ledger.key_of(operator.workload.hash, build.state.attributes, build.state.settings.get("device", ""))
    return Records(evidence.ledger.members(key))


def rules_for(operator: Operator, rules: object) -> list[Any]:
    """Of [[operators]] those that match an operator."""
    names = (operator.label, operator.name, operator.workload.hash)
    listed = rules if isinstance(rules, list) else []
    return [rule for rule in listed if any(fnmatch.fnmatchcase(name, str(rule.get("match", ""))) for name in names)]


def plan_of(evidence: Evidence, build: Noted) -> list[str]:
    """The labels of a build's operators in the order of its plan, as far as the store still has that."""
    entry = evidence.entry(build.state.actions.get("extract", ""))
    digest = entry.outputs.get("plan") if entry is not None else None
    data = evidence.blob(digest.hash) if digest is not None else None
    try:
        workloads = msgspec.json.decode(data)["workloads"] if data is not None else []
        labels = [f"{each['name']}-{each['function']['hash'][:8]}" for each in workloads]
    except (msgspec.DecodeError, KeyError, TypeError):
        labels = []
    return [label for label in labels if label in build.state.operators] or list(build.state.operators)
