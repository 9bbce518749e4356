"""One byte of one file of the store is flipped: never another result, and the file is counted and made again."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from pipeline.hashing import Digest
from pipeline.store import Store

from .workspaces import NATIVE, ROOT, Place

pytest.importorskip("onnx")
from . import networks


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if not data:
        data = bytearray(b"\0")  # nothing to flip: a byte too many
    else:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.chmod(0o600)
    path.write_bytes(data)


def is_right(store: Path, name: Path) -> bool:
    """Whether a file of the store has what its name promises."""
    if name.parts[0] == "cas":
        return (store / name).is_file() and Digest.of_file(store / name).hash == name.name
    return Store(store).lookup(name.name) is not None


def flip_each(place: Place, seed: int, step: int = 1) -> Counter[str]:
    """Flips a byte of every file, or of every so many, in turn and builds. Returns how many of each kind it were."""
    chance = random.Random(seed)
    place.build()
    right, names = place.artifacts(), place.stored()
    flipped: Counter[str] = Counter()
    for name in names[::step]:
        flip(place.store / name, chance)
        damaged = (place.store / name).read_bytes()
        place.forget()
        built = place.build(TVMAKE_JOBS="1")
        assert place.artifacts() == right, f"another result after a flip in {name}:\n{built.output}"
        assert built.summary["corrupt"] == 1, f"{name} is not counted:\n{built.output}"
        aside = list((place.store / "quarantine").iterdir())
        assert [path.read_bytes() for path in aside] == [damaged], name
        aside[0].unlink()
        assert is_right(place.store, name), f"{name} is not made again"
        assert place.stored() == names
        flipped[name.parts[0]] += 1
    return flipped


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 4], ids=["every", "one of four"])
def test_each_file_of_a_small_store(place: Place, step: int) -> None:
    networks.tiny(place.folder / "net.onnx")
    flipped = flip_each(place, seed=1, step=step)
    assert flipped["ac"] >= 8 // step
    assert flipped["cas"] >= 15 // step


def test_each_file_that_only_one_kind_of_target_needs(tmp_path: Path) -> None:
    """Weights inside the library are a blob of their own."""
    place = Place(tmp_path / "workspace", tmp_path / "store", targets={"inside": NATIVE + 'weights = "inside"\n'})
    networks.tiny(place.folder / "net.onnx")
    place.build()
    right = place.artifacts()
    for name in place.stored():
        flip(place.store / name, random.Random(str(name)))
    place.forget()
    built = place.build()
    assert place.artifacts() == right
    assert built.summary["corrupt"] > 0
    place.forget()
    assert place.build().summary["corrupt"] == 0
    assert place.artifacts() == right


SQUEEZENET = f"""\
import sys
sys.path.append({str(ROOT)!r})
from bench import zoo
from pipeline import DOIT_CONFIG, Model, Workspace

workspace = Workspace(Model.onnx("squeezenet", lambda: zoo.light("squeezenet")))
"""


@pytest.mark.slow
def test_each_file_of_squeezenets_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flipped = flip_each(Place(tmp_path / "workspace", tmp_path / "store", SQUEEZENET), seed=2)
    with capsys.disabled():
        print(f"\nsqueezenet: {flipped['ac']} entries and {flipped['cas']} blobs flipped, one a build")
