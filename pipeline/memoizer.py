"""The one place where a stage becomes a cached one: key, look up, run, store.

    key      named components: stage, version, inputs by digest, options, and for binaries the tools
    look up  an entry all of whose blobs are there and whole is a hit; a remote, where there is one, is asked next
    run      under a lock, so that two builds at once do not do the same work; in a process that may die
    store    blobs first, the entry last, by the process that ran the stage: what is done stays done; a remote gets
             them behind the work

Every method may be called from any thread.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import ArtifactError, NotBuiltError, StageError, TvmakeError
from pipeline.hashing import Digest, key_of
from pipeline.stages import Home, Inputs, Kind, Stage
from pipeline.store import ActionEntry, Store

if TYPE_CHECKING:
    from pipeline.executors.contract import Executor
    from pipeline.remotes.cache import Origin, RemoteCache
    from pipeline.toolchain import Toolchain


@dataclass(frozen=True)
class Action:
    """One stage on given inputs. `subject` is what a person calls it, and `places` say where this machine has what the
    stage reads outside of the store: neither enters the key. `needs` are labels that a worker elsewhere must have to
    run it, `llvm-znver5` say: see pipeline.executors.placing. `post` is who must run it, where that matters: one of
    those that `Executor.posts` names."""

    stage: Stage
    subject: str
    inputs: Mapping[str, Digest] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    timeout: float = 1800.0  # seconds; what takes longer is stopped. Not in the key either
    places: Mapping[str, object] = field(default_factory=dict)  # the stage sees them as options
    needs: tuple[str, ...] = ()
    post: str = ""

    def components(self, toolchain: Toolchain) -> dict[str, object]:
        """Everything that can change the result, by name."""
        components: dict[str, object] = {
            "stage": self.stage.name,
            "version": self.stage.version,
            "inputs": {name: digest.hash for name, digest in self.inputs.items()},
            "options": dict(self.options),
        }
        if self.stage.kind is Kind.BINARY:
            components["tools"] = toolchain.pick(self.stage.tools)
        return components


class Watcher(Protocol):
    """Is told of every action as it begins and ends. Called from any thread."""

    def started(self, action: Action) -> None: ...

    def finished(self, action: Action, hit: bool, seconds: float) -> None: ...

    def failed(self, action: Action) -> None: ...


@dataclass
class Tally:
    """What the memoizer did so far, by stage."""

    hits: Counter[str] = field(default_factory=Counter)
    ran: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    subjects: dict[str, set[str]] = field(default_factory=dict)  # of what ran, by stage
    found: dict[str, set[str]] = field(default_factory=dict)  # subjects of the hits, by stage
    # Seconds by stage: what the hits took when they were run, and what was run took.
    saved_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    spent_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


class Memoizer:
    """Runs actions through the store, and the remote behind it where there is one. Knows stages only by their
    contract."""

    def __init__(
        self, store: Store, workers: Executor, toolchain: Toolchain, remote: RemoteCache | None = None
    ) -> None:
        self.store = store
        self.workers = workers
        self.toolchain = toolchain
        self.remote = remote
        self.may_run = True  # where it may not, what would have to be run is an error
        self.tally = Tally()
        self.watcher: Watcher | None = None
        self._counting = threading.Lock()
        self._floor = Floor()
        self._known: dict[str, ActionEntry] = {}
        self._asked: dict[str, set[str]] = {}  # keys of what was found or run, by subject
        self._ran: set[str] = set()  # keys
        self._lost: dict[str, tuple[str, ...]] = {}  # by key: blobs that its entry names and the store has no more

    def found(self, action: Action) -> ActionEntry | None:
        """The entry of an action where the store has it, counted as a hit; None where it would have to be run."""
        key = key_of(action.components(self.toolchain))
        if (entry := self._remembered(action, key)) is not None:
            return entry
        entry = self._looked_up(action, key)
        if entry is None:
            self._note_loss(key)
            entry = self._fetched(action, key)
        if entry is not None:
            self._count_hit(action, key, entry)
        return entry

    def _looked_up(self, action: Action, key: str) -> ActionEntry | None:
        """The entry of an action as the store has it, which may have come from anywhere."""
        entry = self.store.lookup(key)
        return entry if entry is not None and is_of(action.stage, entry) else None

    def _fetched(self, action: Action, key: str) -> ActionEntry | None:
        """The entry of an action from the remote, now in the store as well."""
        entry = self.remote.find(key) if self.remote is not None else None
        return entry if entry is not None and is_of(action.stage, entry) else None

    def run(self, action: Action) -> ActionEntry:
        """The entry of an action, from the store or by running it.

        Raises what the stage raises: a TvmakeError as it is, anything else as a StageError that names the stage, its
        subject and its key; WorkerDiedError where the process that ran it died.
        """
        components = action.components(self.toolchain)
        key = key_of(components)
        if action.stage.kind is Kind.SOURCE:
            return self._watched(action, key, components)
        if (entry := self._remembered(action, key)) is not None:
            return entry
        entry = self._looked_up(action, key)
        if entry is None:
            with self.store.locked(key):
                entry = self._looked_up(action, key)
                if entry is None:
                    self._note_loss(key)
                    entry = self._fetched(action, key)
                if entry is None:
                    return self._watched(action, key, components)
        self._count_hit(action, key, entry)
        return entry

    def forget(self) -> None:
        """Forgets what was looked up: the store is asked again."""
        with self._counting:
            self._known.clear()
            self._asked.clear()
            self._ran.clear()
            self._lost.clear()
            self.tally = Tally()

    def asked(self, wanted: Callable[[str], bool]) -> dict[str, tuple[str, ActionEntry]]:
        """The actions that were found or run for some subjects, by key: subject and entry."""
        with self._counting:
            subjects = {key: subject for subject, keys in self._asked.items() if wanted(subject) for key in keys}
            return {key: (subject, self._known[key]) for key, subject in sorted(subjects.items())}

    def has_run(self, key: str) -> bool:
        """Whether this process ran an action, rather than found it."""
        return key in self._ran

    def lost(self, key: str) -> tuple[str, ...]:
        """Hashes of the blobs for want of which an entry that was here could not be used."""
        return self._lost.get(key, ())

    def origin(self, key: str) -> Origin | None:
        """Where the remote had an entry from that was fetched; None where it was found here, or run."""
        return self.remote.origins.get(key) if self.remote is not None else None

    def refused(self, key: str) -> str:
        """Why the remote's entry was not taken; "" where nothing was wrong with it, or there was none."""
        return self.remote.refused.get(key, "") if self.remote is not None else ""

    def _note_loss(self, key: str) -> None:
        """Notes what an entry that is here lacks: why an action is run again, or fetched again, that was run before."""
        document = self.store.document(key)
        if document is None:
            return
        outputs = ActionEntry.from_bytes(key, document).outputs.values()
        lacking = tuple(digest.hash for digest in outputs if not self.store.has(digest))
        if lacking:
            with self._counting:
                self._lost[key] = lacking

    def _remembered(self, action: Action, key: str) -> ActionEntry | None:
        entry = self._known.get(key)
        if entry is not None:
            with self._counting:
                self._asked.setdefault(action.subject, set()).add(key)
        return entry

    def _remember(self, action: Action, key: str, entry: ActionEntry) -> None:
        self._known[key] = entry
        self._asked.setdefault(action.subject, set()).add(key)

    def _count_hit(self, action: Action, key: str, entry: ActionEntry) -> None:
        with self._counting:
            self.tally.hits[action.stage.name] += 1
            self.tally.found.setdefault(action.stage.name, set()).add(action.subject)
            self.tally.saved_seconds[action.stage.name] += entry.seconds
            self._remember(action, key, entry)
        if self.watcher is not None:
            self.watcher.finished(action, True, entry.seconds)

    def blob(self, digest: Digest) -> bytes:
        """The bytes of a blob that an action of this build made or was given."""
        data = self.store.get(digest)
        if data is None:
            raise TvmakeError(f"blob {digest} is missing from the store", hint="run the same command again")
        return data

    def _watched(self, action: Action, key: str, components: dict[str, object]) -> ActionEntry:
        if not self.may_run and action.stage.kind is not Kind.SOURCE:
            raise NotBuiltError(f"{action.stage.name} of {action.subject} is in no store", hint="run: doit build")
        if self.watcher is not None:
            self.watcher.started(action)
        try:
            entry = self._perform(action, key, components)
        except BaseException:
            with self._counting:
                self.tally.failed[action.stage.name] += 1
            if self.watcher is not None:
                self.watcher.failed(action)
            raise
        if self.watcher is not None:
            self.watcher.finished(action, False, entry.seconds)
        return entry

    def _perform(self, action: Action, key: str, components: dict[str, object]) -> ActionEntry:
        with self._place(action):
            if action.stage.home is Home.INLINE:
                entry = perform(self.store, action, key, components)
            else:
                entry = self.workers.perform(action, key, components)
        with self._counting:
            self.tally.ran[action.stage.name] += 1
            self.tally.spent_seconds[action.stage.name] += entry.seconds
            self.tally.subjects.setdefault(action.stage.name, set()).add(action.subject)
            if action.stage.kind is not Kind.SOURCE:
                self._remember(action, key, entry)
                self._ran.add(key)
        if self.remote is not None and action.stage.kind is not Kind.SOURCE:
            self.remote.publish(key, entry)
        return entry

    def _place(self, action: Action) -> contextlib.AbstractContextManager[None]:
        """Where an action runs: what is timed on this machine has it to itself."""
        if action.stage.home is not Home.INLINE and not self.workers.runs_here(action):
            return contextlib.nullcontext()
        return self._floor.alone(self.store) if action.stage.alone else self._floor.shared()


class Floor:
    """Where actions run: any number at once, or one alone, which goes before those that come after it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._waiting = 0  # of those that want to be alone

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._running >= 0 and self._waiting == 0)
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self, store: Store) -> Iterator[None]:
        """Other builds that share the store time nothing meanwhile either."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self._running == 0)
            self._running, self._waiting = -1, self._waiting - 1
        try:
            with store.locked("measuring"):  # no digest: never the slot that this thread holds already
                yield
        finally:
            with self._changed:
                self._running = 0
                self._changed.notify_all()


def is_of(stage: Stage, entry: ActionEntry) -> bool:
    """Whether an entry can be a result of a stage. What another machine wrote carries a check that holds, whatever it
    says; one that cannot be is made again, and replaced."""
    return entry.stage == stage.name and (not stage.makes or not entry.outputs.keys().isdisjoint(stage.makes))


def perform(store: Store, action: Action, key: str, components: dict[str, object]) -> ActionEntry:
    """Runs a stage here and now, stores what it made, and returns the entry. This is what a worker process does."""
    begun = time.perf_counter()
    try:
        made = action.stage.load()(Inputs(store, action.inputs), {**action.options, **action.places})
        outputs = {name: store.put(data) for name, data in made.items()}
        entry = ActionEntry(action.stage.name, components, outputs, time.perf_counter() - begun)
        if action.stage.kind is not Kind.SOURCE:
            store.commit(key, entry)
        return entry
    except ArtifactError as error:
        # Code that was built failed to run: by itself that does not say whose.
        subject = {"stage": action.stage.name, "subject": action.subject, "key": key}
        raise StageError(error.message, hint=error.hint, **subject) from error
    except TvmakeError:
        raise
    except MemoryError as error:
        raise StageError("out of memory", stage=action.stage.name, subject=action.subject, key=key) from error
    except Exception as error:
        raise StageError(_last_line(error), stage=action.stage.name, subject=action.subject, key=key) from error


def _last_line(error: Exception) -> str:
    """What an exception says, without the trace of C++ frames that TVM puts before it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"
