"""The operators that a run has, so that no other run works on them: see `Ledger.claim`.

To ask whether another machine has an operator takes as long as a remote takes to answer some times, and a moment in
which others may object (pipeline.remotes.lanes). So those of several batches are asked for side by side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

_AT_ONCE = 32  # more would be more than a remote likes


class Claims:
    """Each operator as often as the run has a batch of it. For one thread."""

    def __init__(self, claim: Callable[[str], AbstractContextManager[bool]]) -> None:
        """`claim` is called for several operators at once, in threads of this object's."""
        self._claim = claim
        self._held: dict[str, tuple[contextlib.ExitStack, int]] = {}

    def take(self, key: str) -> bool:
        """Whether an operator is now this run's."""
        (is_ours,) = self.take_all([key])
        return is_ours

    def take_all(self, keys: Sequence[str]) -> list[bool]:
        """Which of these are now this run's. Raises what the first that fails raises; then none of them is, beyond
        what was before."""
        self._ask([key for key in dict.fromkeys(keys) if key not in self._held])
        for key in keys:
            if key in self._held:
                stack, count = self._held[key]
                self._held[key] = stack, count + 1
        return [key in self._held for key in keys]

    def release(self, key: str) -> None:
        stack, count = self._held.pop(key)
        if count > 1:
            self._held[key] = stack, count - 1
        else:
            stack.close()

    def release_all(self) -> None:
        for key in list(self._held):
            self._held.pop(key)[0].close()

    def _ask(self, keys: Sequence[str]) -> None:
        """Has those that are free held, by no batch yet."""
        if len(keys) < 2:
            asked = [self._asked(key) for key in keys]
        else:
            with ThreadPoolExecutor(min(_AT_ONCE, len(keys)), "claiming") as threads:
                asked = list(threads.map(self._asked, keys))
        failed = [each for each in asked if isinstance(each, BaseException)]
        for key, each in zip(keys, asked, strict=True):
            if isinstance(each, contextlib.ExitStack):
                if failed:
                    each.close()
                else:
                    self._held[key] = each, 0
        if failed:
            raise failed[0]

    def _asked(self, key: str) -> contextlib.ExitStack | BaseException | None:
        """What holds an operator; None where another run does."""
        stack = contextlib.ExitStack()
        try:
            if stack.enter_context(self._claim(key)):
                return stack
        except BaseException as error:
            return error
        stack.close()
        return None
