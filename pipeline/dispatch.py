"""Which candidate a workload is compiled from: the strategies are asked in order, and one is chosen.

    first      the first that applies; what is not this project's own is compared with the default before
    fastest    all that apply are compiled, compared with the default and timed, and the fastest beyond the noise is
               taken; where the target's device is not at hand, the first, and the reason says so

A strategy that fails, a function that does not compile and a candidate that is refused when it is tried are put aside
with the reason, and the next one is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline import locking, stages
from pipeline.composition import Composition, Offer, Target
from pipeline.devices import asking
from pipeline.devices.contract import MeasuredOn
from pipeline.errors import ConfigError, StageError, TvmakeError
from pipeline.hashing import Digest, key_of
from pipeline.lock import REASON, Entry, Following
from pipeline.memoizer import Action, Memoizer
from pipeline.platforms import triple_of
from pipeline.store import ActionEntry
from pipeline.toolchain import driver_identity, nvcc_identity
from pipeline.types import TUNED, Candidate, Decision, Packed, Terms, Trial, Workload, symbol_of

if TYPE_CHECKING:
    from pipeline.assembly import Object

Run = Callable[[Action], ActionEntry]  # runs an action, or finds it; raises what its stage raises

_MEASURE_AWAY = replace(stages.MEASURE, alone=False)

REFERENCE = "default"  # what candidates are compared with: the workload as it is


@dataclass(frozen=True)
class Compiled:
    """What a function is compiled to: an object; device code as it is embedded; what there is to look at, by suffix."""

    object: Digest
    device: Digest | None = None
    shown: Mapping[str, Digest] = field(default_factory=dict)


@dataclass(frozen=True)
class Linked:
    """A candidate as it is measured: its name there, its symbol, and all that it is linked of."""

    name: str
    symbol: str
    objects: Mapping[str, Digest]
    shared: Mapping[str, Digest]
    packed: Sequence[Packed] = ()


def measuring(workload: Workload, contenders: Sequence[Linked], terms: Terms, target: Target, anew: str = "") -> Action:
    """What compares candidates of a workload with the first of them, and times the others. `anew`: "", or what tells it
    from measurements that were withdrawn."""
    named: list[list[object]] = []
    inputs: dict[str, Digest] = {}
    for each in contenders:
        inputs |= {digest.hash: digest for digest in (*each.objects.values(), *each.shared.values())}
        objects = {name: digest.hash for name, digest in each.objects.items()}
        shared = {name: digest.hash for name, digest in each.shared.items()}
        packed = [[p.param, symbol_of(p.function.hash), list(p.spec.shape), p.spec.dtype] for p in each.packed]
        named.append([each.name, each.symbol, objects, shared, packed])
    options: dict[str, object] = {
        "contenders": named,
        "parameters": [[list(spec.shape), spec.dtype] for spec in workload.parameters],
        "written": list(workload.written),
        "seeds": list(terms.seeds),
        "seconds": terms.seconds,
        "patience": terms.patience,
        "device": target.device,
    }
    if anew:
        options["anew"] = anew
    subject = f"{target.name}:{workload.label}"
    away = target.file.device
    if away is None or target.measured_on is not MeasuredOn.RPC:
        needs = (away.label,) if away is not None and away.label else ()
        return Action(stages.MEASURE, subject, inputs, options, target.file.timeout, needs=needs)
    places: dict[str, object] = {"rpc": msgspec.to_builtins(away), "triple": triple_of(target.attributes)}
    # Nothing is timed on this machine; and what waits for a device is not late.
    return Action(_MEASURE_AWAY, subject, inputs, options, target.file.timeout + away.wait, places)


@dataclass(frozen=True)
class Dispatcher:
    """Decides for the workloads of one target. `run` may be a look-up that raises where the store lacks an action;
    `host` is what this machine is as a target, for what must run here whatever the target; `following`, how
    tuning.lock is followed."""

    target: Target
    composition: Composition
    memoizer: Memoizer
    run: Run
    host: Mapping[str, Any]
    following: Following = field(default_factory=lambda: Following(None))

    def decide(self, workload: Workload, without: str = "") -> Decision:
        """As tuning.lock says; or among all strategies, or all but one. Raises StageError where every candidate is put
        aside: what befell it, where there was but one; and where the lock must be followed and cannot be."""
        if not without and (locked := self._by_lock(workload)) is not None:
            return locked
        offers = [offer for offer in self.composition.offers(workload) if offer.strategy != without]
        if self.target.file.select == "fastest" and self._can_try(workload):
            return self._fastest(workload, offers)
        return self._first(workload, offers)

    def prepare(self, workload: Workload) -> None:
        """Has made what deciding needs that needs no quiet: candidates, and where they will be timed their objects."""
        if self._by_lock(workload) is not None:
            return
        offers = self.composition.offers(workload)
        if self.target.file.select == "fastest" and self._can_try(workload):
            self._contenders(workload, [each for each in map(self._asker(workload), offers) if each])
        else:
            self._first(workload, offers)

    def _by_lock(self, workload: Workload) -> Decision | None:
        """The decision that tuning.lock has for a workload; None where the choice is free."""
        following, name = self.following, self.target.name
        entry = following.entry(name, workload)
        if entry is None:
            is_unlocked = following.is_followed and following.anew is None and not workload.calls
            return self._as_everywhere(workload) if is_unlocked else None
        try:
            decision = self._locked(workload, entry)
        except TvmakeError as error:
            self._require_going(error)
            following.cannot(name, workload, error)
            return None
        following.better(name, workload, locking.held_back(self.composition, self.target.file, workload, entry))
        return decision

    def _locked(self, workload: Workload, entry: Entry) -> Decision:
        """The decision of an entry, the same on every machine. Raises TvmakeError where it cannot be had."""
        offer = locking.offer(self.composition, self.target.name, workload, entry)
        refusals: list[TvmakeError] = []
        candidate = self._asker(workload, refusals=refusals)(offer)
        if candidate is None:
            raise refusals[0] if refusals else ConfigError(f"{entry.use} no longer applies to it")
        if candidate.whole.hash != entry.function:
            found = f"{candidate.whole.hash[:12]} instead of {entry.function[:12]}"
            raise ConfigError(f"{entry.use} makes another function of it than the locked one: {found}")
        self.compiled(workload, candidate)
        if not offer.trusted and (refused := self._compared(workload, candidate).refused):
            raise ConfigError(f"{entry.use} is put aside: {refused}")
        return Decision(candidate, REASON, (Trial(candidate.strategy),))

    def _as_everywhere(self, workload: Workload) -> Decision | None:
        """What lays out weights is in no lock: of it, the first that applies and is neither timed nor tuned."""
        offers = [offer for offer in self.composition.offers(workload) if offer.strategy != TUNED]
        return self._first(workload, offers) if offers else None

    def compiled(self, workload: Workload, candidate: Candidate) -> Compiled:
        """A candidate compiled under its workload's symbol."""
        return self._compiled_as(workload, candidate.function, workload.symbol)

    def _compiled_as(self, workload: Workload, function: Digest, symbol: str) -> Compiled:
        action = self._codegen(workload, function, symbol, self.target.attributes)
        outputs = self.run(action).outputs
        shown = {name.removeprefix("kernels"): blob for name, blob in outputs.items() if name.startswith("kernels")}
        if "source" in outputs:
            made = self.run(self.cc(action.subject, outputs["source"])).outputs["object"]
            return Compiled(made, None, {".c": outputs["source"]})
        return Compiled(outputs["object"], outputs.get("device"), shown)

    def cc(self, subject: str, source: Digest) -> Action:
        """What compiles C that TVM generated."""
        attributes = self.target.attributes
        options: dict[str, object] = {"target": attributes, "driver": driver_identity(triple_of(attributes))}
        return Action(stages.CC, subject, {"source": source}, options, self.target.file.timeout)

    def packing(self, workload: Workload, packed: Packed) -> Action:
        """What compiles, for this machine, the function that lays out a weight."""
        return self._codegen(workload, packed.function, symbol_of(packed.function.hash), self.host)

    def preparing(self, workload: Workload, compiled: Object | None) -> tuple[Digest, str]:
        """The object of a function that prepares weights, for this machine, and the library that it calls."""
        if compiled is not None and self.target.is_here:
            return compiled.blob, compiled.decision.candidate.library
        action = self._codegen(workload, workload.function, workload.symbol, self.host)
        return self.run(action).outputs["object"], ""

    def _codegen(self, workload: Workload, function: Digest, symbol: str, attributes: Mapping[str, Any]) -> Action:
        options: dict[str, object] = {"symbol": symbol, "target": dict(attributes)}
        if attributes["kind"] == "cuda":
            options["nvcc"] = nvcc_identity()
        subject = f"{self.target.name}:{workload.label}"
        return Action(stages.CODEGEN, subject, {"function": function}, options, self.target.file.timeout)

    def _first(self, workload: Workload, offers: Sequence[Offer]) -> Decision:
        trials: list[Trial] = []
        refusals: list[TvmakeError] = []
        ask = self._asker(workload, trials, refusals)
        for offer in offers:
            candidate = ask(offer)
            if candidate is None:
                continue
            try:
                self.compiled(workload, candidate)
                trial = Trial(candidate.strategy) if offer.trusted else self._compared(workload, candidate)
            except TvmakeError as error:
                self._require_going(error)
                refusals.append(error)
                trial = Trial(candidate.strategy, refused=_said(error))
            trials.append(trial)
            if not trial.refused:
                return Decision(candidate, self._why_first(workload, trials, len(offers)), tuple(trials))
        raise refusals[0] if len(refusals) == len(trials) == 1 else self._none(workload, trials)

    def _why_first(self, workload: Workload, trials: Sequence[Trial], asked: int) -> str:
        without = ""
        if self.target.file.select == "fastest":
            what = "the target's device is not here" if _is_plain(workload) else "its shapes are open"
            without = f" (not timed: {what})"
        if len(trials) == asked == 1:
            return f"the only one in the order{without}"
        return f"the first in the order that {'is right' if len(trials) > 1 else 'applies'}{without}"

    def _fastest(self, workload: Workload, offers: Sequence[Offer]) -> Decision:
        trials: list[Trial] = []
        candidates = [each for each in map(self._asker(workload, trials), offers) if each is not None]
        tried = self._measured(workload, self._contenders(workload, candidates, trials), seconds=True)
        timed = [tried[each.strategy] for each in candidates if each.strategy in tried]
        trials += timed
        best = best_of(timed, self.target.file.measure.noise)
        if best is None:
            raise self._none(workload, trials)
        chosen = next(each for each in candidates if each.strategy == best)
        return Decision(chosen, _why_fastest(best, timed), _in_order(trials, offers))

    def ask(self, workload: Workload, offer: Offer) -> Candidate | None:
        """What a strategy offers, or None where it does not apply or fails."""
        return self._asker(workload)(offer)

    def _asker(
        self, workload: Workload, trials: list[Trial] | None = None, refusals: list[TvmakeError] | None = None
    ) -> Callable[[Offer], Candidate | None]:
        """Asks a strategy: a candidate, or None where it does not apply or fails; a failure is added to the trials."""

        def ask(offer: Offer) -> Candidate | None:
            try:
                entry = self.run(self._apply(workload, offer))
            except TvmakeError as error:
                self._require_going(error)
                if trials is not None:
                    trials.append(Trial(offer.strategy, refused=_said(error)))
                if refusals is not None:
                    refusals.append(error)
                return None
            if "passed" in entry.outputs:
                said = msgspec.json.decode(self.memoizer.blob(entry.outputs["passed"]), type=list[str])
                self.composition.passed_over(workload, said)
            if "function" not in entry.outputs:
                return None
            packed = msgspec.json.decode(self.memoizer.blob(entry.outputs["packed"]), type=tuple[Packed, ...])
            return Candidate(offer.strategy, entry.outputs["whole"], entry.outputs["function"], packed, offer.library)

        return ask

    def _apply(self, workload: Workload, offer: Offer) -> Action:
        options: dict[str, object] = {
            "strategy": offer.strategy,
            "target": self.target.attributes,
            **offer.options,
        }
        subject, inputs = f"{self.target.name}:{workload.label}", {"function": workload.function, **offer.inputs}
        return Action(stages.APPLY, subject, inputs, options, self.target.file.timeout)

    def _contenders(
        self, workload: Workload, candidates: Sequence[Candidate], trials: list[Trial] | None = None
    ) -> list[tuple[Candidate, dict[str, Digest]]]:
        """The candidates that compile, each with the objects that it is linked of."""
        found = []
        for candidate in candidates:
            try:
                found.append((candidate, self.objects(workload, candidate)))
            except TvmakeError as error:
                self._require_going(error)
                if trials is not None:
                    trials.append(Trial(candidate.strategy, refused=_said(error)))
        return found

    def objects(self, workload: Workload, candidate: Candidate) -> dict[str, Digest]:
        """What a candidate is compiled to: itself, under its workload's symbol, and what lays out its weights."""
        objects = {f"{workload.symbol}.o": self.compiled(workload, candidate).object}
        for packed in candidate.packed:
            objects[f"{symbol_of(packed.function.hash)}.o"] = self._packing_there(workload, packed)
        return objects

    def _packing_there(self, workload: Workload, packed: Packed) -> Digest:
        """The object of what lays out a weight, for where candidates are tried: in a model that happens here."""
        if self.target.measured_on in (MeasuredOn.RPC, MeasuredOn.WORKER):
            return self._compiled_as(workload, packed.function, symbol_of(packed.function.hash)).object
        return self.run(self.packing(workload, packed)).outputs["object"]

    def _can_try(self, workload: Workload) -> bool:
        """Whether candidates of a workload can be compared and timed anywhere."""
        return self.target.measured_on is not MeasuredOn.NOWHERE and _is_plain(workload)

    def _compared(self, workload: Workload, candidate: Candidate) -> Trial:
        """What comes of comparing one candidate with the default; it is not timed."""
        if not self._can_try(workload):
            return Trial(
                candidate.strategy, refused="cannot be compared with the default here, and is not this project's own"
            )
        return self._measured(workload, self._contenders(workload, [candidate]), seconds=False)[candidate.strategy]

    def _measured(
        self, workload: Workload, contenders: Sequence[tuple[Candidate, dict[str, Digest]]], seconds: bool
    ) -> dict[str, Trial]:
        plain = Candidate(REFERENCE, workload.function, workload.function)
        if all(candidate.function != workload.function for candidate, _ in contenders):
            reference = (plain, self.objects(workload, plain))
        else:
            reference = next(each for each in contenders if each[0].function == workload.function)
        self._require_known_device()
        action = self._measure(workload, [reference, *contenders], seconds)
        entry = self.run(action)
        if "lost" in entry.outputs and self.memoizer.has_run(key_of(action.components(self.memoizer.toolchain))):
            said = self.memoizer.blob(entry.outputs["lost"]).decode()
            self.composition.tell(f"{said}, while {workload.label} was measured")
        return msgspec.json.decode(self.memoizer.blob(entry.outputs["trials"]), type=dict[str, Trial])

    def _require_known_device(self) -> None:
        """Results are keyed by what a device says of itself, so it is asked before the first; not by a mere look-up."""
        away, is_look_up = self.target.file.device, self.run != self.memoizer.run or not self.memoizer.may_run
        if away is not None and not is_look_up:
            asking.require_known(away, triple_of(self.target.attributes), self.memoizer.workers)

    def _measure(
        self, workload: Workload, contenders: Sequence[tuple[Candidate, dict[str, Digest]]], seconds: bool
    ) -> Action:
        own = self.target.file.measure
        terms = Terms(seconds=own.seconds if seconds else 0.0, patience=own.patience)
        linked = [self.linked(candidate, objects, workload.symbol) for candidate, objects in contenders]
        anew = self.composition.ledger.measured_anew(self.composition.records_key(workload))
        return measuring(workload, linked, terms, self.target, anew)

    def linked(self, candidate: Candidate, objects: Mapping[str, Digest], symbol: str) -> Linked:
        """A compiled candidate, under that symbol, with what it is linked with."""
        more, shared = self.composition.linked_with([candidate.library])
        return Linked(candidate.strategy, symbol, {**objects, **more}, shared, candidate.packed)

    def _require_going(self, error: TvmakeError) -> None:
        """What is no candidate's fault fails as a whole: a build that is being stopped, a full disk, a missing tool."""
        if self.memoizer.workers.stopped or not isinstance(error, StageError | ConfigError):
            raise error

    def _none(self, workload: Workload, trials: Sequence[Trial]) -> StageError:
        reasons = "; ".join(f"{trial.strategy} {trial.refused}" for trial in trials if trial.refused)
        return StageError(
            f"no strategy gives a function that can be used{': ' + reasons if reasons else ''}",
            stage="dispatch",
            subject=f"{self.target.name}:{workload.label}",
            hint=f'add "default" to the order of targets/{self.target.name}.toml',
        )


def _is_plain(workload: Workload) -> bool:
    """Whether a workload can be run by itself: its shapes are known, and so is what it writes."""
    return bool(workload.written) and not any("?" in shape for shape in workload.shapes)


def best_of(trials: Sequence[Trial], noise: float) -> str | None:
    """The first of those that are right, unless another is faster by more than the noise; None where none is right.

    They are in the order of choice; `noise` is the least that is taken for noise, relative.
    """
    best: Trial | None = None
    for each in trials:
        if each.refused or each.seconds is None:
            continue
        margin = min(max(noise, each.noise, best.noise), 0.5) if best is not None else 0.0
        if best is None or each.seconds < (best.seconds or 0.0) * (1 - margin):
            best = each
    return best.strategy if best is not None else None


def _why_fastest(best: str, timed: Sequence[Trial]) -> str:
    times = {trial.strategy: trial.seconds for trial in timed if trial.seconds is not None}
    others = [seconds for name, seconds in times.items() if name != best]
    if not others:
        return "the only one that is right"
    ratio = min(others) / times[best]
    if ratio < 1:
        return "as fast as any within the noise, and first in the order"
    return f"the fastest of {len(times)}, {ratio:.2f} times as fast as the next"


def _in_order(trials: Sequence[Trial], offers: Sequence[Offer]) -> tuple[Trial, ...]:
    order = [offer.strategy for offer in offers]
    return tuple(sorted(trials, key=lambda trial: order.index(trial.strategy)))


def _said(error: TvmakeError) -> str:
    return str(error).partition("\n")[0]
