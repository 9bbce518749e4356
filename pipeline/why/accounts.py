"""The account of an operator, or of a model: what it runs on and why, and what its last builds made of it.

Read from the artifact's manifest, the workspace's journal, the store and the tuning records; nothing is built.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.journal import Journal, Noted, Origin, State
from pipeline.journal import Operator as Noticed
from pipeline.manifests import read_manifest
from pipeline.store import Store
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.records import PreferredRecord, Reign, Standing, WithdrawnRecord
from pipeline.types import Manifest, Operator, Trial
from pipeline.why.causes import NOTHING, Comparison, Fate, Way
from pipeline.why.evidence import Evidence
from pipeline.why.likeness import Likeness, alone, ir_difference, predecessors
from pipeline.why.words import Cause


@dataclass(frozen=True)
class News:
    """What one build made of one operator.

    since   when the build before was, None where none is noted
    causes  why it was made otherwise, or again
    ways    how the build came to each of its entries, by what they are for
    was     the operator of the build before that it most likely was, where it is new, and `ir` how they differ
    """

    build: int
    at: float
    since: float | None
    fate: Fate
    causes: tuple[Cause, ...] = ()
    ways: dict[str, Way] | None = None
    artifact: tuple[Cause, ...] = ()
    was: Likeness | None = None
    ir: str = ""
    implementation: str = ""


@dataclass(frozen=True)
class Turn:
    """From when on something was applied, and what had made it so; `strategy` is "" where nothing tuned was."""

    at: float
    candidate: str
    seconds: float | None
    gain: float | None
    because: str


@dataclass(frozen=True)
class Tuning:
    """What is known of an operator's tuning."""

    trials: int
    failed: int
    spent: float
    gain: float
    unproven: bool


@dataclass(frozen=True)
class Account:
    """All that is told of one operator of an artifact. `news` are of its last builds, the latest first; `origins` where
    its entries came from, None for what was in this machine's store before."""

    target: str
    model: str
    operator: str
    shapes: tuple[str, ...]
    calls: int
    implementation: str
    reason: str
    candidates: tuple[Trial, ...]
    seconds: float | None
    news: tuple[News, ...]
    origins: dict[str, Origin | None]
    tuning: Tuning | None
    history: tuple[Turn, ...]


@dataclass(frozen=True)
class Told:
    """What one build made of one operator, in short."""

    operator: str
    fate: Fate
    causes: tuple[Cause, ...]
    was: Likeness | None = None
    implementations: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class ModelNews:
    """What one build made of a model: causes beside those of its operators, and how many actions came which way."""

    build: int
    at: float
    since: float | None
    causes: tuple[Cause, ...]
    operators: tuple[Told, ...]
    gone: tuple[str, ...]
    unchanged: int
    ways: dict[Way, int]


@dataclass(frozen=True)
class ModelAccount:
    """What the last builds made of a model, the latest first."""

    target: str
    model: str
    news: tuple[ModelNews, ...]


@dataclass(frozen=True)
class Artifact:
    """An artifact with what is known of its builds."""

    target: str
    model: str
    manifest: Manifest
    builds: Sequence[Noted]
    evidence: Evidence
    device: str  # that candidates are measured on

    @classmethod
    def of(cls, workspace: Path, target: str, model: str, store: Store, ledger: Ledger, device: str) -> Artifact:
        """Raises ArtifactError where it is not built."""
        manifest = read_manifest(workspace / "artifacts" / target / model)
        return cls(target, model, manifest, Journal(workspace, target, model).builds(), Evidence(store, ledger), device)

    def matching(self, pattern: str) -> list[Operator]:
        """The operators that a pattern is for: by label, name, or the beginning of the digest or of the label's key."""
        return [each for each in self.manifest.operators if _matches(each, pattern)]

    def account(self, operator: Operator, count: int, seconds: float | None = None) -> Account:
        """The account of an operator, with the news of so many builds; where the last left it as it was, also of the
        last that did not."""
        noticed = self.builds[-1].state.operators.get(operator.name) if self.builds else None
        key = self.evidence.ledger.key_of(operator.workload, self.manifest.target_spec, self.device)
        standing = self.evidence.ledger.standing(key)
        return Account(
            target=self.target,
            model=self.model,
            operator=operator.name,
            shapes=operator.shapes,
            calls=operator.calls,
            implementation=operator.implementation,
            reason=operator.reason,
            candidates=operator.candidates,
            seconds=seconds,
            news=tuple(self._news(operator.name, count)),
            origins=_origins(self.builds[-1].state, noticed) if noticed is not None else {},
            tuning=_tuning(standing),
            history=tuple(map(_turn, self.evidence.ledger.history(key))),
        )

    def model_account(self, count: int) -> ModelAccount:
        """What so many of the last builds made of the model."""
        pairs = self._pairs()[:count]
        news = tuple(self._model_news(before, after) for before, after in pairs)
        return ModelAccount(self.target, self.model, news)

    def _pairs(self) -> list[tuple[Noted, Noted]]:
        """Each build with the one before it, the latest first."""
        return list(zip([NOTHING, *self.builds], self.builds, strict=False))[::-1]

    def _news(self, label: str, count: int) -> Iterator[News]:
        is_told = False
        for number, (before, after) in enumerate(self._pairs()):
            if number >= count and is_told:
                return
            if label not in after.state.operators:
                return
            news = self._one(label, before, after)
            is_change = news.fate is not Fate.SAME or bool(news.causes)
            is_told = is_told or is_change
            if number < count or is_change:
                yield news

    def _one(self, label: str, before: Noted, after: Noted) -> News:
        operator = after.state.operators[label]
        compared = Comparison(before, after, self.evidence)
        fate = compared.fate(label)
        was = predecessors(before, after, self.evidence).get(label) if fate is Fate.NEW else None
        return News(
            build=after.number,
            at=after.at,
            since=None if before is NOTHING else before.at,
            fate=fate,
            causes=tuple(_causes(compared, label, fate)),
            ways={slot: compared.way(key) for slot, key in operator.actions.items()},
            artifact=tuple(compared.of_artifact()),
            was=was,
            ir=ir_difference(self.evidence.store, before.state.operators[was.label], operator) if was else "",
            implementation=operator.implementation,
        )

    def _model_news(self, before: Noted, after: Noted) -> ModelNews:
        compared = Comparison(before, after, self.evidence)
        like = predecessors(before, after, self.evidence)
        told = tuple(self._told(compared, label, like.get(label)) for label in after.state.operators)
        changed = tuple(each for each in told if each.fate is not Fate.SAME or each.causes)
        return ModelNews(
            build=after.number,
            at=after.at,
            since=None if before is NOTHING else before.at,
            causes=tuple(compared.mishaps(after.state.actions) if before is NOTHING else compared.of_model()),
            operators=changed,
            gone=tuple(alone(like, before, after)),
            unchanged=len(told) - len(changed),
            ways=_counted([compared.way(key) for key in after.state.keys]),
        )

    @staticmethod
    def _told(compared: Comparison, label: str, was: Likeness | None) -> Told:
        fate = compared.fate(label)
        new = compared.after.state.operators[label]
        if fate in (Fate.FIRST, Fate.NEW):
            return Told(label, fate, tuple(compared.mishaps(new.actions)), was, ("", new.implementation))
        old = compared.before.state.operators[label]
        return Told(label, fate, tuple(compared.of_operator(label)), None, (old.implementation, new.implementation))


def _causes(compared: Comparison, label: str, fate: Fate) -> list[Cause]:
    if fate not in (Fate.FIRST, Fate.NEW):
        return compared.of_operator(label)
    mishaps = compared.mishaps(compared.after.state.operators[label].actions)
    return [*compared.of_new(), *mishaps] if fate is Fate.NEW else mishaps


def _matches(operator: Operator, pattern: str) -> bool:
    stem, _, short = operator.name.rpartition("-")
    names = (operator.name, stem, operator.workload)
    is_digest = len(pattern) >= _SHORTEST and operator.workload.startswith(pattern)
    return is_digest or any(fnmatch.fnmatchcase(name, pattern) for name in (*names, short))


_SHORTEST = 4  # digits of a digest that may stand for it


def _origins(state: State, operator: Noticed) -> dict[str, Origin | None]:
    return {slot: state.origin(key) for slot, key in operator.actions.items()}


def _counted(ways: Sequence[Way]) -> dict[Way, int]:
    return {way: ways.count(way) for way in Way if way in ways}


def _tuning(standing: Standing) -> Tuning | None:
    if not standing.trials and not standing.spent:
        return None
    winners, is_proven = standing.applied()
    gain = winners[0].gain if winners else 1.0
    return Tuning(len(standing.trials), sum(standing.failures.values()), standing.spent, gain, not is_proven)


def _turn(reign: Reign) -> Turn:
    winner, by = reign.winner, reign.by
    if isinstance(by, WithdrawnRecord):
        because = f"invalidated{f' by {by.by}' if by.by else ''}{f': {by.reason}' if by.reason else ''}"
    elif isinstance(by, PreferredRecord):
        because = f"rolled back{f' by {by.by}' if by.by else ''}{f': {by.reason}' if by.reason else ''}"
    else:
        because = "found by tuning"
    return Turn(
        at=reign.at,
        candidate=winner.trial.candidate if winner is not None else "",
        seconds=winner.retest.seconds if winner is not None else None,
        gain=winner.gain if winner is not None else None,
        because=because,
    )
