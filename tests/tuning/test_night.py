"""The night's loop: what it comes to, what a budget buys, what ends it, and what is told of it."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from pipeline.tuning.events import Begun, End, Measured, OperatorEnded, Phase, Retested
from pipeline.tuning.fakes import NO_FAULTS, Curve, FakeClock, FakeEngine, Faults, MemoryLedger, candidate, operator
from pipeline.tuning.night import Batch
from pipeline.tuning.records import ExhaustedRecord, Outcome, Record, RetestRecord, Standing, TrialRecord
from pipeline.tuning.states import Operator, Terms
from tests.tuning.nights import ALL_CRASH, ALL_WRONG, OPERATORS, TERMS, Raising, night, of, trials

# What a night comes to.


def test_a_night_finds_faster_candidates_and_writes_everything() -> None:
    ledger, engine = MemoryLedger(), FakeEngine()
    made, told = night(engine=engine, ledger=ledger)
    ended = made.run()
    assert ended.end is End.DONE
    assert ended.trials == len(trials(ledger)) > 100
    assert ended.timed == sum(each.outcome is Outcome.TIMED for each in trials(ledger))
    ((untuned, was, now),) = ended.models.values()
    assert untuned == pytest.approx(was)
    assert now < 0.8 * was
    assert sum(ended.gained.values()) == pytest.approx(was - now)
    assert all(each.gain <= engine.limit(one) * 1.01 for each, one in zip(ended.operators, OPERATORS, strict=True))
    assert engine.closed
    assert isinstance(told.events[0], Begun)
    assert told.events[-1] is ended


def test_a_profile_that_was_wrong_is_no_gain() -> None:
    class Quicker(FakeEngine):
        def _baseline(self, operator: Operator) -> float:
            return operator.seconds / 3

    curves = {one.key: Curve(1.0, 10.0) for one in OPERATORS[1:]}
    ended = night(engine=Quicker(curves=curves))[0].run()
    assert set(ended.gained) == {OPERATORS[0].name}
    ((untuned, was, now),) = ended.models.values()
    assert untuned == pytest.approx(was)
    assert was - now == pytest.approx(ended.gained[OPERATORS[0].name])


def test_the_same_night_twice_is_the_same() -> None:
    ledgers = [MemoryLedger(), MemoryLedger()]
    for ledger in ledgers:
        night(ledger=ledger)[0].run()
    assert ledgers[0].records == ledgers[1].records
    other = MemoryLedger()
    night(engine=FakeEngine(seed=1), ledger=other)[0].run()
    assert other.records != ledgers[0].records


def test_what_a_night_took_is_what_its_records_cost() -> None:
    ledger = MemoryLedger()
    ended = night(ledger=ledger)[0].run()
    costs = sum(record.cost for records in ledger.records.values() for record in records)
    assert costs == pytest.approx(ended.elapsed)
    assert ended.spent == pytest.approx(ended.elapsed)
    assert TERMS.budget is not None
    assert TERMS.budget - 1 < ended.elapsed < TERMS.budget + 15, "a batch and its retests more at most"


def test_records_say_when_and_by_which_run() -> None:
    ledger = MemoryLedger()
    night(ledger=ledger, run="monday")[0].run()
    written = [record for records in ledger.records.values() for record in records]
    assert {record.run for record in written} == {"monday"}
    begin = FakeClock().now()
    assert all(begin < record.at <= begin + 140 for record in written)
    for records in ledger.records.values():
        times = [record.at for record in records]
        assert times == sorted(times)


def test_no_candidate_is_measured_twice_but_after_a_crash() -> None:
    engine, ledger = FakeEngine(), MemoryLedger()
    for budget in (60.0, 120.0, 180.0):
        night(engine=engine, ledger=ledger, terms=Terms(budget=budget))[0].run()
    outcomes: dict[str, list[Outcome]] = {}
    for each in trials(ledger):
        outcomes.setdefault(each.candidate, []).append(each.outcome)
    again = {name: each for name, each in outcomes.items() if len(each) > 1}
    assert again, "some crash, and are tried once more"
    for each in again.values():
        assert len(each) == 2
        assert each[0] in (Outcome.CRASHED, Outcome.TIMED_OUT)


# Budgets.


def test_a_repeated_night_does_nothing_and_a_larger_one_goes_on() -> None:
    ledger = MemoryLedger()
    first = night(ledger=ledger, terms=Terms(budget=120.0))[0].run()
    repeated, told = night(ledger=ledger, terms=Terms(budget=120.0))
    ended = repeated.run()
    assert (ended.trials, ended.end) == (0, End.DONE)
    assert not of(told, Phase)
    larger = night(ledger=ledger, terms=Terms(budget=240.0))[0].run()
    assert larger.trials > 50
    assert larger.elapsed == pytest.approx(240.0 - first.elapsed, abs=15)


def test_without_a_budget_it_ends_when_every_operator_has() -> None:
    ledger = MemoryLedger()
    made, told = night(ledger=ledger, terms=Terms(trials=64))
    made.run()
    ends = {each.operator.operator: each.why for each in of(told, OperatorEnded)}
    assert set(ends) == {one.name for one in OPERATORS}
    assert night(ledger=ledger, terms=Terms(trials=64))[0].run().trials == 0


def test_a_new_operator_alone_gets_its_share_when_the_budget_is_spent() -> None:
    ledger = MemoryLedger()
    terms = Terms(budget=200.0)
    night(ledger=ledger, terms=terms)[0].run()
    before = {key: list(records) for key, records in ledger.records.items()}
    new = operator("new", 2e-4)
    ended = night([*OPERATORS, new], ledger=ledger, terms=terms)[0].run()
    assert ended.trials >= 8
    assert {key for key in ledger.records if ledger.records[key] != before.get(key)} == {new.key}
    assert 200 / 7 <= ledger.standing(new.key).spent < 200 / 7 + 15
    assert night([*OPERATORS, new], ledger=ledger, terms=terms)[0].run().trials == 0


def test_what_a_changed_operator_had_been_given_is_given_again() -> None:
    ledger = MemoryLedger()
    terms = Terms(budget=200.0)
    night(ledger=ledger, terms=terms)[0].run()
    had = ledger.standing(OPERATORS[0].key).spent
    changed = [operator("changed", 1e-3), *OPERATORS[1:]]
    ended = night(changed, ledger=ledger, terms=terms)[0].run()
    assert ended.elapsed == pytest.approx(had, abs=15)
    assert ledger.standing(changed[0].key).spent >= 200 / 6
    assert night(changed, ledger=ledger, terms=terms)[0].run().trials == 0


def test_when_all_have_ended_a_changed_operator_alone_is_tuned() -> None:
    ledger, terms = MemoryLedger(), Terms(trials=48)
    night(ledger=ledger, terms=terms)[0].run()
    before = set(ledger.records)
    counts = {key: len(records) for key, records in ledger.records.items()}
    changed = operator("changed", 3e-4)
    assert night([*OPERATORS[:3], changed, *OPERATORS[4:]], ledger=ledger, terms=terms)[0].run().trials > 0
    assert set(ledger.records) - before == {changed.key}
    assert {key: len(ledger.records[key]) for key in before} == counts


def test_the_same_operator_in_another_model_is_not_tuned_again() -> None:
    ledger = MemoryLedger()
    night(ledger=ledger, terms=Terms(trials=32))[0].run()
    elsewhere = [operator(f"op{i}", 1e-3 * 0.7**i, {"other": 2}) for i in range(6)]
    assert night(elsewhere, ledger=ledger, terms=Terms(trials=32))[0].run().trials == 0


# Ends.


def test_a_space_that_is_exhausted_ends_its_operator_for_good() -> None:
    ledger, small = MemoryLedger(), Curve(2.0, 5.0, size=10)
    engine = FakeEngine(curves={OPERATORS[0].key: small}, faults=NO_FAULTS)
    made, told = night(OPERATORS[:1], engine, ledger)
    ended = made.run()
    assert ended.trials == 10
    (end,) = of(told, OperatorEnded)
    assert end.why == "every search space is exhausted"
    assert any(isinstance(each, ExhaustedRecord) for each in ledger.records[OPERATORS[0].key])
    again = FakeEngine(hook=Raising("prepare", AssertionError))
    assert night(OPERATORS[:1], again, ledger)[0].run().end is End.DONE


def test_an_engine_that_proposes_nothing_new_ends_the_operator() -> None:
    class Same(FakeEngine):
        def prepare(self, operator: Operator, standing: Standing, count: int) -> Batch:
            return super().prepare(operator, Standing(), count)

    made, told = night(OPERATORS[:1], Same(faults=NO_FAULTS))
    ended = made.run()
    assert ended.trials == 16, "the first batches, and never again"
    assert [each.said for each in of(told, OperatorEnded)] == ["nothing new was proposed"]


def test_nothing_measured() -> None:
    ended = night(engine=FakeEngine(faults=ALL_CRASH))[0].run()
    assert ended.end is End.NOTHING_MEASURED
    assert ended.timed == 0
    failure = ended.failures["crashed"]
    assert (failure.count, failure.said) == (ended.trials, "crashed with SIGSEGV")
    assert {each.why for each in ended.operators} == {"nothing could be measured"}


def test_validation_failed_names_an_operator_whose_every_candidate_was_wrong() -> None:
    class OneWrong(FakeEngine):
        def prepare(self, operator: Operator, standing: Standing, count: int) -> Batch:
            self.faults = ALL_WRONG if operator is OPERATORS[2] else NO_FAULTS
            return super().prepare(operator, standing, count)

    ended = night(engine=OneWrong())[0].run()
    assert ended.end is End.VALIDATION_FAILED
    assert ended.failures["wrong"].operator == OPERATORS[2].name
    figures = ended.operators[2]
    assert (figures.winners, figures.failed) == (0, {"wrong": figures.trials})


def test_faults_end_no_night_and_never_win() -> None:
    ledger = MemoryLedger()
    faults = Faults(0.1, 0.1, 0.1, 0.1, 0.1)
    ended = night(engine=FakeEngine(faults=faults), ledger=ledger, terms=Terms(budget=600.0))[0].run()
    assert ended.end is End.DONE
    assert set(ended.failures) == {"wrong", "crashed", "timed out", "not built"}
    for one in OPERATORS:
        for winner in ledger.standing(one.key).winners:
            assert winner.trial.outcome is Outcome.TIMED
            assert winner.trial.seconds is not None


def test_a_leader_that_is_not_confirmed_does_not_win() -> None:
    class Fluke(FakeEngine):
        def retest(self, operator: Operator, standing: Standing, leader: TrialRecord) -> list[Record]:
            (record,) = super().retest(operator, standing, leader)
            assert isinstance(record, RetestRecord)
            slower = RetestRecord(
                candidate=record.candidate,
                seconds=record.baseline,
                baseline=record.baseline,
                noise=0.0,
                certificate=record.certificate,
            )
            return [slower]

    made, told = night(engine=Fluke())
    ended = made.run()
    retests = of(told, Retested)
    assert retests
    assert not any(each.won for each in retests)
    assert all(each.winners == 0 and each.gain == 1.0 for each in ended.operators)
    assert not ended.gained


def test_a_retest_is_only_for_what_beats_the_best_beyond_the_noise() -> None:
    made, told = night(terms=Terms(budget=300.0, noise=0.05))
    made.run()
    best: dict[str, float] = {}
    retests = of(told, Retested)
    assert len(retests) > 5
    for each in retests:
        assert each.claimed > best.get(each.operator.operator, 1.0) * 1.05
        best[each.operator.operator] = each.operator.gain
    assert max(Counter(each.candidate for each in retests).values()) == 1


def test_what_a_killed_run_did_not_retest_is_retested_by_the_next() -> None:
    ledger = MemoryLedger()
    one = OPERATORS[0]
    engine = FakeEngine(faults=NO_FAULTS, curves={one.key: Curve(3.0, 1.0)})
    batch = engine.prepare(one, Standing(), 8)
    ledger.add(one.key, {}, engine.measure(one, batch))
    assert ledger.standing(one.key).best is None
    engine.curves = {one.key: Curve(1.0, 1.0)}  # nothing more to be found
    before = set(batch.candidates)

    class Kept(FakeEngine):
        def _ratio(self, operator: Operator, index: int) -> float:
            return 2.0 if candidate(operator, index) in before else 0.9

    made, told = night([one], Kept(faults=NO_FAULTS), ledger)
    made.run()
    assert of(told, Retested)[0].candidate in before


# What is told.


def test_batches_are_told_as_they_were() -> None:
    ledger = MemoryLedger()
    made, told = night(ledger=ledger)
    ended = made.run()
    batches = of(told, Measured)
    assert sum(each.timed for each in batches) == ended.timed
    assert sum(sum(each.failed.values()) for each in batches) == ended.trials - ended.timed
    assert [each.elapsed for each in batches] == sorted(each.elapsed for each in batches)
    assert all(each.left == pytest.approx(max(0.0, 120 - each.elapsed)) for each in batches)
    times = [each.models.now for each in batches]
    assert times == sorted(times, reverse=True)
    assert all(each.models.expected <= each.models.now <= each.models.before * 1.001 for each in batches)
    phases = [(each.phase, each.operator) for each in of(told, Phase)]
    assert [phase for phase, _ in phases[:3]] == ["preparing", "measuring", ""] or phases[2][0] == "retesting"


def test_a_thousand_operators_and_eight_hours_take_seconds() -> None:
    operators = [operator(f"op{i}", 1e-3 * (1 + i % 97) ** -1.2, {f"m{i % 9}": 1}) for i in range(1000)]
    begun = time.perf_counter()
    ended = night(operators, terms=Terms(budget=8 * 3600.0))[0].run()
    assert time.perf_counter() - begun < 60
    assert ended.elapsed >= 8 * 3600 - 1
    assert ended.trials > 20_000
