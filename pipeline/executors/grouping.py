"""Orders that wait for a free worker go out together: an order costs driver and scheduler some milliseconds each.

While workers are free an order goes alone, so that nothing waits for it. Where all are busy, what has come in meanwhile
is shared out among those that become free: the more is waiting, the larger the groups.

    running < room     whoever asks sends its own order, with its share of those that wait
    running = room     it waits; whoever comes back has one of those that wait go next
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from pipeline.executors.orders import Answer, Order

_MOST = 16  # orders of a group, and bytes of what travels along
_LARGEST = 2 << 20

Give = Callable[[Sequence[Order]], Sequence[Answer | None]]


@dataclass(eq=False)
class _Waiting:
    """An order whose answer somebody waits for. `turn` is set when it is answered, and when it is to be sent."""

    order: Order
    turn: threading.Event = field(default_factory=threading.Event)
    answer: Future[Answer | None] = field(default_factory=Future)


class Groups:
    """Orders of one kind, which any of the same workers can perform. `ask` may be called from any thread.

    give  sends orders and returns their answers; None for one that has to be asked again
    room  how many groups may be on their way at once
    """

    def __init__(self, give: Give, room: Callable[[], int]) -> None:
        self._give = give
        self._room = room
        self._changed = threading.Lock()
        self._waiting: deque[_Waiting] = deque()
        self._running = 0

    def ask(self, order: Order) -> Answer | None:
        """The answer to an order. Raises what giving it out, alone or with others, raised."""
        own = _Waiting(order)
        with self._changed:
            is_to_go = self._running < self._room()
            self._running += is_to_go
            if not is_to_go:
                self._waiting.append(own)
        if not is_to_go:
            own.turn.wait()
        if not own.answer.done():
            with self._changed:
                group = self._with_others(own)
            self._send(group)
        return own.answer.result()

    def _with_others(self, first: _Waiting) -> list[_Waiting]:
        """Those that go with one that has room: a fair share of what waits."""
        free = 1 + max(0, self._room() - self._running)
        share = min(_MOST, -(-(1 + len(self._waiting)) // free))
        group, size = [first], _size(first)
        while len(group) < share and self._waiting and size + _size(self._waiting[0]) <= _LARGEST:
            size += _size(self._waiting[0])
            group.append(self._waiting.popleft())
        return group

    def _send(self, group: Sequence[_Waiting]) -> None:
        try:
            answers = self._give([each.order for each in group])
        except BaseException as error:
            for each in group:
                each.answer.set_exception(error)
        else:
            for each, answer in zip(group, answers, strict=True):
                each.answer.set_result(answer)
        finally:
            self._hand_over()
            for each in group:
                each.turn.set()

    def _hand_over(self) -> None:
        """The room of a group that came back goes to the first of those that wait."""
        with self._changed:
            if self._waiting and self._running <= self._room():
                self._waiting.popleft().turn.set()
            else:
                self._running -= 1


def _size(waiting: _Waiting) -> int:
    return sum(map(len, waiting.order.blobs))
