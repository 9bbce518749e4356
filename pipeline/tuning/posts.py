"""The posts of a night: places where candidates are measured, one batch at a time at each.

Which there are says the engine, at any time anew: a post may be lost and may come back. What a post's time is charged
to is kept here; who is told of changes, and what becomes of the batch, is the night's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol


class Places(Protocol):
    """What an engine says of its posts."""

    @property
    def posts(self) -> int: ...
    @property
    def post_names(self) -> Sequence[str]: ...


@dataclass(eq=False)
class Post:
    """One of them.

    name       the engine's, or else a number; "" for the only one of an engine that names none
    since      Unix time up to which its time is charged to batches, or to none where it had nothing to do
    is_idle    nothing is on its way to it: what passes until the next batch is picked is charged to nobody
    is_lost    the engine has it no more
    losses     how often that was so
    """

    name: str
    since: float
    is_idle: bool = False
    is_lost: bool = False
    losses: int = 0

    @property
    def state(self) -> str:
        """Where it stands, as its events say it."""
        return "lost" if self.is_lost else "back" if self.losses else "new"

    def lose(self) -> None:
        self.is_lost = True
        self.losses += 1

    def begin(self, picked: float) -> None:
        """It takes up a batch that was picked at this time."""
        if self.is_idle:
            self.since = max(self.since, picked)
            self.is_idle = False

    def charge(self, now: float) -> tuple[float, float]:
        """From when on, and how many seconds, to charge to what is written now."""
        since, self.since = self.since, now
        return since, now - since


class Posts:
    """All of them, those that were lost included. For one thread."""

    def __init__(self, engine: Places) -> None:
        self._engine = engine
        self._known: dict[str, Post] = {}
        self._free: list[Post] = []  # the last one is the next to get a batch: who idles, idles on
        self._told: tuple[int, tuple[str, ...]] = (0, ())  # what the engine said last …
        self._there: Collection[str] = ()  # … and the names that come of it
        self._is_in_doubt = False  # a post was lost since
        self.count = 0  # how many there are, busy or free

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    @property
    def names(self) -> tuple[str, ...]:
        """Of those that there are; none for a single one without a name."""
        return tuple(each.name for each in self._known.values() if each.name and not each.is_lost)

    def any(self) -> Post:
        """One of them, whatever it does."""
        return next(iter(self._known.values()))

    def take(self) -> Post:
        """A free one: that which was busy last."""
        return self._free.pop()

    def give_back(self, post: Post) -> None:
        if not post.is_lost:
            self._free.append(post)
            self._is_in_doubt |= post.name not in self._there

    def rest(self, coming: int) -> None:
        """Of the free ones all idle but for so many, for which a batch is on its way."""
        for post in self._free[: max(0, len(self._free) - coming)]:
            post.is_idle = True

    def lose(self, post: Post) -> None:
        """A busy one is lost, as far as its batch can tell; the engine may say otherwise."""
        post.lose()
        self.count -= 1
        self._is_in_doubt = True

    def muster(self, now: float) -> list[Post]:
        """Asks the engine which there are. Returns those that came, or came back, and those that went while free."""
        told = (self._engine.posts, tuple(self._engine.post_names))
        if told == self._told and not self._is_in_doubt:
            return []
        self._told, self._is_in_doubt = told, False
        self._there = frozenset(there := self._listed(*told))
        gone = [each for each in self._free if each.name not in self._there]
        for post in gone:
            post.lose()
            self._free.remove(post)
        came = [name for name in there if name not in self._known or self._known[name].is_lost]
        for name in came:
            post = self._known[name] = self._known.get(name) or Post(name, now)
            post.since, post.is_lost, post.is_idle = now, False, False
            self._free.insert(0, post)
        self.count = sum(not each.is_lost for each in self._known.values())
        return [*gone, *(self._known[name] for name in came)]

    def _listed(self, count: int, names: Sequence[str]) -> list[str]:
        """Names of those that there are. Where the engine names none, those that were not lost come first."""
        if names:
            return list(names)
        known = [each.name for each in sorted(self._known.values(), key=lambda each: each.is_lost)]
        if not known and count == 1:
            return [""]
        return [*known[:count], *(str(i + 1) for i in range(len(known), count))]
