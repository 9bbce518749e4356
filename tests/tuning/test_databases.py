"""Which candidates a database of MetaSchedule's shall hold, and with which seconds."""

from __future__ import annotations

import pytest

from pipeline.tuning.databases import exported
from pipeline.tuning.records import Certificate, Outcome, RetestRecord, TrialRecord, standing

RIGHT = Certificate("default", (0, 1), 1e-3, 1e-6)


def trial(name: str, seconds: float, baseline: float = 2.0, space: str = "post-order-apply") -> TrialRecord:
    known = {"space_version": 1, "decisions": name, "outcome": Outcome.TIMED}
    return TrialRecord(candidate=name, space=space, seconds=seconds, baseline=baseline, **known)


def retest(name: str, seconds: float) -> RetestRecord:
    return RetestRecord(candidate=name, seconds=seconds, baseline=2.0, noise=0.0, certificate=RIGHT)


def test_what_seems_faster_than_the_best_winner_was_never_confirmed_and_stays() -> None:
    records = [trial("lucky", 0.1), trial("best", 0.4), retest("best", 0.5), trial("slow", 1.0)]
    assert exported(standing(records, 0.02)) == [("best", 0.5), ("slow", 1.0)]
    assert exported(standing(records[:1], 0.02)) == [("lucky", 0.1)], "where nothing was confirmed all is given"


def test_drift_between_two_nights_decides_nothing() -> None:
    records = [trial("quiet", 1.0, 2.0), trial("loaded", 3.0, 9.0)]
    assert exported(standing(records, 0.02)) == [("loaded", pytest.approx(2 / 3)), ("quiet", 1.0)]


def test_decisions_of_other_spaces_are_no_traces() -> None:
    assert exported(standing([trial("a", 1.0, space="rules")], 0.02)) == []


def test_claims_and_failures_are_not_exported() -> None:
    claim = TrialRecord(
        candidate="c", space="post-order-apply", space_version=1, decisions=[], outcome=Outcome.CLAIMED, seconds=1.0
    )
    assert exported(standing([claim], 0.02)) == []
