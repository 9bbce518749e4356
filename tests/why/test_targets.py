"""`doit why` tells what changed of what a model is built for and with: targets, strategies, libraries, tools."""

from __future__ import annotations

import dataclasses

import pytest
from test_libraries import MINE
from test_strategies import MANUAL, RIGHT

from pipeline import stages
from pipeline.compiler import strategies
from tests.why.bench import Bench


def test_a_targets_attribute(bench: Bench) -> None:
    def target(cores: int) -> str:
        table = f'{{kind = "llvm", mtriple = "x86_64-linux-gnu", num-cores = {cores}}}'
        return f'target = {table}\norder = ["default"]\ncheck.enabled = false\nmeasure.profile = false\n'

    bench.place.write("targets/native.toml", target(4))
    bench.build()
    bench.place.write("targets/native.toml", target(8))
    bench.build()
    assert "target attribute num-cores: 4 → 8" in bench.last()
    assert "target attribute num-cores: 4 → 8" in bench.why("net")


def test_the_order_of_strategies(bench: Bench) -> None:
    bench.build()
    bench.target(["rules", "default"])
    bench.build()
    said = bench.last()
    assert "the order of strategies changed: default → rules, default" in said
    assert "compiled from another function" in said
    assert "runs on     rules: the first in the order that applies" in bench.why()
    bench.target(["rules"])
    bench.build()
    assert "compiled from another" not in bench.last()


def test_a_rule_for_operators(bench: Bench) -> None:
    bench.target(["rules", "default"])
    bench.build()
    bench.target(["rules", "default"], tail='[[operators]]\nmatch = "fused_matmul*"\nforbid = ["rules"]')
    bench.build()
    assert "the [[operators]] of the target's file that match it changed" in bench.last()
    bench.target(["rules", "default"])
    bench.build()
    bench.target(["rules", "default"], tail='[[operators]]\nmatch = "conv2d*"\nforbid = ["rules"]')
    bench.build()
    assert "[[operators]]" not in bench.last()
    assert "the [[operators]] of the target's file changed" in bench.why("net")


def test_fastest_instead_of_first(bench: Bench) -> None:
    bench.target(["rules", "default"])
    bench.build()
    bench.target(["rules", "default"], select="fastest")
    bench.build()
    said = bench.why()
    assert "select of the target's file: first → fastest" in said
    assert "rules: " in said
    assert "not timed" not in said


def test_a_librarys_version(bench: Bench) -> None:
    bench.target(["mine", "default"])
    bench.place.write("libraries/mine.py", MINE)
    bench.build()
    assert "runs on     mine" in bench.why()
    bench.place.write("libraries/mine.py", MINE.replace('Installed("1"', 'Installed("2"'))
    bench.build()
    assert "library mine: 1 → 2" in bench.last()
    bench.place.write("libraries/mine.py", MINE.replace('Installed("1"', 'Installed("2"') + "# a\n# b\n")
    bench.build()
    assert "libraries/mine.py changed: 2 lines" in bench.last()


def test_a_stages_version(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.build()
    monkeypatch.setattr(stages, "CODEGEN", dataclasses.replace(stages.CODEGEN, version=99))
    bench.build()
    assert f"stage codegen: version {_version('CODEGEN', monkeypatch)} → 99" in bench.last()
    bench.build()
    monkeypatch.setattr(stages, "APPLY", dataclasses.replace(stages.APPLY, version=98))
    bench.build()
    said = bench.last()
    assert "stage apply: version" in said
    assert "→ 98" in said
    assert "codegen: version" not in said


def _version(name: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.undo()
    return int(getattr(stages, name).version)


def test_a_strategys_version(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.target(["rules", "default"])
    bench.build()
    rules = strategies.by_name("rules")
    was = rules.version
    monkeypatch.setattr(rules, "version", 99, raising=False)
    bench.build()
    said = bench.last()
    assert f"strategy rules: version {was} → 99" in said
    assert "looked at again, and the same came of it" in said
    assert "codegen rules: found in this machine's store" in said


def test_tvms_version(bench: Bench) -> None:
    bench.build(tvm="0.26.0", libtvm="another")
    bench.build()
    said = bench.last()
    assert f"TVM 0.26.0 → {bench.tools['tvm']}" in said
    assert "another build of the same version" not in said
    assert "TVM 0.26.0 →" in bench.why("net")
    bench.build(libtvm="yet another")
    assert "TVM's compiler library is another build of the same version" in bench.last()


def test_a_manual_function(bench: Bench) -> None:
    bench.target(["manual", "default"])
    bench.build()
    (operator,) = bench.builds()[-1].state.operators.values()
    source = MANUAL.replace("{digest}", operator.workload.hash)
    bench.place.write("manual/dense.py", source)
    bench.build()
    assert "manual/dense.py came" in bench.last()
    edited = source.replace("x[vi, 0] * w[0, vj] + x[vi, 1] * w[1, vj]", "x[vi, 1] * w[1, vj] + x[vi, 0] * w[0, vj]")
    assert edited != source
    bench.place.write("manual/dense.py", edited)
    bench.build()
    said = bench.last()
    assert "manual/dense.py changed: 1 line\n" in said
    assert "compiled from another function" in said
    bench.place.write("manual/dense.py", edited.replace(operator.workload.hash, "f" * 64))
    bench.build()
    assert "manual/dense.py changed: 1 line\n" in bench.last()
    assert "runs on     default" in bench.why()


def test_a_strategy_of_the_workspace(bench: Bench) -> None:
    bench.target(["mine", "default"])
    bench.place.write("strategies/mine.py", RIGHT)
    bench.build()
    bench.place.write("strategies/mine.py", RIGHT + "# a comment\n")
    bench.build()
    said = bench.last()
    assert "strategies/mine.py changed: 1 line" in said
    assert "the same came of it" in said
