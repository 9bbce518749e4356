"""The strategy of tuning records on records of this project's own: the first that is made again as it was tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.compiler import ir, prepack, records
from pipeline.compiler.search import PostOrderApply, Proposal
from pipeline.compiler.strategies.tuned import Tuned
from pipeline.errors import StageError
from pipeline.tuning.records import Certificate, Outcome, RetestRecord, TrialRecord, encoded
from tests.compiler.strategies.workloads import DENSE, FREE, NATIVE, by_rows, commit, lines, scheduled


@pytest.fixture(scope="module")
def proposals() -> list[Proposal]:
    return list(PostOrderApply(threads=1).propose(FREE, NATIVE, (), (), 2, 1))


def winner(proposal: Proposal, **other: Any) -> bytes:
    said = {
        "candidate": records.digest_of(proposal.function),
        "space": PostOrderApply.name,
        "space_version": PostOrderApply.version,
        "decisions": proposal.decisions,
        "outcome": Outcome.TIMED,
    }
    return encoded(TrialRecord(**{**said, **other}))


def test_the_first_winner_is_taken(proposals: list[Proposal]) -> None:
    for best in (proposals, proposals[::-1]):
        made = Tuned([], [winner(each) for each in best]).apply(FREE, NATIVE)
        assert ir.canonical(made) == ir.canonical(best[0].function)
        assert len(prepack.split(made)[1]) == 1


def test_which_weights_are_free_is_the_workloads_to_say(proposals: list[Proposal]) -> None:
    made = Tuned([], [winner(proposals[0])]).apply(DENSE, NATIVE)
    assert prepack.split(made)[1] == ()


UNUSABLE = {
    "its space is gone": ({"space": "gone"}, "no search space 'gone'"),
    "decisions of another space": ({"decisions": {"tile": 3}}, "not a trace"),
    "it makes another function": ({"candidate": "0" * 64}, "another function of it than the one that was tried"),
}


@pytest.mark.parametrize(("change", "said"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_winner_that_cannot_be_used_is_passed_over_and_named(
    proposals: list[Proposal], change: dict[str, Any], said: str
) -> None:
    unusable = winner(proposals[0], **change)
    strategy = Tuned([], [unusable, winner(proposals[1])])
    assert ir.canonical(strategy.apply(FREE, NATIVE)) == ir.canonical(proposals[1].function)
    (passed,) = strategy.passed
    assert said in passed
    with pytest.raises(StageError, match="none of 1 tuning records") as refusal:
        Tuned([], [unusable]).apply(FREE, NATIVE)
    assert said in str(refusal.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"type":"other"}', b'{"type":"trial","format":99}', b"\xff"])
def test_what_is_no_record_is_passed_over(data: bytes, proposals: list[Proposal]) -> None:
    assert Tuned([], [data, winner(proposals[0])]).apply(FREE, NATIVE) is not None
    with pytest.raises(StageError, match="none of 1 tuning records can be replayed"):
        Tuned([], [data]).apply(FREE, NATIVE)


def test_a_retest_is_no_winner(proposals: list[Proposal]) -> None:
    retest = RetestRecord(
        candidate="0" * 64, seconds=1, baseline=2, noise=0, certificate=Certificate("default", (0,), 1e-4, 0.0)
    )
    with pytest.raises(StageError, match="no record of a trial"):
        Tuned([], [encoded(retest)]).apply(FREE, NATIVE)


def test_metaschedules_records_come_after_the_winners(proposals: list[Proposal], tmp_path: Path) -> None:
    commit(tmp_path, DENSE, by_rows)
    groups = list(records.read_database(*lines(tmp_path))[0].values())
    assert ir.canonical(Tuned(groups, [winner(proposals[0])]).apply(FREE, NATIVE)) == ir.canonical(
        proposals[0].function
    )
    fallen_back = Tuned(groups, [winner(proposals[0], candidate="0" * 64)]).apply(DENSE, NATIVE)
    assert ir.canonical(fallen_back) == ir.canonical(scheduled(DENSE, by_rows))
