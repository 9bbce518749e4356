"""An account as text: for a terminal and for a file the same, a sentence a line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from pipeline.journal import Origin
from pipeline.report import duration
from pipeline.types import Trial
from pipeline.why.accounts import Account, ModelAccount, ModelNews, News, Told, Tuning, Turn
from pipeline.why.causes import Fate, Way
from pipeline.why.words import Cause, joined, moment

_WIDTH = 12  # of the names of rows
_NAMED = 4  # operators of one fate and cause that are named; the others are counted
_DIFFERENCE = 60  # lines of IR


def operator_text(account: Account, is_fresh: bool) -> str:
    """The account of an operator."""
    calls = f"{account.calls} {'call' if account.calls == 1 else 'calls'}"
    time = f", {duration(account.seconds)} in one inference" if account.seconds is not None else ""
    lines = [f"{account.target}:{account.model}  {account.operator}  ({', '.join(account.shapes)}), {calls}{time}"]
    lines += _row("runs on", [f"{account.implementation}: {account.reason}"])
    lines += _row("candidates", [_candidate(each) for each in account.candidates])
    if account.tuning is not None:
        lines += _row("tuning", [_tuning(account.tuning)])
    for number, news in enumerate(account.news):
        lines += _row("last build" if number == 0 else "before", _news(news))
    if not account.news:
        lines += _row("last build", ["no build of it is noted here yet"])
    lines += _row("comes from", list(_origins(account.origins)))
    lines += _row("history", [_turn(each) for each in account.history])
    return "\n".join([*lines, *_note(is_fresh)])


def model_text(account: ModelAccount, is_fresh: bool) -> str:
    """What the last builds made of a model."""
    lines = [f"{account.target}:{account.model}"]
    for number, news in enumerate(account.news):
        lines += _row("last build" if number == 0 else "before", list(_model_news(news)))
    if not account.news:
        lines += _row("last build", ["no build of it is noted here yet"])
    return "\n".join([*lines, *_note(is_fresh)])


def _note(is_fresh: bool) -> list[str]:
    said = "something has changed since: `doit build` would look at it again"
    return [] if is_fresh else _row("now", [said])


def _row(name: str, said: Sequence[str]) -> list[str]:
    """A name, and lines beside it."""
    lines = [line for each in said for line in each.split("\n")]
    return [f"  {name if i == 0 else '':{_WIDTH}}{line}".rstrip() for i, line in enumerate(lines)]


def _candidate(trial: Trial) -> str:
    if trial.refused:
        return f"{trial.strategy}: put aside: {trial.refused}"
    return f"{trial.strategy}: {duration(trial.seconds) if trial.seconds is not None else 'not timed'}"


def _tuning(tuning: Tuning) -> str:
    failed = f", {tuning.failed} of them without a time" if tuning.failed else ""
    gain = (
        f"; the best is {tuning.gain:.2f} times as fast as the baseline" if tuning.gain > 1 else "; nothing was better"
    )
    unproven = ", found with other tools than today's" if tuning.unproven and tuning.gain > 1 else ""
    return f"{tuning.trials} candidates tried in {duration(tuning.spent)}{failed}{gain}{unproven}"


# one operator


def _news(news: News) -> list[str]:
    return [_headline(news), *(f"  {line}" for line in _details(news))]


def _headline(news: News) -> str:
    when = f"{moment(news.at)} (build {news.build})"
    since = f" since the build of {moment(news.since)}" if news.since is not None else ""
    says = {
        Fate.FIRST: "the first that is noted",
        Fate.NEW: "the operator is new",
        Fate.REBUILT: "compiled from another function, or otherwise, for this reason:",
        Fate.AGAIN: "the same was made again:",
        Fate.LOOKED_AT: "looked at again, and the same came of it:",
        Fate.SAME: f"nothing changed{since}",
    }
    return f"{when}: {says[news.fate]}"


def _details(news: News) -> Iterator[str]:
    yield from (cause.said for cause in news.causes)
    if news.was is not None:
        yield f"most likely it was {news.was.label} before; {'; '.join(news.was.said)}"
        lines = news.ir.split("\n") if news.ir else []
        yield from lines[:_DIFFERENCE]
        if len(lines) > _DIFFERENCE:
            yield f"… {len(lines) - _DIFFERENCE} more lines: --json has them all"
    elif news.fate is Fate.NEW:
        yield "the build before had none that is like it"
    if news.fate not in (Fate.SAME, Fate.FIRST) and news.ways:
        yield _ways(news.ways)
    yield from (cause.said for cause in news.artifact)


def _ways(ways: Mapping[str, Way]) -> str:
    """apply tuned and codegen tuned were run; measure all was found in the store"""
    by: dict[Way, list[str]] = defaultdict(list)
    for slot, way in sorted(ways.items()):
        by[way].append(slot.replace(":", " "))
    words = {Way.RUN: "run here", Way.FETCHED: "fetched from a remote", Way.FOUND: "found in this machine's store"}
    return "; ".join(f"{joined(by[way])}: {words[way]}" for way in Way if by[way])


def _origins(origins: Mapping[str, Origin | None]) -> Iterator[str]:
    by: dict[str, list[str]] = defaultdict(list)
    for slot, origin in sorted(origins.items()):
        by[_origin(origin)].append(slot.replace(":", " "))
    for said, slots in by.items():
        yield f"{said}: {', '.join(slots)}"


def _origin(origin: Origin | None) -> str:
    if origin is None:
        return "this machine's store, since before the builds that are noted"
    if not origin.remote:
        return "this machine"
    if not origin.signer:
        return f"{origin.remote}, not signed"
    checked = "signed" if origin.checked else "where it says, which was not checked, that it is signed"
    return f"{origin.remote}, {checked} by {origin.signer}"


def _turn(turn: Turn) -> str:
    if not turn.candidate:
        return f"{moment(turn.at)}  nothing tuned: {turn.because}"
    timed = (
        f"{duration(turn.seconds)}, {turn.gain:.2f} times as fast as the baseline" if turn.seconds and turn.gain else ""
    )
    return f"{moment(turn.at)}  {turn.candidate[:8]}  {timed}: {turn.because}"


# a model


def _model_news(news: ModelNews) -> Iterator[str]:
    when = f"{moment(news.at)} (build {news.build})"
    if news.since is None:
        count = len(news.operators)
        yield f"{when}: the first that is noted, of {count} {'operator' if count == 1 else 'operators'}"
        causes = [*news.causes, *(cause for told in news.operators for cause in told.causes)]
        yield from (f"  {said}" for said in dict.fromkeys(cause.said for cause in causes))
    elif not (news.causes or news.operators or news.gone):
        yield f"{when}: nothing changed since the build of {moment(news.since)}"
    else:
        yield f"{when}, compared with that of {moment(news.since)}:"
        yield from (f"  {cause.said}" for cause in news.causes)
        yield from (f"  {line}" for line in _grouped(news))
    words = {Way.RUN: "run", Way.FETCHED: "fetched", Way.FOUND: "found in this machine's store"}
    yield "  actions: " + ", ".join(f"{count} {words[way]}" for way, count in news.ways.items())


def _grouped(news: ModelNews) -> Iterator[str]:
    """The operators of one fate for the same reasons in one line."""
    known = {cause.said for cause in news.causes}
    groups: dict[tuple[Fate, tuple[str, ...]], list[str]] = defaultdict(list)
    for told in news.operators:
        if told.fate is Fate.NEW:
            yield _new(told)
        else:
            groups[told.fate, _reasons(told, known)].append(told.operator)
    words = {Fate.REBUILT: "compiled otherwise", Fate.LOOKED_AT: "looked at again, with the same result"}
    for (fate, reasons), labels in groups.items():
        why = f": {'; '.join(reasons)}" if reasons else ""
        yield f"{words.get(fate, fate.value)}: {_some(labels)}{why}"
    if news.gone:
        yield f"gone: {_some(news.gone)}"
    yield f"unchanged: {news.unchanged} {'operator' if news.unchanged == 1 else 'operators'}"


def _reasons(told: Told, known: set[str]) -> tuple[str, ...]:
    """What is said of an operator beyond what is said of the model, and what it runs on now."""
    runs = "" if told.implementations[0] == told.implementations[1] else " → ".join(told.implementations)
    said = [cause.said for cause in told.causes if cause.said not in known]
    return (*said, runs) if runs else tuple(said)


def _new(told: Told) -> str:
    was = f", most likely {told.was.label} before: {'; '.join(told.was.said)}" if told.was is not None else ""
    return f"new: {told.operator}{was}{_because(told.causes)}"


def _because(causes: Sequence[Cause]) -> str:
    return f" ({'; '.join(cause.said for cause in causes)})" if causes else ""


def _some(labels: Sequence[str]) -> str:
    left = len(labels) - _NAMED
    return ", ".join(labels[:_NAMED]) + (f" and {left} more" if left > 0 else "")
