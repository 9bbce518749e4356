"""Which operators a night is about, and which of them it is to look at again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.config import Stale, TargetFile
from pipeline.manifests import read_manifest
from pipeline.tuning.operators import Model, chosen
from pipeline.tuning.records import VALIDATOR, ExhaustedRecord, Record
from pipeline.types import Plan, Profile, symbol_of
from tests.made_up import ATTRIBUTES, Made, build, retest, trial, won

NOW = time.time()
DAY = 86400.0
FILE = TargetFile(target="native", order=("tuned", "rules", "default"), stale=Stale(days=30))
OLD = won("a", 2.0, NOW - 40 * DAY)
UNPROVEN = [trial("c", 2.0, NOW), retest("c", 2.0, NOW, validator=VALIDATOR + 1)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TVMAKE_CACHE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model(folder: Path, made: Sequence[Made], file: TargetFile = FILE) -> Model:
    build(folder, folder / "store", made)
    plan = Plan((), (), (), (), (), tuple(each.workload() for each in made), False)
    profile = Profile(1.0, {symbol_of(each.digest): each.seconds or 0.0 for each in made})
    manifest = read_manifest(folder / "artifacts/native/net")
    return Model("net", folder, "native", ATTRIBUTES, file, plan, manifest, profile)


def stale(folder: Path, made: Sequence[Made], **rules: Any) -> list[str]:
    """The operators that are to be looked at again."""
    file = msgspec.structs.replace(FILE, stale=msgspec.structs.replace(FILE.stale, **rules))
    operators, left = chosen([model(folder, made, file)])
    assert not left
    assert {each.workload.name for each in operators} == {each.name for each in made}
    return [each.workload.name for each in operators if each.is_stale]


def exhausted(operators: Sequence[Made], folder: Path) -> list[Record]:
    (first, *_), _ = chosen([model(folder, operators)])
    return [ExhaustedRecord(space=name, space_version=version, reason="", at=1.0) for name, version in first.spaces]


def test_what_is_stale_is_to_be_looked_at_again(folder: Path) -> None:
    made = [
        Made("old", "tuned", records=OLD),
        Made("fresh", "tuned", records=won("b", 2.0, NOW - DAY)),
        Made("unproven", "rules", records=UNPROVEN),
        Made("new", "rules"),
        Made("upgraded", "tuned", records=won("d", 2.0, NOW, {"tvm": "0.26.0"})),
    ]
    assert stale(folder, made) == ["old", "unproven"]
    assert stale(folder, made, days=None) == ["unproven"]
    assert stale(folder, made, validator=False) == ["old"]
    assert (folder / "store" / "summaries").is_dir()


def test_what_can_propose_nothing_is_not_looked_at_for_its_age(folder: Path) -> None:
    spent = exhausted([Made("old")], folder)
    made = [Made("old", records=[*OLD, *spent]), Made("unproven", "rules", records=[*UNPROVEN, *spent])]
    assert stale(folder, made) == ["unproven"]


def test_those_that_take_longest_come_first_whether_stale_or_not(folder: Path) -> None:
    made = [Made("new", seconds=1e-3), Made("old", "tuned", 2e-3, OLD, calls=2), Made("large", seconds=3e-3)]
    operators, _ = chosen([model(folder, made)])
    assert [each.workload.name for each in operators] == ["large", "old", "new"]
    assert [each.seconds for each in operators] == [3e-3, 1e-3, 1e-3]


def test_what_is_left_says_why(folder: Path) -> None:
    made = [Made("copy", copies=True), Made("conv"), Made("dense")]
    operators, left = chosen([model(folder, made)], ["co*"])
    assert [each.workload.name for each in operators] == ["conv"]
    assert [(each.reason, each.labels) for each in left] == [("it only copies", (made[0].label,))]
