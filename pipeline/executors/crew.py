"""The workers of a cluster as its scheduler lists them, looked at again every second; and whether it answers at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from pipeline.errors import ExecutorError, first_line
from pipeline.executors.placing import Needs, Worker, listed, unfit, unlike

ANNOUNCED = "tvmake"  # under this name a worker says what it is
_EVERY = 1.0  # seconds
_SILENCE = 5.0  # seconds after which a scheduler that does not answer is lost …
_PER_WORKER = 0.01  # … and for each worker of which it tells so many more


def worker_of(address: str, told: Mapping[str, Any]) -> Worker:
    """What the scheduler tells of one worker."""
    said = told.get(ANNOUNCED) or {}
    return Worker(
        address=address,
        name=str(said.get("name") or told.get("name") or address),
        threads=int(told.get("nthreads", 1)),
        identities=said.get("identities") or {},
        device=str(said.get("device", "")),
        labels=frozenset(told.get("resources") or {}),
        why=str(said.get("why", "")),
    )


class Crew:
    """Who is there. `lost` is called once, with what to tell, when the scheduler is gone."""

    def __init__(self, client: Any, name: str, base: Mapping[str, str], lost: Callable[[ExecutorError], None]) -> None:
        self._client = client
        self._name = name
        self._base = base
        self._lost = lost
        self._changed = threading.Condition()
        self._all: dict[str, Worker] = {}
        self._labels: set[str] = set()  # that were ever there
        self._refused: set[str] = set()
        self._useful: dict[str, Worker] = {}  # of all, those that are like the driver
        self._fit: dict[Hashable, list[str]] = {}  # what was found out of those, by what is asked of them
        self._ends = threading.Event()

    def look(self) -> None:
        """Asks the scheduler. Raises OSError or TimeoutError where it does not answer."""
        told = self._client.sync(self._client.scheduler.identity, n_workers=-1, callback_timeout=self._patience)
        found = {address: worker_of(address, each) for address, each in told["workers"].items()}
        useful = {address: each for address, each in found.items() if not unlike(each, self._base)}
        with self._changed:
            if useful != self._useful:
                self._fit = {}
            self._all, self._useful = found, useful
            self._labels.update(label for worker in found.values() for label in worker.labels)
            self._changed.notify_all()

    def watch(self) -> None:
        """Looks again and again from here on."""
        threading.Thread(target=self._watch, name="cluster-crew", daemon=True).start()

    def close(self) -> None:
        self._ends.set()
        with self._changed:
            self._changed.notify_all()

    @property
    def _patience(self) -> float:
        return _SILENCE + _PER_WORKER * len(self._all)

    @property
    def workers(self) -> dict[str, Worker]:
        """By address, those that can be of use at all."""
        return self._useful

    @property
    def strangers(self) -> dict[str, str]:
        """By name, those that cannot: why."""
        strange = (each for address, each in self._all.items() if address not in self._useful)
        return {each.name: unlike(each, self._base) for each in strange}

    @property
    def threads(self) -> int:
        return sum(worker.threads for worker in self.workers.values())

    def fit(self, asked: Needs) -> list[str]:
        """The addresses of those that can run what asks for this."""
        wanted = (*sorted(asked.identities.items()), asked.device, asked.labels)
        return self._found(wanted, lambda a, each: not unfit(each, asked) and a not in self._refused)

    def names(self, device: str, label: str = "") -> tuple[str, ...]:
        """The names of those that are this device, and have a label where one is given."""
        there = self._found(
            ("device", device, label), lambda _, each: each.device == device and (not label or label in each.labels)
        )
        return tuple(sorted({each.name for a in there if (each := self._useful.get(a)) is not None}))

    def named(self, name: str) -> list[str]:
        """The addresses of those of a name: several where more than one was started on a machine."""
        return self._found(("name", name), lambda _, each: each.name == name)

    def _found(self, question: Hashable, answer: Callable[[str, Worker], bool]) -> list[str]:
        """The addresses of those of which something holds. Asked for each action, of a thousand workers."""
        with self._changed:
            if question not in self._fit:
                self._fit[question] = [a for a, each in self._useful.items() if answer(a, each)]
            return self._fit[question]

    def is_all(self, addresses: list[str]) -> bool:
        return len(addresses) == len(self._all)

    def has_any(self, addresses: list[str]) -> bool:
        """Whether any of these is still there; of none in particular, whether there is any worker."""
        return not self._all.keys().isdisjoint(addresses) if addresses else bool(self._all)

    def why_not(self, asked: Needs) -> str:
        """Why nobody can run it, in words that list who is there."""
        reasons = [f"{each.name} {why}" for each in self.workers.values() if (why := unfit(each, asked))]
        return "; ".join(sorted(set(reasons))[:3]) or "there is no worker"

    def has_had(self, labels: tuple[str, ...]) -> bool:
        return self._labels.issuperset(labels)

    def listed(self) -> str:
        return listed(self.workers.values())

    def refuse(self, address: str) -> None:
        """Gives nothing to a worker again that says itself that it is not what it said before."""
        with self._changed:
            self._refused.add(address)
            self._fit = {}

    def await_(self, there: Callable[[], object], seconds: float) -> bool:
        """Waits until something holds of who is there; whether it does."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: there() or self._ends.is_set(), seconds)) and bool(there())

    def _watch(self) -> None:
        answered = time.monotonic()
        while not self._ends.wait(_EVERY):
            try:
                self.look()
                answered = time.monotonic()
            except Exception as error:
                away = self._client.status == "closed" or time.monotonic() - answered > self._patience
                if away and not self._ends.is_set():
                    self._ends.set()
                    self._lost(self.gone(error))
                    return

    def gone(self, error: BaseException | None = None) -> ExecutorError:
        said = f" ({first_line(error)})" if isinstance(error, OSError) and str(error).strip() else ""
        return ExecutorError(
            f"the scheduler of {self._name} is gone{said}",
            hint="what was finished is kept; start it again and run the same command",
        )
