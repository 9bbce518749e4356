"""MetaSchedule's search as a call: new candidates each time, by a seed, guided by what was tried and learnt."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.compiler import prepack, search
from pipeline.compiler.search import PostOrderApply, Tried, traces
from pipeline.compiler.search.costmodel import CostModel
from pipeline.platforms import architecture
from tests.compiler.search.workloads import NATIVE, conv, digests, proposed, relu, reshape, tiny
from tests.compiler.strategies.workloads import FREE, W, X, Y, call


def test_every_candidate_is_new_and_made_again_from_its_decisions() -> None:
    func = conv()
    known: set[str] = set()
    tried: list[Tried] = []
    for seed in (1, 2, 3):
        found = proposed(func, 8, seed, tried, known, PostOrderApply())
        assert len(found) == 8
        assert len(set(digests(found))) == 8
        assert not known & set(digests(found))
        made = [PostOrderApply().make(func, NATIVE, each.decisions) for each in found]
        assert [prepack.layout_free(each) for each in made] == [{1}] * 8
        known |= set(digests(found))
        tried += [Tried(each.decisions, i / 7) for i, each in enumerate(found)]


def test_a_free_weight_is_laid_out_by_the_kernel() -> None:
    packed = [prepack.split(each.function)[1] for each in proposed(conv())]
    assert all([packing.param for packing in packings] == [1] for packings in packed)
    assert not any(prepack.split(each.function)[1] for each in proposed(conv(free=False)))


def test_candidates_compute_what_the_workload_does() -> None:
    found = proposed(FREE, 4)
    assert len(found) == 4
    for each in found:
        rest, packings = prepack.split(each.function)
        weight = call(packings[0].function, W, name="pack") if packings else W
        np.testing.assert_allclose(call(rest, X, weight), Y, rtol=1e-4, atol=1e-5)


def test_a_seed_gives_one_answer_on_one_thread_and_another_seed_another() -> None:
    first, again, other = (digests(proposed(conv(), 8, seed)) for seed in (1, 1, 2))
    assert first == again
    assert not set(first) & set(other)


def test_a_small_space_is_exhausted_at_last() -> None:
    known: set[str] = set()
    rounds = 0
    while found := proposed(tiny(), 16, rounds + 1, known=known):
        assert not known & set(digests(found))
        known |= set(digests(found))
        rounds += 1
        assert rounds < 20
    assert 1 < len(known) < 200


@pytest.mark.parametrize("func", [reshape(), relu()], ids=["reshape", "relu"])
def test_what_leaves_nothing_to_decide_is_not_searched(func: Any) -> None:
    begun = time.perf_counter()
    assert proposed(func, 32) == []
    assert time.perf_counter() - begun < 1


def choices(decisions: Any) -> dict[int, Any]:
    return {index: tuple(chosen) if isinstance(chosen, list) else chosen for index, chosen in decisions[1]}


def children(found: Sequence[search.Proposal], parents: Sequence[search.Proposal]) -> int:
    """How many of the candidates differ from one of the parents in one decision, or in none but post-processing."""

    def differ(one: search.Proposal, other: search.Proposal) -> int:
        theirs = choices(other.decisions)
        return sum(theirs.get(index) != chosen for index, chosen in choices(one.decisions).items())

    return sum(any(differ(parent, each) <= 1 for parent in parents) for each in found)


def test_the_best_of_what_was_tried_is_varied() -> None:
    parents = proposed(conv(), 12)
    known = digests(parents)
    fast, failed = ([Tried(each.decisions, ratio) for each in parents] for ratio in (9.0, 0.0))
    assert children(proposed(conv(), 16, 5, known=known), parents) == 0
    assert children(proposed(conv(), 16, 5, fast, known), parents) >= 3
    assert children(proposed(conv(), 16, 5, failed, known), parents) == 0


def test_what_cannot_be_replayed_any_more_is_no_parent() -> None:
    tried = [Tried(None, 3.0), Tried([[["Gone", [], [], []]], []], 2.0), Tried({"tile": 1}, 1.0)]
    assert len(proposed(conv(), 4, tried=tried)) == 4


@dataclass(frozen=True)
class Unrolls(CostModel):
    """A model to which nothing counts but that loops are unrolled as far as they go."""

    @property
    def is_blind(self) -> bool:
        return False

    def predict(self, context: Any, candidates: Sequence[Any]) -> npt.NDArray[np.float64]:
        return np.array([1.0 if unrolled(traces.plain(each.sch.trace)) else 1e-3 for each in candidates])


def unrolled(decisions: Any) -> bool:
    (index,) = [i for i, each in enumerate(decisions[0]) if each[0] == "SampleCategorical"]
    return dict(map(tuple, decisions[1]))[index] == 3


def test_the_search_goes_where_its_model_points() -> None:
    by_chance = [unrolled(each.decisions) for each in proposed(conv(), 24)]
    guided = [unrolled(each.decisions) for each in proposed(conv(), 24, space=PostOrderApply(1, Unrolls()))]
    assert sum(by_chance) < 14
    assert sum(guided) > 18
    assert all(guided[:16])  # the most promising first
    assert not all(guided)  # a few are taken at random, so that the model can be wrong


def test_the_spaces_name_themselves() -> None:
    space = search.by_name("post-order-apply")
    assert (space.name, space.version) == (PostOrderApply.name, PostOrderApply.version)
    assert isinstance(space, search.Guided)
    assert len({each.name for each in search.SPACES}) == len(search.SPACES)
    with pytest.raises(ValueError, match=r"no search space 'best': there are .*post-order-apply"):
        search.by_name("best")


# In a process of its own, as a worker is.
_FRESH = """
import sys, time
from pipeline.compiler import search
assert "tvm" not in sys.modules
from tests.compiler.search.workloads import conv, proposed
begun = time.perf_counter()
print(len(proposed(conv(), 16)))
print(time.perf_counter() - begun < 10)
print(sorted(name for name in sys.modules if name.startswith("tvm.s_tir.tensor_intrin")))
"""


@pytest.mark.skipif(architecture("") != "x86_64", reason="the intrinsics are those of x86")
def test_a_fresh_process_imports_the_targets_intrinsics_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FRESH],
        cwd=Path(__file__).parents[3],
        env={"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines() == ["16", "True", "['tvm.s_tir.tensor_intrin.x86']"], done.stderr
