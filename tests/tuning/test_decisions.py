"""What people decide about records: it counts everywhere, in any order, and can be told."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tuning_records import NOISE, retest, sets, trial

from pipeline.errors import ConfigError
from pipeline.hashing import Digest
from pipeline.store import Store
from pipeline.tuning.decisions import candidate_of
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.records import (
    BEST,
    NONE,
    Outcome,
    PreferredRecord,
    Record,
    Standing,
    WithdrawnRecord,
    decoded,
    encoded,
    history,
    live,
    standing,
)

OLD = {"tvm": "0.26", "tvm-ffi": "0.1", "libtvm": "a"}
NEW = {"tvm": "0.27", "tvm-ffi": "0.1", "libtvm": "b"}


def members(*records: Record) -> dict[str, Record]:
    return {name_of(each): each for each in records}


def name_of(record: Record) -> str:
    return Digest.of(encoded(record)).hash


def withdrawn(*records: Record, at: float = 10.0, **more: Any) -> WithdrawnRecord:
    return WithdrawnRecord(records=tuple(map(name_of, records)), at=at, **more)


def of(known: dict[str, Record], tools: dict[str, str] | None = None) -> Standing:
    return standing(live(known), NOISE, tools)


def applied(known: dict[str, Record], tools: dict[str, str] | None = None) -> list[str]:
    return [winner.trial.candidate for winner in of(known, tools).applied()[0]]


FAST = (trial("fast", seconds=0.5), retest("fast", 0.5, at=3.0))
SLOW = (trial("slow"), retest("slow", 1.0, at=2.0))


# withdrawing


def test_what_was_withdrawn_counts_no_longer_and_what_comes_later_does() -> None:
    known = members(*FAST, *SLOW)
    assert applied(known) == ["fast", "slow"]
    known |= members(withdrawn(*FAST))
    assert applied(known) == ["slow"]
    assert len(of(known).withdrawn) == 1
    again = (trial("fast", seconds=0.6, at=11.0), retest("fast", 0.6, at=12.0))
    assert applied(known | members(*again)) == ["fast", "slow"], "it was tried again since"


@given(sets, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_it_does_not_come_back_by_any_merge(listed: list[Record], chance: random.Random) -> None:
    gone = chance.sample(listed, len(listed) // 2)
    told = withdrawn(*gone)
    left = members(*[each for each in listed if each not in gone], told)
    for _ in range(3):
        brought = members(*chance.sample(listed, chance.randint(0, len(listed))))
        merged = {**brought, **left, **brought}
        assert of(dict(chance.sample(list(merged.items()), len(merged)))) == of(left)


def test_a_withdrawal_cannot_be_withdrawn() -> None:
    told = withdrawn(*FAST)
    assert applied(members(*FAST, *SLOW, told, withdrawn(told, at=11.0))) == ["slow"]


@pytest.mark.parametrize("name", ["", "a" * 63, "A" * 64, "../../etc/passwd", "a" * 64 + "\n"])
def test_what_names_no_record_is_none(name: str) -> None:
    data = encoded(withdrawn(*FAST)).replace(name_of(FAST[0]).encode(), name.encode().replace(b"\n", b"\\n"))
    with pytest.raises(ValueError, match="no tuning record"):
        decoded(data)


def test_what_was_measured_is_told_apart_from_before_it_was_withdrawn(tmp_path: Path) -> None:
    ledger, key = Ledger(Store(tmp_path / "store"), NOISE), Ledger.key_of("w" * 64, {"kind": "llvm"}, "here")
    assert ledger.measured_anew(key) == ""
    ledger.add(key, {}, [withdrawn(*FAST)])
    assert ledger.measured_anew(key) == "", "records alone were withdrawn"
    ledger.add(key, {}, [withdrawn(measured=True)])
    first = ledger.measured_anew(key)
    assert len(first) == 64
    assert Ledger(Store(tmp_path / "store"), NOISE).measured_anew(key) == first
    ledger.add(key, {}, [withdrawn(measured=True, at=11.0)])
    assert ledger.measured_anew(key) not in ("", first)


# preferring


def test_what_is_preferred_comes_first_until_somebody_decides_again() -> None:
    known = members(*FAST, *SLOW, PreferredRecord(candidate="slow", at=5.0))
    assert applied(known) == ["slow", "fast"]
    assert of(known).best is not None
    assert of(known).best.trial.candidate == "fast", "the best is the best all the same"  # type: ignore[union-attr]
    assert applied(known | members(PreferredRecord(candidate=NONE, at=6.0))) == []
    assert applied(known | members(PreferredRecord(candidate=BEST, at=7.0))) == ["fast", "slow"]
    assert applied(known | members(PreferredRecord(candidate="fast", at=4.0))) == ["slow", "fast"], "that was before"


def test_what_is_preferred_and_gone_is_passed_over() -> None:
    known = members(*FAST, *SLOW, PreferredRecord(candidate="slow", at=5.0), withdrawn(*SLOW))
    assert applied(known) == ["fast"]


def test_what_was_applied_is_told_in_order() -> None:
    better = (trial("better", seconds=0.25, at=7.0), retest("better", 0.25, at=8.0))
    decided = [
        PreferredRecord(candidate="fast", at=9.0, reason="wrong on one board"),
        withdrawn(*FAST, at=10.0),
        PreferredRecord(candidate=BEST, at=11.0),
    ]
    reigns = history(members(*FAST, *SLOW, *better, *decided), NOISE)
    told = [(each.at, each.winner.trial.candidate if each.winner else None, each.by.at) for each in reigns]
    assert told == [
        (2.0, "slow", 2.0),
        (3.0, "fast", 3.0),
        (8.0, "better", 8.0),
        (9.0, "fast", 9.0),
        (10.0, "better", 10.0),
    ]


def test_where_somebody_can_go_back_to() -> None:
    known = members(*FAST, *SLOW)

    def meant(wanted: str) -> str:
        return candidate_of(of(known), history(known, NOISE), wanted)

    assert meant("previous") == "slow"
    assert (meant("best"), meant("none"), meant("fa")) == (BEST, NONE, "fast")
    with pytest.raises(ConfigError, match="no validated candidate"):
        meant("zz")
    known = members(*FAST, *SLOW, withdrawn(*SLOW, at=2.5))
    assert meant("previous") == NONE, "what was before is no longer to be had"
    known |= members(PreferredRecord(candidate=NONE, at=20.0))
    assert meant("previous") == "fast"
    known = {}
    with pytest.raises(ConfigError, match="nothing to go back to"):
        meant("previous")


# other tools


def test_what_was_validated_with_other_tools_is_unproven() -> None:
    known = members(trial("fast", seconds=0.5, tools=OLD), retest("fast", 0.5))
    assert of(known, OLD).applied() == (of(known, OLD).winners, True)
    assert of(known).applied()[1], "where tools do not matter"
    found = of(known, NEW)
    assert (found.winners, found.best, found.gain, found.retested) == ((), None, 1.0, frozenset())
    assert applied(known, NEW) == ["fast"]
    assert not found.applied()[1], "to be compared before it is applied"


def test_a_retest_with_the_tools_of_today_proves_it() -> None:
    known = members(trial("fast", seconds=0.5, tools=OLD), retest("fast", 0.5), retest("fast", 0.7, tools=NEW, at=6.0))
    for tools, seconds in ((NEW, 0.7), (OLD, 0.5)):
        (winner,) = of(known, tools).winners
        assert winner.retest.seconds == seconds
        assert of(known, tools).unproven == ()


def test_what_is_slow_or_fails_with_the_tools_of_today_does_not_win() -> None:
    known = members(trial("fast", seconds=0.5, tools=OLD), retest("fast", 0.5))
    slow = members(retest("fast", 1.99, tools=NEW, at=6.0))
    assert applied(known | slow, NEW) == []
    for outcome in (Outcome.NOT_BUILT, Outcome.WRONG, Outcome.CRASHED):
        failed = members(trial("fast", outcome, at=6.0, tools=NEW))
        assert applied(known | failed, NEW) == []
        assert of(known | failed, NEW).failures == {outcome: 1}
        assert applied(known | failed, OLD) == ([] if outcome is Outcome.WRONG else ["fast"])


def test_what_is_proven_comes_before_what_was_faster_with_other_tools() -> None:
    known = members(
        *(trial("fast", seconds=0.5, tools=OLD), retest("fast", 0.5)),
        *(trial("slow", tools=NEW), retest("slow", 1.0)),
    )
    assert applied(known, NEW) == ["slow"]
    assert applied(known | members(PreferredRecord(candidate="fast", at=9.0)), NEW) == ["fast"]
