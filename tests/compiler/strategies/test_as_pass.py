"""Strategies as passes of TVM's: IRModule → IRModule, in the order in which they are composed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax, tirx

from pipeline.compiler import ir, prepack, records
from pipeline.compiler.strategies import ORDER, STRATEGIES, Default, Rules, as_pass, by_name
from pipeline.compiler.strategies.manual import Manual, Replacement
from pipeline.compiler.strategies.tuned import Tuned
from tests.compiler.strategies.workloads import (
    DENSE,
    FREE,
    NATIVE,
    W,
    X,
    Y,
    block,
    by_rows,
    call,
    commit,
    in_panels,
    lines,
    scheduled,
)

DONE = "tirx.is_scheduled"
OTHER = tvm.target.Target({"kind": "llvm", "mcpu": "cortex-a72", "mtriple": "aarch64-linux-gnu"})


class Marks:
    """Applies to functions of a name, and leaves its own on them; remembers what it was asked about, and for what."""

    version = 1

    def __init__(self, name: str, applies: bool = True) -> None:
        self.name = name
        self._applies = applies
        self.asked: list[tuple[tirx.PrimFunc, tvm.target.Target]] = []

    def apply(self, func: tirx.PrimFunc, target: tvm.target.Target) -> tirx.PrimFunc | None:
        self.asked.append((func, target))
        return func.with_attr("by", self.name) if self._applies else None


def module(**functions: tirx.PrimFunc) -> tvm.IRModule:
    return tvm.IRModule({name: func.with_attr("global_symbol", name) for name, func in functions.items()})


def by(mod: tvm.IRModule) -> dict[str, str | None]:
    return {gvar.name_hint: func.attrs.get("by") for gvar, func in mod.functions_items()}


@pytest.fixture(autouse=True)
def _within_a_target() -> Iterator[None]:
    with NATIVE:
        yield


def test_the_first_that_applies_has_a_function() -> None:
    first, second, third = Marks("first", applies=False), Marks("second"), Marks("third")
    mod = tvm.transform.Sequential([as_pass(each) for each in (first, second, third)])(module(f=DENSE))
    assert by(mod) == {"f": "second"}
    assert [len(each.asked) for each in (first, second, third)] == [1, 1, 0]


def test_the_order_is_the_composers() -> None:
    one, other = Marks("one"), Marks("other")
    assert by(as_pass(other)(as_pass(one)(module(f=DENSE)))) == {"f": "one"}
    assert by(as_pass(one)(as_pass(other)(module(f=DENSE)))) == {"f": "other"}


def test_what_no_strategy_takes_stays_as_it_was() -> None:
    mod = module(f=DENSE)
    after = as_pass(Marks("none", applies=False))(mod)
    assert tvm_ffi.structural_equal(after, mod)
    assert DONE not in after["f"].attrs


def test_what_is_scheduled_is_left_alone() -> None:
    mod = module(f=DENSE, g=DENSE.with_attr(DONE, True))
    after = as_pass(Marks("one"))(mod)
    assert by(after) == {"f": "one", "g": None}
    assert tvm_ffi.structural_equal(after["g"], mod["g"])
    assert after["f"].attrs[DONE]


def test_relax_functions_pass_through() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([8, 16], "float32"))
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(relax.op.nn.relu(x)))
    mod = builder.get()
    assert tvm_ffi.structural_equal(as_pass(Marks("one"))(mod), mod)


def test_the_target_is_the_functions_own_or_the_scopes() -> None:
    marks = Marks("one")
    mod = as_pass(marks)(module(f=DENSE, g=DENSE.with_attr("target", OTHER)))
    asked = {str(target.attrs.get("mcpu")) for _, target in marks.asked}
    assert asked == {str(NATIVE.attrs["mcpu"]), "cortex-a72"}
    assert str(mod["g"].attrs["target"]) == str(OTHER)
    assert "target" not in mod["f"].attrs


def test_a_module_knows_its_names_and_a_strategy_the_function_alone() -> None:
    marks = Marks("one")
    mod = as_pass(marks)(module(f=DENSE, g=DENSE.with_attr("target", OTHER)))
    assert [ir.canonical(func) == ir.canonical(DENSE) for func, _ in marks.asked] == [True, True]
    assert [mod[name].attrs["global_symbol"] for name in "fg"] == ["f", "g"]


def test_a_private_function_gets_no_name_of_its_replacement() -> None:
    replacement = Replacement(DENSE, scheduled(DENSE, by_rows).with_attr("global_symbol", "by_hand"), "by_hand")
    mod = as_pass(Manual(replacement))(tvm.IRModule({"f": DENSE}))
    assert "global_symbol" not in mod["f"].attrs
    assert mod["f"].attrs[DONE]


def test_without_a_target_it_says_so() -> None:
    # The scope around each test ends at its thread.
    with ThreadPoolExecutor(1) as threads, pytest.raises(Exception, match=r"[Tt]arget"):
        threads.submit(as_pass(Marks("one")), module(f=DENSE)).result()


def test_what_a_strategy_raises_comes_through() -> None:
    class Fails(Marks):
        def apply(self, func: tirx.PrimFunc, target: tvm.target.Target) -> tirx.PrimFunc | None:
            raise ValueError("not today")

    with pytest.raises(ValueError, match="not today"):
        as_pass(Fails("fails"))(module(f=DENSE))


def test_manual_functions_records_and_the_default_compose(tmp_path: Path) -> None:
    """Four functions, each taken by another strategy; all compute what they did."""
    panels, rows = scheduled(DENSE, in_panels), scheduled(DENSE, lambda sch: sch.parallel(sch.get_loops(block(sch))[0]))
    commit(tmp_path, FREE, by_rows)
    strategies = [
        Manual(Replacement(panels, lambda sch: sch.parallel(sch.get_loops(block(sch))[0]), "rows")),
        Tuned(records.read_database(*lines(tmp_path))[0].values()),
        Default(),
    ]
    mod = module(f=panels, g=DENSE, h=FREE, k=rows)
    after = tvm.transform.Sequential([as_pass(each) for each in strategies])(mod)
    assert "T.parallel" in after["f"].script()
    assert "T.vectorized" in after["g"].script()
    assert "T.vectorized" in after["h"].script()
    assert prepack.layout_free(after["h"]) == {1}
    assert prepack.layout_free(after["g"]) == frozenset()
    assert tvm_ffi.structural_equal(after["k"].without_attr(DONE), mod["k"])
    for name in "fghk":
        np.testing.assert_allclose(call(after[name], X, W, name=name), Y, rtol=1e-4, atol=1e-5)


def test_every_strategy_that_needs_no_more_than_the_function_is_a_pass() -> None:
    for strategy in STRATEGIES:
        after = as_pass(strategy)(module(f=DENSE))
        assert after["f"].attrs[DONE]
        np.testing.assert_allclose(call(after["f"], X, W, name="f"), Y, rtol=1e-4, atol=1e-5)
        assert by_name(strategy.name) is strategy
        assert strategy.name in ORDER


def test_rules_before_default_are_rules() -> None:
    ruled = tvm.transform.Sequential([as_pass(Rules()), as_pass(Default())])(module(f=DENSE))
    plain = tvm.transform.Sequential([as_pass(Default()), as_pass(Rules())])(module(f=DENSE))
    assert ir.canonical(plain["f"].without_attr(DONE)) == ir.canonical(DENSE)
    assert ir.canonical(ruled["f"].without_attr(DONE)) != ir.canonical(DENSE)
