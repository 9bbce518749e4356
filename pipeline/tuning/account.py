"""What a night has come to so far, and the telling of it: counts, failures, and an event for whatever happens.

Knows no engine and no ledger: it is told, and reads the rest from the scheduler.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from pipeline.tuning.events import (
    Begun,
    End,
    Ended,
    Failure,
    Figures,
    Measured,
    OperatorEnded,
    Paused,
    Phase,
    PostChanged,
    Retested,
    Times,
    Watcher,
)
from pipeline.tuning.posts import Post
from pipeline.tuning.records import Outcome, Record, TrialRecord, ratio
from pipeline.tuning.scheduler import Scheduler
from pipeline.tuning.states import Operator, State, Why

POST_LOST = "post lost"  # among the failures of a night


class Account:
    """Of one night. `counted` is when records were last written: what lies behind it belongs to batches to come."""

    def __init__(self, scheduler: Scheduler, watcher: Watcher, now: Callable[[], float]) -> None:
        self._scheduler = scheduler
        self._watcher = watcher
        self._now = now
        self.begun = self.counted = now()
        self.trials = self.timed = 0
        self.fresh = 0  # trials, but for second tries where others have a time
        self._failures: dict[str, Failure] = {}
        self._told_ended: dict[str, Why] = {}
        self._gains: dict[str, float] = {}  # of each operator, when the run began

    @property
    def elapsed(self) -> float:
        """Seconds into the run when records were last written."""
        return self.counted - self.begun

    # What happened.

    def begin(self, run: str, posts: Sequence[str]) -> None:
        states, now = self._scheduler.states, self._scheduler.now
        self.begun = self.counted = self._now()
        self._gains = {key: state.gain for key, state in states.items()}
        models = {model: (float(self._scheduler.before[model]), float(seconds)) for model, seconds in now.items()}
        figures = tuple(self._figures(state) for state in states.values())
        budget, spent = self._scheduler.terms.budget, self._scheduler.spent
        self._watcher.told(Begun(self.begun, run, budget, spent, figures, models, tuple(posts)))

    def take_in(self, state: State, written: Sequence[Record], known: Collection[str], post: str) -> None:
        """A batch was measured and written. `known` had been tried before."""
        trials = [each for each in written if isinstance(each, TrialRecord)]
        failed = Counter(str(each.outcome) for each in trials if each.outcome is not Outcome.TIMED)
        timed = len(trials) - failed.total()
        self.trials += len(trials)
        self.timed += timed
        self.fresh += sum(not state.timed or trial.candidate not in known for trial in trials)
        self.note_failures(state.operator, trials)
        told = Measured(
            at=self.counted,
            elapsed=self.elapsed,
            left=self._scheduler.left(self.elapsed),
            operator=self._figures(state),
            timed=timed,
            failed=dict(failed),
            seconds=sum(each.cost for each in written),
            models=self._times(),
            post=post,
        )
        self._watcher.told(told)

    def tell_retest(self, state: State, leader: TrialRecord, gain: float, won: bool, post: str) -> None:
        figures, times = self._figures(state), self._times()
        self._watcher.told(Retested(self.counted, figures, leader.candidate, ratio(leader), gain, won, times, post))

    def tell_phase(self, operator: Operator, phase: str, post: str = "") -> None:
        self._watcher.told(Phase(self._now(), operator.name, phase, post))

    def tell_paused(self, why: str) -> None:
        self._watcher.told(Paused(self._now(), why))

    def tell_post(self, post: Post, count: int, operator: str = "", said: str = "") -> None:
        self._watcher.told(PostChanged(self._now(), post.name, post.state, count, operator, said))

    def note_failures(self, operator: Operator, records: Sequence[Record]) -> None:
        for record in records:
            if isinstance(record, TrialRecord) and record.outcome is not Outcome.TIMED:
                self.note_failure(str(record.outcome), operator, record.said)

    def note_failure(self, kind: str, operator: Operator, said: str) -> None:
        known = self._failures.get(kind, Failure(0, operator.name, said))
        self._failures[kind] = Failure(known.count + 1, known.operator, known.said)

    def note_ended(self, state: State) -> None:
        key = state.operator.key
        if state.why is not None and self._told_ended.get(key) is not state.why:
            self._told_ended[key] = state.why
            self._watcher.told(OperatorEnded(self._now(), self._figures(state), str(state.why), state.said))

    # What it comes to.

    def tell_ended(self, ended: Ended) -> None:
        self._watcher.told(ended)

    def ended(self, end: End, said: str) -> Ended:
        """The last event: how the night ended, and why where it did before its time."""
        states = self._scheduler.states
        forecasts = [each for each in self._scheduler.plan().forecasts if states[each.operator.key].why is None]
        now = self._now()
        # What a profile told and what was measured may differ: the gains alone are compared, of the same baseline.
        was = {key: state.baseline / self._gains[key] for key, state in states.items()}
        gained = {
            state.operator.name: was[key] * state.calls - state.now
            for key, state in states.items()
            if state.gain > self._gains[key]
        }
        return Ended(
            at=now,
            end=end,
            said=said,
            budget=self._scheduler.terms.budget,
            elapsed=now - self.begun,
            spent=self._scheduler.spent,
            trials=self.trials,
            timed=self.timed,
            operators=tuple(self._figures(state) for state in states.values()),
            gained=gained,
            models={
                model: (
                    self._scheduler.before[model],
                    sum(was[key] * state.operator.calls.get(model, 0) for key, state in states.items()),
                    self._scheduler.now[model],
                )
                for model in self._scheduler.before
            },
            failures=self._failures,
            more=sum(each.seconds for each in forecasts) / self._scheduler.terms.posts,
            next=forecasts[0].operator.name if forecasts else "",
        )

    def _figures(self, state: State) -> Figures:
        return Figures(
            operator=state.operator.name,
            calls=dict(state.operator.calls),
            share=self._scheduler.share(state),
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

    def _times(self) -> Times:
        expected = self._scheduler.expected(self.elapsed)
        return Times(self._scheduler.before.total(), self._scheduler.now.total(), expected)
