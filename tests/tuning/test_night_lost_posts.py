"""Posts that are lost, come back or come new in a night: what they measured is made again elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from pipeline.tuning.calls import post
from pipeline.tuning.events import Begun, End, Measured, OperatorEnded, Phase, PostChanged, Retested
from pipeline.tuning.fakes import NO_FAULTS, Curve, FakeClock, FakeEngine, MemoryLedger, Told
from pipeline.tuning.night import PostLostError
from pipeline.tuning.records import Outcome, TrialRecord
from pipeline.tuning.states import Operator, Terms
from tests.tuning.nights import OPERATORS, at_posts, crew, many, night, of, trials


class Losing:
    """A hook that loses a post at some of the times that a phase begins; `back` times later the engine has it again.

    Of `names` alone, where there are any. With `stays` the engine has it all the time: it is restarted at once.
    """

    def __init__(self, phase: str, times: Sequence[int], back: int = 0, stays: bool = False, names: str = "") -> None:
        self.phase, self.times, self.back, self.stays, self.names = phase, list(times), back, stays, names
        self.engine = FakeEngine()
        self.count = 0
        self.gone: list[tuple[int, str]] = []
        self.hit: list[str] = []

    def of(self, engine: FakeEngine) -> FakeEngine:
        self.engine, engine.hook = engine, self
        return engine

    def __call__(self, phase: str, chosen: Operator) -> None:
        if phase != self.phase or (self.names and chosen.workload.name not in self.names):
            return
        self.count += 1
        for due, name in [each for each in self.gone if self.back and each[0] <= self.count]:
            self.gone.remove((due, name))
            self._have(len(self.engine.post_names) + 1, (*self.engine.post_names, name))
        if self.count in self.times:
            self.hit.append(chosen.key)
            if not self.stays:
                self.gone.append((self.count + self.back, post()))
                self._have(self.engine.posts - 1, [each for each in self.engine.post_names if each != post()])
            raise PostLostError(f"post {post()} does not answer")

    def _have(self, count: int, names: Sequence[str]) -> None:
        self.engine.posts, self.engine.post_names = count, tuple(names)


NAMES = ("east", "west", "north")


def changes(told: Told) -> list[tuple[str, str, int]]:
    return [(each.post, each.change, each.posts) for each in of(told, PostChanged)]


@pytest.mark.parametrize("names", [(), NAMES])
def test_a_lost_posts_batch_is_measured_elsewhere_and_the_others_go_on(names: tuple[str, ...]) -> None:
    ledger, losing = MemoryLedger(), Losing("measure", [5])
    engine = losing.of(crew(3, post_names=names, faults=NO_FAULTS))
    made, told = at_posts(engine, many(12), ledger, Terms(trials=40))
    ended = made.run()
    assert ended.end is End.DONE
    ((name, change, left),) = changes(told)
    assert (change, left) == ("lost", 2)
    assert name in (names or "123")
    (event,) = of(told, PostChanged)
    assert event.said == f"post {name} does not answer"
    assert ended.failures["post lost"].count == 1
    assert {each.outcome for each in trials(ledger)} == {Outcome.TIMED}, "nothing is known of what was lost"
    assert not [each for each in ended.operators if each.why == "put aside"]
    assert set(engine.made.values()) == {1}
    (hit,) = losing.hit
    assert len(ledger.standing(hit).trials) == 40
    lost_at = told.events.index(event)
    assert name not in {each.post for each in told.events[lost_at:] if isinstance(each, Measured)}
    assert len({each.post for each in of(told, Measured)}) == 3


def test_a_post_that_is_back_gets_batches_again() -> None:
    losing = Losing("measure", [5], back=6)
    made, told = at_posts(losing.of(crew(3, post_names=NAMES)), many(12), terms=Terms(trials=40))
    made.run()
    (lost, *_), (back, *_) = changes(told)
    assert [each[1:] for each in changes(told)] == [("lost", 2), ("back", 3)]
    assert lost == back
    event = of(told, PostChanged)[1]
    assert lost in {each.post for each in told.events[told.events.index(event) :] if isinstance(each, Measured)}


@pytest.mark.parametrize("posts", [1, 3])
def test_a_post_that_is_restarted_at_once_is_told_as_that(posts: int) -> None:
    losing = Losing("measure", [2, 9], stays=True)
    made, told = at_posts(losing.of(crew(posts)), many(12), terms=Terms(trials=40))
    assert made.run().end is End.DONE
    assert [each[1] for each in changes(told)] == ["lost", "back", "lost", "back"]


def test_an_operator_that_loses_three_posts_in_a_row_is_put_aside_by_name() -> None:
    ledger, losing = MemoryLedger(), Losing("measure", [1, 2, 3, 4, 5], stays=True, names="op0")
    made, told = at_posts(losing.of(crew(3)), ledger=ledger)
    ended = made.run()
    assert ended.end is End.DONE
    (aside,) = [each for each in of(told, OperatorEnded) if each.why == "put aside"]
    assert aside.operator.operator == OPERATORS[0].name
    assert "lost 3 times in a row" in aside.said
    assert losing.count == 3
    assert ended.failures["post lost"].count == 3
    assert not [each for each in ledger.records.get(OPERATORS[0].key, ()) if isinstance(each, TrialRecord)] or {
        each.outcome for each in ledger.records[OPERATORS[0].key] if isinstance(each, TrialRecord)
    } == {Outcome.NOT_BUILT}
    assert all(each.trials > 8 for each in ended.operators[1:])


def test_losses_with_something_measured_between_them_are_no_row() -> None:
    losing = Losing("measure", [1, 2, 4, 5, 7], stays=True, names="op0")
    made, told = at_posts(losing.of(crew(2)), terms=Terms(trials=100))
    made.run()
    assert losing.count > 7
    assert not [each for each in of(told, OperatorEnded) if each.why == "put aside"]


@pytest.mark.parametrize("times", [[1], [1, 2]])
@pytest.mark.parametrize("count", [8, 40])
def test_a_retest_whose_post_is_lost_is_made_again_also_where_the_operator_has_ended(
    count: int, times: list[int]
) -> None:
    ledger, losing = MemoryLedger(), Losing("retest", times, stays=True)
    engine = losing.of(crew(2, faults=NO_FAULTS, curves={OPERATORS[0].key: Curve(3.0, 1.0)}))
    made, told = at_posts(engine, OPERATORS[:1], ledger, Terms(trials=count))
    ended = made.run()
    assert [each[1] for each in changes(told)] == ["lost", "back"] * len(times)
    first = max(trials(ledger)[:8], key=lambda each: (each.baseline or 0) / (each.seconds or 1))
    assert of(told, Retested)[0].candidate == first.candidate
    assert len(trials(ledger)) == count, "what had been measured stands"
    assert ended.operators[0].winners
    assert not ledger._claimed


def test_an_operator_whose_retests_lose_three_posts_is_put_aside() -> None:
    made, told = at_posts(Losing("retest", range(1, 9), stays=True, names="op0").of(crew(2)))
    assert made.run().end is End.DONE
    (aside,) = [each for each in of(told, OperatorEnded) if each.why == "put aside"]
    assert aside.operator.operator == OPERATORS[0].name
    assert len(changes(told)) == 6


def test_a_stale_operator_whose_post_is_lost_is_still_looked_at_again() -> None:
    ledger, terms = MemoryLedger(), Terms(trials=32)
    at_posts(crew(1), OPERATORS[:1], ledger, terms)[0].run()
    stale = [replace(OPERATORS[0], is_stale=True)]
    assert at_posts(Losing("measure", [1], stays=True).of(crew(1)), stale, ledger, terms)[0].run().trials > 16


@pytest.mark.parametrize("measured", [True, False])
def test_without_a_post_a_night_ends_and_the_next_one_goes_on(measured: bool) -> None:
    ledger, losing = MemoryLedger(), Losing("measure", [9, 10, 11] if measured else [1, 2, 3])
    made, told = at_posts(losing.of(crew(3, post_names=NAMES)), many(12), ledger)
    ended = made.run()
    assert ended.end is End.DESERTED
    assert ended.end == "no post left"
    assert "no post to measure at" in ended.said
    assert "does not answer" in ended.said
    assert bool(ended.timed) == measured
    assert sorted(left for *_, left in changes(told)) == [0, 1, 2]
    assert at_posts(crew(3), many(12), ledger)[0].run().trials > 50


def test_an_engine_without_a_post_ends_its_night_at_once() -> None:
    ended = night(engine=FakeEngine(posts=0))[0].run()
    assert (ended.end, ended.trials, ended.said) == (End.DESERTED, 0, "there is no post to measure at")


def test_posts_that_come_in_the_night_are_put_to_work_and_the_budget_stays_its_hours() -> None:
    engine = crew(1, post_names=("a",))

    def hook(phase: str, chosen: Operator) -> None:
        if phase == "measure" and engine.clock.now() > FakeClock().now() + 100:
            engine.posts, engine.post_names = 3, ("a", "b", "c")

    engine.hook = hook
    made, told = at_posts(engine, many(40), terms=Terms(budget=300.0))
    ended = made.run()
    assert [each[:2] for each in changes(told)] == [("b", "new"), ("c", "new")]
    assert ended.elapsed == pytest.approx(300.0, abs=15)
    assert ended.spent == pytest.approx(100 + 3 * 200, abs=40)


def test_posts_are_named_in_what_is_told() -> None:
    made, told = at_posts(crew(3, post_names=NAMES), many(12))
    made.run()
    assert of(told, Begun)[0].posts == NAMES
    assert {each.post for each in of(told, Measured)} == set(NAMES)
    assert {each.post for each in of(told, Retested)} == set(NAMES)
    assert {each.post for each in of(told, Phase) if each.phase in ("measuring", "retesting")} == set(NAMES)
    assert {each.post for each in of(told, Phase) if each.phase == "preparing"} == {""}
