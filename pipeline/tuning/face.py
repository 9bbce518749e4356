"""What one sees of a night: a live table in a terminal, plain lines elsewhere, events for machines, and a summary.

    Live     a table, drawn anew at most four times a second, in a terminal
    Lines    a line for each batch, where there is no terminal
    Events   every event as one line of JSON
    Several  more than one of them

All are watchers (pipeline.tuning.events): they are told and never ask, so that what is slow to draw delays no batch.
"""

from __future__ import annotations

import heapq
import math
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import msgspec

from pipeline.report import duration
from pipeline.tuning.events import (
    Begun,
    End,
    Ended,
    Event,
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
from pipeline.tuning.scheduler import Forecast, Plan, Scheduler

_ROWS = 12  # of a live table and of a list; the rest is summed up
_POSTS = 8  # of a live table
_PER_SECOND = 4  # drawings of a live table
_WIDTH = 160  # of a table where there is no terminal

_ENDS = {
    End.DONE: "done",
    End.STOPPED: "stopped",
    End.NOTHING_MEASURED: "nothing could be measured",
    End.VALIDATION_FAILED: "done, but every candidate of some operator was wrong",
    End.DESERTED: "no post is left",
    End.BROKEN: "given up",
}


def watcher(stream: TextIO, events: TextIO | None = None) -> Watcher:
    """What a person sees on a stream, and where one is given, events as JSON on another."""
    seen: Watcher = Live(stream) if stream.isatty() else Lines(stream)
    return Several(seen, Events(events)) if events is not None else seen


def lines() -> Watcher:
    """Plain lines on the standard error, terminal or not: for a night that is one task among others."""
    return Lines(sys.stderr)


class Several:
    """Tells every event to several watchers."""

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = watchers

    def told(self, event: Event) -> None:
        for each in self._watchers:
            each.told(event)


class Events:
    """Writes every event as a line of JSON. Each has `event`, its kind, and `at`, Unix time in seconds.

        begun           run, budget and spent (seconds), operators (figures of each), models (seconds: untuned, now),
                        posts (names)
        phase           operator, phase: "preparing", "measuring", "retesting", or "" where it waits; post
        batch           operator (its figures), elapsed, left, seconds of the batch, timed, failed (by outcome), models
                        (seconds of all models' operators: before, which is untuned, now, and expected); post
        retest          operator (its figures), candidate, claimed (its gain before), gain, won, models (as of a batch);
                        post
        operator-ended  operator (its figures), why, said
        post            post, change ("new", "lost" or "back"), posts (how many there are), operator, said
        paused          why
        ended           end, said, budget, elapsed, spent, trials, timed, operators (figures), gained (seconds by
                        operator), models (seconds: untuned, before this run, now), failures (by cause: count, operator,
                        said), more (seconds), next (operator)

    Figures are: operator, calls (by model), share, baseline and best (seconds of a call), gain, trials, timed, failed
    (by outcome), winners, spent (seconds), why. `posts` and `post`, where it measures, are left out where there is
    but one that has no name. The last line is `ended`, also where an error ended the night.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def told(self, event: Event) -> None:
        line = msgspec.json.encode(event).decode()
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()


class Lines:
    """One plain line for each batch and for what is worth one, and the summary."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def told(self, event: Event) -> None:
        text = said(event)
        if text:
            with self._lock:
                print(text, file=self._stream, flush=True)


def said(event: Event) -> str:
    """An event in plain words; "" for one that is not worth a line."""
    match event:
        case Begun():
            budget = f", {clock(event.budget)} for all" if event.budget is not None else ""
            spent = f", {clock(event.spent)} spent before" if event.spent else ""
            posts = f" at {_counted(len(event.posts), 'post')}" if event.posts else ""
            return f"tuning {_counted(len(event.operators), 'operator')}{posts}{budget}{spent}"
        case Measured():
            left = f", {clock(event.left)} left" if event.left is not None else ""
            parts = ", ".join([f"{event.timed} timed", *_causes(event.failed)])
            return (
                f"[{clock(event.elapsed)}{left}] {event.operator.operator}: {parts}; {_gain(event.operator)}; "
                f"models {duration(event.models.before)} → {duration(event.models.now)}{_at(event.post)}"
            )
        case Retested(won=True):
            return f"{event.operator.operator}: {event.gain:.2f} times as fast, confirmed{_at(event.post)}"
        case Retested():
            told = f"{event.gain:.2f} times" if event.gain else "no time"
            claimed = f"{event.operator.operator}: {event.claimed:.2f} times as fast"
            return f"{claimed} was not confirmed: {told} when timed longer{_at(event.post)}"
        case OperatorEnded():
            why = f"{event.why}: {event.said}" if event.said else event.why
            trials = _counted(event.operator.trials, "trial")
            return f"{event.operator.operator} has ended: {why}; {_gain(event.operator)} after {trials}"
        case PostChanged():
            return _post_line(event)
        case Paused():
            return f"waiting: {event.why}"
        case Ended():
            return summary(event)
        case Phase():
            return ""


def _at(post: str) -> str:
    return f"; post {post}" if post else ""


def _post_line(event: PostChanged) -> str:
    """What became of a post, of its batch, and how many are left."""
    name = f"post {event.post}" if event.post else "the post"
    if event.change != "lost":
        return f"{name} is {'back' if event.change == 'back' else 'there'}: {_counted(event.posts, 'post')}"
    said = f": {event.said}" if event.said else ""
    batch = f"; what it had of {event.operator} is taken up again" if event.operator else ""
    return f"{name} is lost{said}{batch}; {_counted(event.posts, 'post')} left"


@dataclass
class _Place:
    """What is known of a post: since when it is watched, what it does, its trials, and how often it was lost."""

    since: float
    doing: str = ""
    trials: int = 0
    losses: int = 0
    is_there: bool = True

    def rate(self, now: float) -> float:
        """Trials a minute."""
        return 60 * self.trials / max(now - self.since, 1e-9)


class Live:
    """A table in a terminal: the operators with the largest shares, and what is done at the moment, at which post.

    Begins with the event `begun` and gives way to the summary with `ended`.
    """

    def __init__(self, stream: TextIO, console: Any = None) -> None:
        from rich.console import Console

        self._console = console or Console(file=stream)
        self._lock = threading.Lock()
        self._live: Any = None
        self._rows: dict[str, Figures] = {}
        self._phases: dict[str, str] = {}
        self._places: dict[str, _Place] = {}  # by the post's name; none where there is but one without a name
        self._begun: Begun | None = None
        self._last: Measured | None = None
        self._times = Times(0.0, 0.0, 0.0)
        self._trials = 0
        self._now = 0.0
        self._paused = ""

    def told(self, event: Event) -> None:
        with self._lock:
            self._take_in(event)
        if isinstance(event, Begun):
            self._start()
        elif isinstance(event, Ended):
            self._stop()
            self._console.print(summary(event), markup=False, highlight=False, soft_wrap=True)

    def _take_in(self, event: Event) -> None:
        self._now = max(self._now, event.at)
        match event:
            case Begun():
                self._begun = event
                self._rows = {each.operator: each for each in event.operators}
                self._places = {name: _Place(event.at) for name in event.posts}
            case Phase():
                self._phases[event.operator] = event.phase
                if not event.phase:
                    del self._phases[event.operator]
                if event.post in self._places:
                    self._places[event.post].doing = f"{event.phase} {event.operator}" if event.phase else ""
                self._paused = ""
            case Measured():
                self._last, self._times = event, event.models
                self._trials += event.timed + sum(event.failed.values())
                self._rows[event.operator.operator] = event.operator
                if event.post in self._places:
                    self._places[event.post].trials += event.timed + sum(event.failed.values())
            case PostChanged():
                place = self._places.setdefault(event.post, _Place(event.at))
                place.is_there = event.change != "lost"
                place.losses += not place.is_there
            case Retested():
                self._rows[event.operator.operator] = event.operator
                self._times = event.models
            case OperatorEnded():
                self._rows[event.operator.operator] = event.operator
            case Paused():
                self._paused = event.why

    def _start(self) -> None:
        from rich.live import Live as Drawn

        self._live = Drawn(
            get_renderable=self.drawn, console=self._console, refresh_per_second=_PER_SECOND, transient=True
        )
        self._live.start()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def drawn(self) -> Any:
        """What is in the terminal now."""
        from rich.console import Group
        from rich.text import Text

        with self._lock:
            places = [self._posts_table()] if self._places else []
            return Group(Text(self._header()), *places, self._table())

    def _header(self) -> str:
        elapsed = self._now - self._begun.at if self._begun is not None else 0.0
        parts = [f"{clock(elapsed)} elapsed"]
        if self._last is None:
            return f"{parts[0]}; the first batch is on its way"
        if self._last.left is not None:
            since = elapsed - self._last.elapsed
            parts.append(f"{clock(max(0.0, self._last.left - since))} left")
        parts.append(f"{60 * self._trials / max(elapsed, 1e-9):.0f} trials/min")
        times = self._times
        parts.append(f"models {duration(times.before)} → {duration(times.now)}, {duration(times.expected)} expected")
        if self._paused:
            parts.append(f"waiting: {self._paused}")
        return ", ".join(parts)

    def _posts_table(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        there = sum(each.is_there for each in self._places.values())
        made = Table(box=SIMPLE_HEAD, pad_edge=False)
        made.add_column(f"{there} of {_counted(len(self._places), 'post')}", no_wrap=True, max_width=32)
        made.add_column("state", no_wrap=True, max_width=64)
        for name in ("trials", "trials/min", "lost"):
            made.add_column(name, justify="right", no_wrap=True)
        shown = sorted(self._places, key=lambda name: self._places[name].is_there)[:_POSTS]  # those that are lost first
        for name, each in self._places.items():
            if name in shown:
                made.add_row(*self._post_cells(name or "the post", [each]))
        if len(shown) < len(self._places):
            rest = [each for name, each in self._places.items() if name not in shown]
            made.add_row(*self._post_cells(f"{len(rest)} more", rest))
        return made

    def _post_cells(self, name: str, places: Sequence[_Place]) -> tuple[str, ...]:
        """Of one post, or summed up of several."""
        said = [each.doing or "waits" if each.is_there else "lost" for each in places]
        kinds = Counter(each.partition(" ")[0] for each in said)
        state = said[0] if len(places) == 1 else ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        rate = sum(each.rate(self._now) for each in places)
        losses = sum(each.losses for each in places)
        return name, state, str(sum(each.trials for each in places)), f"{rate:.0f}", str(losses or "")

    def _table(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        made = Table(box=SIMPLE_HEAD, pad_edge=False)
        made.add_column("operator", no_wrap=True, max_width=48)
        for name in ("share", "baseline", "best", "gain", "trials", "timed"):
            made.add_column(name, justify="right", no_wrap=True)
        made.add_column("failed")
        made.add_column("validated", justify="right", no_wrap=True)
        made.add_column("state")
        total = sum(map(_inference, self._rows.values()))
        shown = heapq.nlargest(_ROWS, self._rows.values(), key=_inference)
        for each in shown:
            made.add_row(*self._cells(each, total))
        if len(self._rows) > len(shown):
            made.add_row(*self._rest(shown, total))
        return made

    def _cells(self, each: Figures, total: float) -> tuple[str, ...]:
        is_known = each.baseline > 0
        return (
            each.operator,
            f"{_inference(each) / total:.1%}" if total else "",
            duration(each.baseline) if is_known else "",
            duration(each.best) if is_known else "",
            f"{each.gain:.2f}" if each.trials else "",
            str(each.trials),
            str(each.timed),
            ", ".join(_causes(each.failed)),
            str(each.winners),
            self._phases.get(each.operator) or each.why,
        )

    def _rest(self, shown: Sequence[Figures], total: float) -> tuple[str, ...]:
        names = {each.operator for each in shown}
        rest = [each for each in self._rows.values() if each.operator not in names]
        share = f"{sum(map(_inference, rest)) / total:.1%}" if total else ""
        failed = sum((Counter(each.failed) for each in rest), Counter[str]())
        ended = sum(bool(each.why) for each in rest)
        busy = [phase for operator, phase in self._phases.items() if operator not in names]
        return (
            f"{len(rest)} more",
            *(share, "", "", ""),
            str(sum(each.trials for each in rest)),
            str(sum(each.timed for each in rest)),
            ", ".join(_causes(failed)),
            str(sum(each.winners for each in rest)),
            ", ".join([*busy, f"{ended} ended"]),
        )


def summary(ended: Ended) -> str:
    """What a night came to: what was gained, what failed and why, what to do next."""
    was, now = (sum(each[i] for each in ended.models.values()) for i in (1, 2))
    said = f": {ended.said}" if ended.said else ""
    lines = [
        f"{_ENDS[ended.end]}{said}",
        f"{_counted(ended.trials, 'trial')} in {clock(ended.elapsed)}, {ended.timed} timed; operators of all models "
        f"{duration(was)} → {duration(now)}",
    ]
    lines += _section("gained, by model", [_model_line(*each) for each in _by_gain(ended.models)])
    figures = {each.operator: each for each in ended.operators}
    by_gain = sorted(ended.gained, key=lambda name: -ended.gained[name])
    lines += _section(
        "gained, by operator",
        [f"{name}: {duration(ended.gained[name])} an inference, {_gain(figures[name])}" for name in by_gain],
    )
    failures = sorted(ended.failures.items(), key=lambda each: -each[1].count)
    lines += _section(
        "failed", [f"{cause}, {each.count}: {each.operator}: {each.said or 'no message'}" for cause, each in failures]
    )
    return "\n".join([*lines, *_section("next", _what_next(ended))])


def _section(title: str, entries: Sequence[str]) -> list[str]:
    if not entries:
        return []
    rest = [f"  and {len(entries) - _ROWS} more"] if len(entries) > _ROWS else []
    return [f"{title}:", *(f"  {entry}" for entry in entries[:_ROWS]), *rest]


def _by_gain(models: Mapping[str, tuple[float, float, float]]) -> list[tuple[str, float, float, float]]:
    listed = [(name, *seconds) for name, seconds in models.items() if seconds[2] < seconds[1] * (1 - 1e-6)]
    return sorted(listed, key=lambda each: each[3] - each[2])


def _model_line(name: str, untuned: float, was: float, now: float) -> str:
    before = f", untuned {duration(untuned)}" if untuned > was * 1.001 else ""
    return f"{name}: {duration(was)} → {duration(now)}, {was / now:.2f} times as fast{before}"


def _what_next(ended: Ended) -> list[str]:
    found = ["doit build uses what was found"] if ended.gained else []
    if ended.end is End.STOPPED:
        return [*found, "doit tune, with the same options, goes on from here"]
    if ended.end is End.DESERTED:
        return [*found, "doit tune, with the same options, goes on once there is a post to measure at"]
    if ended.end in (End.BROKEN, End.NOTHING_MEASURED):
        return [*found, "doit doctor says what this machine lacks"]
    if ended.more and ended.budget is not None:
        larger = budget_words(ended.budget + min(ended.more, max(ended.budget, 600.0)))
        return [*found, f"doit tune --budget {larger} goes on; {ended.next} takes most of the time"]
    return found


def nothing_to_do(scheduler: Scheduler) -> str:
    """Why a run would make no trial."""
    plan = scheduler.plan()
    whys = Counter(each.why for each in plan.forecasts)
    told = "; ".join(f"{count} {why}" if len(whys) > 1 else why for why, count in whys.most_common())
    tuned = f"nothing to tune: {_counted(len(plan.forecasts), 'operator')}"
    times = f", models {duration(scheduler.before.total())} → {duration(scheduler.now.total())}"
    return f"{tuned}{times if scheduler.before.total() else ''}{f' ({told})' if told else ''}"


def show_plan(plan: Plan, stream: TextIO) -> None:
    """What a run would do, as a table, and the sum."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    made.add_column("operator", no_wrap=True)
    for name in ("share", "gain", "trials", "to come", "time"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("state")
    for each in plan.forecasts:
        made.add_row(*_forecast_cells(each))
    console = Console(file=stream, width=None if stream.isatty() else _WIDTH)
    console.print(made)
    console.print(plan_line(plan), markup=False, highlight=False, soft_wrap=True)


def plan_line(plan: Plan) -> str:
    """A plan in one line."""
    to_come = sum(each.to_come for each in plan.forecasts)
    open_ = sum(bool(each.to_come) for each in plan.forecasts)
    spent = f"; {clock(plan.spent)} spent before" if plan.spent else ""
    if not to_come:
        return f"{_counted(len(plan.forecasts), 'operator')}, nothing to tune{spent}"
    return (
        f"{open_} of {_counted(len(plan.forecasts), 'operator')} to tune, "
        f"at most {_counted(to_come, 'trial')} in {clock(plan.seconds)}{spent}"
    )


def _forecast_cells(each: Forecast) -> tuple[str, ...]:
    return (
        each.operator.name,
        f"{each.share:.1%}" if each.share else "",
        f"{each.gain:.2f}" if each.trials else "",
        str(each.trials),
        str(each.to_come),
        clock(each.seconds) if each.to_come else "",
        each.why or ("new" if not each.trials else "open"),
    )


def clock(seconds: float) -> str:
    """75 → "1:15", 3725 → "1:02:05": hours where there are some, minutes and seconds; rounded down."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def budget_words(seconds: float) -> str:
    """Seconds as `--budget` takes them, rounded up: 500 → "9m", 4000 → "1.5h", 36000 → "10h"."""
    if seconds <= 3600:
        return f"{math.ceil(seconds / 60)}m"
    return f"{math.ceil(seconds / 1800) / 2:g}h"


def _inference(each: Figures) -> float:
    """Seconds of all an operator's calls."""
    return each.best * sum(each.calls.values())


def _gain(each: Figures) -> str:
    return f"{each.gain:.2f} times as fast" if each.winners else "nothing faster yet"


def _causes(failed: Mapping[str, int]) -> Iterable[str]:
    return (f"{count} {outcome}" for outcome, count in sorted(failed.items(), key=lambda each: (-each[1], each[0])))


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing if number == 1 else thing + 's'}"
