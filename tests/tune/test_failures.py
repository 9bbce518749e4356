"""What cannot stop `doit tune`: candidates, spaces, records and models that are at fault are named, and none wins."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest
from conftest import WorkspaceFolder
from tuning_runs import NET, NOISE, RELU, dense, idle, implementations, planted, records, relu, right, standings, tune

from pipeline.store import Store
from pipeline.tuning.records import Outcome, encoded, standing

FAILURES = {
    "wrong": "wrong",
    "nan": "wrong",
    "crash": "crashed",
    "loop": "timed out",
    "missing": "failed",
    "refused": "not built",
    "large": "build timed out",
}


@pytest.mark.parametrize("large", [(), pytest.param(("large",), marks=pytest.mark.slow)], ids=["", "with a large one"])
def test_each_failure_is_named_and_none_wins_or_stops_the_night(
    dense_built: WorkspaceFolder, large: tuple[str, ...]
) -> None:
    kinds = [kind for kind in FAILURES if kind != "large"] + [*large]
    dense(dense_built, "right", *kinds, timeout=6 if large else 60)
    fails = (
        planted().replace('name = "planted"', 'name = "fails"').replace("made = [", "raise RuntimeError(3)\n        [")
    )
    dense_built.write("spaces/fails.py", fails)
    dense_built.edit('spaces = ["planted"]', 'spaces = ["fails", "planted"]', "targets/native.toml")
    night = tune(dense_built)
    night.done.good()
    assert "the search space fails fails for native:fused_matmul" in night.done.err
    failed = Counter(FAILURES[kind] for kind in kinds)
    (figures,) = night.ended["operators"]
    assert figures["failed"] == failed
    assert figures["timed"] == 1
    for cause in failed:
        assert f"  {cause}, {failed[cause]}: native:fused_matmul" in night.done.err
    dense_built.edit('spaces = ["fails", "planted"]', 'spaces = ["planted"]', "targets/native.toml")
    again = tune(dense_built)
    again.done.good()
    transient = {"crashed", "timed out", "build timed out"} & failed.keys()  # what may have been the machine's fault
    assert again.ended["failures"].keys() == transient
    assert again.trials.total() == len(transient)
    (found,) = standings(dense_built).values()
    assert [trial.decisions for trial in found.trials if trial.seconds is not None] == ["right"]
    assert {winner.trial.decisions for winner in found.winners} <= {"right"}
    idle(dense_built)


@pytest.mark.parametrize(
    ("kinds", "code"), [pytest.param(("crash", "missing"), 3, marks=pytest.mark.slow), (("wrong", "nan"), 4)]
)
def test_the_exit_code_says_that_nothing_was_measured_or_all_was_wrong(
    dense_built: WorkspaceFolder, kinds: Sequence[str], code: int
) -> None:
    dense(dense_built, *kinds)
    night = tune(dense_built)
    assert night.done.code == code, night.done.err
    assert not any(each.winners for each in standings(dense_built).values())
    assert dense_built.build().good().idle or implementations(dense_built, "dense").popitem()[1] == "default"


@pytest.mark.parametrize(
    ("space", "code", "said"),
    [
        ("def (", 2, "spaces/planted.py"),
        ("x = 1", 2, "spaces/planted.py"),
        (
            planted("right").replace("made = [", 'raise RuntimeError("no idea today")\n        made = ['),
            3,
            "no idea today",
        ),
    ],
    ids=["syntax", "no space", "raises"],
)
def test_a_space_that_cannot_be_used_is_named(dense_built: WorkspaceFolder, space: str, code: int, said: str) -> None:
    dense(dense_built, "right")
    dense_built.write("spaces/planted.py", space)
    night = tune(dense_built)
    assert night.done.code == code
    assert said in night.done.err
    assert "Traceback" not in night.done.err


def test_records_that_make_no_sense_are_named_and_the_best_of_the_others_is_built(relu_built: WorkspaceFolder) -> None:
    tune(relu_built).done.good()
    sets = Store(relu_built.cache).sets
    ((key, found),) = records(relu_built).items()
    best = standing(found, NOISE).best
    assert best is not None
    trial, retest = best.trial, best.retest
    broken = msgspec.structs.replace(trial, candidate="0" * 64, decisions="broken")
    faster = msgspec.structs.replace(retest, candidate="0" * 64, seconds=retest.seconds / 100)
    claim = msgspec.structs.replace(broken, candidate="1" * 64, outcome=Outcome.CLAIMED)
    newer = msgspec.json.encode({"type": "trial", "format": 99})
    sets.add(key, [encoded(broken), encoded(faster), encoded(claim), b"not a record", newer], {})
    (folder,) = (relu_built.cache / "sets").glob("??/*")
    (folder / ("a" * 64)).write_bytes(encoded(trial)[:100])
    (folder / "notes.txt").write_text("of another tool")

    built = relu_built.build().good()
    assert re.search(
        rf"WARNING native: 1 better tuning record of {RELU}-\w+ cannot be made again, .*no tile", built.err
    )
    assert implementations(relu_built) == {RELU: "tuned"}
    right(relu_built, relu)
    assert "unread" in relu_built.doit("records", "list").good().out
    night = tune(relu_built)
    night.done.good()
    assert f"not built, 1: native:{RELU}" in night.done.err
    assert "'broken' is no tile" in night.done.err
    idle(relu_built)


def test_a_model_that_cannot_be_built_keeps_no_other_from_being_tuned(relu_built: WorkspaceFolder) -> None:
    relu_built.write("broken.onnx", b"no model")
    relu_built.dodo(f'{NET},\nModel.onnx("broken", "broken.onnx"),')
    night = tune(relu_built)
    assert night.done.code == 1
    assert night.trials.total() > 0
    assert "left out, as they could not be built: native:broken" in night.done.err
    only = relu_built.doit("tune", "-m", "broken")
    assert only.code == 2
    assert "no model could be built" in only.err
