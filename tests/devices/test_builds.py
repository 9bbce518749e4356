"""Builds and nights whose candidates are measured on devices: chosen and tuned there as on this machine."""

from __future__ import annotations

import json
import threading
import time

import models
import pytest
from conftest import WorkspaceFolder
from test_strategies import CRASH, DENSE, LOOP, RIGHT, WRONG
from tuning_runs import RELU, fill, implementations, records, tune

from pipeline.tuning.ledger import Ledger
from pipeline.tuning.records import Outcome, TrialRecord
from tests.devices.boards import Boards, free_port

DEVICE = """
[device]
tracker = "{tracker}"
key = "{key}"
parallel = {parallel}
wait = {wait}
"""


def device(tracker: str, key: str = "board", parallel: int = 2, wait: float = 90) -> str:
    return DEVICE.format(tracker=tracker, key=key, parallel=parallel, wait=wait)


def target(order: list[str], more: str) -> str:
    head = (
        f'target = "native"\norder = {json.dumps(order)}\nselect = "fastest"\n[measure]\nseconds = 0.01\npatience = 2\n'
    )
    return head + more


@pytest.fixture
def dense(workspace: WorkspaceFolder) -> WorkspaceFolder:
    workspace.onnx("dense.onnx", models.dense())
    workspace.dodo(DENSE)
    return workspace


def candidates(workspace: WorkspaceFolder) -> dict[str, dict[str, object]]:
    (operator,) = workspace.manifest("dense")["operators"]
    return {trial["strategy"]: trial for trial in operator["candidates"]}


def test_a_selection_on_devices_puts_aside_what_is_bad_and_times_the_others(
    boards: Boards, dense: WorkspaceFolder
) -> None:
    names = {"crash": CRASH, "loop": LOOP, "wrong": WRONG, "right": RIGHT}
    for name, source in names.items():
        dense.write(f"strategies/{name}.py", source.replace('"mine"', f'"{name}"'))
    dense.write("targets/native.toml", target([*names, "default"], device(boards.address)))
    done = dense.build().good()
    found = candidates(dense)
    assert "SIGABRT" in str(found["crash"]["refused"])
    assert "had not ended after 2 s" in str(found["loop"]["refused"])
    assert "another result than the default" in str(found["wrong"]["refused"])
    for name in ("right", "default"):
        assert found[name]["seconds"], done.err
    assert "not timed" not in json.dumps(dense.manifest("dense"))
    boards.await_free("board", 2)
    dense.build().good()  # the first asked the device what it is, and what changed meanwhile is looked at again
    assert dense.idle_build().idle


def test_what_is_known_of_a_device_is_kept_apart_from_what_is_known_of_this_machine(
    boards: Boards, dense: WorkspaceFolder
) -> None:
    dense.write("strategies/right.py", RIGHT.replace('"mine"', '"right"'))
    dense.write("targets/native.toml", target(["right", "default"], ""))
    dense.build().good()
    here = candidates(dense)
    dense.write("targets/native.toml", target(["right", "default"], device(boards.address)))
    dense.build().good()
    there = candidates(dense)
    assert there["default"]["seconds"] != here["default"]["seconds"], "it was timed again, there"
    dense.write("targets/native.toml", target(["right", "default"], device(boards.address, parallel=1, wait=80)))
    dense.build().good()
    assert candidates(dense) == there, "how a device is reached changes no result"


def test_without_a_tracker_a_build_says_so_at_once(dense: WorkspaceFolder) -> None:
    address = f"127.0.0.1:{free_port()}"
    dense.write("targets/native.toml", target(["rules", "default"], device(address)))
    done = dense.build()
    assert done.code != 0
    assert f"the RPC tracker {address} is not there" in done.err
    assert "Traceback" not in done.err


def test_an_operator_is_tuned_on_devices_while_one_is_killed_and_started_again(
    boards: Boards, workspace: WorkspaceFolder
) -> None:
    servers = [boards.start("tuned"), boards.start("tuned")]
    boards.await_free("tuned", 2)
    fill(workspace, "Relu")
    text = (workspace.folder / "targets/native.toml").read_text()
    text = text.replace("seconds = 0.01", "seconds = 0.4")  # long enough to be hit in the middle
    workspace.write("targets/native.toml", text + device(boards.address, "tuned"))
    workspace.build().good()

    def kill() -> None:
        """In the middle of the first session that is longer than to ask a device what it is."""
        begun = since = time.monotonic()
        while time.monotonic() < min(since + 1.0, begun + 60):
            time.sleep(0.02)
            since = since if boards.standing("tuned").busy else time.monotonic()
        for server in servers:
            boards.end(server)
        servers[:] = [boards.start("tuned")]

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        night = tune(workspace)
        night.done.good()
    finally:
        thread.join()
        for server in servers:
            boards.end(server)
    ((key, found),) = records(workspace).items()
    (asked,) = (json.loads(each.read_text()) for each in (workspace.cache / "locks" / "devices").glob("*.json"))
    manifest = workspace.manifest("net")
    (operator,) = manifest["operators"]
    assert key == Ledger.key_of(operator["workload"], manifest["target_spec"], f"rpc tuned: {asked['said']}")
    trials = [each for each in found if isinstance(each, TrialRecord)]
    assert {each.outcome for each in trials} == {Outcome.TIMED}, "no device's end is a candidate's fault"
    workspace.build().good()
    assert implementations(workspace) == {RELU: "tuned"}
    assert any("was lost" in line for line in night.done.err.splitlines()), night.done.err
