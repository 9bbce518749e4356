"""Operators as a night sees them: what each is, where it stands in numbers, and what its curve lets one hope for.

The logarithm of the best time over the logarithm of the trials is near a straight line, so the slope of the last
doubling of the trials says what the next batch may bring. Needs no TVM, no clock and no thread.
"""

from __future__ import annotations

import enum
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.tuning.records import TRANSIENT, Outcome, Standing, TrialRecord, ratio
from pipeline.types import Workload

HOPE = math.log(2)  # in log time, of an operator at which nobody has looked
_OPTIMISM = 0.35  # slope, in log time over log trials, that is hoped for after the first batch; fades with the trials


@dataclass(frozen=True)
class Operator:
    """One workload of a target: what `doit tune` tunes.

    calls    per inference, by model
    seconds  of one call before tuning, as far as a profile told; 0: unknown
    key      of its set of records
    spaces   name and version of every search space that there is for it
    is_stale whether it has to be looked at again, also where it has ended: see pipeline.tuning.staleness
    about    what its set says of itself
    """

    target: str
    workload: Workload
    calls: Mapping[str, int]
    seconds: float
    key: str
    spaces: frozenset[tuple[str, int]] = frozenset()
    is_stale: bool = False
    about: Mapping[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.target}:{self.workload.label}"


@dataclass(frozen=True)
class Terms:
    """What a night may take.

    budget    seconds for the chosen operators together, what earlier runs gave them included; None: until all have
              ended
    posts     places that measure at once. A budget of 8 hours is a night of 8 hours, however many they are: it ends
              after as many seconds by the clock, or once `posts` times as many were spent at all posts and in all runs
              together. So 3 hours that one post worked before are 45 minutes of a night with four. A budget that was
              used to its end is so for any number of posts
    trials    of one operator at most
    batch     candidates of a batch
    first     candidates of an operator's first batch
    noise     the least share that is taken for noise
    patience  trials without a gain until a curve is flat
    """

    budget: float | None = None
    trials: int = 256
    batch: int = 16
    first: int = 8
    noise: float = 0.02
    patience: int = 64
    posts: int = 1

    @property
    def at_posts(self) -> float | None:
        """The budget in seconds of posts' time."""
        return None if self.budget is None else self.budget * self.posts


class Why(enum.StrEnum):
    """Why an operator has ended, in words."""

    TRIALS = "all its trials are used"
    FLAT = "its curve is flat"
    EXHAUSTED = "every search space is exhausted"
    UNMEASURABLE = "nothing could be measured"
    SMALL = "too small a share to matter"
    PUT_ASIDE = "put aside"
    BUDGET = "the budget is spent"  # in an earlier run, to its end


class Curve:
    """The best ratio after each trial of an operator, kept as its few rises: it grows with the trials, and is read in
    the logarithm of what it holds."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.trials = 0
        self._last = ""  # the candidate of the last trial that was followed
        self._at = [0]  # after so many trials …
        self._best = [1.0]  # … it rose to this

    def follow(self, trials: Sequence[TrialRecord]) -> None:
        """Takes in the trials of an operator: those that are new, where the others are as they were."""
        known = self.trials
        if known and (len(trials) < known or trials[known - 1].candidate != self._last):
            self._forget()
        for number in range(self.trials, len(trials)):
            if (reached := ratio(trials[number])) > self._best[-1]:
                self._at.append(number + 1)
                self._best.append(reached)
        self.trials = len(trials)
        self._last = trials[-1].candidate if trials else ""

    def best(self, trials: int) -> float:
        return self._best[bisect_right(self._at, trials) - 1]

    def idle(self, noise: float) -> int:
        """Trials since the best came to within the noise of what it is."""
        near = bisect_right(self._best, self._best[-1] / (1 + noise))
        return self.trials - self._at[near]

    def slope(self, terms: Terms) -> float:
        """By how much the logarithm of the time may fall while that of the trials grows by 1.

        That of the last doubling of the trials, with some optimism that fades; halved with every half of the patience
        that passed without a gain.
        """
        if not self.trials:
            return 0.0
        recent = math.log(self._best[-1] / self.best(self.trials // 2)) / math.log(2)
        hoped = _OPTIMISM * min(1.0, terms.first / self.trials)
        return (recent + hoped) * math.exp2(-2 * self.idle(terms.noise) / terms.patience)


@dataclass
class State:
    """Where one operator stands: numbers alone, computed from its `Standing` whenever that changes."""

    operator: Operator
    index: int
    calls: int
    baseline: float = 0.0  # seconds of a call; 0: unknown
    gain: float = 1.0
    trials: int = 0
    timed: int = 0
    winners: int = 0
    spent: float = 0.0
    failures: Mapping[Outcome, int] = field(default_factory=dict)
    curve: Curve = field(default_factory=Curve)
    slope: float = 0.0
    why: Why | None = None
    said: str = ""
    flying: int = 0  # candidates of batches that are under way
    preparing: bool = False
    looked: bool = False  # whether there was a trial of it
    is_owed_a_retest: bool = False  # an earlier run ended before it came to that
    completed: float = 0.0  # seconds of the largest budget that it had a part in and that was used to its end
    owed: bool = False  # has a right to its share, also where the budget is spent
    again: frozenset[str] = frozenset()  # candidates of earlier runs, or of others, that this run may try
    is_over: bool = False  # but for those, it has ended
    is_unproven: bool = False  # whether winners of another compiler are among those
    grace: int = 0  # being stale, it goes on until it has so many trials in all, although it has ended
    is_in_grace: bool = False
    hoped: float = 0.0  # seconds of all its calls that its trials to come may save
    needed: float = 0.0  # seconds that they take
    version: int = 0  # entries of heaps that name another are void

    @property
    def untuned(self) -> float:
        """Seconds of one call, untuned: the longer of what a profile told and what was measured, so that it is the same
        before the first trial and after."""
        return max(self.baseline, self.operator.seconds)

    @property
    def before(self) -> float:
        """Seconds of all its calls in all models, untuned."""
        return self.baseline * self.calls

    @property
    def now(self) -> float:
        return self.before / self.gain

    def hope(self, trials: int) -> float:
        """By how much the logarithm of its time is expected to fall within so many trials."""
        known = self.trials + self.flying
        return self.slope * math.log1p(trials / known) if self.looked and known else HOPE


def untried(operator: Operator, standing: Standing) -> frozenset[str]:
    """Candidates that somebody claims to be fast, those whose failure may have been the machine's, and winners that
    another compiler made."""
    proven_elsewhere = frozenset(winner.trial.candidate for winner in standing.unproven if not standing.winners)
    if not standing.claims and not any(standing.failures.get(outcome) for outcome in TRANSIENT):
        return proven_elsewhere
    failed = (
        trial
        for trial in standing.trials
        if trial.outcome in TRANSIENT and (trial.space, trial.space_version) in operator.spaces
    )
    return proven_elsewhere | frozenset(trial.candidate for trial in (*standing.claims, *failed)) - standing.tried
