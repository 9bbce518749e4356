"""How axes lie: each rule against what NumPy does with an array in that form."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline.compiler.axes import (
    groups,
    identity,
    in_groups,
    last,
    order,
    through_reshape,
    through_transpose,
    with_ones,
    without,
)


def test_a_transpose_moves_nothing() -> None:
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    for perm, axes in itertools.product(itertools.permutations(range(4)), repeat=2):
        held = array.transpose(perm)
        np.testing.assert_array_equal(array.transpose(axes).transpose(through_transpose(perm, axes)), held)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((1, 12, 5, 5), (1, 3, 4, 25), [([1], [1, 2]), ([2, 3], [3])]),
        ((2, 3), (3, 2), [([0, 1], [0, 1])]),
        ((1, 8, 1, 1), (8,), [([1], [0])]),
        ((1, 1), (), []),
        ((0, 3), (3, 0), None),
    ],
)
def test_a_reshape_takes_groups_of_axes_to_groups(old: tuple, new: tuple, expected: list | None) -> None:
    assert groups(old, new) == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((1, 8, 6, 6), (1, 2, 4, 6, 6)),
        ((1, 4, 2, 6, 6), (1, 8, 6, 6)),
        ((1, 8, 6, 6), (8, 36)),
        ((2, 8, 6, 1), (2, 1, 8, 3, 2)),
        ((4, 6), (6, 4)),
    ],
)
def test_a_reshape_of_any_form_is_one_reshape_of_a_form_near_it(old: tuple, new: tuple) -> None:
    array = np.arange(np.prod(old)).reshape(old)
    grouped = groups(old, new)
    assert grouped is not None
    for perm in itertools.permutations(range(len(old))):
        held = in_groups(old, perm, grouped)
        assert sorted(held) == list(range(len(old)))
        assert order(old, in_groups(old, held, grouped)) == order(old, held)
        after = through_reshape(held, new, grouped)
        physical = tuple(new[axis] for axis in after)
        np.testing.assert_array_equal(array.transpose(held).reshape(physical), array.reshape(new).transpose(after))


def test_small_words() -> None:
    assert identity(3) == (0, 1, 2)
    assert last(4) == (0, 2, 3, 1)
    assert last(3) == (0, 2, 1)
    assert order((1, 8, 4, 1), last(4)) == (2, 1)
    assert without(last(4), [2, 3]) == (0, 1)
    assert without((2, 0, 1), [0]) == (1, 0)
    assert with_ones([2, 1], (1, 8, 4, 1)) == (0, 2, 1, 3)
