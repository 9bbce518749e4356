"""`doit tune` on a real model, killed at any moment: what was told is kept, and the next run goes on from there."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.store import Store
from pipeline.tuning.records import Outcome, Record, TrialRecord, decoded

from .workspaces import Place, finish

pytestmark = pytest.mark.slow

DODO = """\
from bench import zoo
from pipeline import DOIT_CONFIG, Model, Workspace  # noqa: F401


def squeezenet():
    return zoo.light("squeezenet")


workspace = Workspace(Model.onnx("squeezenet", squeezenet))
"""
TARGET = """\
target = "native"
order = ["tuned", "rules", "default"]
[tune]
batch = 8
seconds = 0.01
"""


@pytest.fixture
def squeezenet(tmp_path: Path) -> Place:
    place = Place(tmp_path / "workspace", tmp_path / "store", DODO, {"native": TARGET})
    place.build()
    return place


def records(place: Place) -> dict[str, list[Record]]:
    sets = Store(place.store).sets
    keys = [folder.name for folder in (place.store / "sets").glob("??/*")]
    return {key: [decoded(data) for _, data in sets.read(key)] for key in keys}


def tried(place: Place) -> int:
    """How many candidates have records; none has two times."""
    count = 0
    for found in records(place).values():
        trials = [each for each in found if isinstance(each, TrialRecord)]
        timed = Counter(each.candidate for each in trials if each.outcome is Outcome.TIMED)
        assert set(timed.values()) <= {1}
        count += len({each.candidate for each in trials})
    return count


def await_event(process: subprocess.Popen[str], kind: str) -> dict[str, Any]:
    for line in process.stdout or ():
        if line.startswith("{") and (event := json.loads(line))["event"] == kind:
            return dict(event)
    raise AssertionError("it ended before")


def test_twenty_kills_lose_nothing_and_time_nothing_twice(
    squeezenet: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(4)
    kept, story = tried(squeezenet), []
    for _ in range(20):
        process = squeezenet.start("tune", "--events", "-")
        begun = await_event(process, "begun")
        assert sum(each["trials"] for each in begun["operators"]) == kept
        told = 0
        until = time.monotonic() + chance.uniform(0, 15)
        if chance.random() < 0.7:
            batch = await_event(process, "batch")
            told = batch["timed"] + sum(batch["failed"].values())
            until = time.monotonic() + chance.uniform(0, 3)
        time.sleep(max(0.0, until - time.monotonic()))
        process.kill()
        rest = [json.loads(line) for line in (process.stdout or ()) if line.startswith("{") and line.endswith("}\n")]
        process.wait()
        for event in rest:
            if event["event"] == "batch":
                told += event["timed"] + sum(event["failed"].values())
        squeezenet.require_nobody_left()
        found = tried(squeezenet)
        assert found >= kept + told, "a batch that was told is lost"
        story.append(found - kept)
        kept = found

    process = squeezenet.start("tune", "--events", "-")
    assert sum(each["trials"] for each in await_event(process, "begun")["operators"]) == kept
    await_event(process, "batch")
    process.send_signal(signal.SIGINT)
    assert finish(process).code == 130
    assert tried(squeezenet) > kept
    squeezenet.build()
    squeezenet.require_nobody_left()
    with capsys.disabled():
        print(f"\ncandidates that each killed run left behind: {story}")
