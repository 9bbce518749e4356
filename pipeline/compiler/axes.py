"""How a tensor's axes may lie in memory: arithmetic of permutations and shapes, and nothing else.

A form is a permutation p of the logical axes: physical = permute_dims(logical, p).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Permutation = tuple[int, ...]
Shape = tuple[int, ...]
Groups = Sequence[tuple[list[int], list[int]]]


def identity(rank: int) -> Permutation:
    return tuple(range(rank))


def last(rank: int) -> Permutation:
    """Channels-last of (n, c, …): 0 2 3 1 for four axes."""
    return (0, *range(2, rank), 1)


def order(shape: Shape, perm: Permutation) -> Permutation:
    """The axes that have an extent, as they lie in memory: forms with equal orders hold the same bytes.

    (1, 8, 4, 1), 0 2 3 1  →  2 1
    """
    return tuple(axis for axis in perm if shape[axis] != 1)


def through_transpose(perm: Permutation, axes: Permutation) -> Permutation:
    """The form of permute_dims(x, axes) that is a form of x as it lies: nothing moves."""
    return tuple(axes.index(axis) for axis in perm)


def groups(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]] | None:
    """Which axes a reshape makes of which, where extents of 1 are left out; None for empty tensors.

    (1, 12, 5, 5) → (1, 3, 4, 25)   →   ([1], [1, 2]), ([2, 3], [3])
    """
    if 0 in old or 0 in new:
        return None
    olds = [axis for axis, extent in enumerate(old) if extent != 1]
    news = [axis for axis, extent in enumerate(new) if extent != 1]
    found = []
    while olds:
        mine, theirs = [olds.pop(0)], [news.pop(0)]
        size, wanted = old[mine[0]], new[theirs[0]]
        while size != wanted:
            if size < wanted:
                mine.append(olds.pop(0))
                size *= old[mine[-1]]
            else:
                theirs.append(news.pop(0))
                wanted *= new[theirs[-1]]
        found.append((mine, theirs))
    return found


def in_groups(shape: Shape, perm: Permutation, grouped: Groups) -> Permutation:
    """The form nearest to `perm` in which each group's axes lie side by side and in order: where its last one lies."""
    place = {axis: i for i, axis in enumerate(perm)}
    ordered = sorted((mine for mine, _ in grouped), key=lambda mine: max(place[axis] for axis in mine))
    return with_ones([axis for mine in ordered for axis in mine], shape)


def through_reshape(perm: Permutation, new: Shape, grouped: Groups) -> Permutation:
    """The form of a reshape's result that is its argument's form as it lies; its groups lie side by side, in order."""
    place = {axis: i for i, axis in enumerate(perm)}
    ordered = sorted(grouped, key=lambda group: place[group[0][0]])
    return with_ones([axis for _, theirs in ordered for axis in theirs], new)


def with_ones(axes: Iterable[int], shape: Shape) -> Permutation:
    """A form with these axes in this order, and those of extent 1 where they are in the logical one."""
    perm = list(axes)
    for axis, extent in enumerate(shape):
        if extent == 1:
            perm.insert(axis, axis)
    return tuple(perm)


def without(perm: Permutation, gone: Iterable[int]) -> Permutation:
    """A form after axes are gone."""
    left = [axis for axis in perm if axis not in set(gone)]
    return tuple(sorted(left).index(axis) for axis in left)
