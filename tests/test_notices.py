"""What a stage tells while it runs reaches whoever asked for it, and only that."""

from __future__ import annotations

from pathlib import Path

import pytest
import stage_doubles
from stage_doubles import Double, double

from pipeline import notices
from pipeline.memoizer import Action
from pipeline.store import Store
from pipeline.workers import Workers

TESTS = Path(__file__).resolve().parent


def test_what_is_soon_over_is_not_told_and_what_takes_long_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    now = [100.0]
    monkeypatch.setattr(notices.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(notices, "_listener", told.append)
    wait = notices.Wait()
    for second in (0, 1, 2, 3, 61, 63, 64):
        now[0] = 100.0 + second
        wait.tell(f"after {second} s")
    assert told == ["after 2 s", "after 63 s"]


def test_a_worker_hands_on_what_its_stage_tells_and_then_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    told: list[str] = []
    workers = Workers(Store(tmp_path / "store").root, 1, say=told.append)
    try:
        for _ in range(2):
            stage: Double = double(stage_doubles.wait_aloud)
            entry = workers.perform(Action(stage, "cpu:add", timeout=30), "ab" * 32, {"stage": stage.name})
            assert set(entry.outputs) == {"done"}
    finally:
        workers.stop()
    assert told == ["cpu:add: waiting for rain"] * 2
