"""What changed between two trees: nested mappings, as the components of a key are."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


class Absent(enum.Enum):
    """What stands for a value that is not there; None may be one that is."""

    ABSENT = "absent"


ABSENT = Absent.ABSENT


@dataclass(frozen=True)
class Change:
    """What stands at a path: before and after, one of them ABSENT where it appeared or went."""

    path: tuple[str, ...]
    before: object
    after: object


def changes(before: object, after: object, path: tuple[str, ...] = ()) -> Iterator[Change]:
    """Every place where two trees differ, in the order of the names; lists are compared whole.

    {"options": {"target": {"num-cores": 4}}}, {"options": {"target": {"num-cores": 8}}}
        →  Change(("options", "target", "num-cores"), 4, 8)
    """
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in sorted({*before, *after}):
            yield from changes(before.get(name, ABSENT), after.get(name, ABSENT), (*path, name))
    elif before != after:
        yield Change(path, before, after)
