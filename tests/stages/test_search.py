"""The stages of a search: what they take and give as blobs, and that what they give can be compiled as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from pipeline import stages
from pipeline.compiler import ir, prepack, records, search, targets
from pipeline.compiler.search.costmodel import CostModel
from pipeline.hashing import Digest
from pipeline.stages import Inputs, apply, learn
from pipeline.stages import search as stage
from pipeline.store import Store
from pipeline.tuning.records import Outcome, TrialRecord, encoded
from pipeline.types import Packed
from tests.compiler.search.workloads import conv, relu, tiny
from tests.compiler.strategies.workloads import FREE, W, X, Y, call

TARGET = targets.resolve("native")


def inputs(folder: Path, **blobs: bytes) -> Inputs:
    store = Store(folder)
    return Inputs(store, {name: store.put(data) for name, data in blobs.items()})


def options(count: int = 6, seed: int = 1, **more: object) -> dict[str, object]:
    space = search.by_name("post-order-apply")
    named = {"space": space.name, "space version": space.version}
    return {**named, "count": count, "seed": seed, "target": TARGET, "threads": 1, **more}


def searched(
    folder: Path, func: Any, tried: object = (), known: object = (), model: bytes | None = None, **more: Any
) -> dict[str, Any]:
    blobs = {"function": ir.canonical(func), "tried": json.dumps(tried).encode(), "known": json.dumps(known).encode()}
    if model is not None:
        blobs["model"] = model
    return dict(stage.run(inputs(folder, **blobs), options(**more)))


def test_candidates_come_with_all_that_is_compiled_of_them(tmp_path: Path) -> None:
    outputs = searched(tmp_path, FREE)
    proposed = json.loads(outputs.pop("proposed"))
    assert len(proposed) == len({each["candidate"] for each in proposed}) == 6
    for i, each in enumerate(proposed):
        made = search.by_name("post-order-apply").make(FREE, targets.load(TARGET), json.loads(outputs.pop(f"d{i}")))
        assert records.digest_of(made) == each["candidate"]
        rest = ir.load(outputs.pop(f"f{i}"))
        assert ir.canonical(rest) == ir.canonical(prepack.split(made)[0])
        packed = msgspec.convert(each["packed"], tuple[Packed, ...])
        assert [each.param for each in packed] == [1]
        packing = outputs.pop(f"p{i}.0")
        assert packed[0].function == Digest.of(packing)
        weight = np.zeros(packed[0].spec.shape, packed[0].spec.dtype)
        assert weight.size == W.size
        np.testing.assert_allclose(call(rest, X, call(ir.load(packing), W, name="pack")), Y, rtol=1e-4, atol=1e-5)
    assert not outputs  # nothing else


def test_what_is_known_is_not_proposed_again(tmp_path: Path) -> None:
    first = searched(tmp_path, conv())
    known = [each["candidate"] for each in json.loads(first["proposed"])]
    tried = [[json.loads(first[f"d{i}"]), 1.0 + i] for i in range(len(known))]
    second = searched(tmp_path, conv(), tried, known)
    assert second["proposed"] != first["proposed"]
    assert not {each["candidate"] for each in json.loads(second["proposed"])} & set(known)
    assert searched(tmp_path, conv()) == first


def test_a_space_with_nothing_left_says_why(tmp_path: Path) -> None:
    assert searched(tmp_path, relu()) == {
        "proposed": b"[]",
        "reason": b"post-order-apply has nothing to decide in this operator",
    }
    known: list[str] = []
    tried: list[Any] = []
    while (outputs := searched(tmp_path, tiny(), tried, known, seed=len(known) + 1, count=24))["proposed"] != b"[]":
        proposed = json.loads(outputs["proposed"])
        known += [each["candidate"] for each in proposed]
        tried += [[json.loads(outputs[f"d{i}"]), 1.0] for i in range(len(proposed))]
    assert outputs["reason"].decode() == f"post-order-apply has nothing new after {len(tried)} candidates"


def results(outputs: dict[str, Any]) -> list[Any]:
    """Made-up ratios: the odd ones failed."""
    return [[json.loads(outputs[f"d{i}"]), 0.0 if i % 2 else 1.0 + i] for i in range(len(outputs) // 3)]


def learnt(folder: Path, listed: object, model: bytes | None = None) -> bytes:
    blobs = {"function": ir.canonical(conv()), "results": json.dumps(listed).encode()}
    if model is not None:
        blobs["model"] = model
    given = {"space": "post-order-apply", "target": TARGET}
    (made,) = learn.run(inputs(folder, **blobs), given).values()
    return bytes(made)


def test_a_model_is_learnt_batch_by_batch_and_guides_the_search(tmp_path: Path) -> None:
    pytest.importorskip("xgboost")
    listed = results(searched(tmp_path, conv(), count=24))
    first = learnt(tmp_path, listed[:12])
    assert CostModel.from_bytes(first).is_blind  # too few to tell
    both = learnt(tmp_path, listed[12:], first)
    model = CostModel.from_bytes(both)
    assert not model.is_blind
    assert [sample.ratio for sample in model.samples] == [ratio for _, ratio in listed]
    assert searched(tmp_path, conv(), model=both) == searched(tmp_path, conv(), model=both)
    assert searched(tmp_path, conv(), model=both)["proposed"] != searched(tmp_path, conv())["proposed"]


def test_a_model_that_cannot_be_read_is_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    garbage = b"\x00garbage"
    outputs = searched(tmp_path, conv(), model=garbage)
    assert len(json.loads(outputs["proposed"])) == 6
    assert "begun with an empty one: a cost model cannot be read" in caplog.text
    assert learnt(tmp_path, results(outputs), garbage) == learnt(tmp_path, results(outputs))


def test_what_cannot_be_made_again_teaches_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listed = results(searched(tmp_path, conv()))
    assert learnt(tmp_path, [[None, 3.0], *listed]) == learnt(tmp_path, listed)
    assert "not learnt: not a trace" in caplog.text


def trial(decisions: Any, candidate: str, space: str = "post-order-apply") -> bytes:
    return encoded(
        TrialRecord(candidate=candidate, space=space, space_version=1, decisions=decisions, outcome=Outcome.TIMED)
    )


def test_a_winner_is_applied_as_it_was_proposed(tmp_path: Path) -> None:
    """What is built of a record is, to the byte, what was measured."""
    outputs = searched(tmp_path, conv(), count=12)
    proposed = json.loads(outputs["proposed"])
    named = {f"winner{i}": trial(json.loads(outputs[f"d{i}"]), proposed[i]["candidate"]) for i in range(12)}
    given = inputs(tmp_path, function=ir.canonical(conv()), **named)
    applied = apply.run(given, {"strategy": "tuned", "version": 1, "target": TARGET})
    assert applied["function"] == outputs["f0"]
    assert applied["p0"] == outputs["p0.0"]
    assert json.loads(applied["packed"]) == proposed[0]["packed"]
    # The best first, by number: the tenth is not the second.
    spoilt = {**named, **{f"winner{i}": trial(None, "0" * 64) for i in range(2)}}
    applied = apply.run(
        inputs(tmp_path, function=ir.canonical(conv()), **spoilt), {"strategy": "tuned", "target": TARGET}
    )
    assert applied["function"] == outputs["f2"]


def test_the_stages_are_known() -> None:
    assert {stages.SEARCH, stages.LEARN} <= set(stages.STAGES)
    assert stages.SEARCH.load() is stage.run
    assert stages.LEARN.load() is learn.run
