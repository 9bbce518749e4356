"""What happens in a night, as plain records that are JSON lines as well; who watches one is told of each.

begun, phase, batch, retest, operator-ended, post, paused, ended

Where an engine has one post without a name, `post` is "" everywhere, and left out of the JSON.
"""

from __future__ import annotations

import enum
from typing import Protocol

import msgspec


class Figures(msgspec.Struct, frozen=True):
    """Where an operator stands.

    share     of the time of all chosen models, as they are now
    baseline  seconds of one call, untuned; 0: unknown
    best      seconds of one call with its best validated candidate
    gain      baseline / best
    trials    candidates tried, in all runs; timed and failed (by outcome) are parts of them
    winners   candidates validated, retested and faster than the baseline
    spent     seconds, all runs together
    why       why it has ended, "" where it has not
    """

    operator: str
    calls: dict[str, int]
    share: float
    baseline: float
    best: float
    gain: float
    trials: int
    timed: int
    failed: dict[str, int]
    winners: int
    spent: float
    why: str = ""


class Times(msgspec.Struct, frozen=True):
    """Seconds of all models' operators: untuned, now, and at the end of the run as far as the curves tell."""

    before: float
    now: float
    expected: float


class Begun(msgspec.Struct, frozen=True, tag="begun", tag_field="event", omit_defaults=True):
    """The night begins. `models`: seconds of each model's operators, untuned and now; `posts`: names of those that
    measure."""

    at: float
    run: str
    budget: float | None
    spent: float
    operators: tuple[Figures, ...]
    models: dict[str, tuple[float, float]]
    posts: tuple[str, ...] = ()


class Phase(msgspec.Struct, frozen=True, tag="phase", tag_field="event", omit_defaults=True):
    """An operator is being prepared, or measured or retested at a post; or waits (""), and so does the post."""

    at: float
    operator: str
    phase: str
    post: str = ""


class Measured(msgspec.Struct, frozen=True, tag="batch", tag_field="event", omit_defaults=True):
    """A batch was measured and written.

    elapsed, left  seconds of this run, and of the budget; left is null without a budget
    timed, failed  candidates of the batch that got a time, and the others by outcome
    seconds        that it took of its post's time
    post           where it was measured
    """

    at: float
    elapsed: float
    left: float | None
    operator: Figures
    timed: int
    failed: dict[str, int]
    seconds: float
    models: Times
    post: str = ""


class Retested(msgspec.Struct, frozen=True, tag="retest", tag_field="event", omit_defaults=True):
    """A candidate that led was timed longer.

    claimed, gain  how many times as fast as the baseline it seemed, and is; 0 where it got no time
    won            it is the best now
    """

    at: float
    operator: Figures
    candidate: str
    claimed: float
    gain: float
    won: bool
    models: Times
    post: str = ""


class OperatorEnded(msgspec.Struct, frozen=True, tag="operator-ended", tag_field="event"):
    """An operator gets no more trials in this run, and why."""

    at: float
    operator: Figures
    why: str
    said: str = ""


class PostChanged(msgspec.Struct, frozen=True, tag="post", tag_field="event"):
    """A post came, was lost, or is back.

    change    "new", "lost" or "back"
    posts     how many there are now
    operator  whose batch it had, which is as if it had not been begun; "" where it had none
    said      what became of it
    """

    at: float
    post: str
    change: str
    posts: int
    operator: str = ""
    said: str = ""


class Paused(msgspec.Struct, frozen=True, tag="paused", tag_field="event"):
    """The night waits, and for what."""

    at: float
    why: str


class Failure(msgspec.Struct, frozen=True):
    """What went wrong in one way: how often, and once where, and what was said."""

    count: int
    operator: str
    said: str


class End(enum.StrEnum):
    """How a night ended."""

    DONE = "done"  # every operator has ended, or the budget has
    STOPPED = "stopped"  # by stop()
    NOTHING_MEASURED = "nothing measured"  # something was to do, and no candidate got a time
    VALIDATION_FAILED = "validation failed"  # every candidate of some operator was wrong
    DESERTED = "no post left"  # all places to measure at were lost, or there was none
    BROKEN = "broken"  # the engine failed for one operator after the other


class Ended(msgspec.Struct, frozen=True, tag="ended", tag_field="event"):
    """The night is over.

    said       why, where it ended before its time
    elapsed    seconds of this run; spent: of all runs, on these operators, the time of all posts added up
    trials     of this run; timed: those that got a time
    operators  where each stands; gained: seconds an inference that this run took from each, all models together
    models     seconds of each model's operators: untuned, when this run began, now
    failures   of this run, by outcome, by the kind of error where an operator was put aside, and posts lost
    more       seconds that the trials to come would take at most, at as many posts, and the operator with the largest
               share of those
    """

    at: float
    end: End
    said: str
    budget: float | None
    elapsed: float
    spent: float
    trials: int
    timed: int
    operators: tuple[Figures, ...]
    gained: dict[str, float]
    models: dict[str, tuple[float, float, float]]
    failures: dict[str, Failure]
    more: float
    next: str = ""


Event = Begun | Phase | Measured | Retested | OperatorEnded | PostChanged | Paused | Ended


class Watcher(Protocol):
    """Is told of everything that happens."""

    def told(self, event: Event) -> None: ...
