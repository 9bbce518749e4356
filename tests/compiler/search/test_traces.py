"""Traces as plain JSON: what is proposed for the operators of real networks is made again, and nothing else is."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tvm

from pipeline.compiler import ir, prepack, records, targets
from pipeline.compiler.search import PostOrderApply, Proposal, traces
from tests.compiler.search.workloads import NATIVE, conv, proposed, relu

# The names of the operators that are taken from each network: one of each kind.
NETWORKS = {
    "squeezenet": ("fused_conv2d_add_relu", "max_pool2d", "softmax"),
    "shufflenet": ("fused_conv2d_add_relu", "depthwise", "dense", "avg_pool2d"),
}


def operators(network: str) -> dict[str, tvm.tirx.PrimFunc]:
    """The unique functions of a network by their names and shapes."""
    pytest.importorskip("onnx")
    zoo = pytest.importorskip("bench.zoo")
    from pipeline.compiler.frontends import onnx
    from pipeline.stages.extract import lower_skeleton

    read = onnx.read(lambda: zoo.light(network), {}, [])
    weights = [spec.name for spec, _ in read.weights]
    options = {"kind": "onnx", "weights": weights, "target": targets.resolve("native")}
    lowered, _ = lower_skeleton(read.skeleton, options)
    return {
        f"{each.name} {' '.join(each.shapes)}": ir.load(each.canonical)
        for each in lowered.functions.values()
        if each.calls
    }


def uses(func: tvm.tirx.PrimFunc) -> Iterator[tvm.tirx.PrimFunc]:
    """A function with its weights' layout free, and the same where they have another use."""
    yield func
    if prepack.layout_free(func):
        yield func.without_attr(prepack.LAYOUT_FREE)


@pytest.mark.parametrize("network", NETWORKS)
def test_what_is_proposed_for_a_networks_operators_is_made_again(network: str) -> None:
    known = operators(network)
    # One of each name: layers of one kind differ in shape alone.
    chosen = {name.partition(" ")[0]: func for name, func in known.items()}
    replayed, packed = 0, 0
    for func in (use for each in chosen.values() for use in uses(each)):
        for proposal in proposed(func, count=3, space=PostOrderApply()):
            written = json.loads(json.dumps(proposal.decisions))
            assert written == proposal.decisions
            made = traces.make(func, NATIVE, written)
            assert records.digest_of(made) == records.digest_of(proposal.function)
            assert ir.canonical(made) == ir.canonical(proposal.function)
            assert prepack.layout_free(made) == prepack.layout_free(func)
            assert not (made.attrs or {}).get("global_symbol")
            replayed += 1
            packed += bool(prepack.split(made)[1])
    assert replayed >= 15
    assert 0 < packed < replayed


@pytest.fixture(scope="module")
def one() -> tuple[tvm.tirx.PrimFunc, Proposal]:
    func = conv()
    return func, proposed(func, count=1)[0]


def test_a_trace_survives_text_and_gives_the_same_bytes_twice(one: tuple[tvm.tirx.PrimFunc, Proposal]) -> None:
    func, proposal = one
    text = json.dumps(proposal.decisions)
    first, second = (traces.make(func, NATIVE, json.loads(text)) for _ in range(2))
    assert ir.canonical(first) == ir.canonical(second) == ir.canonical(proposal.function)
    assert traces.plain(traces.replayed(traces.module_of(func), NATIVE, proposal.decisions).trace) == json.loads(text)


def test_which_weights_are_free_is_the_workloads_to_say(one: tuple[tvm.tirx.PrimFunc, Proposal]) -> None:
    _, proposal = one
    held = traces.make(conv(free=False), NATIVE, proposal.decisions)
    assert prepack.layout_free(held) == frozenset()
    assert records.digest_of(held) == records.digest_of(proposal.function)


def test_what_a_search_may_change_ends_where_post_processing_begins(one: tuple[tvm.tirx.PrimFunc, Proposal]) -> None:
    _, proposal = one
    instructions, decisions = traces.searched(proposal.decisions)
    names = [instruction[0] for instruction in instructions]
    assert "SamplePerfectTile" in names
    assert not {"EnterPostproc", "TransformLayout", "Parallel", "Vectorize"} & set(names)
    assert decisions == proposal.decisions[1]
    assert traces.searched([instructions, decisions]) == [instructions, decisions]


def edited(change: Callable[[list[Any], list[Any]], object]) -> Callable[[Any], Any]:
    def edit(decisions: Any) -> Any:
        decisions = copy.deepcopy(decisions)
        change(*decisions)
        return decisions

    return edit


def first(instructions: list[Any], name: str) -> list[Any]:
    return next(each for each in instructions if each[0] == name)


MISFITS = {
    "a renamed instruction": edited(lambda listed, _: first(listed, "Split").__setitem__(0, "Spilt")),
    "a missing block": edited(lambda listed, _: first(listed, "GetSBlock")[2].__setitem__(0, "block77")),
    "a missing loop": edited(lambda listed, _: first(listed, "Split")[1].__setitem__(0, "l777")),
    "another function": edited(lambda listed, _: first(listed, "GetSBlock")[2].__setitem__(1, "other")),
    "attributes gone": edited(lambda listed, _: first(listed, "SamplePerfectTile")[2].clear()),
    "a tile in words": edited(lambda _, chosen: chosen[1].__setitem__(1, ["many"])),
    "a decision of nothing": edited(lambda _, chosen: chosen.append([9999, 1])),
    "a torn instruction": edited(lambda listed, _: listed.__setitem__(3, ["Annotate"])),
    "garbage of TVM's": edited(
        lambda listed, _: first(listed, "TransformLayout")[1].__setitem__(1, '{"root_index":3}')
    ),
    "nothing": lambda _: None,
    "rules' decisions": lambda _: {"tile": 3},
    "a number": lambda _: 7,
    "text": lambda _: "trace",
    "one list": lambda _: [[]],
    "numbers": lambda _: [[1], [2]],
    "nested text": lambda _: [["Split"], []],
    "decisions alone": lambda decisions: decisions[1],
    "swapped": lambda decisions: decisions[::-1],
}


@pytest.mark.parametrize("damage", MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_refused_in_one_line(
    one: tuple[tvm.tirx.PrimFunc, Proposal], damage: Callable[[Any], Any]
) -> None:
    func, proposal = one
    with pytest.raises(ValueError, match=r"not a trace|not a decision|does not fit") as refusal:
        traces.make(func, NATIVE, damage(proposal.decisions))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_a_trace_of_another_operator_does_not_fit(one: tuple[tvm.tirx.PrimFunc, Proposal]) -> None:
    _, proposal = one
    with pytest.raises(ValueError, match="does not fit"):
        traces.make(relu(), NATIVE, proposal.decisions)
