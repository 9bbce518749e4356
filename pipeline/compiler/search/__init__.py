"""Search spaces: each proposes scheduled functions for a workload, and makes any of them again from its decisions.

    rules               the CPU rules with their parameters opened: a few tens of candidates
    post-order-apply    MetaSchedule's own: its space, its mutators, its cost model
    dlight              what each of TVM's GPU rules offers

To add one, write a file with a class that has a space's members and name it in SPACES; in a workspace, write
spaces/<name>.py with an object `space`. The version enters records: raise it when the same decisions would make another
function.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from pipeline.compiler.search.dlight import DlightSpace
from pipeline.compiler.search.metaschedule import PostOrderApply
from pipeline.compiler.search.rules import RulesSpace
from pipeline.platforms import has_device_code
from pipeline.sources import object_of

if TYPE_CHECKING:
    import tvm

    from pipeline.compiler.search.costmodel import CostModel


@dataclass(frozen=True)
class Tried:
    """A candidate of this space that was tried: its decisions, and how many times as fast as the baseline it is
    (0 where it has no time)."""

    decisions: Any
    ratio: float


@dataclass(frozen=True)
class Proposal:
    """A scheduled function, whole (see pipeline.compiler.prepack), and the decisions that make it: plain JSON."""

    decisions: Any
    function: tvm.tirx.PrimFunc


class Space(Protocol):
    """One search space."""

    name: str
    version: int

    def propose(
        self,
        func: tvm.tirx.PrimFunc,
        target: tvm.target.Target,
        tried: Sequence[Tried],
        known: Collection[str],
        count: int,
        seed: int,
    ) -> Sequence[Proposal]:
        """At most `count` candidates, the most promising first, none of whose digests is `known` and none twice.

        `tried` are those of this space that were tried, `known` the digests (`digest_of` the function) of all that
        were, in any space. None at all: the space has nothing more for this workload.
        """
        ...

    def make(self, func: tvm.tirx.PrimFunc, target: tvm.target.Target, decisions: Any) -> tvm.tirx.PrimFunc:
        """The candidate that these decisions make, the same function each time. Raises ValueError where they do not
        fit the workload."""
        ...


@runtime_checkable
class Guided(Space, Protocol):
    """A space that asks a cost model."""

    def guided(self, model: CostModel | None, threads: int | None) -> Space:
        """The same space, searched by this model and on so many threads; neither changes what decisions make."""
        ...


# Names and versions are read where TVM is not loaded: import it inside a space's functions.
SPACES: tuple[Space, ...] = (RulesSpace(), PostOrderApply(), DlightSpace())


def by_name(name: str) -> Space:
    """The space of this name. Raises ValueError where there is none."""
    for space in SPACES:
        if space.name == name:
            return space
    raise ValueError(f"there is no search space {name!r}: there are {', '.join(space.name for space in SPACES)}")


def of(name: str, source: bytes | None = None) -> Space:
    """The space of this name: this project's, or that of a workspace's file.

    Raises ValueError where there is none, ConfigError for a file that cannot be used.
    """
    return by_name(name) if source is None else cast("Space", object_of(source, f"spaces/{name}.py", "space"))


def names() -> tuple[str, ...]:
    return tuple(space.name for space in SPACES)


def usual(kind: str) -> tuple[str, ...]:
    """The spaces for a target of this kind, in the order in which they are searched: the small ones first."""
    return ("dlight",) if has_device_code({"kind": kind}) else ("rules", "post-order-apply")
