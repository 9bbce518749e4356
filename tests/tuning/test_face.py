"""What one sees of a night: lines, the table, the events, the summary."""

from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from pipeline.tuning import face
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
    PostChanged,
    Retested,
    Times,
)
from pipeline.tuning.fakes import Curve, FakeEngine, Faults, MemoryLedger, Simulated, Told, operator
from pipeline.tuning.night import Night
from pipeline.tuning.scheduler import Scheduler
from pipeline.tuning.states import Terms

CONV = Figures(
    operator="native:conv-1",
    calls={"net": 2},
    share=0.75,
    baseline=3e-3,
    best=1.5e-3,
    gain=2.0,
    trials=24,
    timed=20,
    failed={"crashed": 3, "wrong": 1},
    winners=1,
    spent=12.0,
)
RELU = Figures("native:relu-2", {"net": 1}, 0.25, 1e-3, 1e-3, 1.0, 8, 8, {}, 0, 4.0, "its curve is flat")
TIMES = Times(7e-3, 4e-3, 3.5e-3)
BEGUN = Begun(1000.0, "r", 600.0, 60.0, (CONV, RELU), {"net": (7e-3, 7e-3)})
BATCH = Measured(1075.0, 75.0, 465.0, CONV, 14, {"crashed": 2}, 6.0, TIMES)
WON = Retested(1077.0, CONV, "c", 2.1, 2.0, True, TIMES)
ENDED = Ended(
    at=1600.0,
    end=End.DONE,
    said="",
    budget=600.0,
    elapsed=3725.0,
    spent=660.0,
    trials=32,
    timed=28,
    operators=(CONV, RELU),
    gained={"native:conv-1": 3e-3},
    models={"net": (7e-3, 7e-3, 4e-3)},
    failures={"wrong": Failure(1, "native:conv-1", "not a number"), "crashed": Failure(3, "native:conv-1", "SIGSEGV")},
    more=900.0,
    next="native:conv-1",
)


def told(watcher_of: type, *events: Event) -> list[str]:
    stream = io.StringIO()
    watcher = watcher_of(stream)
    for event in events:
        watcher.told(event)
    return stream.getvalue().splitlines()


# Lines.


def test_a_line_for_each_batch() -> None:
    lines = told(face.Lines, BEGUN, Phase(1001.0, "native:conv-1", "preparing"), BATCH, WON)
    assert lines == [
        "tuning 2 operators, 10:00 for all, 1:00 spent before",
        "[1:15, 7:45 left] native:conv-1: 14 timed, 2 crashed; 2.00 times as fast; models 7 ms → 4 ms",
        "native:conv-1: 2.00 times as fast, confirmed",
    ]


def test_other_lines() -> None:
    refused = msgspec.structs.replace(WON, won=False, gain=1.01)
    assert face.said(refused) == ("native:conv-1: 2.10 times as fast was not confirmed: 1.01 times when timed longer")
    assert "no time" in face.said(msgspec.structs.replace(WON, won=False, gain=0.0))
    assert face.said(OperatorEnded(1.0, RELU, "its curve is flat")) == (
        "native:relu-2 has ended: its curve is flat; nothing faster yet after 8 trials"
    )
    aside = OperatorEnded(1.0, CONV, "put aside", "the builder died")
    assert face.said(aside).startswith("native:conv-1 has ended: put aside: the builder died; 2.00 times")
    assert face.said(Paused(1.0, "the machine is busy")) == "waiting: the machine is busy"
    no_budget = msgspec.structs.replace(BATCH, left=None)
    assert face.said(no_budget).startswith("[1:15] ")


AT_EAST = msgspec.structs.replace(BATCH, post="east")
LOST = PostChanged(1080.0, "east", "lost", 2, "native:conv-1", "it does not answer")


def test_lines_name_the_post_where_there_are_several() -> None:
    begun = msgspec.structs.replace(BEGUN, posts=("east", "west", "north"))
    free = PostChanged(1090.0, "west", "lost", 1)
    lines = told(face.Lines, begun, AT_EAST, LOST, free, PostChanged(1100.0, "east", "back", 2))
    assert lines[0].startswith("tuning 2 operators at 3 posts, 10:00 for all")
    assert lines[1].endswith("models 7 ms → 4 ms; post east")
    assert lines[2:] == [
        "post east is lost: it does not answer; what it had of native:conv-1 is taken up again; 2 posts left",
        "post west is lost; 1 post left",
        "post east is back: 2 posts",
    ]
    assert face.said(PostChanged(1.0, "south", "new", 4)) == "post south is there: 4 posts"
    assert face.said(PostChanged(1.0, "", "lost", 0)) == "the post is lost; 0 posts left"


# The summary.


def test_the_summary_says_what_was_gained_what_failed_and_what_is_next() -> None:
    assert face.summary(ENDED).splitlines() == [
        "done",
        "32 trials in 1:02:05, 28 timed; operators of all models 7 ms → 4 ms",
        "gained, by model:",
        "  net: 7 ms → 4 ms, 1.75 times as fast",
        "gained, by operator:",
        "  native:conv-1: 3 ms an inference, 2.00 times as fast",
        "failed:",
        "  crashed, 3: native:conv-1: SIGSEGV",
        "  wrong, 1: native:conv-1: not a number",
        "next:",
        "  doit build uses what was found",
        "  doit tune --budget 20m goes on; native:conv-1 takes most of the time",
    ]


@pytest.mark.parametrize(
    ("end", "first", "said"),
    [
        (End.STOPPED, "stopped", "goes on from here"),
        (End.NOTHING_MEASURED, "nothing could be measured", "doit doctor"),
        (End.VALIDATION_FAILED, "done, but every candidate of some operator was wrong", "--budget"),
        (End.DESERTED, "no post is left", "once there is a post to measure at"),
        (End.BROKEN, "given up: the disk is full", "doit doctor"),
    ],
)
def test_the_summary_of_other_ends(end: End, first: str, said: str) -> None:
    ended = msgspec.structs.replace(ENDED, end=end, said="the disk is full" if end is End.BROKEN else "")
    text = face.summary(ended)
    assert text.splitlines()[0] == first
    assert said in text


def test_a_night_that_gained_nothing_says_no_more_than_that() -> None:
    nothing = msgspec.structs.replace(
        ENDED, gained={}, models={"net": (7e-3, 4e-3, 4e-3)}, failures={}, more=0.0, next=""
    )
    assert len(face.summary(nothing).splitlines()) == 2


def test_what_was_gained_before_is_not_gained_again() -> None:
    ended = msgspec.structs.replace(ENDED, models={"net": (9e-3, 7e-3, 4e-3)})
    assert "  net: 7 ms → 4 ms, 1.75 times as fast, untuned 9 ms" in face.summary(ended).splitlines()


def test_long_lists_are_cut() -> None:
    names = [f"native:op-{i}" for i in range(30)]
    operators = tuple(msgspec.structs.replace(CONV, operator=name) for name in names)
    ended = msgspec.structs.replace(
        ENDED, operators=operators, gained={name: 1e-3 * (i + 1) for i, name in enumerate(names)}
    )
    lines = face.summary(ended).splitlines()
    assert "  and 18 more" in lines
    assert lines[lines.index("gained, by operator:") + 1].startswith("  native:op-29: ")


# The table.


def shown(live: face.Live, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(live.drawn())
    return console.file.getvalue()  # type: ignore[attr-defined]


def live_with(*events: Event) -> face.Live:
    live = face.Live(io.StringIO(), Console(file=io.StringIO(), width=200, force_terminal=False))
    for event in events:
        live._take_in(event)
    return live


def test_the_table_shows_where_each_operator_stands() -> None:
    lines = shown(live_with(BEGUN, Phase(1001.0, "native:conv-1", "measuring"), BATCH)).splitlines()
    assert lines[0] == "1:15 elapsed, 7:45 left, 13 trials/min, models 7 ms → 4 ms, 3.5 ms expected"
    assert " ".join(lines[2].split()) == "operator share baseline best gain trials timed failed validated state"
    conv, relu = (line for line in lines if "native:" in line)
    assert conv.split("  ")[0].strip() == "native:conv-1"
    for cell in ("75.0%", "3 ms", "1.5 ms", "2.00", "24", "20", "3 crashed, 1 wrong", "measuring"):
        assert cell in conv, cell
    assert relu.rstrip().endswith("its curve is flat")


def test_before_the_first_batch_and_while_it_waits() -> None:
    assert "the first batch is on its way" in shown(live_with(BEGUN))
    assert "waiting: busy" in shown(live_with(BEGUN, BATCH, Paused(1080.0, "busy")))
    going_on = live_with(BEGUN, BATCH, Paused(1080.0, "busy"), Phase(1081.0, "native:conv-1", "measuring"))
    assert "waiting" not in shown(going_on)


def test_the_largest_are_shown_and_the_rest_is_summed_up() -> None:
    many = tuple(
        msgspec.structs.replace(RELU, operator=f"native:op-{i}", best=1e-3 * (i + 1), failed={"crashed": 1})
        for i in range(20)
    )
    begun = msgspec.structs.replace(BEGUN, operators=many)
    text = shown(live_with(begun, Phase(1.0, "native:op-0", "preparing")))
    assert "native:op-19" in text
    assert "native:op-7" not in text
    (rest,) = [line for line in text.splitlines() if "8 more" in line]
    for cell in ("64", "8 crashed", "preparing, 8 ended"):
        assert cell in rest, cell


def posts_shown(*events: Event) -> dict[str, list[str]]:
    """Rows of the table of posts, by name: the cells."""
    lines = [line for line in shown(live_with(*events)).splitlines() if line.strip("─━ ")]
    rows: dict[str, list[str]] = {}
    for line in lines[1:]:
        if line.strip().startswith("operator"):
            break
        name, *cells = (cell.strip() for cell in line.split("  ") if cell.strip())
        rows[name] = cells
    return rows


def test_one_post_without_a_name_is_not_shown() -> None:
    assert posts_shown(BEGUN, Phase(1001.0, "native:conv-1", "measuring"), BATCH) == {}


def test_the_table_of_posts_shows_what_each_does_and_what_was_lost() -> None:
    begun = msgspec.structs.replace(BEGUN, posts=("east", "west", "north"))
    events: list[Event] = [begun, AT_EAST, Phase(1060.0, "native:relu-2", "measuring", "west")]
    assert posts_shown(*events) == {
        "3 of 3 posts": ["state", "trials", "trials/min", "lost"],
        "east": ["waits", "16", "13"],
        "west": ["measuring native:relu-2", "0", "0"],
        "north": ["waits", "0", "0"],
    }
    gone = [*events, msgspec.structs.replace(LOST, post="west"), Phase(1080.0, "native:relu-2", "", "west")]
    rows = posts_shown(*gone)
    assert "2 of 3 posts" in rows
    assert rows["west"] == ["lost", "0", "0", "1"]
    back = posts_shown(*gone, PostChanged(1090.0, "west", "back", 3), PostChanged(1091.0, "new", "new", 4))
    assert back["west"] == ["waits", "0", "0", "1"]
    assert back["new"] == ["waits", "0", "0"]
    assert "4 of 4 posts" in back


def test_many_posts_are_summed_up_and_those_that_are_lost_are_shown() -> None:
    names = tuple(f"node-{i:02}" for i in range(20))
    begun = msgspec.structs.replace(BEGUN, posts=names)
    busy = [Phase(1001.0, "native:conv-1", "measuring", name) for name in names[5:]]
    rows = posts_shown(begun, *busy, PostChanged(1002.0, "node-19", "lost", 19))
    assert rows["node-19"] == ["lost", "0", "0", "1"]
    assert rows["12 more"][0] == "12 measuring"
    assert len(rows) == 1 + 8 + 1


def test_a_live_table_gives_way_to_the_summary() -> None:
    stream = io.StringIO()
    live = face.Live(stream, Console(file=stream, force_terminal=True, width=120))
    for event in (BEGUN, BATCH, ENDED):
        live.told(event)
    assert stream.getvalue().rstrip().endswith("takes most of the time")
    assert live._live is None


def test_the_watcher_fits_the_stream() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(face.watcher(io.StringIO()), face.Lines)
    assert isinstance(face.watcher(Terminal()), face.Live)
    assert isinstance(face.watcher(io.StringIO(), io.StringIO()), face.Several)


# Events.


FIGURES = set(Figures.__struct_fields__)
FIELDS = {
    "begun": {"run", "budget", "spent", "operators", "models"},
    "phase": {"operator", "phase"},
    "batch": {"elapsed", "left", "operator", "timed", "failed", "seconds", "models"},
    "retest": {"operator", "candidate", "claimed", "gain", "won", "models"},
    "operator-ended": {"operator", "why", "said"},
    "paused": {"why"},
    "ended": set(Ended.__struct_fields__) - {"at"},
}


def a_nights_events() -> list[dict[str, object]]:
    stream = io.StringIO()
    watcher = face.Several(face.Events(stream), Told())
    operators = [operator(f"op{i}", 1e-3) for i in range(4)]
    engine = FakeEngine(faults=Faults(0.1, 0.1, 0.1, 0.1, 0.1), curves={operators[0].key: Curve(2.0, 3.0, size=20)})
    Night(operators, engine, MemoryLedger(), Terms(trials=64), watcher, "r").run()
    watcher.told(Paused(1.0, "busy"))
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_every_event_is_a_line_of_json_with_the_fields_that_are_documented() -> None:
    events = a_nights_events()
    found = {str(event["event"]): set(event) - {"event", "at"} for event in events}
    assert found == FIELDS
    assert all(isinstance(event["at"], float) for event in events)
    documented = face.Events.__doc__ or ""
    for kind, fields in FIELDS.items():
        for name in (kind, *fields):
            assert name in documented, name
    assert all(name in documented for name in FIGURES)
    batch = next(event for event in events if event["event"] == "batch")
    assert set(batch["operator"]) == FIGURES  # type: ignore[call-overload]
    assert set(batch["models"]) == {"before", "now", "expected"}  # type: ignore[call-overload]


def test_posts_are_in_the_events_where_they_have_names() -> None:
    stream = io.StringIO()
    calls = Simulated((engine := FakeEngine(posts=2, workers=4)).clock)
    operators = [operator(f"op{i}", 1e-3) for i in range(4)]
    Night(operators, engine, MemoryLedger(), Terms(trials=32), face.Events(stream), "r", calls=calls).run()
    face.Events(stream).told(LOST)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    found: dict[str, set[str]] = {}
    for event in events:
        found.setdefault(event["event"], set()).update(set(event) - {"event", "at"})
    more = {"begun": {"posts"}, "phase": {"post"}, "batch": {"post"}, "retest": {"post"}}
    posts = {"post": {"post", "change", "posts", "operator", "said"}}
    assert (
        found == {kind: fields | more.get(kind, set()) for kind, fields in FIELDS.items() if kind != "paused"} | posts
    )
    assert all(name in (face.Events.__doc__ or "") for name in posts["post"])
    assert events[0]["posts"] == ["1", "2"]
    assert {event["post"] for event in events if event["event"] == "batch"} == {"1", "2"}


def test_events_can_be_read_back() -> None:
    stream = io.StringIO()
    events: list[Event] = [BEGUN, BATCH, AT_EAST, LOST, WON, ENDED]
    for event in events:
        face.Events(stream).told(event)
    read = [msgspec.json.decode(line, type=Event) for line in stream.getvalue().splitlines()]
    assert read == events


# Plans.


def test_a_plan_is_a_table_and_a_sum() -> None:
    ledger = MemoryLedger()
    operators = [operator("large", 2e-3), operator("little", 1e-3)]
    stream = io.StringIO()
    face.show_plan(Scheduler(operators, ledger.standing, Terms(trials=100)).plan(), stream)
    lines = stream.getvalue().splitlines()
    assert "native:large" in lines[3]
    assert lines[3].split()[-5:] == ["66.7%", "0", "100", "0:40", "new"]
    assert lines[-1] == "2 of 2 operators to tune, at most 200 trials in 1:20"

    Night(operators, FakeEngine(), ledger, Terms(trials=100), Told()).run()
    after = Scheduler(operators, ledger.standing, Terms(trials=100))
    assert not after.plan().seconds
    assert face.plan_line(after.plan()).startswith("2 operators, nothing to tune; ")
    said = face.nothing_to_do(after)
    assert said.startswith("nothing to tune: 2 operators, models 3 ms → ")
    assert "its curve is flat" in said or "all its trials are used" in said


@pytest.mark.parametrize(("seconds", "said"), [(0.9, "0:00"), (75, "1:15"), (3725, "1:02:05"), (36000, "10:00:00")])
def test_clock(seconds: float, said: str) -> None:
    assert face.clock(seconds) == said


@pytest.mark.parametrize(("seconds", "said"), [(90, "2m"), (500, "9m"), (3600, "60m"), (4000, "1.5h"), (36000, "10h")])
def test_budgets_are_said_as_the_command_takes_them(seconds: float, said: str) -> None:
    assert face.budget_words(seconds) == said


def test_no_tvm_is_needed() -> None:
    import subprocess
    import sys

    program = "import sys, pipeline.tuning.face, pipeline.tuning.fakes; print(*sys.modules)"
    root = Path(__file__).resolve().parents[2]
    loaded = set(subprocess.check_output([sys.executable, "-c", program], cwd=root, text=True).split())
    assert "pipeline.tuning.scheduler" in loaded
    assert not loaded & {"tvm", "tvm_ffi", "numpy", "rich"}
