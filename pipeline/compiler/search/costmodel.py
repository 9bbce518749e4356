"""A cost model: which of many candidates are worth building, learnt from those that were timed.

What MetaSchedule's XGBoost model computes, kept as bytes without pickle and trained in a second or so:

    features    one row for each store of the lowered function (MetaSchedule's PerStoreFeature)
    prediction  the sum, over a candidate's rows, of what boosted trees say of each
    label       how fast a candidate is against the fastest known one of its workload, 0 where it failed; its root

Samples of several workloads are kept, the newest, so that the next search begins with what others taught.
"""

from __future__ import annotations

import importlib.util
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
import xxhash
from tvm.ir.utils import derived_object
from tvm.s_tir import Schedule, meta_schedule
from tvm.s_tir.meta_schedule.cost_model import PyCostModel

from pipeline.compiler import intrinsics
from pipeline.compiler.search import traces
from pipeline.errors import last_line

SAMPLES = 1500  # kept in all: the newest
PER_WORKLOAD = 150  # of them of one workload

_MAGIC = b"tvmake cost model 1\n"
_LEAST = 16  # samples before predictions are worth anything
_ROUNDS = 100  # of boosting
_TREES = {"max_depth": 6, "eta": 0.1, "gamma": 0.001, "min_child_weight": 0, "tree_method": "hist", "max_bin": 64}
_SLOW = 0.3  # what a candidate counts that is infinitely slow, where the best counts as much more as 1
_FLOOR = 1e-3  # the least prediction: the search draws by it, and cannot draw from nothing but zeros

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Sample:
    """One candidate: the workload that it is of, its rows of features, and how many times as fast as the baseline."""

    workload: str
    rows: npt.NDArray[np.float16]
    ratio: float


@dataclass(frozen=True)
class CostModel:
    """What was learnt. Immutable: `learn` returns another.

    trees  the trained booster as XGBoost writes it; empty before there are samples enough, or without XGBoost
    """

    samples: tuple[_Sample, ...] = ()
    trees: bytes = b""

    @property
    def is_blind(self) -> bool:
        """Whether it predicts at random."""
        return not (self.trees and has_xgboost())

    def learn(
        self,
        workload: str,
        target: tvm.target.Target,
        timed: Sequence[tuple[tvm.tirx.PrimFunc, float]],
        threads: int = 1,
    ) -> CostModel:
        """The model with these candidates of a workload (named by its digest), and their ratios, learnt as well."""
        found = _features(target, [func for func, _ in timed], threads)
        new = [
            _Sample(workload, rows, max(0.0, float(ratio)))
            for rows, (_, ratio) in zip(found, timed, strict=True)
            if len(rows)
        ]
        samples = _newest([*self.samples, *new])
        return CostModel(samples, _trained(samples) if new or not self.trees else self.trees)

    def predict(self, context: meta_schedule.TuneContext, candidates: Sequence[Any]) -> npt.NDArray[np.float64]:
        """A score for each measure candidate of MetaSchedule's: the higher, the faster."""
        import xgboost

        rows = [each.numpy().astype(np.float32) for each in _extractor().extract_from(context, list(candidates))]
        booster = xgboost.Booster({"nthread": 1}, model_file=bytearray(self.trees))
        width = booster.num_features()
        lengths = [len(each) if each.ndim == 2 and each.shape[1] == width else 0 for each in rows]
        if not any(lengths):
            return np.full(len(rows), _FLOOR)
        stacked = np.concatenate([each for each, length in zip(rows, lengths, strict=True) if length])
        of = np.repeat(np.arange(len(rows)), lengths)
        roots = np.bincount(of, booster.inplace_predict(stacked), len(rows))
        return np.maximum(roots, 0.0) ** 2 + _FLOOR

    def as_metaschedules(self, seed: int) -> Any:
        """The model as MetaSchedule's search asks it; a blind one answers at random."""
        random = np.random.default_rng(seed)

        def scores(context: Any, candidates: Sequence[Any]) -> npt.NDArray[np.float64]:
            return random.uniform(_FLOOR, 1, len(candidates)) if self.is_blind else self.predict(context, candidates)

        return _Scores(scores)

    def to_bytes(self) -> bytes:
        """Same samples, same bytes."""
        names = sorted({sample.workload for sample in self.samples})
        arrays: dict[str, Any] = {
            "names": np.array(names, dtype="U64"),
            "workloads": np.array([names.index(sample.workload) for sample in self.samples], dtype=np.int32),
            "ratios": np.array([sample.ratio for sample in self.samples], dtype=np.float64),
            "lengths": np.array([len(sample.rows) for sample in self.samples], dtype=np.int32),
            "trees": np.frombuffer(self.trees, dtype=np.uint8),
        }
        rows = [sample.rows for sample in self.samples]
        # Most rows are those of another candidate as well: what one did not change is the same.
        unique, where = np.unique(np.concatenate(rows), axis=0, return_inverse=True) if rows else (_no_rows(), _none())
        file = io.BytesIO()
        np.savez(file, rows=unique, where=where.reshape(-1).astype(np.int32), **arrays)
        return _MAGIC + xxhash.xxh3_128_digest(file.getvalue()) + file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> CostModel:
        """What `to_bytes` wrote. Raises ValueError for anything else: begin with an empty model then."""
        body = data[len(_MAGIC) + 16 :]
        if not data.startswith(_MAGIC) or data[len(_MAGIC) : len(_MAGIC) + 16] != xxhash.xxh3_128_digest(body):
            raise ValueError("a cost model cannot be read: it is torn, or not one of this version")
        try:
            with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
                rows = arrays["rows"][arrays["where"]]
                each = np.split(rows, np.cumsum(arrays["lengths"])[:-1]) if len(rows) else []
                names = [str(arrays["names"][i]) for i in arrays["workloads"]]
                ratios = [float(ratio) for ratio in arrays["ratios"]]
                samples = tuple(_Sample(*parts) for parts in zip(names, each, ratios, strict=True))
                trees = arrays["trees"].tobytes()
        except (KeyError, IndexError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"a cost model cannot be read: {last_line(error)}") from error
        return cls(samples, trees if _are_readable(trees) else _trained(samples))


def has_xgboost() -> bool:
    """Whether there is anything to learn with."""
    return importlib.util.find_spec("xgboost") is not None


def _are_readable(trees: bytes) -> bool:
    """Whether this version of XGBoost reads what another may have written."""
    if not trees or not has_xgboost():
        return True
    import xgboost

    try:
        xgboost.Booster(model_file=bytearray(trees))
    except xgboost.core.XGBoostError:
        return False
    return True


@derived_object
class _Scores(PyCostModel):
    """A function from candidates to scores, as MetaSchedule wants it."""

    def __init__(self, scores: Any) -> None:
        super().__init__()
        self._scores = scores

    def load(self, path: str) -> None:
        raise NotImplementedError

    def save(self, path: str) -> None:
        raise NotImplementedError

    def update(self, context: Any, candidates: Any, results: Any) -> None:
        """Nothing is learnt while a search runs."""

    def predict(self, context: Any, candidates: Any) -> npt.NDArray[np.float64]:
        return self._scores(context, candidates)


def _no_rows() -> npt.NDArray[np.float16]:
    return np.zeros((0, 1), np.float16)


def _none() -> npt.NDArray[np.int64]:
    return np.zeros(0, np.int64)


def _extractor() -> Any:
    return meta_schedule.feature_extractor.PerStoreFeature()


def _features(
    target: tvm.target.Target, functions: Sequence[tvm.tirx.PrimFunc], threads: int
) -> list[npt.NDArray[np.float16]]:
    """The rows of each function; none of one that cannot be lowered. They are logarithms: half precision is enough."""
    with intrinsics.standing_in():
        context = meta_schedule.TuneContext(target=target, num_threads=threads)
    schedules = [Schedule(traces.module_of(func)) for func in functions]
    candidates = [meta_schedule.MeasureCandidate(schedule, []) for schedule in schedules]
    try:
        return [_halved(rows) for rows in _extractor().extract_from(context, candidates)]
    except Exception:  # one that TVM's lowering refuses, which raises anything: it is found and left out
        return [_rows_of(context, candidate) for candidate in candidates]


def _rows_of(context: Any, candidate: Any) -> npt.NDArray[np.float16]:
    try:
        (rows,) = _extractor().extract_from(context, [candidate])
    except Exception:
        return _no_rows()
    return _halved(rows)


def _halved(rows: Any) -> npt.NDArray[np.float16]:
    return rows.numpy().astype(np.float16)


def _newest(samples: Sequence[_Sample]) -> tuple[_Sample, ...]:
    """The newest samples, oldest first: within the limits, and each once."""
    kept: list[_Sample] = []
    seen: set[tuple[str, float, bytes]] = set()
    of: Counter[str] = Counter()
    for sample in reversed(samples):
        name = sample.workload, sample.ratio, xxhash.xxh3_128_digest(sample.rows.tobytes())
        if name in seen or of[sample.workload] == PER_WORKLOAD:
            continue
        seen.add(name)
        of[sample.workload] += 1
        kept.append(sample)
        if len(kept) == SAMPLES:
            break
    return tuple(reversed(kept))


def _trained(samples: Sequence[_Sample]) -> bytes:
    """Boosted trees whose sum over a sample's rows is the root of its ratio against the best of its workload.

    The gradient of a sample's squared error is that of each of its rows. A sample counts by its label: what is slow
    need only be known as slow. Of the ratio itself little is learnt, as most candidates are far slower than the best.
    """
    best: dict[str, float] = {}
    for sample in samples:
        best[sample.workload] = max(best.get(sample.workload, 0.0), sample.ratio)
    if len(samples) < _LEAST or not any(best.values()) or not has_xgboost():
        return b""
    import xgboost

    labels = np.sqrt([sample.ratio / (best[sample.workload] or 1.0) for sample in samples])
    lengths = [len(sample.rows) for sample in samples]
    of = np.repeat(np.arange(len(samples)), lengths)
    weights = (_SLOW + labels)[of]

    def objective(predicted: Any, _matrix: Any) -> tuple[Any, Any]:
        off = np.bincount(of, predicted, len(samples)) - labels
        return off[of] * weights, weights

    matrix = xgboost.DMatrix(np.concatenate([sample.rows for sample in samples]).astype(np.float32), nthread=1)
    settings = {**_TREES, "seed": 0, "nthread": 1, "base_score": 0.0}
    booster = xgboost.train(settings, matrix, num_boost_round=_ROUNDS, obj=objective)
    return bytes(booster.save_raw("ubj"))
