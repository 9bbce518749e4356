"""`doit why` tells which tuning records, and which lock, an operator runs on otherwise than before."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from typing import Any

import models
import pytest
from conftest import WorkspaceFolder
from tuning_runs import lanes

from pipeline.hashing import Digest
from pipeline.store import Store
from pipeline.tuning.ledger import Ledger
from pipeline.tuning.records import (
    NONE,
    TOOLS,
    Certificate,
    Outcome,
    PreferredRecord,
    RetestRecord,
    TrialRecord,
    WithdrawnRecord,
    encoded,
)
from tests.why.bench import Bench


def found(bench: Bench, tile: list[int], seconds: float, at: float) -> list[str]:
    """Has the operator's records hold a winner that really can be made again. Returns the digests of its records."""
    from pipeline.compiler import ir
    from pipeline.compiler.records import digest_of
    from pipeline.sources import object_of

    (operator,) = bench.builds()[-1].state.operators.values()
    store = Store(bench.place.cache)
    space: Any = object_of(lanes().encode(), "spaces/lanes.py", "space")
    function = store.get(operator.workload)
    assert function is not None
    candidate = digest_of(space.make(ir.load(function), None, tile))
    tools = {name: bench.tools[name] for name in TOOLS}
    said = {"baseline": 211e-6, "noise": 0.0, "at": at, "tools": tools}
    certificate = Certificate("default", (0, 1), 1e-3, 1e-6)
    records = [
        TrialRecord(
            candidate=candidate,
            space="lanes",
            space_version=1,
            decisions=tile,
            outcome=Outcome.TIMED,
            seconds=seconds,
            certificate=certificate,
            **said,
        ),
        RetestRecord(candidate=candidate, seconds=seconds, certificate=certificate, **said),
    ]
    Ledger.here(store, 0.03).add(bench.key, {"operator": operator.name}, records)
    return [Digest.of(encoded(record)).hash for record in records]


@pytest.fixture
def tuned(bench: Bench) -> Iterator[Bench]:
    """A workspace whose operator may be tuned, built without a record."""
    bench.place.write("spaces/lanes.py", lanes())
    bench.target(["tuned", "default"])
    bench.build()
    yield bench
    shutil.rmtree(Store(bench.place.cache).root / "sets", ignore_errors=True)


def test_a_record_won(tuned: Bench) -> None:
    found(tuned, [4, 1], 187e-6, time.time())
    tuned.build()
    assert "a tuning record won: 211 µs → 187 µs" in tuned.last()
    found(tuned, [2, 1], 150e-6, time.time())
    tuned.build()
    said = tuned.why()
    assert "another tuning record won: 187 µs → 150 µs" in said
    assert "behind the best" not in said
    history = said.partition("history")[2]
    assert history.count("found by tuning") == 2
    assert "1.41 times as fast as the baseline" in history
    assert "2 candidates tried" in said


def test_a_record_invalidated(tuned: Bench) -> None:
    withdrawn = found(tuned, [4, 1], 187e-6, time.time())
    tuned.build()
    ledger = Ledger.here(Store(tuned.place.cache), 0.03)
    gone = WithdrawnRecord(records=tuple(withdrawn), reason="the fan was broken", at=time.time(), by="ada")
    ledger.add(tuned.key, {}, [gone])
    tuned.build()
    said = tuned.last()
    assert "the record that it ran on was invalidated on " in said
    assert " by ada: the fan was broken" in said
    assert "nothing tuned: invalidated by ada: the fan was broken" in tuned.why()
    assert "runs on     default" in tuned.why()


def test_a_rollback(tuned: Bench) -> None:
    found(tuned, [4, 1], 187e-6, time.time())
    tuned.build()
    ledger = Ledger.here(Store(tuned.place.cache), 0.03)
    ledger.add(tuned.key, {}, [PreferredRecord(candidate=NONE, reason="too hot", at=time.time(), by="ben")])
    tuned.build()
    assert "it was rolled back to no tuned candidate on " in tuned.last()
    assert "rolled back by ben: too hot" in tuned.why()


def test_measurements_were_invalidated(bench: Bench) -> None:
    bench.target(["rules", "default"], select="fastest")
    bench.build()
    ledger = Ledger.here(Store(bench.place.cache), 0.03)
    gone = WithdrawnRecord(records=(), measured=True, reason="somebody compiled Chromium", at=time.time(), by="ada")
    ledger.add(bench.key, {}, [gone])
    bench.build()
    said = bench.last()
    assert "what had been measured of it was invalidated on " in said
    assert " by ada: somebody compiled Chromium" in said
    assert "measure all: run here" in said


def test_a_lock(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the lock decides is another's to test: here the journal says which it was."""
    from pipeline import notes

    monkeypatch.setattr(notes, "LOCK", "the.lock")
    bench.build()
    (label,) = bench.builds()[-1].state.operators
    bench.place.write("the.lock", f'"{label}" = "rules"\n"other" = "default"\n')
    bench.target(["rules", "default"])
    bench.build()
    said = bench.last()
    assert 'tuning.lock came; of this operator it says: nothing → "rules"' in said
    bench.place.write("the.lock", f'"{label}" = "rules"\n"other" = "rules"\n')
    bench.build()
    assert "tuning.lock changed" in bench.why("net")
    assert "tuning.lock" not in bench.last().partition("before")[0]


def test_the_lock_changed_and_with_it_what_an_operator_runs_on(workspace: WorkspaceFolder) -> None:
    def target(*order: str) -> None:
        more = "check.enabled = false\nmeasure.profile = false\n"
        workspace.write("targets/native.toml", f'target = "native"\norder = {json.dumps(order)}\n{more}')

    workspace.onnx("net.onnx", models.dense())
    workspace.dodo('Model.onnx("net", "net.onnx"),')
    locks = []
    for strategy in ("rules", "default"):
        target(strategy)
        workspace.doit("lock").good()
        locks.append((workspace.folder / "tuning.lock").read_text())
    target("rules", "default")
    workspace.build().good()
    assert "runs on     default: tuning.lock" in workspace.doit("why", "fused_*").good().out
    workspace.write("tuning.lock", locks[0])
    workspace.build().good()
    said = workspace.doit("why", "fused_*", forbid_tvm=True).good().out
    assert "runs on     rules: tuning.lock" in said
    assert "tuning.lock changed; of this operator it says: " in said
    assert 'use = "default"' in said.partition(" → ")[0]
    assert 'use = "rules"' in said.partition(" → ")[2]
