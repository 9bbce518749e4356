"""What rules ask of a search: which decisions there are, and that none of them changes what a function computes."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm import relax, tirx

from pipeline.compiler import ir, prepack, rules
from pipeline.compiler.rules import terms
from pipeline.compiler.rules.choices import Choices
from tests.compiler.rules.cases import NATIVE, assert_same, conv2d, fused, target

R = relax.op


def free(func: tirx.PrimFunc, *weights: int) -> tirx.PrimFunc:
    return func.with_attr(prepack.LAYOUT_FREE, list(weights))


def pool(kind, data: tuple[int, ...], padding: int, layout: str) -> tirx.PrimFunc:
    return fused(lambda emit, x: emit(kind(x, (3, 3), (2, 2), (padding, padding), layout=layout)), data)


FUNCTIONS = {
    "convolution": free(conv2d((1, 11, 13, 16), (3, 3, 16, 64), padding=1), 1),
    "depthwise": conv2d((1, 19, 14, 36), (3, 3, 1, 36), padding=1, groups=36, strides=2),
    "grouped": conv2d((1, 12, 12, 32), (1, 1, 8, 48), groups=4),
    "product": free(fused(lambda emit, x, y: emit(R.nn.relu(emit(R.matmul(x, y)))), (33, 40), (40, 96)), 1),
    "row by matrix": free(fused(lambda emit, x, y: emit(R.matmul(x, y)), (1, 120), (120, 250)), 1),
    "softmax": fused(lambda emit, x: emit(R.nn.softmax(x, -1)), (90, 214)),
    "layer norm": fused(lambda emit, x, g, b: emit(R.nn.layer_norm(x, g, b, axes=[-1])), (20, 240), (240,), (240,)),
    "pool, channels first": pool(R.nn.max_pool2d, (1, 5, 21, 23), 1, "NCHW"),
    "mean pool, channels first": pool(R.nn.avg_pool2d, (1, 5, 20, 20), 1, "NCHW"),
    "pool, channels last": pool(R.nn.max_pool2d, (1, 21, 23, 20), 1, "NHWC"),
    "elementwise": fused(lambda emit, x, y: emit(R.nn.relu(emit(R.add(x, y)))), (50, 60), (60,)),
    "transposition": fused(lambda emit, x: emit(R.permute_dims(x)), (90, 70)),
}


def asked(func: tirx.PrimFunc, decisions: dict[str, int]) -> dict[str, int]:
    choices = Choices(decisions)
    assert rules.schedule(func, NATIVE, choices) is not None
    choices.require_used()
    return choices.asked


def test_the_first_option_is_taken_and_noted_where_nothing_is_decided() -> None:
    choices = Choices()
    assert choices.pick("windows", ("a", "b")) == "a"
    assert choices.within(2).pick("tile", (1, 2, 3)) == 1
    assert choices.asked == {"windows": 2, "2.tile": 3}


def test_decisions_are_taken_and_those_that_fit_nothing_refused() -> None:
    choices = Choices({"1.tile": 2, "1.order": 1})
    assert choices.within(1).pick("tile", "abc") == "c"
    assert choices.within(0).pick("tile", "abc") == "a"
    with pytest.raises(ValueError, match=r"1\.order"):
        choices.require_used()
    with pytest.raises(ValueError, match=r"no option 2 of 1\.tile, which has 2"):
        choices.within(1).pick("tile", "ab")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_decision_alone_gives_the_same_results(name: str) -> None:
    func = FUNCTIONS[name]
    parameters = asked(func, {})
    assert parameters
    plain = ir.canonical(rules.schedule(func, NATIVE))
    changed = 0
    for parameter, options in parameters.items():
        for option in range(1, options):
            made = rules.schedule(func, NATIVE, Choices({parameter: option}))
            assert_same(func, made)
            changed += ir.canonical(made) != plain
    assert changed


def made_or_not(func: tirx.PrimFunc, choices: Choices) -> tirx.PrimFunc | None:
    """None for a decision beside which another has fewer options than alone."""
    try:
        return rules.schedule(func, NATIVE, choices)
    except ValueError as error:
        if "there is no option" in str(error):
            return None
        raise


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_decisions_together_give_the_same_results(name: str) -> None:
    func = FUNCTIONS[name]

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def together(data: st.DataObject) -> None:
        parameters = asked(func, {})
        for _ in range(3):  # a decision may open others
            drawn = {each: data.draw(st.integers(0, options - 1)) for each, options in parameters.items()}
            choices = Choices(drawn)
            made = made_or_not(func, choices)
            if made is None:
                return
            assert_same(func, made)
            parameters = choices.asked

    together()


def test_a_decision_that_fits_nothing_is_no_warning_but_an_error() -> None:
    with pytest.raises(ValueError, match="tile"):
        rules.schedule(FUNCTIONS["product"], NATIVE, Choices({"0.tile": 99}))


def test_pooling_in_steps_makes_its_padding_window_by_window() -> None:
    func = FUNCTIONS["pool, channels first"]
    made = rules.schedule(func, target("znver5"), Choices({"windows": 1}))
    assert made is not None
    unrolled = [loop for loop in terms.nodes(made.body, tirx.For) if loop.kind == tirx.ForKind.UNROLLED]
    assert [int(loop.extent) for loop in unrolled if int(loop.extent) > 1] == [3, 3] * 2  # the padding, the maximum


def test_rows_multiply_by_what_they_divided_by() -> None:
    func = FUNCTIONS["softmax"]
    before, after = (
        len(terms.nodes(rules.schedule(func, target("znver5"), Choices(decisions)).body, tirx.Mul))
        for decisions in ({}, {"0.divide": 1})
    )
    assert after == before + 1
