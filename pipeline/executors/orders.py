"""What travels between a driver, which wants an action performed, and a worker of a cluster, which performs it.

    Order    driver → worker   the action with its key and components, and where its blobs come from and go to
    Answer   worker → driver   the entry, or what was raised instead

Both are pickled here and not left to the cluster's own machinery: an exception keeps its class and its words, and the
scheduler never looks inside. User functions travel in an order only where the driver's user wrote them.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import StageError

if TYPE_CHECKING:
    from pipeline.memoizer import Action
    from pipeline.store import ActionEntry


@dataclass(frozen=True)
class Way:
    """How blobs reach a worker and its results come back: a store that both have as a folder, or a remote.

    run        not "" where all that is made is wanted in one run of one driver only: it travels within orders and
               answers, and lies in a store that the worker throws away. What is large comes through the remote
    durable    whether what lies in that store outlives a power failure
    temporary  where stages make their temporary files; "": where the worker does
    """

    folder: str = ""
    remote: str = ""
    run: str = ""
    durable: bool = True
    temporary: str = ""


@dataclass(frozen=True)
class Order:
    """`wanted`: identities of the driver's tools that must be the worker's. `blobs`: inputs that travel along."""

    action: Action
    key: str
    components: dict[str, object]
    way: Way
    wanted: dict[str, str]
    blobs: tuple[bytes, ...] = ()

    def packed(self) -> bytes:
        return pickle.dumps(self)


@dataclass(frozen=True)
class Answer:
    """`result` is None where the worker did not do it: it must not (`unfit` says why), or it `lacks` inputs (their
    hashes), or it was told to drop it. `worker` is its address. `blobs`: outputs that travel along."""

    result: ActionEntry | Exception | None
    corrupt: int = 0
    unfit: str = ""
    lacks: tuple[str, ...] = ()
    worker: str = ""
    blobs: tuple[bytes, ...] = ()

    def packed(self, order: Order) -> bytes:
        try:
            return pickle.dumps(self)
        except Exception as error:
            message = f"{self.result}\n(what it raised cannot be sent from one process to another: {error})"
            where = {"stage": order.action.stage.name, "subject": order.action.subject, "key": order.key}
            return pickle.dumps(Answer(StageError(message, **where), self.corrupt))
