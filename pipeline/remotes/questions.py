"""Whether many blobs are there, where a protocol can only ask about one: some threads that ask at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor

from pipeline.hashing import Digest

_AT_ONCE = 16


class Questions:
    """Threads that ask, started when there is something to ask. Any number of threads may use one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def missing(self, digests: Collection[Digest], has: Callable[[Digest], bool]) -> set[Digest]:
        """Those of the digests for which `has` says no. What `has` raises first is raised, and the rest not asked."""
        asked = list(digests)
        if len(asked) < 2:
            return {digest for digest in asked if not has(digest)}
        answers = [self._started().submit(has, digest) for digest in asked]
        try:
            return {digest for digest, answer in zip(asked, answers, strict=True) if not answer.result()}
        finally:
            for answer in answers:
                answer.cancel()

    def close(self) -> None:
        with self._lock:
            if self._threads is not None:
                self._threads.shutdown(wait=False, cancel_futures=True)
                self._threads = None

    def _started(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="remote-question")
            return self._threads
