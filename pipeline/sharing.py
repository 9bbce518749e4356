"""What a workspace shares with other machines, through a remote or a file: whole closures and tuning records.

    push      what is here goes to the remote           pull     what is there comes here
    lookup    which actions of an artifact are there
    export    closures and records into one file        take_in  and out of one

A build does most of this by itself; these are for who wants it done at a time of his own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import closures
from pipeline.build import Build
from pipeline.errors import ConfigError, NotBuiltError, TvmakeError
from pipeline.hashing import Digest
from pipeline.memoizer import Memoizer
from pipeline.remotes.results import Signature
from pipeline.remotes.trust import signer, trusting
from pipeline.store import Store, carry
from pipeline.store.inventory import Progress
from pipeline.store.usage import RemoteUsage, StageUsage, Usage, UsageCounts
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.records import decoded

if TYPE_CHECKING:
    from pipeline.models import Model
    from pipeline.remotes.cache import RemoteCache
    from pipeline.workspace import Workspace

Pairs = Sequence[tuple[str, "Model"]]
Left = Callable[[int], None]  # is told how many entries are left
_SIGNATURE = ".sig"
TUNE = "tune"  # what tuning is called among stages, where runs are counted


@dataclass
class Moved:
    """What went over for one artifact: entries, of how many; or `why` it could not be told what belongs to it."""

    target: str
    model: str
    entries: int = 0
    of: int = 0
    why: str = ""
    missing: list[str] = field(default_factory=list)  # what a person calls the actions that are not there
    lost: int = 0  # entries that were to go over and did not

    @property
    def whole(self) -> bool:
        """Whether all of the artifact is where it was asked for."""
        return not (self.why or self.missing or self.lost)


def require_remote(workspace: Workspace) -> RemoteCache:
    """Raises ConfigError where the settings name none."""
    remote = workspace.remote
    if remote is None:
        hint = 'write into tvmake.toml beside dodo.py:\n    [remote]\n    url = "https://…"\n  or set TVMAKE_REMOTE'
        raise ConfigError("there is no remote", hint=hint)
    return remote


# through a remote


def push(workspace: Workspace, pairs: Pairs, left: Left) -> list[Moved]:
    """Sends what is here of built artifacts and the remote lacks, and this store's tuning records."""
    remote, done = require_remote(workspace), []
    _require(remote.policy.writes, "writes")
    for target, model in pairs:
        moved = Moved(target, model.name)
        done.append(moved)
        try:
            found = workspace.build.found(target, model)
        except TvmakeError as error:  # not built; or this model or target is at fault, and others are not
            moved.why = error.message
            continue
        before = remote.counts.published
        absent = _absent(remote, found)
        for key in absent:
            remote.publish(key, found[key][1])
        remote.drain(left)
        moved.entries, moved.of = remote.counts.published - before, len(absent)
        moved.lost = moved.of - moved.entries
        workspace.build.publish_closure(target, model, found)
        remote.drain(left)
    remote.finish(left)
    if workspace.lanes is not None:
        workspace.lanes.publish()
    return done


def pull(workspace: Workspace, pairs: Pairs) -> list[Moved]:
    """Brings what the remote has of artifacts into the store, and tuning records."""
    remote, done = require_remote(workspace), []
    _require(remote.policy.reads, "reads")
    workspace.gather()
    for target, model in pairs:
        before = remote.counts.hits
        moved = Moved(target, model.name)
        done.append(moved)
        try:
            moved.of = len(workspace.build.found(target, model))
        except TvmakeError as error:
            moved.why = error.message
        moved.entries = remote.counts.hits - before
    return done


def lookup(workspace: Workspace, pairs: Pairs) -> list[Moved]:
    """Which actions of artifacts the remote has, with all their blobs."""
    remote, done = require_remote(workspace), []
    for target, model in pairs:
        moved = Moved(target, model.name)
        done.append(moved)
        try:
            wanted = _wanted(workspace, remote, target, model)
        except TvmakeError as error:
            moved.why = error.message
            continue
        moved.of = len(wanted)
        moved.missing = sorted(wanted[key] for key in _absent(remote, wanted))
        moved.entries = moved.of - len(moved.missing)
    return done


def _wanted(workspace: Workspace, remote: RemoteCache, target: str, model: Model) -> dict[str, str]:
    """The keys of an artifact's actions, and what a person calls them: as this machine found them, or else as others
    told."""
    known = workspace.build.memoizer
    here = Build(workspace.folder, Memoizer(known.store, known.workers, known.toolchain))  # which fetches nothing
    try:
        return {key: f"{entry.stage} of {subject}" for key, (subject, entry) in here.found(target, model).items()}
    except NotBuiltError:
        content, _ = workspace.build.closure_keys(target, model)
        if (told := closures.ask(remote, workspace.store, content)) is None:
            raise
        return {part.key: part.subject for part in told.parts}


def _absent(remote: RemoteCache, wanted: Iterable[str]) -> list[str]:
    """Those of some keys whose entries the remote does not have, or not with all their blobs."""
    entries = remote.look_all(wanted)
    blobs = {digest for entry in entries.values() for digest in entry.outputs.values()}
    lost = remote.lacks(blobs)
    whole = {key for key, entry in entries.items() if lost.isdisjoint(entry.outputs.values())}
    return [key for key in wanted if key not in whole]


def _require(may: bool, what: str) -> None:
    if not may:
        raise ConfigError(f"the policy of this machine's remote is one that never {what}", hint="set: policy")


# through a file


def export(workspace: Workspace, pairs: Pairs, path: Path, progress: Progress | None = None) -> carry.Carried:
    """Writes closures and tuning records of built artifacts to one file, signed where this machine has a key.

    Raises NotBuiltError where one of them is not built.
    """
    keys: set[str] = set()
    sets: set[str] = set()
    for target, model in pairs:
        keys.update(workspace.build.found(target, model))
        resolved = workspace.build.target(target)
        workloads = workspace.build.plan(target, model).workloads
        tuned = (Ledger.key_of(each.digest, resolved.attributes, resolved.device) for each in workloads)
        sets.update(key for key in tuned if workspace.store.sets.names(key))
    carried = carry.export(workspace.store, keys, sets, path, progress)
    if (signs := signer(workspace.settings.sign_with)) is not None:
        signature = signs.sign_file(Digest.of_file(path))
        _beside(path).write_text(f"{signature.by} {signature.over}\n")
    return carried


def take_in(workspace: Workspace, path: Path, progress: Progress | None = None) -> carry.Carried:
    """Brings an exported file into the store. Raises ConfigError where this machine wants a signature that it lacks."""
    settings = workspace.settings
    trust = trusting(settings.trusted, settings.signature_required, signer(settings.sign_with))
    if trust.required and not trust.believes_file(_digest(path), _signatures(_beside(path))):
        raise ConfigError(
            f"{path} is not signed by a key that this machine trusts",
            hint=f"bring {_beside(path).name} along, which `doit cache export` writes where [trust] sign_with is set",
        )
    return carry.take_in(workspace.store, path, progress)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + _SIGNATURE)


def _digest(path: Path) -> Digest:
    try:
        return Digest.of_file(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _signatures(path: Path) -> Iterable[Signature]:
    try:
        words = path.read_text().split()
    except (OSError, UnicodeDecodeError):
        return []
    return [Signature(*words)] if len(words) == 2 else []


# what a run did


def remember_tuning(store: Store, trials: int, seconds: float) -> None:
    """Notes what a run of tuning tried, for `doit cache stats`."""
    counts = UsageCounts({TUNE: StageUsage(misses=trials, seconds_spent=seconds)})
    Usage(store.root).add(counts)


def tuning_seconds(store: Store) -> float:
    """What all tuning records of a store cost: seconds, on whatever machine. Reads them all."""
    costs = 0.0
    for key in store.sets.all_keys():
        for _, data in store.sets.read(key):
            with contextlib.suppress(ValueError):
                costs += decoded(data).cost
    return costs


def usage(memoizer: Memoizer) -> UsageCounts:
    """What one process found and made, for `doit cache stats`."""
    tally, remote = memoizer.tally, memoizer.remote
    fetched = remote.counts.fetched if remote is not None else {}
    stages = {}
    for name in {*tally.hits, *tally.ran, *tally.failed, *fetched}:
        stages[name] = StageUsage(
            hits=max(0, tally.hits[name] - fetched.get(name, 0)),
            remote_hits=fetched.get(name, 0),
            misses=tally.ran[name],
            errors=tally.failed[name],
            seconds_spent=tally.spent_seconds[name],
            seconds_saved=tally.saved_seconds[name],
        )
    remotes = {}
    if remote is not None:
        counts = remote.counts
        requests = counts.hits + counts.misses + counts.published
        remotes[remote.remote.name] = RemoteUsage(requests, counts.errors, counts.received, counts.sent)
    return UsageCounts(stages, remotes)
