"""The fakes do what their documents say: they ship, and others' tests stand on them."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from pipeline.tuning.events import Ended
from pipeline.tuning.fakes import (
    NO_FAULTS,
    Costs,
    Curve,
    FakeClock,
    FakeEngine,
    Faults,
    MemoryLedger,
    Simulated,
    Told,
    WaitingEngine,
    candidate,
    operator,
)
from pipeline.tuning.night import Batch, Night
from pipeline.tuning.records import ExhaustedRecord, Outcome, Standing, TrialRecord, encoded, ratio
from pipeline.tuning.states import Terms

ONE = operator("one", 2e-3)


def test_operators_of_other_names_and_targets_have_other_keys() -> None:
    made = [operator("a"), operator("b"), operator("a", target="cpu")]
    assert len({each.key for each in made}) == 3
    assert made[0] == operator("a")
    assert made[0].name.startswith("native:a-")


def test_a_clock_goes_forward_only() -> None:
    clock = FakeClock(100.0)
    clock.advance(5.0)
    clock.advance_to(50.0)
    assert clock.now() == 105.0
    clock.advance_to(200.0)
    assert clock.now() == 200.0


def test_measuring_takes_fake_time_after_the_preparation() -> None:
    clock = FakeClock(0.0)
    engine = FakeEngine(clock=clock, faults=NO_FAULTS, costs=Costs(propose=1.0, build=2.0, measure=0.5, batch=0.25))
    batch = engine.prepare(ONE, Standing(), 4)
    assert clock.now() == 0.0, "it may go on while another batch is measured"
    engine.measure(ONE, batch)
    assert clock.now() == pytest.approx(4 * 3.0 + 4 * 0.5)


def test_what_passes_aside_leaves_the_clock_as_it_was() -> None:
    clock = FakeClock(100.0)
    with clock.aside():
        clock.advance(30.0)
        assert clock.now() == 130.0
    assert clock.now() == 100.0


def test_a_waiting_engine_takes_real_time_in_its_pace() -> None:
    engine = WaitingEngine(faults=NO_FAULTS, pace=0.01)
    begun, fake = time.monotonic(), engine.now()
    batch = engine.prepare(ONE, Standing(), 10)
    engine.measure(ONE, batch)
    took = time.monotonic() - begun
    assert took >= 0.01 * (10 * 0.12 + 0.5 + 10 * 0.2)
    assert engine.now() - fake == pytest.approx(took / 0.01, rel=0.2)


def test_a_simulated_night_is_the_same_twice_and_for_one_post_as_good_as_in_turn() -> None:
    operators = [operator(f"op{i}", 1e-3 * 0.8**i) for i in range(8)]

    def night(posts: int, workers: int) -> tuple[MemoryLedger, Ended]:
        engine, ledger = FakeEngine(posts=posts, workers=workers), MemoryLedger()
        calls = Simulated(engine.clock) if workers else None
        return ledger, Night(operators, engine, ledger, Terms(budget=120.0), Told(), "r", calls=calls).run()

    assert night(3, 6)[0].records == night(3, 6)[0].records
    simulated, in_turn = night(1, 2)[1], night(1, 0)[1]
    assert simulated.trials == pytest.approx(in_turn.trials * 1.2, rel=0.3), "others are prepared meanwhile"


def test_candidates_follow_from_the_seed_alone() -> None:
    first, again, other = FakeEngine(), FakeEngine(), FakeEngine(seed=1)
    measured = [engine.measure(ONE, engine.prepare(ONE, Standing(), 20)) for engine in (first, again, other)]
    assert measured[0] == measured[1]
    assert measured[0] != measured[2]


def test_what_was_tried_is_not_proposed() -> None:
    engine = FakeEngine(faults=NO_FAULTS)
    tried = frozenset(candidate(ONE, i) for i in (0, 1, 3))
    batch = engine.prepare(ONE, Standing(tried=tried), 3)
    assert list(batch.candidates) == [candidate(ONE, i) for i in (2, 4, 5)]


def test_a_space_that_is_empty_says_so() -> None:
    engine = FakeEngine(curves={ONE.key: Curve(2.0, 5.0, size=2)}, faults=NO_FAULTS)
    tried = frozenset(candidate(ONE, i) for i in range(2))
    (record,) = engine.prepare(ONE, Standing(tried=tried), 3).records
    assert isinstance(record, ExhaustedRecord)


def test_faults_come_in_their_shares() -> None:
    faults = Faults(wrong=0.1, not_a_number=0.1, crashed=0.2, timed_out=0.1, not_built=0.1)
    engine = FakeEngine(faults=faults)
    batch = engine.prepare(ONE, Standing(), 2000)
    records = [*batch.records, *engine.measure(ONE, batch)]
    found = Counter(record.outcome for record in records if isinstance(record, TrialRecord))
    expected = {"wrong": 0.2, "crashed": 0.2, "timed out": 0.1, "not built": 0.1, "timed": 0.4}
    assert {str(outcome): count / 2000 for outcome, count in found.items()} == pytest.approx(expected, abs=0.04)
    said = {record.said for record in records if isinstance(record, TrialRecord) and record.outcome is Outcome.WRONG}
    assert any("not a number" in each for each in said)


def test_the_search_gets_better_and_never_beyond_its_limit() -> None:
    engine = FakeEngine(faults=NO_FAULTS, curves={ONE.key: Curve(3.0, 20.0)})
    records = engine.measure(ONE, engine.prepare(ONE, Standing(), 200))
    ratios = [ratio(record) for record in records if isinstance(record, TrialRecord)]
    assert sum(ratios[:20]) < sum(ratios[-20:])
    assert 2.5 < max(ratios) < 3.05


def test_records_can_be_written() -> None:
    engine = FakeEngine()
    batch = engine.prepare(ONE, Standing(), 20)
    for record in [*batch.records, *engine.measure(ONE, batch)]:
        assert encoded(record)


def test_a_batch_without_what_was_tried() -> None:
    built, failed = candidate(ONE, 0), candidate(ONE, 1)
    unbuilt = TrialRecord(candidate=failed, space="fake", space_version=1, decisions=1, outcome=Outcome.NOT_BUILT)
    nothing = ExhaustedRecord(space="fake", space_version=1, reason="")
    batch = Batch({built: 0}, (unbuilt, nothing))
    assert batch.without(()) == batch
    assert batch.without({built}) == Batch({}, (unbuilt, nothing))
    assert batch.without({failed}) == Batch({built: 0}, (nothing,))


def test_a_claim_is_for_one_at_a_time() -> None:
    ledger = MemoryLedger()
    with ledger.claim("k") as first:
        with ledger.claim("k") as second, ledger.claim("other") as third:
            assert (first, second, third) == (True, False, True)
        with ledger.claim("k") as again:
            assert not again, "who did not get it does not give it back"
    with ledger.claim("k") as free:
        assert free
