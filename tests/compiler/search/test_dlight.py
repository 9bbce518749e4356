"""The space of dlight: each schedule of each of its rules, where TVM makes code of it; no GPU is needed for that."""

from __future__ import annotations

import pytest
import tvm

from pipeline.compiler import records, rules, search
from pipeline.compiler.rules import gpu
from pipeline.compiler.search import Tried
from pipeline.compiler.search.dlight import DlightSpace
from tests.compiler.search.workloads import NATIVE, conv, digests, relu

SPACE = DlightSpace()
KINDS = ("cuda", "opencl", "metal")


def target(kind: str) -> tvm.target.Target:
    arch = {"arch": "sm_80"} if kind == "cuda" else {}
    return tvm.target.Target({"kind": kind, "host": {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}, **arch})


def test_the_space_is_known_by_its_name() -> None:
    assert isinstance(search.by_name("dlight"), DlightSpace)


@pytest.mark.parametrize("kind", KINDS)
def test_several_rules_offer_a_convolution_and_all_of_it_generates_code(kind: str) -> None:
    found = SPACE.propose(conv(), target(kind), (), (), 16, 0)
    assert len({each.decisions["rule"] for each in found}) == len(found) > 1
    assert len(set(digests(found))) == len(found)
    assert all(gpu.generates(each.function, target(kind)) for each in found)


def test_the_first_is_what_the_rules_take() -> None:
    first = SPACE.propose(conv(), target("opencl"), (), (), 1, 0)
    assert digests(first) == [records.digest_of(rules.schedule(conv(), target("opencl")))]


def test_decisions_make_the_same_function_again() -> None:
    for each in SPACE.propose(conv(), target("metal"), (), (), 16, 0):
        made = SPACE.make(conv(), target("metal"), each.decisions)
        assert records.digest_of(made) == records.digest_of(each.function)


def test_what_is_known_or_was_tried_is_not_proposed() -> None:
    found = SPACE.propose(relu(), target("opencl"), (), (), 16, 0)
    assert not SPACE.propose(relu(), target("opencl"), (), digests(found), 16, 0)
    assert not SPACE.propose(relu(), target("opencl"), [Tried(each.decisions, 1.0) for each in found], (), 16, 0)


@pytest.mark.parametrize("decisions", [{"rule": "Nothing", "at": 0}, {"rule": "Fallback", "at": 7}, {"at": 0}, [1], 3])
def test_decisions_that_do_not_fit_are_refused(decisions: object) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        SPACE.make(relu(), target("opencl"), decisions)


def test_nothing_is_proposed_for_a_processor() -> None:
    assert not SPACE.propose(relu(), NATIVE, (), (), 8, 0)
    with pytest.raises(ValueError, match="Fallback"):
        SPACE.make(relu(), NATIVE, {"rule": "Fallback", "at": 0})
