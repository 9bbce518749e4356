"""`doit invalidate` and `doit rollback`: exactly what is meant counts no longer, everywhere, and can be told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from conftest import Done, WorkspaceFolder
from tuning_runs import FEW, fill, implementations, lanes, plain, records, right, standings, tune

from pipeline.store import Store
from pipeline.tuning.records import PreferredRecord, RetestRecord, TrialRecord, WithdrawnRecord, encoded
from tests.lock.machines import copied

ACTIVATIONS = ("Relu", "Sigmoid", "Tanh")  # an operator each


@pytest.fixture(scope="module")
def tuned_once(new_workspace: Callable[[], WorkspaceFolder]) -> WorkspaceFolder:
    """Three operators, each tuned and built with the best that was found."""
    return _tuned(new_workspace())


def _tuned(workspace: WorkspaceFolder, **environment: str) -> WorkspaceFolder:
    fill(workspace, *ACTIVATIONS)
    workspace.build(**environment).good()
    tune(workspace, **environment).done.good()
    workspace.build(**environment).good()
    assert set(implementations(workspace).values()) == {"tuned"}
    return workspace


@pytest.fixture
def tuned(tuned_once: WorkspaceFolder, new_workspace: Callable[[], WorkspaceFolder]) -> WorkspaceFolder:
    """The same in a copy of its own, with a copy of the store."""
    workspace = copied(tuned_once, new_workspace()).workspace
    workspace.build().good()
    return workspace


def operator(workspace: WorkspaceFolder, part: str) -> str:
    """The label of the operator whose name has this in it."""
    (found,) = [each["name"] for each in workspace.manifest("net")["operators"] if part in each["name"]]
    return str(found)


def invalidate(workspace: WorkspaceFolder, *arguments: str, **environment: str) -> Done:
    return workspace.doit("invalidate", *arguments, forbid_tvm=True, **environment)


def test_one_operator_is_stale_is_tuned_and_is_rebuilt_and_no_other(tuned: WorkspaceFolder) -> None:
    label = operator(tuned, "sigmoid")
    others = records(tuned)
    shown = invalidate(tuned, label).good()
    assert label in shown.out
    assert "1 of 3 operators" in shown.out
    assert "--yes" in shown.out
    assert records(tuned) == others, "it was only shown"
    tuned.idle_build()

    invalidate(tuned, label, "--yes", "--reason", "the fan was broken").good()
    (withdrawn,) = [each for found in records(tuned).values() for each in found if isinstance(each, WithdrawnRecord)]
    assert withdrawn.reason == "the fan was broken"
    assert withdrawn.by
    done = tuned.build().good()
    assert {name: how for name, how in implementations(tuned).items() if how != "tuned"} == {
        label.rpartition("-")[0]: "default"
    }
    assert done.ran["extracted"] == 0
    assert done.compiled == 0, "what it ran on before it was tuned is in the store"

    night = tune(tuned)
    assert dict(night.trials) == {label.rpartition("-")[0]: len(FEW)}, "it alone is tuned, and anew"
    tuned.build().good()
    assert set(implementations(tuned).values()) == {"tuned"}


def test_it_holds_for_who_shares_the_store_and_does_not_come_back(
    new_workspace: Callable[[], WorkspaceFolder], tmp_path: Path
) -> None:
    remote = {"TVMAKE_REMOTE": (tmp_path / "shared").as_uri()}
    one, other = _tuned(new_workspace(), **remote), new_workspace()
    fill(other, *ACTIVATIONS)
    assert other.build(**remote).good().compiled == 0
    assert set(implementations(other).values()) == {"tuned"}

    label = operator(one, "tanh")
    name = label.rpartition("-")[0]
    invalidate(one, label, "--yes", **remote).good()
    one.build(**remote).good()
    done = other.build(**remote).good()
    assert implementations(other) == implementations(one)
    assert implementations(other)[name] == "default"
    assert done.compiled == 0
    assert other.artifact_bytes("net") == one.artifact_bytes("net")

    # The other machine has the records still, and brings them along with what it finds itself.
    night = tune(other, **remote)
    assert dict(night.trials) == {name: len(FEW)}
    for each in (one, other, one):
        each.build(**remote).good()
    assert set(implementations(one).values()) == set(implementations(other).values()) == {"tuned"}
    invalidate(other, label, "--yes", **remote).good()
    for each in (other, one, other):
        each.build(**remote).good()
        assert implementations(each)[name] == "default"


def test_what_can_be_meant(tuned: WorkspaceFolder) -> None:
    def meant(*arguments: str) -> set[str]:
        done = invalidate(tuned, "--json", *arguments)
        assert done.code in (0, 1), done.err
        return {plain(each["operator"]) for each in json.loads(done.out)}

    every = set(implementations(tuned))
    assert meant("--all") == meant("*") == meant("--model", "net") == meant("--implementation", "tuned") == every
    (digest,) = [each["workload"] for each in tuned.manifest("net")["operators"] if "relu" in each["name"]]
    (relu,) = [each for each in every if "relu" in each]
    assert meant(digest) == meant(digest[:12]) == {relu}
    assert meant("--gain-below", "1e9") == every
    assert meant("--toolchain", "tvm *") == meant("--older-than", "0s") == every
    for nothing in (
        ["--gain-below", "0.5"],
        ["--toolchain", "tvm 0.1*"],
        ["--older-than", "1d"],
        ["--implementation", "onednn"],
        ["--device", "*"],
    ):
        assert meant(*nothing) == set(), nothing

    done = invalidate(tuned)
    assert done.code == 2
    assert "which operators" in done.err
    done = invalidate(tuned, "nosuch", digest, "--yes")
    assert done.code == 2
    assert "there is no operator nosuch\n" in done.err
    assert meant("--all") == every, "nothing goes where one of the names may be a slip"
    assert invalidate(tuned, "--older-than", "soon").code == 2
    assert invalidate(tuned, "--model", "other").code == 2


def test_a_model_that_is_not_built_is_told(workspace: WorkspaceFolder) -> None:
    fill(workspace, "Relu")
    done = invalidate(workspace, "--all")
    assert done.code == 2
    assert "doit build" in done.err


MEASURED = """\
target = "native"
order = ["rules", "default"]
select = "fastest"
layout = "as-is"
[measure]
profile = false
seconds = 0.01
"""


def test_what_was_measured_is_measured_again(workspace: WorkspaceFolder) -> None:
    fill(workspace, "Relu", "Sigmoid")
    workspace.write("targets/native.toml", MEASURED)
    workspace.build().good()
    label = operator(workspace, "relu")
    before = measured(workspace)
    assert before >= 2
    invalidate(workspace, label, "--yes").good()
    workspace.build().good()
    assert measured(workspace) == before + 1, "of that operator alone"
    workspace.idle_build()


def measured(workspace: WorkspaceFolder) -> int:
    """How often this store had candidates measured."""
    stats = json.loads(workspace.doit("cache", "stats", "--json").good().out)
    return int(stats["usage"]["stages"]["measure"]["misses"])


def test_back_to_the_one_before_and_to_the_best_again(workspace: WorkspaceFolder) -> None:
    fill(workspace, "Relu", space=lanes([[2, 1]]))
    workspace.build().good()
    tune(workspace).done.good()
    slow = _applied(workspace)
    workspace.write("spaces/lanes.py", lanes(FEW).replace("version = 1", "version = 2"))
    tune(workspace).done.good()
    best = _applied(workspace)
    assert best != slow, "several lanes at once are faster than two"
    workspace.build().good()
    label, fast = operator(workspace, "relu"), _object(workspace)

    listed = workspace.doit("rollback", label, "--list", forbid_tvm=True).good()
    assert [line.split()[2] for line in listed.out.splitlines()[:-1]] == [slow[:12], best[:12]]
    done = workspace.doit("rollback", label, "--reason", "it was wrong in production", forbid_tvm=True).good()
    assert slow[:12] in done.out
    workspace.build().good()
    assert _object(workspace) != fast
    assert _applied(workspace) == slow
    (preferred,) = [
        each for found in records(workspace).values() for each in found if isinstance(each, PreferredRecord)
    ]
    assert preferred.reason == "it was wrong in production"

    workspace.doit("rollback", label, "--to", "none", forbid_tvm=True).good()
    workspace.build().good()
    assert set(implementations(workspace).values()) == {"default"}
    assert _object(workspace) not in (fast, "")

    workspace.doit("rollback", label, "--to", "best", forbid_tvm=True).good()
    workspace.build().good()
    assert _object(workspace) == fast
    assert workspace.doit("rollback", label, "--to", "ffffffffff", forbid_tvm=True).code == 1
    assert workspace.doit("rollback", "no-such", forbid_tvm=True).code == 2
    assert workspace.doit("rollback", forbid_tvm=True).code == 2


def _applied(workspace: WorkspaceFolder) -> str:
    """The candidate of the one operator that a build applies."""
    (found,) = standings(workspace).values()
    applied, _ = found.applied()
    return applied[0].trial.candidate


def _object(workspace: WorkspaceFolder) -> str:
    (found,) = workspace.manifest("net")["operators"]
    return str(found["object"])


def of_another_compiler(workspace: WorkspaceFolder) -> None:
    """Has all records say that another TVM made them."""
    old = {"tvm": "0.1", "tvm-ffi": "0.1", "libtvm": "an old one"}
    store = Store(workspace.cache)
    for key, found in records(workspace).items():
        about = store.sets.about(key)
        for path in (workspace.cache / "sets" / key[:2] / key).glob("[0-9a-f]*"):
            path.unlink()
        changed = [
            msgspec.structs.replace(each, tools=old) if isinstance(each, TrialRecord | RetestRecord) else each
            for each in found
        ]
        store.sets.add(key, [encoded(each) for each in changed], about)


def test_what_another_compiler_found_is_compared_again_and_timed_again(tuned: WorkspaceFolder) -> None:
    before = {name: each.applied()[0][0].trial.candidate for name, each in standings(tuned).items()}
    of_another_compiler(tuned)
    done = tuned.build().good()
    assert "TVM 0.1 → " in done.err
    assert "3 of 3 tuned functions made again and validated" in done.err
    assert set(implementations(tuned).values()) == {"tuned"}
    assert done.compiled == 0
    tuned.idle_build()

    night = tune(tuned)
    assert (night.trials.total(), len(night.of("retest"))) == (0, 3), "what won is timed again, and nothing else tried"
    assert {name: each.applied()[0][0].trial.candidate for name, each in standings(tuned).items()} == before
    assert "made again" not in tuned.build().good().err
    assert set(implementations(tuned).values()) == {"tuned"}
    assert tune(tuned).done.good().last.startswith("nothing to tune")


def test_what_cannot_be_made_again_is_told_with_what_it_costs(tuned: WorkspaceFolder) -> None:
    """The space makes another function of every decision: none of its records holds any more."""
    tuned.edit("profile = false", "profile = true", "targets/native.toml")
    of_another_compiler(tuned)
    other = lanes([[12, 1], [12, 2]]).replace("lanes, rows = tile", "lanes, rows = 12, tile[1]")
    tuned.write("spaces/lanes.py", other.replace("version = 1", "version = 2"))
    done = tuned.build().good()
    assert "0 of 3 tuned functions made again and validated, 3 to be tuned again" in done.err
    assert "are at risk" in done.err
    assert set(implementations(tuned).values()) == {"default"}, "nothing unvalidated wins"
    trials = {name: len(each.trials) for name, each in standings(tuned).items()}
    print(tune(tuned).done.good().err)
    tuned.build().good()
    assert set(implementations(tuned).values()) == {"tuned"}
    assert all(len(each.trials) >= trials[name] for name, each in standings(tuned).items()), "nothing is lost"


def test_what_another_compiler_found_and_is_wrong_now_does_not_win(tuned: WorkspaceFolder) -> None:
    """The same decisions make a function that computes something else: as if the compiler had a fault now."""
    of_another_compiler(tuned)
    tuned.write("spaces/lanes.py", lanes() + WRONG)
    done = tuned.build().good()
    assert "3 to be tuned again" in done.err
    assert set(implementations(tuned).values()) == {"default"}
    right(tuned, lambda x: np.maximum(x, 0), lambda x: 1 / (1 + np.exp(-x)), np.tanh)


# Whoever asks for the digest of what it makes gets that of the function that was tuned.
WRONG = """
_make = Lanes.make


def make(self, func, target, tile):
    import tvm
    from tvm import tirx

    made = _make(self, func, target, tile)
    stores = []
    body = tirx.stmt_functor.ir_transform(
        made.body,
        None,
        lambda store: tirx.BufferStore(store.buffer, store.value * tirx.const(2, "float32"), store.indices),
        ["tirx.BufferStore"],
    )
    return made.with_body(body)


Lanes.make = make
"""
