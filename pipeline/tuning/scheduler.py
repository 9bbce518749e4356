"""Which operator the next batch of trials is for, which operators have ended, and why.

Greedy by the largest expected gain for a second of the night:

    calls in all models * seconds of a call now * share expected to be saved by one more batch
    ------------------------------------------------------------------------------------------
                              seconds that the batch is expected to cost

Before anybody has looked at an operator much is hoped for. Afterwards its curve tells (see states.py), and trials that
brought nothing make it less.

So the first pass, which gives every operator that matters a small batch, the largest first, is woven into the work on
the largest: in simulated nights that lowers the models' time sooner than to have it done first. What it has not reached
when half of the budget is spent comes before everything else, as long as that takes no more than a quarter.

A decision takes O(log n): the operators lie in heaps, where entries that no longer hold are passed over. Needs no TVM,
no clock and no thread: it is told.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from pipeline.tuning.records import Standing
from pipeline.tuning.states import HOPE, Operator, State, Terms, Why, untried

TRIAL_SECONDS = 0.4  # of a trial, before any was made
MATTERS = 1e-4  # share of a model's time; what is expected to bring less is not worth a batch

_FIRST_PASS = 0.25  # share of a budget that it may take …
_FIRST_PASS_FROM = 0.5  # … before everything else, once this share is spent
_AHEAD = 0.5  # what a batch is worth that is proposed before the results of the one before it
# What is no end for an operator with candidates that failed in an earlier run and may be tried again, and with those
# that others claim to be fast.
_UNLESS_AGAIN = frozenset({Why.EXHAUSTED, Why.UNMEASURABLE})
_UNLESS_CLAIMED = _UNLESS_AGAIN | {Why.TRIALS, Why.FLAT}
_UNLESS_UNPROVEN = _UNLESS_CLAIMED | {Why.BUDGET}
# What is no end for a stale operator until it has had as many more trials as it takes to call a curve flat.
_UNLESS_STALE = _UNLESS_UNPROVEN


@dataclass(frozen=True)
class Turn:
    """One batch: for which operator, and how many candidates."""

    operator: Operator
    count: int


@dataclass(frozen=True)
class Forecast:
    """What is expected of one operator: `doit tune --plan`.

    to_come  trials at most, 0 where it has ended
    seconds  that they would take
    why      why there are none to come, "" where there are some
    """

    operator: Operator
    share: float
    trials: int
    to_come: int
    seconds: float
    gain: float
    why: str


@dataclass(frozen=True)
class Plan:
    """What a run would do: a forecast for each operator, and the seconds of the run by the clock, its budget
    considered."""

    forecasts: tuple[Forecast, ...]
    seconds: float
    spent: float


class Scheduler:
    """The operators of a night. Not for several threads: the night's loop alone calls it."""

    def __init__(self, operators: Iterable[Operator], standing: Callable[[str], Standing], terms: Terms) -> None:
        self.terms = terms
        self.states = {
            operator.key: State(operator, i, sum(operator.calls.values()))
            for i, operator in enumerate(_once(operators))
        }
        self.spent = 0.0
        self.before: Counter[str] = Counter()  # seconds of each model's operators
        self.now: Counter[str] = Counter()
        self._untuned: Counter[str] = Counter()
        self._order: Sequence[State] = tuple(self.states.values())
        self._trials = 0
        self._looking = 0.0  # seconds that the first pass of this run took
        self._unseen: list[tuple[float, int, int]] = []
        self._seen: list[tuple[float, int, int]] = []
        self._owed: list[tuple[float, int, int]] = []
        self._hoped = self._needed = 0.0  # sums over the operators
        for state in self._order:
            known = standing(state.operator.key)
            state.again = untried(state.operator, known)
            state.is_owed_a_retest = known.is_owed_a_retest(terms.noise)
            state.grace = len(known.trials) + terms.patience if state.operator.is_stale else 0
            self._read(state, known)
        self._guess = statistics.median([state.before for state in self._order if state.before] or [1.0])
        self._note_what_is_owed()
        for state in self._order:
            self._judge(state)
            self._push(state)

    # What the night asks and tells.

    def pick(self, elapsed: float) -> Turn | None:
        """The next batch, `elapsed` seconds into this run; None where there is none to begin now."""
        state = self._next(elapsed)
        if state is None:
            return None
        state.version += 1
        state.preparing = True
        turn = Turn(state.operator, self._count(state))
        state.flying += turn.count
        return turn

    def prepared(self, turn: Turn) -> None:
        """Its batch is being measured: another may be prepared ahead, where nothing else is worth half as much."""
        state = self.states[turn.operator.key]
        state.preparing = False
        if state.looked:
            self._push(state, _AHEAD)

    def may_go_on(self, turn: Turn, elapsed: float) -> bool:
        """Whether what was picked is still wanted: its operator has not ended since, nor the budget."""
        state = self.states[turn.operator.key]
        return state.why is None and not self._is_over(elapsed) and (self._is_owed(state) or not self._is_spent())

    def finish(self, turn: Turn, standing: Standing) -> State:
        """A batch that was `prepared` is over, and this is where its operator stands now."""
        state = self.states[turn.operator.key]
        state.flying -= turn.count
        if standing.spent == state.spent:
            state.grace = 0  # nothing is proposed, and nothing was tried again
        return self.update(turn.operator, standing)

    def lose(self, turn: Turn, standing: Standing) -> State:
        """A batch that was `prepared` is over without having been measured, as its post was lost."""
        self.states[turn.operator.key].flying -= turn.count
        return self.update(turn.operator, standing)

    def update(self, operator: Operator, standing: Standing) -> State:
        """Takes in what is known of an operator now: of this run's or of another's."""
        state = self.states[operator.key]
        was_new, spent = not state.looked, state.spent
        self._read(state, standing)
        if was_new:
            self._looking += state.spent - spent
        if state.why is not Why.PUT_ASIDE:
            self._judge(state)
        self._push(state)
        return state

    def put_back(self, turn: Turn) -> None:
        """Its batch was not begun, or dropped before it was `prepared`: nothing more is known than before."""
        state = self.states[turn.operator.key]
        state.flying -= turn.count
        state.preparing = False
        self._push(state)

    def end(self, operator: Operator, why: Why, said: str = "") -> State:
        """Ends an operator for this run."""
        state = self.states[operator.key]
        state.why, state.said = why, said
        self._push(state)
        return state

    def owed_retests(self) -> list[Operator]:
        """Those that had ended before this run, while what leads of them was never retested."""
        return [each.operator for each in self._order if each.is_owed_a_retest and each.why is not None]

    def share(self, state: State) -> float:
        """Its share of the time of the chosen models, all together, as they are now."""
        total = self.now.total()
        return state.now / total if total else 0.0

    def left(self, elapsed: float) -> float | None:
        """Seconds left of the budget, None where there is none."""
        if self.terms.budget is None:
            return None
        return max(0.0, self.terms.budget - self._used(elapsed))

    def expected(self, elapsed: float) -> float:
        """Seconds of all models at the end of the run, as far as the curves tell."""
        left = self.left(elapsed)
        reached = 1.0 if left is None or not self._needed else min(1.0, left * self.terms.posts / self._needed)
        return self.now.total() - self._hoped * reached

    def plan(self) -> Plan:
        """What a run of these terms would do, begun now."""
        forecasts = tuple(map(self._forecast, sorted(self._order, key=lambda state: (-state.now, state.index))))
        needed = sum(each.seconds for each in forecasts) / self.terms.posts
        left = self.left(0.0)
        owed = sum(
            max(self._fair_share() - state.spent, self._due(state)) / self.terms.posts
            for state in self._order
            if self._is_owed(state) and state.why is None
        )
        return Plan(forecasts, needed if left is None else min(needed, max(left, owed)), self.spent)

    # How it decides.

    def _next(self, elapsed: float) -> State | None:
        if self._is_over(elapsed):
            return None
        if self._is_spent():
            return self._pop(self._owed) if self._top(self._owed) else None
        new, old = self._top(self._unseen), self._top(self._seen)
        if new is None or old is None:
            return self._pop(self._seen if new is None else self._unseen) if new or old else None
        if self._is_first_pass_due(elapsed) or self._value(new) >= -self._seen[0][0]:
            return self._pop(self._unseen)
        return self._pop(self._seen)

    def _is_first_pass_due(self, elapsed: float) -> bool:
        budget = self.terms.budget
        if budget is None or self._used(elapsed) < _FIRST_PASS_FROM * budget:
            return False
        return self._looking < _FIRST_PASS * budget * self.terms.posts

    def _used(self, elapsed: float) -> float:
        """Seconds of the budget that are gone: by the clock, or as all posts spent them, in all runs together."""
        return max(elapsed, self.spent / self.terms.posts)

    def _is_over(self, elapsed: float) -> bool:
        return self.terms.budget is not None and self.terms.budget - elapsed < self._trial_seconds()

    def _is_spent(self) -> bool:
        """Whether what is left of the budget, all runs together, is less than a trial takes."""
        return self.terms.at_posts is not None and self.terms.at_posts - self.spent < self._trial_seconds()

    def _is_owed(self, state: State) -> bool:
        is_due = not state.looked or state.is_unproven or state.is_in_grace or state.spent < self._fair_share()
        return state.owed and is_due

    def _fair_share(self) -> float:
        return (self.terms.at_posts or 0.0) / max(1, len(self._order))

    def _due(self, state: State) -> float:
        """Seconds that it gets whatever was spent on it before."""
        if not state.looked:
            return self._first_batch(state)
        return self._seconds(state, self._to_come(state)) if state.is_unproven or state.is_in_grace else 0.0

    def _first_batch(self, state: State) -> float:
        """Seconds that its first batch took, or will."""
        first = min(self.terms.first, self.terms.trials)
        return self._seconds(state, min(first, state.trials) if state.looked else first)

    def _value(self, state: State) -> float:
        count = self._count(state)
        return self._weight(state) * -math.expm1(-state.hope(count)) / self._seconds(state, count)

    def _weight(self, state: State) -> float:
        """Seconds of all its calls; where nothing is known of them, what is usual."""
        return state.now or self._guess

    def _count(self, state: State) -> int:
        size = self.terms.batch if state.looked or state.flying else min(self.terms.first, self.terms.batch)
        return min(size, self._to_come(state))

    def _to_come(self, state: State) -> int:
        if state.is_over:
            most = len(state.again)
        else:
            most = (state.grace if state.is_in_grace else self.terms.trials) - state.trials
        return max(0, most - state.flying)

    def _seconds(self, state: State, count: int) -> float:
        each = state.spent / state.trials if state.trials and state.spent else self._trial_seconds()
        return max(each, 1e-6) * max(1, count)

    def _trial_seconds(self) -> float:
        return self.spent / self._trials if self._trials and self.spent else TRIAL_SECONDS

    # What an operator's standing says.

    def _read(self, state: State, standing: Standing) -> None:
        self._add_up(state, -1)
        state.baseline = standing.baseline or state.operator.seconds
        state.gain = standing.gain
        state.spent = standing.spent
        state.completed = standing.budget
        state.trials = len(standing.trials)
        state.timed = state.trials - sum(standing.failures.values())
        state.failures, state.winners = standing.failures, len(standing.winners)
        state.looked = bool(standing.trials)
        state.curve.follow(standing.trials)
        state.slope = state.curve.slope(self.terms)
        state.again &= untried(state.operator, standing)
        if state.why is not Why.PUT_ASIDE:
            why = self._ended(state, standing)
            state.is_in_grace = why in _UNLESS_STALE and state.trials < state.grace
            why = None if state.is_in_grace else why
            is_unproven = bool(standing.unproven) and not standing.winners
            claimed = _UNLESS_CLAIMED if standing.claims else _UNLESS_AGAIN
            state.is_over = bool(state.again) and why in (_UNLESS_UNPROVEN if is_unproven else claimed)
            state.is_unproven = is_unproven
            state.why, state.said = None if state.is_over else why, ""
        self._add_up(state, 1)

    def _add_up(self, state: State, sign: int) -> None:
        """Adds an operator to the sums over all, or takes it from them."""
        self.spent += sign * state.spent
        self._trials += sign * state.trials
        for sums, seconds in (
            (self.before, state.baseline),
            (self.now, state.baseline / state.gain),
            (self._untuned, state.untuned if state.baseline else 0.0),
        ):
            for model, calls in state.operator.calls.items():
                sums[model] += sign * calls * seconds  # type: ignore[assignment]

    def _ended(self, state: State, standing: Standing) -> Why | None:
        """What of an operator alone says that it has ended."""
        spaces = state.operator.spaces
        if spaces and spaces <= standing.exhausted:
            return Why.EXHAUSTED
        if state.trials and not state.timed and state.trials >= min(self.terms.first + self.terms.batch, self._cap):
            return Why.UNMEASURABLE
        if state.trials >= self._cap:
            return Why.TRIALS
        if self.terms.budget is not None and standing.budget >= self.terms.budget:
            return Why.BUDGET
        return Why.FLAT if state.curve.idle(self.terms.noise) >= self.terms.patience else None

    @property
    def _cap(self) -> int:
        return self.terms.trials

    def _judge(self, state: State) -> None:
        """Ends an operator whose share is too small."""
        if state.why is None and self._is_small(state):
            state.why = Why.SMALL

    def _is_small(self, state: State) -> bool:
        """Whether in none of its models it is expected to save a share that matters.

        Of the models' time as it was untuned: what is too small once stays so, as the models get faster. What is stale
        is not judged by its old curve.
        """
        if not state.baseline:
            return False
        hope = HOPE if state.is_in_grace else state.hope(self.terms.patience)
        call = state.baseline / state.gain * -math.expm1(-hope)
        return all(calls * call < MATTERS * self._untuned[model] for model, calls in state.operator.calls.items())

    def _note_what_is_owed(self) -> None:
        """Whatever was spent, an operator at which nobody has looked, and that no finished run of this budget passed
        over, has a right to its share of it: it is new, as a changed layer is."""
        for state in self._order:
            is_new = not state.looked or state.is_unproven or state.is_in_grace
            state.owed = self.terms.budget is not None and is_new and state.why is None

    def _forecast(self, state: State) -> Forecast:
        out_of_reach = self._is_spent() and not self._is_owed(state)
        said = f"{state.why}: {state.said}" if state.why and state.said else str(state.why or "")
        why = said or ("the budget is spent" if out_of_reach else "")
        to_come = 0 if why else self._to_come(state)
        seconds = self._seconds(state, to_come) if to_come else 0.0
        return Forecast(state.operator, self.share(state), state.trials, to_come, seconds, state.gain, why)

    def _sum_up(self, state: State) -> None:
        hoped, needed = state.hoped, state.needed
        is_open = state.why is None
        state.hoped = state.now * -math.expm1(-state.hope(self.terms.patience)) if is_open else 0.0
        state.needed = self._seconds(state, to_come) if is_open and (to_come := self._to_come(state)) else 0.0
        self._hoped += state.hoped - hoped
        self._needed += state.needed - needed

    # The heaps: least first, entries of a version that no longer holds are void.

    def _push(self, state: State, worth: float = 1.0) -> None:
        state.version += 1
        self._sum_up(state)
        if state.why is not None or state.preparing or not self._to_come(state):
            return
        if state.looked:
            heapq.heappush(self._seen, (-self._value(state) * worth, state.index, state.version))
        else:
            heapq.heappush(self._unseen, (-self._weight(state), state.index, state.version))
        if self._is_owed(state):
            heapq.heappush(self._owed, (-self._weight(state), state.index, state.version))
        self._tidy()

    def _top(self, heap: list[tuple[float, int, int]]) -> State | None:
        while heap:
            _, index, version = heap[0]
            if self._order[index].version == version:
                return self._order[index]
            heapq.heappop(heap)
        return None

    def _pop(self, heap: list[tuple[float, int, int]]) -> State:
        return self._order[heapq.heappop(heap)[1]]

    def _tidy(self) -> None:
        """Void entries may lie deep in a heap; they are never more than the operators themselves."""
        for heap in (self._unseen, self._seen, self._owed):
            if len(heap) > 2 * len(self._order) + 8:
                heap[:] = [entry for entry in heap if self._order[entry[1]].version == entry[2]]
                heapq.heapify(heap)


def _once(operators: Iterable[Operator]) -> Iterable[Operator]:
    """Each set of records once: two targets with the same attributes share theirs, and an operator its calls."""
    found: dict[str, Operator] = {}
    for operator in operators:
        known = found.get(operator.key)
        found[operator.key] = operator if known is None else replace(known, calls={**operator.calls, **known.calls})
    return found.values()
