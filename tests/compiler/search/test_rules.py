"""The space of rules: what it proposes, in which order, and that decisions make the same function again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import pytest
import tvm

from pipeline.compiler import records, rules, search
from pipeline.compiler.search import Proposal, Tried
from pipeline.compiler.search.rules import RulesSpace, steps
from tests.compiler.search.workloads import NATIVE, conv, digests, proposed, relu

SPACE = RulesSpace()
Decisions = Mapping[str, int]


def searched(func: tvm.tirx.PrimFunc, ratio: Callable[[Decisions], float], trials: int, batch: int = 4) -> list[Tried]:
    """Tries batch after batch, as long as anything is proposed; `ratio` says how fast decisions are."""
    tried: list[Tried] = []
    known: set[str] = set()
    while len(tried) < trials and (found := proposed(func, min(batch, trials - len(tried)), 0, tried, known, SPACE)):
        assert known.isdisjoint(digests(found))
        known |= set(digests(found))
        tried += [Tried(each.decisions, ratio(each.decisions)) for each in found]
    assert len(known) == len(tried)
    return tried


def test_the_space_is_known_by_its_name() -> None:
    assert isinstance(search.by_name("rules"), RulesSpace)


def test_what_the_rules_make_comes_first_unless_it_is_known() -> None:
    own = records.digest_of(rules.schedule(conv(), NATIVE))
    found = proposed(conv(), space=SPACE)
    assert (found[0].decisions, digests(found)[0]) == ({}, own)
    assert own not in digests(proposed(conv(), space=SPACE, known={own}))


def test_proposals_are_the_same_each_time_whatever_the_seed() -> None:
    def said(found: list[Proposal]) -> list[object]:
        return [each.decisions for each in found]

    first, second = (proposed(conv(), 20, seed, space=SPACE) for seed in (1, 2))
    assert said(list(first)) == said(list(second))
    assert digests(first) == digests(second)
    assert len(set(digests(first))) == len(first) > 10


def test_the_first_proposals_change_one_thing_each_and_not_all_the_same() -> None:
    single = [each.decisions for each in proposed(conv(), 6, space=SPACE)][1:]
    assert all(len(decisions) == 1 for decisions in single)
    assert len({name for decisions in single for name in decisions}) > 2


def test_decisions_make_the_same_function_again_also_from_json() -> None:
    for each in proposed(conv(), 12, space=SPACE):
        made = SPACE.make(conv(), NATIVE, json.loads(json.dumps(each.decisions)))
        assert records.digest_of(made) == records.digest_of(each.function)


@pytest.mark.parametrize(
    "decisions", [{"0.tile": 99}, {"0.tile": -1}, {"7.tile": 1}, {"tile": 1}, {"0.tile": "1"}, {"0.tile": True}, [], 3]
)
def test_decisions_that_do_not_fit_are_refused(decisions: object) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        SPACE.make(conv(), NATIVE, decisions)


def test_a_search_ends_after_a_few_tens() -> None:
    tried = searched(conv(), lambda decisions: 1.0 + 0.001 * len(decisions), 1000, batch=16)
    assert 10 < len(tried) <= 64
    assert not proposed(conv(), 8, 0, tried, space=SPACE)


def test_gains_are_joined() -> None:
    """Two parameters gain, a third loses: the best of both is found within a handful of trials."""

    def ratio(decisions: Decisions) -> float:
        gain = 1.2 if decisions.get("0.order") == 1 else 1.0
        gain *= 1.3 if decisions.get("0.unroll") == 1 else 1.0
        return gain * (0.5 if decisions.get("0.packed") else 1.0)

    tried = searched(conv(), ratio, 16)
    assert max(each.ratio for each in tried) == pytest.approx(1.56)
    assert sum("0.packed" in each.decisions for each in tried) <= 1


def test_what_failed_is_not_tried_beside_others() -> None:
    tried = searched(conv(), lambda decisions: 0.0 if "0.tile" in decisions else 1.0, 40)
    alone = [each.decisions for each in tried if "0.tile" in each.decisions]
    assert alone
    assert all(len(decisions) == 1 for decisions in alone)


def test_steps_leave_what_gains_nothing_for_last() -> None:
    asked = {"0.tile": 3, "0.order": 2}
    ratios = {(): 1.0, (("0.tile", 1),): 1.5, (("0.tile", 2),): 0.95, (("0.order", 1),): 0.5}
    ahead = list(steps(ratios, lambda _decisions: asked))
    assert ahead == []  # another tile in place of the best was tried, another order costs half

    ratios = {(): 1.0, (("0.tile", 1),): 1.5}
    assert list(steps(ratios, lambda _decisions: asked)) == [(("0.order", 1), ("0.tile", 1)), (("0.tile", 2),)]


def test_an_elementwise_function_has_few_candidates() -> None:
    assert 1 < len(proposed(relu(), 64, space=SPACE)) < 10


def test_nothing_is_proposed_for_a_gpu() -> None:
    target = tvm.target.Target({"kind": "opencl", "host": {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}})
    assert not SPACE.propose(conv(), target, (), (), 8, 0)
