"""When what was tuned is stale: every rule, in both directions, from records that are made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from pipeline.config import Stale
from pipeline.hashing import Digest
from pipeline.tuning.records import TOOLS, VALIDATOR, Outcome, Record, WithdrawnRecord, encoded
from pipeline.tuning.staleness import DAY, Kind, Present, can_be_tuned_away, is_to_go_on, reasons
from pipeline.tuning.summaries import EMPTY, Summary, summary
from tests.made_up import digest_of, retest, trial, won

NOISE = 0.03
NOW = 1_800_000_000.0
TODAY = {"tvm": "0.27.0", "tvm-ffi": "0.1.14", "libtvm": "build ID, 1"}
BEFORE = {**TODAY, "tvm": "0.26.0"}
ALL = Stale(days=30, failures=0.5)


def summed(records: Sequence[Record]) -> Summary:
    members = {Digest.of(encoded(record)).hash: record for record in records}
    return summary(members, NOISE, TODAY)


def found(records: Sequence[Record] | Summary, rules: Stale = ALL, **present: Any) -> dict[Kind, str]:
    known = records if isinstance(records, Summary) else summed(records)
    against = replace(Present(NOW, TODAY, patience=4), **present)
    return {each.kind: each.said for each in reasons(known, rules, against)}


def winner(name: str = "a", gain: float = 2.0, at: float = NOW - DAY, tools: dict[str, str] = TODAY) -> list[Record]:
    return won(name, gain, at, tools)


def test_what_was_tuned_yesterday_is_fresh() -> None:
    assert found(winner()) == {}
    assert found([trial("a", 1.0, NOW - DAY, tools=TODAY)]) == {}
    assert found(EMPTY) == {}


def test_days() -> None:
    assert found(winner(at=NOW - 29 * DAY)) == {}
    assert found(winner(at=NOW - 40 * DAY)) == {Kind.DAYS: "last measured 40 days ago, the limit is 30"}
    assert found([trial("a", 1.0, NOW - 40 * DAY, tools=TODAY)]).keys() == {Kind.DAYS}, "also where nothing was found"
    looked_at_since = [*winner(at=NOW - 40 * DAY), trial("b", 1.0, NOW - DAY, tools=TODAY)]
    assert found(looked_at_since) == {}
    claimed = [*winner(at=NOW - 40 * DAY), trial("b", 9.0, NOW, tools=TODAY, outcome=Outcome.CLAIMED)]
    claimed[-1] = msgspec.structs.replace(claimed[-1], outcome=Outcome.CLAIMED)  # type: ignore[type-var]
    assert found(claimed).keys() == {Kind.DAYS}, "a claim was measured elsewhere"
    assert found(winner(at=NOW - 4000 * DAY), Stale()) == {}
    assert found(winner(at=NOW + DAY)) == {}, "another machine's clock"


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        (BEFORE, "validated with TVM 0.26.0, this is 0.27.0"),
        ({**TODAY, "tvm-ffi": "0.1.13"}, "validated with TVM's FFI 0.1.13, this is 0.1.14"),
        ({**TODAY, "libtvm": "build ID, 2"}, "validated with another build of TVM"),
        ({}, "validated with TVM an unknown version, this is 0.27.0"),
    ],
)
def test_toolchain(tools: dict[str, str], said: str) -> None:
    records = winner(tools=tools)
    assert found(records) == {Kind.TOOLCHAIN: said}
    assert found(records, Stale(toolchain=False)) == {}
    again = [*records, retest("a", 2.0, NOW, tools=TODAY)]
    assert found(again) == {}


def test_device() -> None:
    there = ["an older processor, 8 processors"]
    assert found(EMPTY, elsewhere=there) == {
        Kind.DEVICE: "tuned on another device only: an older processor, 8 processors"
    }
    assert found(EMPTY, Stale(device=False), elsewhere=there) == {}
    assert found(winner(), elsewhere=there) == {}


def old_validator(name: str, gain: float, at: float = NOW - DAY) -> list[Record]:
    return [trial(name, gain, at, tools=TODAY), retest(name, gain, at, validator=VALIDATOR + 1, tools=TODAY)]


def test_validator() -> None:
    records = old_validator("a", 2.0)
    assert found(records).keys() == {Kind.VALIDATOR}
    assert found(records, Stale(validator=False)) == {}
    assert found([*records, *winner("b", 1.2)]) == {}, "another is applied, which is validated"
    compared = [*records, retest("a", 1.0, NOW, tools=TODAY)]
    assert found(compared) == {}, "it was compared again, and lost"
    assert found(old_validator("a", 1.01)) == {}, "it never won"


def test_failures() -> None:
    crashed: list[Record] = [
        trial(name, None, NOW - DAY, outcome=Outcome.CRASHED, tools=TODAY) for name in ("c", "d", "e")
    ]
    assert found([*winner(), *crashed]) == {Kind.FAILURES: "3 of 4 candidates failed"}
    assert found([*winner(), *crashed[:1]]) == {}, "half is not more than half"
    assert found([*winner(), *crashed], Stale()) == {}


def test_the_default_has_caught_up() -> None:
    lost = [*winner(at=NOW - 3 * DAY), retest("a", 1.0, NOW - 2 * DAY, tools=TODAY)]
    assert found(lost).keys() == {Kind.CAUGHT_UP}
    assert found(lost, Stale(caught_up=False)) == {}
    since: list[Record] = [trial(f"s{i}", 1.0, NOW - DAY + i, tools=TODAY) for i in range(4)]
    assert found([*lost, *since[:3]]).keys() == {Kind.CAUGHT_UP}
    assert found([*lost, *since]) == {}, "as many were tried since as it takes to believe it"
    assert found([*lost, *winner("b", 1.5)]) == {}, "another won"
    never = [trial("a", 1.5, NOW - 3 * DAY, tools=TODAY), retest("a", 1.0, NOW - 2 * DAY, tools=TODAY)]
    assert found(never) == {}, "it never won"


def test_a_winner_that_turned_out_wrong_was_not_caught_up_with() -> None:
    wrong = trial("a", None, NOW - DAY, outcome=Outcome.WRONG, tools=TODAY)
    assert found([*winner(at=NOW - 3 * DAY), wrong], Stale()) == {}


def test_another_compiler_made_it_and_it_no_longer_wins() -> None:
    lost = [*winner(at=NOW - 9 * DAY, tools=BEFORE), trial("a", 1.0, NOW - DAY, tools=TODAY)]
    assert found(lost).keys() == {Kind.CAUGHT_UP}


def test_the_baseline_has_become_as_fast() -> None:
    one = winner(gain=1.5, at=NOW - 9 * DAY)
    level = trial("b", 1.0, NOW - DAY, baseline=1.36e-3, tools=TODAY)
    assert found([*one, level]).keys() == {Kind.LEVEL}
    assert found([*one, level], Stale(caught_up=False)) == {}
    assert found([*one, trial("b", 1.0, NOW - DAY, baseline=1.5e-3, tools=TODAY)]) == {}
    before = trial("b", 1.0, NOW - 10 * DAY, baseline=1.36e-3, tools=TODAY)
    assert found([*one, before]) == {}, "the winner was timed later"


def test_what_was_withdrawn_says_nothing() -> None:
    records = winner(tools=BEFORE, at=NOW - 90 * DAY)
    gone = WithdrawnRecord(records=tuple(Digest.of(encoded(each)).hash for each in records), at=NOW - DAY)
    known = summed([*records, gone])
    assert found(known) == {}
    assert (known.is_empty, known.withdrawn) == (True, NOW - DAY)


def test_what_helps() -> None:
    def told(records: Sequence[Record], is_exhausted: bool, **rules: Any) -> tuple[bool, bool]:
        why = reasons(summed(records), msgspec.structs.replace(ALL, **rules), Present(NOW, TODAY, 4))
        return is_to_go_on(why, is_exhausted), can_be_tuned_away(why, is_exhausted)

    old = winner(at=NOW - 40 * DAY)
    assert told(old, False) == (True, True)
    assert told(old, True) == (False, False), "nothing new can be proposed: what was found must go first"
    assert told(old_validator("a", 2.0), True) == (True, True), "what is known is compared again"
    assert told(winner(tools=BEFORE), True) == (False, True), "the night tries that again without being asked"
    level = trial("b", 1.0, NOW - DAY, baseline=1.01e-3, tools=TODAY)
    assert told([*winner(at=NOW - 9 * DAY), level], False) == (False, False)
    assert told(winner(), False) == (False, True)


def test_every_rule_is_tried() -> None:
    assert set(Stale.__struct_fields__) == {str(kind).replace(" ", "_") for kind in Kind if kind is not Kind.LEVEL}
    assert set(TODAY) == set(TOOLS)
    assert digest_of("a") == trial("a").candidate
