"""What the rules may choose otherwise, opened for a search.

A rule asks where there is more than one way to do something. The first way is the rule's own, so that nobody who does
not search sees a difference; a search reads off what was asked, and sends decisions for the next time:

    choices.pick("tile", [a, b, c])   →  a, and notes {"0.tile": 3}
    … with decisions {"0.tile": 2}    →  c

A name holds the stage that asks and the parameter, `0.tile`. What is asked may depend on decisions before, so that the
names differ from one run to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

Option = TypeVar("Option")


@dataclass(frozen=True)
class Choices:
    """Decisions by name, as indices of options, and what was asked: how many options there were, by name."""

    decisions: Mapping[str, int] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    prefix: str = ""

    def within(self, stage: int) -> Choices:
        """The same choices, as one stage asks for them."""
        return Choices(self.decisions, self.asked, f"{stage}.")

    def pick(self, name: str, options: Sequence[Option]) -> Option:
        """One of the options. Raises ValueError for a decision that names none of them."""
        full = self.prefix + name
        self.asked[full] = max(len(options), self.asked.get(full, 0))
        at = self.decisions.get(full, 0)
        if not 0 <= at < len(options):
            raise ValueError(f"there is no option {at} of {full}, which has {len(options)}")
        return options[at]

    def require_used(self) -> None:
        """Raises ValueError where there is a decision that nobody asked for."""
        if unknown := sorted(set(self.decisions) - set(self.asked)):
            raise ValueError(f"nothing asks for {', '.join(unknown)}")
