"""Entries and their blobs to a remote, behind the work: blobs that it lacks first, what names them last."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from pipeline.errors import StoreError, first_line
from pipeline.hashing import Digest
from pipeline.remotes import results
from pipeline.remotes.availability import Way
from pipeline.remotes.calls import Calls
from pipeline.remotes.results import Result
from pipeline.store import ActionEntry, Store

Entry = ActionEntry | Callable[[], ActionEntry]  # what is yet to be made is made when it is sent

_TOGETHER = 64  # actions whose blobs are asked about in one question


class Sender:
    """What waits to be sent, and who sends it. `signed` makes of an entry what goes over. Every method may be called
    from any thread."""

    def __init__(self, store: Store, calls: Calls, signed: Callable[[str, ActionEntry], Result]) -> None:
        self._store = store
        self._calls = calls
        self._signed = signed
        self._changed = threading.Condition()
        self._queue: list[tuple[str, Entry]] = []
        self._active = 0  # entries that are under way
        self._thread: threading.Thread | None = None
        self._ends = False

    def publish(self, key: str, entry: Entry) -> None:
        """Has an entry, whose blobs the local store has, sent with them while the work goes on."""
        with self._changed:
            if self._ends:
                return
            self._queue.append((key, entry))
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_all, name="remote-sender", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def send(self, entries: Sequence[tuple[str, ActionEntry]]) -> int:
        """Sends entries with their blobs now; how many of them are there."""
        digests = {digest for _, entry in entries for digest in entry.outputs.values()}
        missing = self._calls.ask(Way.WRITE, lambda: self._calls.remote.missing(digests)) if digests else set()
        if missing is None:
            self._calls.count(dropped=len(entries))
            return 0
        sent = dict(zip(missing, self._calls.map(self._send_blob, missing), strict=True))
        whole = [each for each in entries if all(sent.get(digest, True) for digest in each[1].outputs.values())]
        done = sum(self._calls.map(lambda each: self._send_entry(*each), whole))
        self._calls.count(published=done, dropped=len(entries) - done)
        return done

    def waiting(self) -> int:
        """How many entries are not sent yet."""
        with self._changed:
            return len(self._queue) + self._active

    def drain(self, progress: Callable[[int], None] | None = None) -> None:
        """Waits until what was published is sent, or the remote is given up; tells what is left from time to time."""
        with self._changed:
            while self._queue or self._active:
                self._changed.wait(0.25)
                if progress is not None:
                    progress(len(self._queue) + self._active)

    def close(self) -> None:
        """Drops what was not sent."""
        with self._changed:
            self._ends = True
            self._queue.clear()
            self._changed.notify_all()

    def _send_all(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._ends:
                    self._changed.wait()
                if self._ends:
                    return
                taken = self._queue[:_TOGETHER]
                del self._queue[: len(taken)]
                self._active = len(taken)
            try:
                if not self._sent(taken) and len(taken) > 1:  # one that cannot be sent keeps no other from it
                    for each in taken:
                        self._sent([each])
            finally:
                with self._changed:
                    self._active = 0
                    self._changed.notify_all()

    def _sent(self, taken: Sequence[tuple[str, Entry]]) -> bool:
        """Sends entries, and counts those that the remote does not take; False where this side has none to send."""
        try:
            self.send([(key, entry() if callable(entry) else entry) for key, entry in taken])
        except Exception as error:
            if len(taken) == 1:
                self._calls.count(dropped=1)
                if not isinstance(error, StoreError):
                    name = self._calls.remote.name
                    self._calls.say_once(f"what cannot be sent to {name} stays here: {first_line(error)}")
            return False
        return True

    def _send_blob(self, digest: Digest) -> bool:
        path = self._store.path(digest)
        if path is None:
            return False  # somebody removed it meanwhile: the entry stays here
        sent = self._put(lambda: self._calls.remote.put_blob(digest, path))
        if sent:
            self._calls.count(sent=digest.size)
        return sent

    def _send_entry(self, key: str, entry: ActionEntry) -> bool:
        document = results.to_document(self._signed(key, entry))
        return self._put(lambda: self._calls.remote.put_action(key, document))

    def _put(self, call: Callable[[], None]) -> bool:
        def put() -> bool:
            call()
            return True

        return bool(self._calls.ask(Way.WRITE, put))
