"""What a target's order comes to in a workspace: which strategies are asked about a workload, in order, with what.

    order = ["manual", "library", "tuned", "rules", "default"]     in targets/<name>.toml
      manual    one for each function in manual/*.py that is for the workload
      library   one for each of `libraries` that is installed, this project's or the workspace's libraries/*.py
      tuned     where something that beats the baseline was tuned for the workload, or the target's databases have it
      <name>    strategies/<name>.py of the workspace
    [[operators]] then forbids some, by the operator's name

Runs no strategy and needs no TVM. What cannot be used (a library that is not installed, a file that does not load) is
said once, by name, and left out.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from pipeline import stages
from pipeline.compiler import libraries, search, strategies
from pipeline.compiler.libraries import Installed, Library
from pipeline.compiler.libraries.shims import HEADER, POOL
from pipeline.compiler.strategies.manual import Manual
from pipeline.compiler.strategies.tuned import Tuned
from pipeline.config import TargetFile
from pipeline.devices.contract import MeasuredOn
from pipeline.devices.identity import device_of, file_of
from pipeline.errors import ConfigError, TvmakeError
from pipeline.freshness import FOLDERS
from pipeline.hashing import Digest
from pipeline.lock import FILE as LOCK
from pipeline.memoizer import Action, Memoizer
from pipeline.platforms import has_device_code, runs_here
from pipeline.processor import device, missing_features
from pipeline.sources import object_of
from pipeline.toolchain import library_identity, openmp_runtime
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.records import TOOLS, Outcome, TrialRecord, Winner, encoded
from pipeline.types import LibraryUse, Plan, Workload


@dataclass(frozen=True)
class Target:
    """A target as its file describes it and as TVM understands it."""

    name: str
    file: TargetFile
    attributes: dict[str, Any]
    llvm: str

    @property
    def is_here(self) -> bool:
        """Whether what is built for it runs on this machine."""
        return is_here(self.attributes)

    @property
    def measured_on(self) -> MeasuredOn:
        """Where candidates for it can be tried, which is another question than where models run."""
        return measured_on(self.attributes, self.file)

    @property
    def device(self) -> str:
        """What times that are taken for it hold for."""
        return device_of(self.file)


def is_here(attributes: Mapping[str, Any]) -> bool:
    """Whether what is built for a target of these attributes runs on this machine."""
    return runs_here(attributes) and not missing_features(attributes)


def measured_on(attributes: Mapping[str, Any], file: TargetFile) -> MeasuredOn:
    """Where candidates of a target can be tried: on the devices that its file names, or else here, if its code runs."""
    if file.device is not None:
        there = MeasuredOn.WORKER if file.device.label else MeasuredOn.RPC
        return MeasuredOn.NOWHERE if has_device_code(attributes) else there
    return MeasuredOn.LOCAL if is_here(attributes) else MeasuredOn.NOWHERE


@dataclass(frozen=True)
class Offer:
    """One strategy to ask about one workload: its name, and what of it enters the key."""

    strategy: str
    inputs: Mapping[str, Digest] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    library: str = ""
    trusted: bool = True  # whether it is this project's own; what is not is compared with the default before it is used


@dataclass(frozen=True)
class Linking:
    """What the functions that call a library are linked with: its shim's object, and its shared libraries by name."""

    shim: Digest
    shared: Mapping[str, Digest]


@dataclass(frozen=True)
class _Found:
    """A library that is installed."""

    library: Library
    installed: Installed
    source: Digest | None  # of its module, where the workspace has it

    @functools.cached_property
    def identity(self) -> str:
        """What tells this library from another version: enters the keys of what it is asked and of what calls it."""
        parts = [f"{name} {library_identity(path)}" for name, path in self.installed.shared.items()]
        return "; ".join([self.installed.version, str(self.library.version), *parts])


def names(folder: Path) -> list[str]:
    """Every name that a target's order, libraries and rules may hold in this workspace."""
    own = [*strategies.ORDER, *(library.name for library in libraries.LIBRARIES)]
    return [*own, *(path.stem for kind in ("strategies", "libraries") for path in _files(folder / kind))]


def space_of(folder: Path, name: str) -> tuple[search.Space, Path | None]:
    """A search space: this project's, or the workspace's spaces/<name>.py with the path of that file.

    Raises ConfigError where there is none, and for a file that cannot be used.
    """
    if name in search.names():
        return search.by_name(name), None
    path = folder / "spaces" / f"{name}.py"
    try:
        return search.of(name, path.read_bytes()), path
    except OSError as error:
        raise ConfigError(
            f"there is no search space {name!r}", hint=f"spaces: {', '.join(search.names())}, and spaces/*.py here"
        ) from error


_WINNERS = 3  # records that `tuned` is given: should the best not be made again, the next is
# The files of a database of MetaSchedule's.
DATABASE = {"workloads": "database_workload.json", "records": "database_tuning_record.json"}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))


class Composition:
    """The strategies of one target in a workspace. Every method may be called from any thread.

    problems  what could not be used, in words; grows as it is found
    """

    def __init__(self, folder: Path, target: Target, memoizer: Memoizer) -> None:
        self._folder = folder
        self._target = target.name
        self._file = target.file
        self._attributes = target.attributes
        self._is_here = target.is_here
        self._memoizer = memoizer
        self._lock = threading.Lock()
        self._linking: dict[str, Linking] = {}
        self._pool: tuple[dict[str, Digest], dict[str, Digest]] | None = None
        self._records: dict[str, list[Digest]] = {}
        tools = memoizer.toolchain.pick(TOOLS)
        self.ledger = Ledger(memoizer.store, target.file.measure.noise, tools=tools)
        self.cannot_be_made: dict[str, list[str]] = {}  # by workload: what is said of better records
        self.unproven: dict[str, Winner] = {}  # by workload: the best of another compiler, where nothing is proven
        self.problems: list[str] = []
        self._libraries = dict(self._installed())
        self._bindings = list(self._bound())

    def files(self) -> list[Path]:
        """The files that the choice depends on: the workspace's own, the databases of records, and the libraries'."""
        lock = self._folder / LOCK
        own = [path for kind in FOLDERS for path in (self._folder / kind).glob("*") if path.is_file()]
        databases = [self._folder / name / part for name in self._file.records for part in DATABASE.values()]
        found = [each for each in self._libraries.values() if each.source is None]
        shared = [path for each in self._libraries.values() for path in each.installed.shared.values()]
        ours = [Path(sys.modules[type(each.library).__module__].__file__ or "") for each in found]
        shims = [each.library.shim for each in found if isinstance(each.library.shim, Path)]
        if "tuned" in self._file.order or self._file.select == "fastest":  # what was measured may be withdrawn
            databases.append(self._memoizer.store.sets.changed)
        if self._file.device is not None:
            databases.append(file_of(self._file.device))
        return [lock, *own, *databases, *shared, *ours, *shims]

    def offers(self, workload: Workload) -> list[Offer]:
        """The strategies to ask about a workload, in the order of choice.

        Raises ConfigError where the target's rules leave none.
        """
        asked = (offer for name in self._file.order for offer in self._of(name, workload))
        found = [offer for offer in asked if self.is_allowed(offer, workload)]
        if not found:
            raise ConfigError(
                f"targets/{self._target}.toml leaves no strategy for {workload.label}",
                hint='add "default" to its order, or loosen its [[operators]]',
            )
        return found

    def offer(self, name: str, workload: Workload) -> Offer | None:
        """The offer of one strategy or library, whether the target's order has it or not; None where it has none."""
        return next(self._of(name, workload), None)

    def is_asked(self, name: str) -> bool:
        """Whether a strategy stands in the target's order, as itself or as one of the libraries."""
        if name in self._file.order:
            return True
        is_library = name in self._known_libraries() or (self._folder / "libraries" / f"{name}.py").exists()
        listed = self._file.libraries
        return is_library and "library" in self._file.order and (listed is None or name in listed)

    def is_allowed(self, offer: Offer, workload: Workload) -> bool:
        """Whether the target's rules leave an operator a strategy."""
        return is_allowed(self._file, offer, workload)

    def offer_of_record(self, trial: TrialRecord, trusted: bool) -> Offer:
        """`tuned` with one record alone. Raises ConfigError where its search space is not there."""
        _, sources = self.space(trial.space)
        inputs = {"winner0": self._memoizer.store.put(encoded(recipe(trial)))}
        inputs |= {f"space.{trial.space}": source for source in sources.values()}
        return Offer(Tuned.name, inputs, {"strategy version": Tuned.version}, trusted=trusted)

    def sets_elsewhere(self, workload: Workload) -> Sequence[str]:
        """The keys of a workload's records for other devices than this, or other targets."""
        own = self.records_key(workload)
        return [key for key in self._sets_by_workload.get(workload.digest, ()) if key != own]

    @functools.cached_property
    def _sets_by_workload(self) -> Mapping[str, Sequence[str]]:
        found: dict[str, list[str]] = {}
        for key in sorted(self.ledger.all_keys()):
            found.setdefault(str(self.ledger.about(key).get("workload", "")), []).append(key)
        return found

    def offer_of_databases(self, workload: Workload) -> Offer | None:
        """`tuned` with what the target's databases have of a workload alone."""
        groups = {f"records{i}": group for i, group in enumerate(self._records.get(workload.digest, []))}
        return Offer(Tuned.name, groups, {"strategy version": Tuned.version}) if groups else None

    def linking(self, library: str) -> Linking:
        """What the functions that call a library are linked with."""
        with self._lock:
            if library not in self._linking:
                found = self._libraries[library]
                store = self._memoizer.store
                shared = {name: store.put_file(path) for name, path in found.installed.shared.items()}
                shim = self._memoizer.run(self._shim_action(found)).outputs["object"]
                self._linking[library] = Linking(shim, shared)
            return self._linking[library]

    def linked_with(self, used: Iterable[str]) -> tuple[dict[str, Digest], dict[str, Digest]]:
        """What is linked with functions that call these libraries: objects and shared libraries, by file name.

        Where some library of the target runs on OpenMP's threads, all code does, whether it calls that library or not:
        two pools in one process take the cores from each other, and what is timed alone shall hold in a model.
        """
        linkings = {name: self.linking(name) for name in sorted(set(used)) if name}
        objects = {f"shim-{name}.o": linking.shim for name, linking in linkings.items()}
        shared = {file: digest for linking in linkings.values() for file, digest in linking.shared.items()}
        if any(found.library.threads == "openmp" for found in self._libraries.values()):
            pool_objects, pool_shared = self._openmp()
            return {**objects, **pool_objects}, {**shared, **pool_shared}
        return objects, shared

    def patterns(self) -> list[list[str]]:
        """The libraries that would have some Relax operators as one function, by name and identity."""
        grouping = {name: found for name, found in self._libraries.items() if hasattr(found.library, "patterns")}
        return [[name, found.identity] for name, found in grouping.items() if found.source is None]

    def describe(self, library: str) -> LibraryUse:
        """What a manifest says of a library."""
        found = self._libraries[library]
        return LibraryUse(library, found.installed.version, found.library.licence, tuple(found.installed.shared))

    def take_records(self, plan: Plan, functions: Mapping[str, Digest]) -> None:
        """Looks in the target's record sets for records of a plan's workloads. `functions` are those of the plan."""
        for name in self._file.records:
            inputs = {}
            try:
                for part, file in DATABASE.items():
                    inputs[part] = self._memoizer.store.put_file(self._folder / name / file)
                inputs |= {f"f{workload.digest}": functions[f"f{workload.digest}"] for workload in plan.workloads}
                entry = self._memoizer.run(Action(stages.RECORDS, f"{self._target}:{name}", inputs))
            except (OSError, TvmakeError) as error:
                self._problem(f"the records in {name} cannot be used: {_said(error)}")
                continue
            unread = int(self._memoizer.blob(entry.outputs["unread"]))
            if unread:
                self._problem(f"{unread} {'line' if unread == 1 else 'lines'} of the records in {name} cannot be read")
            with self._lock:
                for output, digest in entry.outputs.items():
                    if output[0] == "g" and digest not in self._records.setdefault(output[1:], []):
                        self._records[output[1:]].append(digest)

    def unused_bindings(self, digests: Iterable[str]) -> list[str]:
        """The functions of manual/ that are for none of these workloads."""
        known = list(digests)
        return [
            f"{file}: {function} is for {wanted[:16]}, which is no operator of the models built"
            for file, _, function, wanted in self._bindings
            if not any(digest.startswith(wanted) for digest in known)
        ]

    def _of(self, name: str, workload: Workload) -> Iterator[Offer]:
        if name == "library":
            for library in self._file.libraries if self._file.libraries is not None else self._libraries:
                yield from self._library_offer(library)
        elif name == "manual":
            bound = [each for each in self._bindings if workload.digest.startswith(each[3])]
            for _, source, function, _ in bound[:1]:
                yield Offer(
                    name, {"source": source}, {"function": function, "strategy version": Manual.version}, trusted=False
                )
            for file, _, function, _ in bound[1:]:
                self._problem(
                    f"{file}: {function} is left out: {bound[0][0]} has another function for {workload.label}"
                )
        elif name == "tuned":
            inputs = {f"records{i}": group for i, group in enumerate(self._records.get(workload.digest, []))}
            winners, is_proven = self._winners(workload)
            if inputs or winners:
                yield Offer(name, {**inputs, **winners}, {"strategy version": Tuned.version}, trusted=is_proven)
        elif name in self._libraries or name in self._known_libraries():
            yield from self._library_offer(name)
        elif any(strategy.name == name for strategy in strategies.STRATEGIES):
            yield Offer(name, {}, {"strategy version": strategies.by_name(name).version})
        else:
            own = self._source(self._folder / "strategies" / f"{name}.py")
            if own is not None:
                yield Offer(name, {"source": own}, trusted=False)

    def space(self, name: str) -> tuple[search.Space, dict[str, Digest]]:
        """A search space, and what of it enters keys: the bytes of its file, where it is the workspace's."""
        found, path = space_of(self._folder, name)
        return found, {} if path is None else {"source": self._memoizer.store.put_file(path)}

    def records_key(self, workload: Workload) -> str:
        """The key of a workload's set of tuning records."""
        return self.ledger.key_of(workload.digest, self._attributes, device_of(self._file))

    def _winners(self, workload: Workload) -> tuple[dict[str, Digest], bool]:
        """The records of what was tuned that may be applied, the best first, with the files of the spaces that they are
        of; and whether they were validated with the tools of today."""
        applied, is_proven = self.ledger.standing(self.records_key(workload)).applied()
        if applied and not is_proven:
            with self._lock:
                self.unproven[workload.digest] = applied[0]
        inputs: dict[str, Digest] = {}
        winners: list[Digest] = []
        for winner in applied:
            if len(winners) == _WINNERS:
                break
            try:
                _, sources = self.space(winner.trial.space)
            except ConfigError as error:
                self._problem(f"a tuned {workload.label} is passed over: {error.message}")
                continue
            winners.append(self._memoizer.store.put(encoded(winner.trial)))
            inputs |= {f"space.{winner.trial.space}": source for source in sources.values()}
        return inputs | {f"winner{i}": record for i, record in enumerate(winners)}, is_proven

    def _library_offer(self, name: str) -> Iterator[Offer]:
        found = self._libraries.get(name)
        if found is None:
            return
        try:
            inputs = {"shim": self.linking(name).shim}
        except TvmakeError as error:
            if self._memoizer.workers.stopped:
                raise
            self._problem(f"the library {name} is left out: {error}")
            return
        if found.source is not None:
            inputs["source"] = found.source
        # What a library packs, and which functions it takes, depends on the processor that it finds.
        options = {
            "library": found.identity,
            "device": device(),
            "strategy version": found.library.version,
        }
        yield Offer(name, inputs, options, name, trusted=found.source is None)

    def _openmp(self) -> tuple[dict[str, Digest], dict[str, Digest]]:
        """TVM's parallel loops on OpenMP's threads: the object that brings them there, and OpenMP's runtime."""
        with self._lock:
            if self._pool is None:
                store = self._memoizer.store
                inputs = {"shim": store.put_file(POOL), "header": store.put_file(HEADER)}
                entry = self._memoizer.run(Action(stages.SHIM, "OpenMP", inputs, {"library": ""}))
                runtime = openmp_runtime()
                shared = {runtime.name: store.put_file(runtime)} if runtime is not None else {}
                self._pool = ({"openmp-pool.o": entry.outputs["object"]}, shared)
            return self._pool

    def _shim_action(self, found: _Found) -> Action:
        store, shim = self._memoizer.store, found.library.shim
        source = store.put(shim.encode()) if isinstance(shim, str) else store.put_file(shim)
        inputs = {"shim": source, "header": store.put_file(HEADER)}
        if found.source is not None:
            inputs["source"] = found.source
        options = {"library": found.library.name, "identity": found.identity}
        return Action(stages.SHIM, found.library.name, inputs, options)

    def _known_libraries(self) -> set[str]:
        return {library.name for library in libraries.LIBRARIES}

    def _installed(self) -> Iterator[tuple[str, _Found]]:
        """This project's libraries and the workspace's, as far as the target's order may ask them."""
        known: dict[str, tuple[Library, Digest | None]] = {
            library.name: (library, None) for library in libraries.LIBRARIES
        }
        for path in _files(self._folder / "libraries"):
            source = self._source(path)
            if source is None:
                continue
            try:
                shown = f"libraries/{path.name}"
                made = object_of(self._memoizer.blob(source), shown, "library", str(path))
                known[path.stem] = (made, source)  # type: ignore[assignment]
            except ConfigError as error:
                self._problem(str(error))
        wanted = set(self._file.order) | set(self._file.libraries or ())
        every = "library" in self._file.order and self._file.libraries is None
        for name, (library, source) in known.items():
            if name not in wanted and not (every and not getattr(library, "by_name_only", False)):
                continue
            # A library is for the machine that it is installed on.
            here = self._is_here and self._attributes["kind"] == "llvm"
            installed = library.find() if here else None
            if installed is not None:
                yield name, _Found(library, installed, source)
            elif name in wanted and here:
                self._problem(f"the library {name} is not installed ({library.install}); operators go on without it")

    def _bound(self) -> Iterator[tuple[str, Digest, str, str]]:
        """File, source, function and workload of everything that manual/ binds."""
        if "manual" not in self._file.order:
            return
        for path in _files(self._folder / "manual"):
            source = self._source(path)
            if source is None:
                continue
            shown = f"manual/{path.name}"
            try:
                entry = self._memoizer.run(Action(stages.BINDINGS, shown, {"source": source}))
            except TvmakeError as error:
                self._problem(f"{shown} is left out: {error}")
                continue
            for function, wanted in msgspec.json.decode(
                self._memoizer.blob(entry.outputs["bindings"]), type=list[tuple[str, str]]
            ):
                yield shown, source, function, wanted

    def _source(self, path: Path) -> Digest | None:
        try:
            return self._memoizer.store.put_file(path)
        except OSError as error:
            self._problem(f"{path.parent.name}/{path.name} cannot be read: {error.strerror}")
            return None

    def passed_over(self, workload: Workload, said: list[str]) -> None:
        """Notes that better records of a workload cannot be made again: by this TVM, or by this version of a space."""
        count = f"{len(said)} better tuning {'record' if len(said) == 1 else 'records'}"
        with self._lock:
            self.cannot_be_made[workload.digest] = said
        self._problem(f"{count} of {workload.label} cannot be made again, tune it again: {said[0]}")

    def tell(self, text: str) -> None:
        """Has the end of the run say something that happened, once."""
        self._problem(text)

    def _problem(self, text: str) -> None:
        with self._lock:
            if text not in self.problems:
                self.problems.append(text)


def recipe(trial: TrialRecord) -> TrialRecord:
    """What it takes to make a candidate again, and nothing that was measured of it: the same on every machine."""
    return TrialRecord(
        candidate=trial.candidate,
        space=trial.space,
        space_version=trial.space_version,
        decisions=trial.decisions,
        outcome=Outcome.CLAIMED,
    )


def is_allowed(file: TargetFile, offer: Offer, workload: Workload) -> bool:
    """Whether the rules of a target's file leave an operator a strategy."""
    rules = [rule for rule in file.operators if workload.matches(rule.match)]
    return all(_allows(rule.only, offer) and not _names(rule.forbid, offer) for rule in rules)


def _names(listed: tuple[str, ...], offer: Offer) -> bool:
    return offer.strategy in listed or (bool(offer.library) and "library" in listed)


def _allows(only: tuple[str, ...] | None, offer: Offer) -> bool:
    return only is None or _names(only, offer)


def _said(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
