"""What is stale from end to end: `doit status` tells of it, `doit tune` tunes it again, and then it has an end."""

from __future__ import annotations

import json
from typing import Any

from conftest import WorkspaceFolder
from tuning_runs import MANY, fill, idle, lanes, target, tune


def states(workspace: WorkspaceFolder) -> list[tuple[str, str]]:
    found: Any = json.loads(workspace.doit("status", "--json", forbid_tvm=True).good().out)
    return [(row["state"], row["next"].partition(" '")[0]) for model in found for row in model["operators"]]


def test_from_never_tuned_to_fresh_and_stale_again(workspace: WorkspaceFolder) -> None:
    fill(workspace, "Relu", space=lanes(MANY[:17]))  # one more than two patiences
    workspace.edit("batch = 4", "batch = 8\npatience = 8", "targets/native.toml")
    workspace.build().good()
    assert states(workspace) == [("never tuned", "doit tune")]
    first = tune(workspace, "--trials", "8")
    first.done.good()
    assert first.trials.total() == 8
    assert states(workspace) == [("not built in", "doit build net")]
    workspace.build().good()
    assert states(workspace) == [("fresh", "")]
    idle(workspace, "--trials", "8")

    # Everything is older than that.
    workspace.write("targets/native.toml", f"{target('lanes')}[stale]\ndays = 1e-9\n")
    workspace.edit("batch = 4", "batch = 8\npatience = 8", "targets/native.toml")
    workspace.build().good()
    assert states(workspace) == [("stale", "doit tune")]
    assert "1 of 1 operator to tune" in workspace.doit("tune", "--plan", "--trials", "8", forbid_tvm=True).good().out
    again = tune(workspace, "--trials", "8")
    again.done.good()
    assert again.trials.total() == 8, "one patience more"
    while tune(workspace, "--trials", "8").trials.total():
        pass
    idle(workspace, "--trials", "8")
    assert states(workspace) == [("stale", "doit invalidate")], "nothing new can be proposed"
