"""The functions of a batch are compiled as each would be alone, and one that fails takes no other along."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from tvm import s_tir

from pipeline.compiler import ir, objects, targets
from pipeline.stages import Inputs, codegen, compile
from pipeline.store import Store
from tests.compiler.search.workloads import conv, relu

TARGET = targets.resolve("native")
HASTY = {**TARGET, "opt-level": 0}


def refused() -> Any:
    """A function that no compiler for a processor takes."""
    schedule = s_tir.Schedule(relu())
    block = schedule.get_child_blocks(schedule.get_sblock("root"))[0]
    schedule.bind(schedule.get_loops(block)[0], "threadIdx.x")
    return schedule.mod["main"]


def compiled(folder: Path, functions: list[tuple[Any, str, int]], seconds: float = 60.0) -> dict[str, Any]:
    store = Store(folder)
    digests = {f"f{i}": store.put(ir.canonical(func)) for i, (func, _, _) in enumerate(functions)}
    options = {
        "functions": [[symbol, which] for _, symbol, which in functions],
        "targets": [TARGET, HASTY],
        "seconds": seconds,
    }
    return dict(compile.run(Inputs(store, digests), options))


def alone(folder: Path, func: Any, symbol: str, target: dict[str, Any]) -> bytes:
    store = Store(folder)
    inputs = Inputs(store, {"function": store.put(ir.canonical(func))})
    return bytes(codegen.run(inputs, {"symbol": symbol, "target": target})["object"])


def test_each_object_is_what_it_is_alone_for_its_own_symbol_and_target(tmp_path: Path) -> None:
    made = compiled(tmp_path, [(conv(), "one", 0), (relu(), "two", 0), (conv(), "three", 1)])
    assert made == {
        "o0": alone(tmp_path, conv(), "one", TARGET),
        "o1": alone(tmp_path, relu(), "two", TARGET),
        "o2": alone(tmp_path, conv(), "three", HASTY),
    }


def test_one_that_cannot_be_compiled_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        alone(tmp_path, refused(), "bad", TARGET)
    made = compiled(tmp_path, [(refused(), "bad", 0), (relu(), "good", 0)])
    assert set(made) == {"o1"}


def test_none_is_begun_once_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = objects.compile_parts

    def slowly(*given: Any) -> Any:
        time.sleep(0.2)
        return real(*given)

    monkeypatch.setattr(compile.objects, "compile_parts", slowly)
    made = compiled(tmp_path, [(relu(), f"s{i}", 0) for i in range(3)], seconds=0.1)
    assert set(made) == {"o0"}
