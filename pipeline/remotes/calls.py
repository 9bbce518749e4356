"""Questions to one remote: put where it may be asked, and what it does wrong counted and told of, never raised.

Owns what receiving (pipeline.remotes.receiving), sending (pipeline.remotes.sending) and looking up
(pipeline.remotes.cache) have in common.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from pipeline.errors import ConfigError, RemoteError, Trouble
from pipeline.remotes.availability import Availability, Way
from pipeline.remotes.contract import Remote
from pipeline.remotes.hands import Hands

T = TypeVar("T")
R = TypeVar("R")

_TRANSFERS = 16  # at once


@dataclass
class RemoteCounts:
    """What happened between one store and its remote.

    fetched                                       entries that came, whole, by stage
    misses                                        entries of actions that did not come
    unsigned, garbled, incomplete                 documents that were not believed, made no sense, or lack blobs
    errors                                        questions and transfers that the remote failed at
    received, sent                                bytes of blobs
    published, dropped                            entries that were sent, and that were not as the remote was away
    """

    fetched: Counter[str] = field(default_factory=Counter)
    misses: int = 0
    unsigned: int = 0
    garbled: int = 0
    incomplete: int = 0
    errors: int = 0
    received: int = 0
    sent: int = 0
    published: int = 0
    dropped: int = 0

    @property
    def hits(self) -> int:
        return self.fetched.total()


class Calls:
    """One remote, asked from many threads.

    `say` is told, in sentences, what a person should know, and `tell`, again and again, how far it is with what may
    take long; whoever shows them may put others in their place.
    """

    def __init__(self, remote: Remote, say: Callable[[str], None]) -> None:
        self.remote = remote
        self.counts = RemoteCounts()
        self.say = say
        self.tell: Callable[[str], None] = lambda sentence: None
        self._available = Availability(remote.name, self._said)
        self._hands = Hands(_TRANSFERS, "remote")
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self._is_closed = False

    def ask(self, way: Way, call: Callable[[], T]) -> T | None:
        """What a remote answers; None where it may not be asked now, or fails."""
        if not self._available.may(way):
            return None
        try:
            answer = call()
        except RemoteError as error:
            self.count(errors=1)
            self._available.failed(way, error)
            return None
        except ConfigError as error:  # what lies there is no remote
            self.count(errors=1)
            refused = RemoteError(error.message, trouble=Trouble.REFUSED, hint=error.hint)
            for each in Way:
                self._available.failed(each, refused)
            return None
        except BaseException:
            self._available.answered(way)  # the fault is on this side
            raise
        self._available.answered(way)
        return answer

    def map(self, call: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """What a call says to each item, in order, many at once."""
        return self._hands.map(call, items)

    def made_sense(self) -> None:
        """What came was what it should be."""
        self._available.made_sense()

    def garbled(self, what: str) -> None:
        """What came is none; after some of these in a row the remote is left alone."""
        self.count(garbled=1)
        error = RemoteError(f"{self.remote.name} answers with what is none: {what}", trouble=Trouble.GARBLED)
        self._available.failed(Way.READ, error)

    def is_given_up(self, way: Way) -> bool:
        """Whether the remote is not used that way any more; that was told."""
        return self._available.is_closed(way)

    def count(self, **more: int) -> None:
        """Adds to the counts of these names."""
        with self._lock:
            for name, number in more.items():
                setattr(self.counts, name, getattr(self.counts, name) + number)

    def count_fetched(self, stage: str) -> None:
        with self._lock:
            self.counts.fetched[stage] += 1

    def say_once(self, sentence: str) -> None:
        with self._lock:
            if sentence in self._told:
                return
            self._told.add(sentence)
        self._said(sentence)

    def quieten(self) -> None:
        """From now on nothing is said: what ends as it was closed is no news."""
        self._is_closed = True

    def close(self) -> None:
        """Ends connections."""
        self.quieten()
        self._hands.close()
        with suppress(RemoteError):
            self.remote.close()

    def _said(self, sentence: str) -> None:
        if not self._is_closed:
            self.say(sentence)
