"""The cost model: it ranks what it has not seen, keeps itself as plain bytes, and is content without XGBoost."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi

from pipeline.compiler import intrinsics
from pipeline.compiler.search import costmodel, traces
from pipeline.compiler.search.costmodel import CostModel
from tests.compiler.search.workloads import NATIVE, conv, proposed

pytest.importorskip("xgboost")
Timed = list[tuple[tvm.tirx.PrimFunc, float]]


def made_up(func: tvm.tirx.PrimFunc) -> float:
    """Stands for how fast a candidate is: what decides it is in the features, though in none of them alone."""
    longest: Counter[Any] = Counter()

    def visit(loop: tvm.tirx.For) -> None:
        longest[loop.kind] = max(longest[loop.kind], int(loop.extent))

    tvm_ffi.structural_walk(func.body, (tvm.tirx.For, visit), order="post")
    return longest[tvm.tirx.ForKind.VECTORIZED] * (1 + min(longest[tvm.tirx.ForKind.PARALLEL], 8))


@pytest.fixture(scope="module")
def timed() -> Timed:
    found = proposed(conv(), 96)
    return [(each.function, made_up(each.function) + i * 1e-6) for i, each in enumerate(found)]


@pytest.fixture(scope="module")
def learnt(timed: Timed) -> CostModel:
    return CostModel().learn("conv", NATIVE, timed[:64])


def scores(model: CostModel, timed: Timed) -> Any:
    """What a model says of functions, asked as MetaSchedule asks it."""
    from tvm.s_tir import Schedule, meta_schedule

    with intrinsics.standing_in():
        context = meta_schedule.TuneContext(target=NATIVE, num_threads=1)
    candidates = [meta_schedule.MeasureCandidate(Schedule(traces.module_of(func)), []) for func, _ in timed]
    return meta_schedule.cost_model.CostModel.predict(model.as_metaschedules(3), context, candidates)


def rank_correlation(one: Any, other: Any) -> float:
    ranks = [np.argsort(np.argsort(each)) for each in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_it_ranks_candidates_that_it_has_not_seen(timed: Timed, learnt: CostModel) -> None:
    unseen = timed[64:]
    assert len({round(ratio) for _, ratio in unseen}) > 4
    assert rank_correlation(scores(learnt, unseen), [ratio for _, ratio in unseen]) > 0.6
    assert abs(rank_correlation(scores(CostModel(), unseen), [ratio for _, ratio in unseen])) < 0.5


def test_what_failed_is_expected_to_be_slow(timed: Timed) -> None:
    failing = [(func, 0.0 if i % 2 else 5.0) for i, (func, _) in enumerate(timed)]
    said = scores(CostModel().learn("conv", NATIVE, failing), failing)
    assert np.mean(said[1::2]) < np.mean(said[::2]) / 2
    assert np.all(said > 0)  # the search draws by it


def test_ratios_of_several_workloads_are_compared_within_each(timed: Timed, learnt: CostModel) -> None:
    """An operator whose baseline is slow does not make all others look slow."""
    both = learnt.learn("other", NATIVE, [(func, 1000 * ratio) for func, ratio in timed[64:]])
    assert rank_correlation(scores(both, timed[:64]), [ratio for _, ratio in timed[:64]]) > 0.8


def test_bytes_come_back_as_they_were(timed: Timed, learnt: CostModel) -> None:
    data = learnt.to_bytes()
    again = CostModel.from_bytes(data)
    assert again.to_bytes() == data
    assert np.array_equal(scores(again, timed[:8]), scores(learnt, timed[:8]))
    # It goes on from there.
    assert len(again.learn("conv", NATIVE, timed[64:]).samples) == len(learnt.samples) + len(timed[64:])
    assert CostModel().learn("conv", NATIVE, timed[:64]).to_bytes() == data
    assert CostModel.from_bytes(CostModel().to_bytes()) == CostModel()
    assert CostModel().is_blind
    assert len(data) < 400_000


def test_no_byte_of_it_is_a_pickle(learnt: CostModel) -> None:
    body = learnt.to_bytes().partition(b"PK")
    with np.load(io.BytesIO(body[1] + body[2]), allow_pickle=False) as arrays:
        assert all(arrays[name].dtype.kind != "O" for name in arrays.files)


@pytest.mark.parametrize("damage", ["empty", "garbage", "torn", "flipped", "alien", "pickled"])
def test_what_is_no_cost_model_is_refused(learnt: CostModel, damage: str) -> None:
    data = learnt.to_bytes()
    pickled = io.BytesIO()
    np.savez(pickled, rows=np.array([{}], dtype=object))
    damaged = {
        "empty": b"",
        "garbage": b"\x80\x04K\x01.",
        "torn": data[:-100],
        "flipped": data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
        "alien": data.replace(b"model 1", b"model 2", 1),
        "pickled": costmodel._MAGIC + costmodel.xxhash.xxh3_128_digest(pickled.getvalue()) + pickled.getvalue(),
    }[damage]
    with pytest.raises(ValueError, match="cost model cannot be read"):
        CostModel.from_bytes(damaged)


def test_trees_of_another_xgboost_are_grown_anew(learnt: CostModel) -> None:
    alien = CostModel(learnt.samples, b"{" + learnt.trees[5:])
    assert CostModel.from_bytes(alien.to_bytes()).to_bytes() == learnt.to_bytes()


def test_the_newest_samples_are_kept(timed: Timed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costmodel, "PER_WORKLOAD", 20)
    monkeypatch.setattr(costmodel, "SAMPLES", 50)
    model = CostModel()
    for i in range(3):
        model = model.learn(f"w{i}", NATIVE, timed[24 * i : 24 * i + 24])
    assert Counter(sample.workload for sample in model.samples) == {"w0": 10, "w1": 20, "w2": 20}
    ratios = [sample.ratio for sample in model.samples if sample.workload == "w2"]
    assert ratios == [ratio for _, ratio in timed[52:72]]


def test_what_is_learnt_twice_counts_once(timed: Timed, learnt: CostModel) -> None:
    assert learnt.learn("conv", NATIVE, timed[:64]).to_bytes() == learnt.to_bytes()
    assert len(learnt.learn("other", NATIVE, timed[:64]).samples) == 2 * len(learnt.samples)


def test_few_samples_teach_nothing_yet(timed: Timed) -> None:
    assert CostModel().learn("conv", NATIVE, timed[:4]).is_blind
    assert CostModel().learn("conv", NATIVE, [(func, 0.0) for func, _ in timed[:32]]).is_blind


def test_without_xgboost_it_predicts_at_random_and_says_so(
    timed: Timed, learnt: CostModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costmodel, "has_xgboost", lambda: False)
    blind = CostModel().learn("conv", NATIVE, timed)
    assert blind.is_blind
    assert learnt.is_blind  # what was learnt elsewhere
    assert len(set(scores(blind, timed[:8]))) == 8
    # The samples are kept: they are learnt from where XGBoost is.
    kept = CostModel.from_bytes(blind.to_bytes())
    monkeypatch.undo()
    assert not kept.learn("conv", NATIVE, []).is_blind
