"""Two builds of an artifact compared: for each action that has another key the reason, followed to its root.

link     inputs.o…        made by codegen, which has another key
codegen  inputs.function  made by apply, which has another key
apply    inputs.winner0   made by nobody here               →  another tuning record won
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from pipeline.journal import Events, Noted, Operator
from pipeline.store import ActionEntry
from pipeline.why.changes import ABSENT, Change, changes
from pipeline.why.evidence import Evidence
from pipeline.why.words import About, Cause, cause, joined

_Made = tuple[str, str]  # of an action: its operator's label, "" where it is none's, and what it is for


class Fate(enum.StrEnum):
    """What became of an operator from one build to the next."""

    FIRST = "first"  # there is no build before
    NEW = "new"  # the build before had no such operator
    REBUILT = "rebuilt"  # it is compiled from another function, or otherwise
    AGAIN = "made again"  # the same was run again, as the store had lost it
    LOOKED_AT = "looked at again"  # something else was asked, and the same object came of it
    SAME = "unchanged"


class Way(enum.StrEnum):
    """How a build came to an entry."""

    RUN = "run"
    FETCHED = "fetched"
    FOUND = "found"


NOTHING = Noted(0, 0.0, {}, Events())


@dataclass(frozen=True)
class Comparison:
    """A build, and the one before it."""

    before: Noted  # NOTHING where none is noted
    after: Noted
    evidence: Evidence
    _seen: set[_Made] = field(default_factory=set)

    def of_operator(self, label: str) -> list[Cause]:
        """Why an operator that both builds have was made otherwise, or again."""
        operator = self.after.state.operators[label]
        old = self.before.state.operators[label]
        self._seen.clear()
        found = [*self._asked_otherwise(label, old, operator)]
        for slot in sorted(operator.actions):
            found += self._roots(label, slot)
        if old != operator:
            found += self._settings(
                operator, ("order", "libraries", "select", "operators", "records", "measure", "lock")
            )
            found += self._said(_decided(old, operator, only_calls=bool(found)), operator)
        return _once([*found, *self.mishaps(operator.actions)])

    def of_new(self) -> list[Cause]:
        """Why a build has operators that the one before had not."""
        self._seen.clear()
        found = _once([*self._files(), *self._roots("", "extract")])
        strong = [each for each in found if each.kind != "skeleton"]
        return strong or found

    def of_model(self) -> list[Cause]:
        """Why what is no operator's was made otherwise, or again, and all that no key holds."""
        self._seen.clear()
        found = list(self._files())
        for slot in sorted(self.after.state.actions):
            found += self._roots("", slot)
        old, new = self.before.state, self.after.state
        found += self._settings(None, sorted({*old.settings, *new.settings}))
        found += self._said([Change(("tvmake",), old.tvmake, new.tvmake)] if old.tvmake != new.tvmake else [])
        found += self._weights()
        return _once([*found, *self.mishaps(new.actions), *self.of_artifact()])

    def of_artifact(self) -> list[Cause]:
        """What was not as it should be in the artifact that was there."""
        wrong = self.after.events.artifact
        return self._said([Change(("artifact", name), ABSENT, what) for name, what in sorted(wrong.items())])

    def mishaps(self, actions: Mapping[str, str]) -> list[Cause]:
        """Of some actions what was made again, and what a remote had that was refused."""
        events = self.after.events
        found = []
        refused: dict[str, list[str]] = {}
        for slot, key in sorted(actions.items()):
            if key in events.again:
                found += self._said([Change(("again", slot), ABSENT, events.again[key])])
            if key in events.refused:
                refused.setdefault(events.refused[key], []).append(slot.replace(":", " "))
        told = [Change(("refused", joined(slots)), ABSENT, why) for why, slots in sorted(refused.items())]
        return [*found, *self._said(told)]

    def fate(self, label: str) -> Fate:
        """What became of an operator of the later build."""
        if self.before is NOTHING:
            return Fate.FIRST
        operator, old = self.after.state.operators[label], self.before.state.operators.get(label)
        if old is None:
            return Fate.NEW
        if _objects(old) != _objects(operator):
            return Fate.REBUILT
        if any(key in self.after.events.again for key in operator.actions.values()):
            return Fate.AGAIN
        return Fate.LOOKED_AT if old != operator else Fate.SAME

    def way(self, key: str) -> Way:
        """How the later build came to an entry."""
        if not self.after.has_news_of(key, self.before.state):
            return Way.FOUND
        origin = self.after.state.origin(key)
        return Way.FETCHED if origin is not None and origin.remote else Way.RUN

    # one action

    def _roots(self, label: str, slot: str) -> Iterator[Cause]:
        """Why an action has another key, where both builds have it."""
        if (label, slot) in self._seen:
            return
        self._seen.add((label, slot))
        keys = [_actions(build, label).get(slot, "") for build in (self.before, self.after)]
        if "" in keys or keys[0] == keys[1]:
            return
        entries = [self.evidence.entry(key) for key in keys]
        if entries[0] is None or entries[1] is None:
            yield _forgotten(slot)
            return
        operator = self.after.state.operators.get(label)
        stage = slot.partition(":")[0]
        found = tuple(changes(entries[0].components, entries[1].components, (stage,)))
        about = self._about(operator, slot, found)
        for change in found:
            maker = self._maker(change)
            if maker is not None:
                if maker[0] in ("", label):
                    yield from self._roots(*maker)
            elif (said := cause(change, about)) is not None:
                yield said

    def _maker(self, change: Change) -> _Made | None:
        """The action that made an input which changed; None for an option, and for what nobody made."""
        if len(change.path) < 3 or change.path[1] != "inputs":
            return None
        return self._makers[1].get(str(change.after)) or self._makers[0].get(str(change.before))

    @cached_property
    def _makers(self) -> tuple[dict[str, _Made], dict[str, _Made]]:
        """Which action made a blob, by the blob's hash, in either build."""
        return self._made_in(self.before), self._made_in(self.after)

    def _made_in(self, build: Noted) -> dict[str, _Made]:
        made: dict[str, _Made] = {}
        for label in ("", *build.state.operators):
            for slot, key in _actions(build, label).items():
                entry = self.evidence.entry(key)
                for digest in entry.outputs.values() if entry is not None else ():
                    made.setdefault(digest.hash, (label, slot))
        return made

    # what stands in no key, or in one that only one build has

    def _asked_otherwise(self, label: str, old: Operator, new: Operator) -> Iterator[Cause]:
        """Why a strategy is asked that was not, or is not any more."""
        both = {old.implementation, new.implementation}
        timed = all(build.state.settings.get("select") == "fastest" for build in (self.before, self.after))
        slots = {slot for slot in {*old.actions, *new.actions} if slot.startswith("apply:")}
        for slot in sorted(slots):
            gone, came = slot not in new.actions, slot not in old.actions
            if (gone or came) and (timed or slot.partition(":")[2] in both):
                yield from self._came(new, slot, (old if gone else new).actions[slot], gone)

    def _came(self, operator: Operator, slot: str, key: str, gone: bool) -> Iterator[Cause]:
        """What let a strategy come, or go: what its action is made of that the other build does not have."""
        entry = self.evidence.entry(key)
        if entry is None:
            yield _forgotten(slot)
            return
        if isinstance(self._option(entry, "library"), str) and self._is_composed_alike():
            what = "is not there any more" if gone else "is there now"
            yield Cause("library", f"library {slot.partition(':')[2]} {what}", (slot,), None, None)
        inputs = entry.components.get("inputs")
        named = {name: inputs[name] for name in ("winner0", "source") if isinstance(inputs, Mapping) and name in inputs}
        if "winner0" not in named and self._still_has(named.get("source"), gone):
            return
        about = self._about(operator, slot)
        for name, value in named.items():
            change = Change(("apply", "inputs", name), value if gone else ABSENT, ABSENT if gone else value)
            if (said := cause(self._edited(change), about)) is not None:
                yield said
                return

    @staticmethod
    def _option(entry: ActionEntry, name: str) -> object:
        options = entry.components.get("options")
        return options.get(name) if isinstance(options, Mapping) else None

    def _is_composed_alike(self) -> bool:
        """Whether both builds were to ask the same strategies."""
        old, new = (build.state.settings for build in (self.before, self.after))
        return all(old.get(name) == new.get(name) for name in ("order", "libraries", "operators"))

    def _still_has(self, source: object, gone: bool) -> bool:
        """Whether the other build has the same file, so that this is not the reason."""
        other = self.after if gone else self.before
        return source is not None and any(each.hash == source for each in other.state.sources.values())

    def _edited(self, change: Change) -> Change:
        """Of a file that only one of the builds used, the other one's version where it has one."""
        if change.path[-1] != "source":
            return change
        names = {each.hash: name for build in (self.before, self.after) for name, each in build.state.sources.items()}
        name = names.get(str(change.before if change.after is ABSENT else change.after), "")
        other = (self.after if change.after is ABSENT else self.before).state.sources.get(name)
        if other is None:
            return change
        before = other.hash if change.before is ABSENT else change.before
        return Change(change.path, before, other.hash if change.after is ABSENT else change.after)

    def _settings(self, operator: Operator | None, names: Iterable[str]) -> list[Cause]:
        old, new = self.before.state.settings, self.after.state.settings
        found = [
            each for name in names for each in changes(old.get(name, ABSENT), new.get(name, ABSENT), ("settings", name))
        ]
        return self._said(found, operator)

    def _files(self) -> list[Cause]:
        """Changed files that a function depends on which makes the model."""
        old, new = (build.state.model.get("files", {}) for build in (self.before, self.after))
        return self._said(changes(old, new, ("model", "files")))

    def _weights(self) -> list[Cause]:
        old, new = (build.state.model.get("weights", {}) for build in (self.before, self.after))
        found = [each for each in changes(old, new, ("model", "weights")) if ABSENT not in (each.before, each.after)]
        if len(found) > _FEW:
            said = f"{len(found)} of {len(new)} weights of the model changed"
            return [Cause("weights", said, ("model", "weights"), None, None)]
        return self._said(found)

    def _said(self, found: Iterable[Change], operator: Operator | None = None, slot: str = "") -> list[Cause]:
        about = self._about(operator, slot)
        return [said for each in found if (said := cause(each, about)) is not None]

    def _about(self, operator: Operator | None, slot: str, beside: tuple[Change, ...] = ()) -> About:
        return About(self.evidence, self.before, self.after, operator, slot, beside)


_FEW = 3  # weights that are named one by one


def _actions(build: Noted, label: str) -> Mapping[str, str]:
    if not label:
        return build.state.actions
    operator = build.state.operators.get(label)
    return operator.actions if operator is not None else {}


def _objects(operator: Operator) -> tuple[str | None, ...]:
    """The keys of what is linked of an operator."""
    return tuple(operator.actions.get(f"{stage}:{operator.implementation}") for stage in ("codegen", "cc"))


def _decided(old: Operator, new: Operator, only_calls: bool) -> Iterator[Change]:
    """What is another of an operator itself: told where nothing else explains it, and its calls in any case."""
    for name in ("calls",) if only_calls else ("calls", "implementation", "reason"):
        yield from changes(getattr(old, name), getattr(new, name), ("operator", name))


def _forgotten(slot: str) -> Cause:
    said = f"the store has no entry of {slot.replace(':', ' ')} any more: what changed in its key cannot be told"
    return Cause("forgotten", said, (slot,), None, None)


def _once(found: Iterable[Cause]) -> list[Cause]:
    """Each sentence once, in the order in which it came first."""
    known: dict[str, Cause] = {}
    for each in found:
        known.setdefault(each.said, each)
    return list(known.values())
