"""Workload digests of real models: equal exactly where TVM's structural equality says so, and the same everywhere."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tvm
import tvm_ffi

from pipeline.compiler import ir
from pipeline.hashing import Digest

from . import extraction
from .workspaces import ROOT

pytest.importorskip("onnx")

SMALL = ("mlp", "squeezenet")
ALL = (
    *SMALL,
    "shufflenet",
    "resnet50",
    "densenet121",
    "inception_v1",
    "magika",
    "det",
    "rec",
    "cls",
)
needs_zoo = pytest.mark.skipif(
    not (find_spec("magika") and find_spec("rapidocr_onnxruntime")), reason="the zoo extra is not installed"
)
PrimFunc = tvm.tirx.PrimFunc

_known: dict[str, list[PrimFunc]] = {}


def functions(models: Sequence[str]) -> list[PrimFunc]:
    for name in models:
        if name not in _known:
            _known[name] = extraction.functions(name)
    return [func for name in models for func in _known[name]]


def distinct(models: Sequence[str]) -> dict[bytes, PrimFunc]:
    found: dict[bytes, PrimFunc] = {}
    for func in functions(models):
        found.setdefault(ir.canonical(func), func)
    return found


def anonymous(func: PrimFunc) -> PrimFunc:
    return func.without_attr("global_symbol")


NAMES = {"name", "name_hint"}
# What they are called is what they are.
CALLED = {"ir.Op", "tirx.IntrinInfo"}


def renamed(func: PrimFunc, chance: random.Random) -> PrimFunc:
    """The function with every variable, buffer and block under a random name, and under another symbol."""
    graph = json.loads(tvm.ir.save_json(func))
    nodes: list[dict[str, Any]] = graph["nodes"]
    given = 0
    for node in list(nodes):
        data = node.get("data")
        if isinstance(data, dict) and node["type"] not in CALLED:
            for field in NAMES.intersection(data):
                assert node["type"] in ("ir.Var", "s_tir.SBlock"), f"{node['type']} has a name as well"
                nodes.append({"type": "ffi.String", "data": f"{chance.choice('pqxyz')}{chance.getrandbits(40):x}"})
                data[field] = len(nodes) - 1
                given += 1
    assert given
    return tvm.ir.load_json(json.dumps(graph)).with_attr("global_symbol", f"g{chance.getrandbits(30)}")


SWAPS = {
    "prim.Add": "prim.Sub",
    "prim.Mul": "prim.Add",
    "prim.Max": "prim.Min",
    "prim.LT": "prim.LE",
    "prim.Sub": "prim.Add",
}


def mutated(func: PrimFunc, chance: random.Random) -> PrimFunc:
    """The function with one number, operation or order of operands changed. It may mean nothing, or the same."""
    graph = json.loads(tvm.ir.save_json(anonymous(func)))
    nodes: list[dict[str, Any]] = graph["nodes"]
    kinds = [*SWAPS, "ir.IntImm", "ir.FloatImm"]
    kind = chance.choice(sorted({node["type"] for node in nodes if node["type"] in kinds}))
    node = chance.choice([node for node in nodes if node["type"] == kind])
    data = node["data"]
    if kind == "ir.IntImm":
        value = nodes[data["value"]]["data"]
        nodes.append({"type": "int", "data": 1 - value if value in (0, 1) else value + chance.choice((-1, 1))})
        data["value"] = len(nodes) - 1
    elif kind == "ir.FloatImm":
        data["value"] += 1.0
    elif chance.random() < 0.5:
        node["type"] = SWAPS[kind]
    else:
        data["a"], data["b"] = data["b"], data["a"]
    return tvm.ir.load_json(json.dumps(graph))


def agree(one: list[tuple[PrimFunc, bytes]]) -> tuple[int, int]:
    """For every pair: equal bytes exactly where TVM says structurally equal. Returns pairs, and how many are equal."""
    pairs = equal = 0
    for (a, a_bytes), (b, b_bytes) in itertools.combinations(one, 2):
        same = bool(tvm_ffi.structural_equal(a, b))
        assert (a_bytes == b_bytes) == same, f"disagree on\n{a}\nand\n{b}"
        pairs += 1
        equal += same
    return pairs, equal


def require_agreement(models: Sequence[str], seed: int) -> str:
    """Over all functions, each also under other names: a model alone has no two that are equal."""
    chance = random.Random(seed)
    own = [copy for func in functions(models) for copy in (func, renamed(func, chance))]
    pairs, equal = agree([(anonymous(func), ir.canonical(func)) for func in own])
    assert equal >= len(own) // 2
    return f"{len(own)} functions, half of them renamed copies: {pairs:,} pairs agree, {equal} of them equal"


def require_renamed_agreement(models: Sequence[str], seed: int) -> str:
    chance = random.Random(seed)
    copies = 0
    for data, func in distinct(models).items():
        for _ in range(2):
            other = renamed(func, chance)
            assert tvm_ffi.structural_equal(anonymous(func), anonymous(other))
            assert ir.canonical(other) == data, f"other bytes under other names:\n{func}\n{other}"
            assert ir.structural_hash(other) == ir.structural_hash(func)
            copies += 1
        assert ir.canonical(ir.load(data)) == data
    return f"{copies} renamed copies agree"


def require_mutated_agreement(models: Sequence[str], seed: int) -> str:
    chance = random.Random(seed)
    pairs = different = 0
    for func in distinct(models).values():
        family = [func, *(mutated(func, chance) for _ in range(4))]
        family.append(renamed(family[-1], chance))
        checked, equal = agree([(anonymous(member), ir.canonical(member)) for member in family])
        pairs, different = pairs + checked, different + checked - equal
    assert different
    return f"{pairs} pairs of functions and mutants agree, {different} of them different"


def elsewhere(tmp_path: Path, *arguments: str, seed: str = "77") -> dict[str, Any]:
    """What the script says in another process, folder, user environment and hash seed."""
    folder = tmp_path / "else" / "where"
    folder.mkdir(parents=True, exist_ok=True)
    people = dict.fromkeys(("USER", "LOGNAME"), "zebulon")
    done = subprocess.run(
        [sys.executable, str(Path(extraction.__file__)), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "HOME": str(folder), "TZ": "Asia/Tokyo"}
        | people,
        stdout=subprocess.PIPE,
        check=True,
    )
    said: dict[str, Any] = json.loads(done.stdout.decode().strip().splitlines()[-1])
    return said


def require_same_elsewhere(models: Sequence[str], tmp_path: Path) -> str:
    here = {name: [Digest.of(ir.canonical(func)).hash for func in functions([name])] for name in models}
    assert elsewhere(tmp_path, *models) == here
    assert elsewhere(tmp_path, *reversed(models), seed="0") == here
    return f"{sum(map(len, here.values()))} digests are the same in two other processes"


def require_same_objects(workloads: dict[bytes, PrimFunc], tmp_path: Path, seed: int) -> str:
    """Renamed functions give the same objects, here and, compiled in another order, in another process."""
    chance = random.Random(seed)
    here = {}
    for data, func in workloads.items():
        path = tmp_path / Digest.of(data).hash
        path.write_bytes(data)
        here[str(path)] = extraction.object_of(data)
        assert extraction.object_of(ir.canonical(renamed(func, chance))) == here[str(path)]
    assert elsewhere(tmp_path, "--objects", *reversed(list(here))) == here
    return f"{len(here)} functions, {len(set(here.values()))} objects, each the same three times"


def test_equal_bytes_exactly_where_structurally_equal() -> None:
    require_agreement(SMALL, seed=0)


def test_renamed_copies_have_the_same_digest() -> None:
    require_renamed_agreement(SMALL, seed=1)


def test_mutants_have_other_digests_where_structurally_different() -> None:
    require_mutated_agreement(SMALL, seed=2)


def test_digests_are_the_same_in_another_process(tmp_path: Path) -> None:
    require_same_elsewhere(SMALL, tmp_path)


def test_renamed_functions_give_the_same_object(tmp_path: Path) -> None:
    require_same_objects(dict(itertools.islice(distinct(SMALL).items(), 8)), tmp_path, seed=3)


@pytest.mark.slow
@needs_zoo
def test_all_of_the_zoo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def say(line: str) -> None:
        with capsys.disabled():
            print("\n" + line, end="", flush=True)

    for name in ALL:
        say(f"{name}: {len(functions([name]))} functions, {len(distinct([name]))} distinct")
    say(require_agreement(ALL, seed=7))
    say(require_renamed_agreement(ALL, seed=4))
    say(require_mutated_agreement(ALL, seed=5))
    say(require_same_elsewhere(ALL, tmp_path))
    say(require_same_objects(distinct(ALL), tmp_path, seed=6))
