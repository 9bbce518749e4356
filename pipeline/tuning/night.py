"""The loop of a night: batches are prepared side by side, measured one at a time, and written down at once.

    pick ─ claim ─ prepare ┐
    pick ─ claim ─ prepare ┴─ measure ─ add records ─ retest the leader ─ learn ─ pick …

What is measured is written before anything else happens, so that a night that is killed loses the running batch at
most. A first `stop()` lets the batch end that is being measured, with the retest of what leads in it, and drops those
in preparation; a second one gives up at once. What one sees of it are events: pipeline.tuning.events.

An engine that fails for one operator puts that operator aside. Three failures of one kind in a row are the machine's,
and end the night. The store's errors end it at once. Needs no TVM.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import msgspec

from pipeline.errors import StoreError, last_line
from pipeline.tuning.events import (
    Begun,
    End,
    Ended,
    Event,
    Failure,
    Figures,
    Measured,
    OperatorEnded,
    Paused,
    Phase,
    Retested,
    Times,
    Watcher,
)
from pipeline.tuning.records import CompletedRecord, Outcome, Record, RetestRecord, Standing, TrialRecord, ratio
from pipeline.tuning.scheduler import Operator, Scheduler, State, Terms, Turn, Why

T = TypeVar("T")

_POLL = 0.1  # seconds until a stop is seen while something is waited for
_ELSEWHERE = 0.5  # seconds until operators that another run has are asked for again
_IN_A_ROW = 3  # failures of one kind that are no longer an operator's own
_FRUITLESS = 3  # batches in a row without anything new, until an operator has ended
_RETESTS = 2  # of one batch at most


@dataclass(frozen=True)
class Batch:
    """Candidates of one operator, built and ready to be measured.

    candidates  by digest: whatever the engine needs to measure one
    records     what is known without measuring: what could not be built, a space that has nothing more
    """

    candidates: Mapping[str, Any] = field(default_factory=dict)
    records: tuple[Record, ...] = ()

    def without(self, tried: Collection[str]) -> Batch:
        """What of it nobody has tried."""
        return Batch(
            {digest: each for digest, each in self.candidates.items() if digest not in tried},
            tuple(each for each in self.records if not (isinstance(each, TrialRecord) and each.candidate in tried)),
        )


class Engine(Protocol):
    """How candidates are proposed, built and measured. Records leave `cost`, `at` and `run` to the night."""

    workers: int  # how many prepare() may run at once; 0: each in turn, in the night's own thread

    def prepare(self, operator: Operator, standing: Standing, count: int) -> Batch:
        """Proposes and builds at most `count` candidates, none that the standing says was tried. In any thread."""
        ...

    def measure(self, operator: Operator, batch: Batch) -> Sequence[Record]:
        """Tries every candidate of a batch. Called for one batch at a time: the machine is quiet."""
        ...

    def retest(self, operator: Operator, standing: Standing, leader: TrialRecord) -> Sequence[Record]:
        """Times the leader longer, in turn with the best winner and the baseline. As quiet as `measure`."""
        ...

    def learn(self, operator: Operator, records: Sequence[Record]) -> None:
        """Takes in what was measured. May return before it is done."""
        ...

    def now(self) -> float:
        """Unix time in seconds, as a clock that only goes forward."""
        ...

    def close(self) -> None:
        """Ends what still runs; calls that are under way may raise."""
        ...


class Ledger(Protocol):
    """The sets of records, as the night uses them. Called from the night's thread alone."""

    def standing(self, key: str) -> Standing:
        """Where the operator with this key stands, records of other runs included."""
        ...

    def add(self, key: str, about: Mapping[str, Any], records: Sequence[Record]) -> object:
        """Writes records; they are safe when it returns. `about` says in words what the set is of."""
        ...

    def claim(self, key: str) -> AbstractContextManager[bool]:
        """Yields whether no other run is at this operator; keeps others from it within the block."""
        ...


@dataclass
class _Pending:
    """A batch in preparation, or ready."""

    turn: Turn
    batch: Future[Batch]


class _GivenUpError(Exception):
    """stop() was called twice."""


class Night:
    """One run of `doit tune`. Closes the engine at its end."""

    def __init__(
        self,
        operators: Sequence[Operator],
        engine: Engine,
        ledger: Ledger,
        terms: Terms,
        watcher: Watcher,
        run: str = "",
        scheduler: Scheduler | None = None,
    ) -> None:
        self.scheduler = scheduler or Scheduler(operators, ledger.standing, terms)
        self._engine = engine
        self._ledger = ledger
        self._terms = terms
        self._watcher = watcher
        self._run = run
        self._stops = 0
        self._pending: list[_Pending] = []
        self._elsewhere: list[Turn] = []
        self._waits = False  # for other runs, and has said so
        self._claims = _Claims(ledger)
        self._in_hand: dict[str, set[str]] = {}  # digests that are being measured, by operator
        self._visited: set[str] = set()
        self._told_ended: dict[str, Why] = {}
        self._fruitless: Counter[str] = Counter()
        self._row: tuple[str, int] = ("", 0)  # kind of the last failures, and how many there were in a row
        self._broken = ""
        self._failures: dict[str, Failure] = {}
        self._trials = self._timed = 0
        self._fresh = 0  # trials, but for second tries where others have a time
        self._begun = self._counted = 0.0
        self._gains: dict[str, float] = {}  # of each operator, when the run began

    def stop(self) -> None:
        """Ends the night at the next safe point; called again, at once. From a signal handler or any thread."""
        self._stops += 1

    def run(self) -> Ended:
        """Works until all is done, the budget is spent or it is stopped.

        Raises StoreError, and whatever is not the engine's, after what was measured is written and the end is told.
        """
        self._begun = self._counted = self._engine.now()
        now = self.scheduler.now
        models = {model: (float(self.scheduler.before[model]), float(seconds)) for model, seconds in now.items()}
        self._gains = {key: state.gain for key, state in self.scheduler.states.items()}
        figures = tuple(self._figures(state) for state in self.scheduler.states.values())
        self._tell(Begun(self._begun, self._run, self._terms.budget, self.scheduler.spent, figures, models))
        try:
            self._work_and_leave()
        except BaseException as error:
            self._broken = last_line(error)
            self._tell(self._ended())
            raise
        ended = self._ended()
        if ended.end is not End.STOPPED and not self._broken:
            self._complete()
        self._tell(ended)
        return ended

    def _complete(self) -> None:
        """Notes that the budget was used to its end: the same one again gives these operators nothing."""
        budget = self._terms.budget
        for state in self.scheduler.states.values():
            if budget is not None and state.why is not Why.PUT_ASIDE and state.completed < budget:
                record = CompletedRecord(budget=budget, at=self._engine.now(), run=self._run)
                self._ledger.add(state.operator.key, _about(state.operator), [record])

    # The loop.

    def _work_and_leave(self) -> None:
        with contextlib.ExitStack() as leaving:
            leaving.callback(self._engine.close)
            leaving.callback(self._claims.release_all)
            leaving.callback(self._write_what_is_ready)
            with contextlib.suppress(_GivenUpError):
                self._work()

    def _work(self) -> None:
        while not self._stops and not self._broken:
            self._fill()
            if self._pending:
                ready = self._await_ready()
                if ready is not None:
                    self._take_up(ready)
            elif self._elsewhere and not self._is_over():
                self._wait_for_others()
            else:
                return

    def _fill(self) -> None:
        """Has as many batches in preparation as the engine takes."""
        while len(self._pending) < max(1, self._engine.workers) and not self._stops:
            turn = self.scheduler.pick(self._elapsed_when_counted)
            if turn is None:
                return
            key = turn.operator.key
            if not self._claims.take(key):
                self._elsewhere.append(turn)
                continue
            standing = self._ledger.standing(key)
            state = self.scheduler.states[key]
            if len(standing.trials) != state.trials:  # another run was there in the meantime
                self.scheduler.put_back(turn)
                self._note_ended(self.scheduler.update(turn.operator, standing))
                self._claims.release(key)
                continue
            known = replace(standing, tried=standing.tried | self._in_hand.get(key, set()))
            self._tell_phase(turn.operator, "preparing")
            self._pending.append(_Pending(turn, self._begin(self._prepare, turn, known)))

    def _prepare(self, turn: Turn, standing: Standing) -> Batch:
        return self._engine.prepare(turn.operator, standing, turn.count)

    def _await_ready(self) -> _Pending | None:
        """The batch that was picked first among those that are ready; None where the night is stopped before."""
        while True:
            done, _ = wait([each.batch for each in self._pending], _POLL, FIRST_COMPLETED)
            if self._stops:
                return None
            for each in self._pending:
                if each.batch in done:
                    self._pending.remove(each)
                    return each

    def _is_over(self) -> bool:
        return self._terms.budget is not None and self._elapsed_when_counted >= self._terms.budget

    def _wait_for_others(self) -> None:
        """Other runs have all operators that are left. To wait for them costs no operator anything."""
        if not self._waits:
            self._tell(Paused(self._engine.now(), "another run is at all operators that are left"))
            self._waits = True
        for _ in range(round(_ELSEWHERE / _POLL)):
            if not self._stops:
                time.sleep(_POLL)
        self._counted = self._engine.now()
        self._ask_for_others()

    def _ask_for_others(self) -> None:
        """Sees what became of operators that another run had, and lets them be picked again."""
        asked, self._elsewhere = self._elsewhere, []
        for turn in asked:
            self.scheduler.put_back(turn)
            self._note_ended(self.scheduler.update(turn.operator, self._ledger.standing(turn.operator.key)))

    # One batch.

    def _take_up(self, pending: _Pending) -> None:
        turn, operator = pending.turn, pending.turn.operator
        self._waits = False
        try:
            if not self.scheduler.may_go_on(turn, self._elapsed_when_counted):
                self.scheduler.put_back(turn)
                return  # the budget was spent, or the operator ended, while it was prepared
            before = self._ledger.standing(operator.key)
            batch = pending.batch.result().without(before.tried)
            self.scheduler.prepared(turn)
            self._in_hand[operator.key] = set(batch.candidates)
            if self._engine.workers:
                self._fill()  # others are prepared while this one is measured
            if self._stops:
                self._pending.append(pending)  # built, and not measured
                return
            written = self._measured(operator, batch)
            state = self.scheduler.finish(turn, self._ledger.standing(operator.key))
            self._learn_from(operator, written, state, {each.candidate for each in (*before.trials, *before.claims)})
            self._row = ("", 0)
        except (StoreError, _GivenUpError):
            raise
        except Exception as error:  # an engine may fail in any way: that is the operator's, until it is everyone's
            self._put_aside(operator, error)
        finally:
            self._in_hand.pop(operator.key, None)
            self._claims.release(operator.key)
            self._tell_phase(operator, "")
        self._ask_for_others()

    def _measured(self, operator: Operator, batch: Batch) -> list[Record]:
        """Everything that came of a batch, written."""
        written = [*batch.records]
        try:
            if batch.candidates:
                self._tell_phase(operator, "measuring")
                written += self._in_thread(self._engine.measure, operator, batch)
        finally:
            written = self._add(operator, written)
        return written

    def _learn_from(self, operator: Operator, written: Sequence[Record], state: State, known: Collection[str]) -> None:
        """Tells of a batch, retests what leads, and lets the engine learn. `known` had been tried before."""
        trials = [each for each in written if isinstance(each, TrialRecord)]
        self._trials += len(trials)
        self._timed += sum(trial.outcome is Outcome.TIMED for trial in trials)
        self._fresh += sum(not state.timed or trial.candidate not in known for trial in trials)
        self._note_failures(operator, trials)
        took = sum(each.cost for each in written)
        failed = Counter(str(each.outcome) for each in trials if each.outcome is not Outcome.TIMED)
        self._tell(self._batch_event(state, len(trials) - failed.total(), dict(failed), took))
        retests = self._retest(operator, trials)
        state = self.scheduler.update(operator, self._ledger.standing(operator.key))
        if written and not self._stops:
            self._in_thread(self._engine.learn, operator, [*written, *retests])
        self._fruitless[operator.key] = 0 if written else self._fruitless[operator.key] + 1
        if state.why is None and self._fruitless[operator.key] >= _FRUITLESS:
            self.scheduler.end(operator, Why.EXHAUSTED, "nothing new was proposed")
        self._note_ended(state)

    def _retest(self, operator: Operator, trials: Sequence[TrialRecord]) -> list[Record]:
        """Retests what of a batch seems better than the best winner, the best first, until one is."""
        written: list[Record] = []
        standing = self._ledger.standing(operator.key)
        if operator.key not in self._visited:  # an earlier run may have been killed before it came to this
            self._visited.add(operator.key)
            trials = standing.trials
        timed = [
            trial for trial in trials if trial.outcome is Outcome.TIMED and trial.candidate not in standing.retested
        ]
        for leader in sorted(timed, key=_sure_ratio, reverse=True)[:_RETESTS]:
            if _sure_ratio(leader) <= standing.gain * (1 + self._terms.noise):
                break
            self._tell_phase(operator, "retesting")
            again = self._add(operator, self._in_thread(self._engine.retest, operator, standing, leader))
            self._note_failures(operator, again)  # a second look may find that it is wrong
            written += again
            standing = self._ledger.standing(operator.key)
            state = self.scheduler.update(operator, standing)
            won = standing.best is not None and standing.best.trial.candidate == leader.candidate
            gain = next((_gain(record) for record in again if _is_retest_of(record, leader)), 0.0)
            figures = self._figures(state)
            self._tell(Retested(self._counted, figures, leader.candidate, ratio(leader), gain, won, self._times()))
            if won:
                break
        return written

    def _add(self, operator: Operator, records: Sequence[Record]) -> list[Record]:
        """Writes records, with the time since the last ones as their cost."""
        if not records:
            return []
        begun, self._counted = self._counted, self._engine.now()
        each = (self._counted - begun) / len(records)
        written: list[Record] = [
            msgspec.structs.replace(record, cost=each, at=begun + each * (i + 1), run=self._run)
            for i, record in enumerate(records)
        ]
        self._ledger.add(operator.key, _about(operator), written)
        return written

    def _write_what_is_ready(self) -> None:
        """What is known of batches that were built and will not be measured."""
        for each in self._pending:
            if each.batch.done() and each.batch.exception() is None:
                tried = self._ledger.standing(each.turn.operator.key).tried
                self._add(each.turn.operator, each.batch.result().without(tried).records)

    # What goes wrong.

    def _put_aside(self, operator: Operator, error: Exception) -> None:
        kind, said = type(error).__name__, last_line(error)
        self._row = (kind, self._row[1] + 1 if self._row[0] == kind else 1)
        self._note_failure(kind, operator, said)
        self._note_ended(self.scheduler.end(operator, Why.PUT_ASIDE, said))
        if self._row[1] >= _IN_A_ROW:
            self._broken = f"{_IN_A_ROW} operators in a row failed, the last with: {said}"

    def _note_failures(self, operator: Operator, records: Sequence[Record]) -> None:
        for record in records:
            if isinstance(record, TrialRecord) and record.outcome is not Outcome.TIMED:
                self._note_failure(str(record.outcome), operator, record.said)

    def _note_failure(self, kind: str, operator: Operator, said: str) -> None:
        known = self._failures.get(kind, Failure(0, operator.name, said))
        self._failures[kind] = Failure(known.count + 1, known.operator, known.said)

    def _note_ended(self, state: State) -> None:
        key = state.operator.key
        if state.why is not None and self._told_ended.get(key) is not state.why:
            self._told_ended[key] = state.why
            self._tell(OperatorEnded(self._engine.now(), self._figures(state), str(state.why), state.said))

    # Threads.

    def _begin(self, call: Callable[..., T], *arguments: Any) -> Future[T]:
        """Runs a call of the engine's in a thread that ends with the process, whatever it does."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call(*arguments))
            except BaseException as error:
                future.set_exception(error)

        if self._engine.workers:
            threading.Thread(target=run, daemon=True, name="tuning").start()
        else:
            run()
        return future

    def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        """What a call of the engine's returns. Raises _GivenUpError where the night is stopped twice before."""
        future = self._begin(call, *arguments)
        while not future.done():
            if self._stops > 1:
                raise _GivenUpError
            wait([future], _POLL)
        return future.result()

    # What is told.

    def _tell(self, event: Event) -> None:
        self._watcher.told(event)

    def _tell_phase(self, operator: Operator, phase: str) -> None:
        self._tell(Phase(self._engine.now(), operator.name, phase))

    @property
    def _elapsed_when_counted(self) -> float:
        """Seconds into the run when records were last written: what lies between belongs to the batch to come."""
        return self._counted - self._begun

    def _figures(self, state: State) -> Figures:
        return Figures(
            operator=state.operator.name,
            calls=dict(state.operator.calls),
            share=self.scheduler.share(state),
            baseline=state.baseline,
            best=state.baseline / state.gain,
            gain=state.gain,
            trials=state.trials,
            timed=state.timed,
            failed={str(outcome): count for outcome, count in state.failures.items()},
            winners=state.winners,
            spent=state.spent,
            why=str(state.why or ""),
        )

    def _batch_event(self, state: State, timed: int, failed: dict[str, int], took: float) -> Measured:
        elapsed = self._elapsed_when_counted
        return Measured(
            at=self._counted,
            elapsed=elapsed,
            left=self.scheduler.left(elapsed),
            operator=self._figures(state),
            timed=timed,
            failed=failed,
            seconds=took,
            models=self._times(),
        )

    def _times(self) -> Times:
        expected = self.scheduler.expected(self._elapsed_when_counted)
        return Times(self.scheduler.before.total(), self.scheduler.now.total(), expected)

    def _ended(self) -> Ended:
        states = self.scheduler.states
        forecasts = [each for each in self.scheduler.plan().forecasts if states[each.operator.key].why is None]
        now = self._engine.now()
        # What a profile told and what was measured may differ: the gains alone are compared, of the same baseline.
        was = {key: state.baseline / self._gains[key] for key, state in states.items()}
        gained = {
            state.operator.name: was[key] * state.calls - state.now
            for key, state in states.items()
            if state.gain > self._gains[key]
        }
        return Ended(
            at=now,
            end=self._end(),
            said=self._broken,
            budget=self._terms.budget,
            elapsed=now - self._begun,
            spent=self.scheduler.spent,
            trials=self._trials,
            timed=self._timed,
            operators=tuple(self._figures(state) for state in states.values()),
            gained=gained,
            models={
                model: (
                    self.scheduler.before[model],
                    sum(was[key] * state.operator.calls.get(model, 0) for key, state in states.items()),
                    self.scheduler.now[model],
                )
                for model in self.scheduler.before
            },
            failures=self._failures,
            more=sum(each.seconds for each in forecasts),
            next=forecasts[0].operator.name if forecasts else "",
        )

    def _end(self) -> End:
        states = self.scheduler.states.values()
        if self._stops:
            return End.STOPPED
        if any(_is_all_wrong(state) for state in states):
            return End.VALIDATION_FAILED
        if not self._timed and (self._fresh or any(state.why is Why.PUT_ASIDE for state in states)):
            return End.NOTHING_MEASURED
        return End.BROKEN if self._broken else End.DONE


class _Claims:
    """The operators that this run has, each as often as it has a batch of it."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._held: dict[str, tuple[contextlib.ExitStack, int]] = {}

    def take(self, key: str) -> bool:
        if key in self._held:
            stack, count = self._held[key]
            self._held[key] = stack, count + 1
            return True
        stack = contextlib.ExitStack()
        if not stack.enter_context(self._ledger.claim(key)):
            stack.close()
            return False
        self._held[key] = stack, 1
        return True

    def release(self, key: str) -> None:
        stack, count = self._held.pop(key)
        if count > 1:
            self._held[key] = stack, count - 1
        else:
            stack.close()

    def release_all(self) -> None:
        for key in list(self._held):
            self._held.pop(key)[0].close()


def _about(operator: Operator) -> dict[str, Any]:
    """What a set of records is of, for people."""
    return {
        "operator": operator.workload.name,
        "workload": operator.workload.digest,
        "shapes": list(operator.workload.shapes),
        "target": operator.target,
    }


def _sure_ratio(trial: TrialRecord) -> float:
    """The ratio of a trial less what may be noise in it: what a retest is worth for."""
    return ratio(trial) * (1 - min(trial.noise, 0.5))


def _is_retest_of(record: Record, leader: TrialRecord) -> bool:
    return isinstance(record, RetestRecord) and record.candidate == leader.candidate


def _gain(record: Record) -> float:
    return record.baseline / record.seconds if isinstance(record, RetestRecord) else 0.0


def _is_all_wrong(state: State) -> bool:
    """Whether every candidate of an operator gave another result than the default."""
    return 0 < state.trials == state.failures.get(Outcome.WRONG, 0)
