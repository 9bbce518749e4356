"""What follows from a set of records: the same in any order, however it was split, and never a wrong winner."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.tuning import records as tuning
from pipeline.tuning.records import (
    ATTEMPTS,
    FORMAT,
    TRANSIENT,
    VALIDATOR,
    Certificate,
    ExhaustedRecord,
    NewerFormatError,
    Outcome,
    Record,
    RetestRecord,
    Standing,
    TrialRecord,
    decoded,
    encoded,
    filed,
    set_key,
    standing,
)

NOISE = 0.02
RIGHT = Certificate("default", (0, 1), 1e-3, 1e-5)
FINAL = [each for each in Outcome if each not in TRANSIENT and each is not Outcome.CLAIMED]

seconds = st.floats(1e-6, 10.0)
candidates = st.sampled_from(["aa", "bb", "cc", "dd"])  # few, so that records meet
certificates = st.sampled_from(
    [RIGHT, Certificate("default", (0,), 1e-3, 1e-5, VALIDATOR - 1), Certificate("default", (0,), 1e-3, 1e-2)]
)
times = st.sampled_from([1.0, 2.0, 3.0])  # few, so that two say the same
costs = st.floats(0.0, 100.0)


@st.composite
def trials(draw: Any) -> TrialRecord:
    outcome = draw(st.sampled_from(Outcome))
    has_time = outcome in (Outcome.TIMED, Outcome.CLAIMED)
    return TrialRecord(
        candidate=draw(candidates),
        space=draw(st.sampled_from(["rules", "post-order-apply"])),
        space_version=1,
        decisions=draw(st.sampled_from([{}, {"tile": 3}, [[["GetSBlock", [], ["root", "main"], ["b0"]]], []]])),
        outcome=outcome,
        seconds=draw(seconds) if has_time else None,
        baseline=draw(st.none() | seconds) if outcome is Outcome.CLAIMED else draw(seconds),
        cost=draw(costs),
        at=draw(times),
        run=draw(st.sampled_from(["one", "two"])),
    )


retests = st.builds(
    RetestRecord,
    candidate=candidates,
    seconds=seconds,
    baseline=seconds,
    noise=st.sampled_from([0.0, 0.01, 0.3]),
    certificate=certificates,
    cost=costs,
    at=times,
)
ends = st.builds(
    ExhaustedRecord,
    space=st.sampled_from(["rules", "dlight"]),
    space_version=st.integers(1, 2),
    reason=st.just("nothing new"),
    cost=costs,
)
sets = st.lists(trials() | retests | ends, max_size=24).map(
    lambda listed: list({encoded(record): record for record in listed}.values())
)


def trial(candidate: str, outcome: Outcome = Outcome.TIMED, at: float = 1.0, **known: Any) -> TrialRecord:
    timed = {"seconds": 1.0, "baseline": 2.0} if outcome is Outcome.TIMED else {}
    return TrialRecord(
        candidate=candidate, space="rules", space_version=1, decisions={}, outcome=outcome, at=at, **timed | known
    )


def retest(candidate: str, seconds: float = 1.0, certificate: Certificate = RIGHT, **known: Any) -> RetestRecord:
    known = {"baseline": 2.0, "noise": 0.0, "at": 5.0, **known}
    return RetestRecord(candidate=candidate, seconds=seconds, certificate=certificate, **known)


def of(*listed: Record) -> Standing:
    return standing(listed, NOISE)


# properties


@given(sets, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_records_does_not_matter(listed: list[Record], chance: random.Random) -> None:
    shuffled = chance.sample(listed, len(listed))
    assert standing(shuffled, NOISE) == standing(listed, NOISE)


@given(sets, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_union_of_parts_is_the_whole_however_it_was_split(listed: list[Record], chance: random.Random) -> None:
    parts: list[set[bytes]] = [set(), set(), set()]
    for record in listed:
        for part in chance.sample(parts, chance.randint(1, 3)):  # some are in several parts
            part.add(encoded(record))
    assert standing(map(decoded, set.union(*parts)), NOISE) == standing(listed, NOISE)


@given(sets)
@settings(deadline=None)
def test_nothing_wins_that_must_not(listed: list[Record]) -> None:
    found = standing(listed, NOISE)
    said: dict[str, set[Outcome]] = {}
    for record in listed:
        if isinstance(record, TrialRecord):
            said.setdefault(record.candidate, set()).add(record.outcome)
    for winner in found.winners:
        outcomes = said[winner.trial.candidate]
        assert Outcome.WRONG not in outcomes
        assert Outcome.TIMED in outcomes
        assert winner.retest.certificate == RIGHT
        assert winner.gain > 1 / (1 - NOISE)
        assert winner.retest in listed
    assert [winner.gain for winner in found.winners] == sorted((w.gain for w in found.winners), reverse=True)


@given(sets)
@settings(deadline=None)
def test_every_candidate_is_counted_once(listed: list[Record]) -> None:
    found = standing(listed, NOISE)
    names = {record.candidate for record in listed if isinstance(record, TrialRecord)}
    here = [each.candidate for each in found.trials]
    claimed = [each.candidate for each in found.claims]
    assert sorted(here + claimed) == sorted(names)
    assert found.timed + sum(found.failures.values()) == len(here)
    assert Outcome.CLAIMED not in found.failures
    assert found.curve() == sorted(found.curve())
    assert len(found.curve()) == len(here)
    assert found.spent == math.fsum(record.cost for record in listed)


@given(sets)
@settings(deadline=None)
def test_what_is_filed_stands_where_what_is_decoded_stands(listed: list[Record]) -> None:
    written = [encoded(record) for record in listed]
    plain, light = standing(map(decoded, written), NOISE), standing(map(filed, written), NOISE)
    assert plain == standing(listed, NOISE)
    assert msgspec.json.encode(light.trials) == msgspec.json.encode(plain.trials)
    assert [encoded(each.trial) for each in light.winners] == [encoded(each.trial) for each in plain.winners]
    assert (light.tried, light.spent, light.baseline, light.failures) == (
        plain.tried,
        plain.spent,
        plain.baseline,
        plain.failures,
    )


@given(trials() | retests | ends)
@settings(deadline=None)
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    assert decoded(encoded(record)) == record
    assert encoded(filed(encoded(record))) == encoded(record)


# what wins


def test_a_retested_candidate_wins_and_the_fastest_is_the_best() -> None:
    found = of(trial("aa"), trial("bb"), retest("aa", 1.0), retest("bb", 0.5))
    assert [winner.trial.candidate for winner in found.winners] == ["bb", "aa"]
    assert (found.gain, found.best) == (4.0, found.winners[0])
    assert of().gain == 1.0
    assert of().baseline is None


def test_without_a_retest_nothing_wins() -> None:
    assert of(trial("aa", seconds=1e-6)).winners == ()
    assert of(retest("aa")).winners == ()


@pytest.mark.parametrize("at", [0.0, 9.0])
def test_once_wrong_never_wins(at: float) -> None:
    found = of(trial("aa"), retest("aa"), trial("aa", Outcome.WRONG, at=at))
    assert found.winners == ()
    assert found.failures == {Outcome.WRONG: 1}
    assert "aa" in found.tried


def test_a_claim_wins_only_after_it_was_tried_here() -> None:
    claim = trial("aa", Outcome.CLAIMED, seconds=1e-9, baseline=5e-9)
    found = of(claim, retest("aa"))
    assert found.winners == ()
    assert (found.trials, found.claims, found.curve()) == ((), (claim,), [])
    assert found.baseline == 2.0, "a baseline that was measured elsewhere counts for nothing"
    assert "aa" not in found.tried
    assert found.failures == {}
    found = of(claim, retest("aa"), trial("aa"))
    assert [winner.trial.outcome for winner in found.winners] == [Outcome.TIMED]
    assert found.claims == ()


def test_claims_come_fastest_first() -> None:
    found = of(*(trial(name, Outcome.CLAIMED, seconds=s) for name, s in (("aa", 3.0), ("bb", 1.0), ("cc", None))))
    assert [claim.candidate for claim in found.claims] == ["bb", "aa", "cc"]


@pytest.mark.parametrize(
    "certificate",
    [
        Certificate("default", (0, 1), 1e-3, 1e-5, VALIDATOR - 1),
        Certificate("default", (0, 1), 1e-3, 1e-5, VALIDATOR + 1),
        Certificate("default", (0, 1), 1e-3, 2e-3),
        Certificate("default", (), 1e-3, 0.0),
    ],
)
def test_what_proves_nothing_today_counts_no_more(certificate: Certificate) -> None:
    assert of(trial("aa"), retest("aa", certificate=certificate)).winners == ()
    # Nor does it stand in the way of one that does, though it is the later one.
    found = of(trial("aa"), retest("aa", 0.1, certificate, at=9.0), retest("aa", 1.0))
    assert found.gain == 2.0


def test_the_latest_retest_counts() -> None:
    assert of(trial("aa"), retest("aa", 0.5, at=1.0), retest("aa", 1.9999, at=2.0)).winners == ()


@pytest.mark.parametrize(
    ("seconds", "noise", "wins"), [(1.97, 0, False), (1.95, 0, True), (1.5, 0.3, False), (0.9, 9, True)]
)
def test_a_gain_inside_the_noise_is_no_gain(seconds: float, noise: float, wins: bool) -> None:
    assert bool(of(trial("aa"), retest("aa", seconds, noise=noise)).winners) is wins


# what is tried again


@pytest.mark.parametrize("outcome", sorted(TRANSIENT))
def test_what_may_be_the_machines_fault_is_tried_once_more_and_counted(outcome: Outcome) -> None:
    once = of(trial("aa", outcome, seconds=None))
    assert "aa" not in once.tried
    assert (once.retries, once.failures) == (0, {outcome: 1})
    twice = of(trial("aa", outcome), trial("aa", outcome, at=2.0))
    assert "aa" in twice.tried
    assert (twice.retries, twice.failures, len(twice.trials)) == (1, {outcome: 1}, 1)
    assert twice.curve() == [1.0], "never read as slow"
    assert twice.timed == 0
    mended = of(trial("aa", outcome, at=9.0), trial("aa"))
    assert (mended.timed, mended.retries, mended.failures) == (1, 1, {})
    assert ATTEMPTS == 2


@pytest.mark.parametrize("outcome", FINAL)
def test_a_final_word_is_final(outcome: Outcome) -> None:
    assert of(trial("aa", outcome)).tried == {"aa"}
    assert of(trial("aa", outcome)).retries == 0


def test_a_ratio_is_of_what_was_timed_here() -> None:
    assert tuning.ratio(trial("aa")) == 2.0
    assert tuning.ratio(trial("aa", Outcome.CRASHED, seconds=1.0, baseline=2.0)) == 0.0
    assert tuning.ratio(trial("aa", baseline=None)) == 0.0


# what is read


def changed(record: Record, **fields: Any) -> bytes:
    return json.dumps({**json.loads(encoded(record)), **fields}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        encoded(trial("aa"))[:-1],
        encoded(trial("aa")) + b"}",
        b'{"type": "trial"}',
        b'{"type": "nonesuch", "format": 1}',
        b'{"operator": "conv2d"}',
        changed(trial("aa"), outcome="slow"),
        changed(trial("aa"), seconds=0),
        changed(trial("aa"), seconds=-1.0),
        changed(trial("aa"), baseline=0.0),
        changed(trial("aa"), cost=-3),
        changed(trial("aa"), format="1"),
        changed(retest("aa"), seconds=0.0),
        changed(retest("aa"), certificate=None),
        b'{"type": "trial", "decisions": ' + b"[" * 100_000,
    ],
    ids=lambda data: repr(data[:24]),
)
def test_what_is_no_record_is_a_value_error(data: bytes) -> None:
    for read in (decoded, filed):
        with pytest.raises(ValueError, match="no tuning record") as caught:
            read(data)
        assert not isinstance(caught.value, NewerFormatError)


@pytest.mark.parametrize(
    "data",
    [
        changed(trial("aa"), format=FORMAT + 1),
        changed(retest("aa"), format=FORMAT + 1, seconds="fast"),
        changed(trial("aa"), format=FORMAT + 7, type="dreamt"),
    ],
)
def test_a_newer_format_is_told_from_what_is_torn(data: bytes) -> None:
    for read in (decoded, filed):
        with pytest.raises(NewerFormatError, match="newer"):
            read(data)


def test_what_a_newer_version_adds_within_the_format_is_passed_over() -> None:
    assert decoded(changed(trial("aa"), watts=3)) == trial("aa")


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_what_could_not_be_read_back_is_not_written(value: float) -> None:
    with pytest.raises(ValueError, match=r"seconds|> 0"):
        encoded(trial("aa", seconds=value))
    with pytest.raises(ValueError, match="no tuning record"):
        encoded(retest("aa", certificate=Certificate("default", (0,), 1e-3, math.nan)))


def test_what_was_timed_for_one_target_or_device_is_in_no_other_set() -> None:
    target = {"kind": "llvm", "mcpu": "znver4", "mattr": ["+avx2"], "host": {"kind": "llvm"}}
    keys = {
        set_key("w", target, "here"),
        set_key("v", target, "here"),
        set_key("w", target, "there"),
        set_key("w", {**target, "mcpu": "znver3"}, "here"),
        set_key("w", {**target, "mattr": []}, "here"),
        set_key("w", {**target, "num-cores": 2}, "here"),
    }
    assert len(keys) == 6
    assert set_key("w", dict(reversed(target.items())), "here") in keys
