"""The driver's side of a cluster of dask's: an action becomes a task whose key is the action's.

    place    on this machine what reads the user's files or functions; elsewhere on a worker that fits, or on the one
             that is named
    carry    the inputs to the remote, or within the order, unless workers have this store's folder
    submit   under "tvmake-<key>": the scheduler knows it by that, so that who asks for the same waits for the same
    take     the answer, and its blobs into the store

A worker that dies has its work run elsewhere, by dask. A scheduler that is gone ends all of it: whoever waits is told.
"""

from __future__ import annotations

import contextlib
import pickle
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.errors import ExecutorError, SetupError, StageError, StoreError, WorkerDiedError, WorkerLostError
from pipeline.executors.carrying import Carrier, Carries, Passer, require_remote
from pipeline.executors.contract import HERE
from pipeline.executors.crew import Crew
from pipeline.executors.extra import ALLOWED_FAILURES
from pipeline.executors.orders import Answer, Order, Way
from pipeline.executors.placing import BASE, Needs, identities, needs
from pipeline.stages import Kind
from pipeline.store import ActionEntry
from pipeline.workers import Workers

if TYPE_CHECKING:
    from pipeline.executors import Job
    from pipeline.memoizer import Action

_LOOK = 1.0  # seconds between two looks at whether what was asked can still be answered
_GRACE = 15.0  # seconds for which workers that were there may be gone: who watches over them starts them again
_FORGET = 1.0
_AGAIN = 5  # times an action is given out, where it was not the action's fault that it came back
_AT_ONCE = 256  # actions, at most: each is waited for in a thread


@dataclass(frozen=True)
class Cluster:
    """A connection to a scheduler. `close` ends it, and the cluster where it was started for this one driver.

    is_here   whether its workers are on this machine
    patience  seconds that the first worker may take to appear
    threads   that it may come to have, where that is known
    """

    name: str
    client: Any
    close: Callable[[], None]
    is_here: bool = False
    patience: float = 2.0
    threads: int = 0


class DaskExecutor:
    """An Executor. Raises ExecutorError where no worker of the cluster can do this machine's work, ConfigError where
    there is no way for blobs to get there."""

    def __init__(self, job: Job, cluster: Cluster) -> None:
        self.say = job.say
        self._job = job
        self._cluster = cluster
        self._way, self._carrier = _way(job, cluster)
        self._own = identities(job.toolchain)
        self._here = Workers(
            job.store.root, job.jobs, job.temporary, durable=job.durable, say=lambda sentence: self.say(sentence)
        )
        self._changed = threading.Lock()
        self._waiting: set[threading.Event] = set()
        self._futures: set[Any] = set()
        self._told: set[str] = set()
        # By device and label: when any was last there, and which.
        self._posts: dict[tuple[str, str], tuple[float, tuple[str, ...]]] = {}
        self._corrupt = 0
        self._stopped = False
        self._lost: ExecutorError | None = None
        self._crew = Crew(cluster.client, cluster.name, {name: self._own[name] for name in BASE}, self._lose)
        try:
            self._await_workers()
        except BaseException:
            self.stop()
            raise
        self.limit = max(job.jobs, min(_AT_ONCE, max(self._crew.threads, cluster.threads) + 1))
        self._crew.watch()

    # the contract

    def perform(self, action: Action, key: str, components: dict[str, object]) -> ActionEntry:
        """See the contract. What no worker can do as this machine would, and needs no label, is done here."""
        if self._belongs_here(action):
            return self._here.perform(action, key, components)
        asked = needs(action, self._own)
        order = Order(action, key, components, self._way, dict(asked.identities))
        for _ in range(_AGAIN):
            places = self._placed(action, asked)
            if not places:
                return self._here.perform(action, key, components)
            if self._carrier is not None:
                order = replace(order, blobs=tuple(self._carrier.send(action.inputs.values())))
            answer = self._answered(order, asked, places)
            if answer is not None and answer.result is not None:
                return self._taken(order, answer)
        why = ": the remote does not keep what it is given" if answer is not None and answer.lacks else ""
        raise ExecutorError(
            f"{action.stage.name} of {action.subject} was given out {_AGAIN} times and came back undone{why}",
            hint="see what the workers are at: doit cluster status",
        )

    def runs_here(self, action: Action) -> bool:
        if self._cluster.is_here or self._belongs_here(action):
            return True
        return not action.post and not self._crew.fit(needs(action, self._own))

    def posts(self, device: str, label: str = "") -> tuple[str, ...]:
        """See the contract. A post that went is listed for as long as whoever watches over it may bring it back."""
        if self._cluster.is_here:
            return (HERE,)
        there, now = () if self.stopped else self._crew.names(device, label), time.monotonic()
        if there:
            self._posts[device, label] = now, there
            return there
        if (device, label) not in self._posts:
            return () if label else (HERE,)
        seen, names = self._posts[device, label]
        return names if now - seen < _GRACE and not self.stopped else ()

    def serving(self, label: str) -> str:
        there = sorted({each.device for each in self._crew.workers.values() if label in each.labels})
        if not there:
            raise ExecutorError(
                f"no worker of {self._cluster.name} is labelled {label}; its workers: {self._crew.listed()}",
                hint=self._how_to_start(f" --label {label}"),
            )
        if there[1:]:
            self._tell_once(label, f"workers labelled {label} differ; used are those that are {there[0]}")
        return there[0]

    def beside(self, job: Job) -> DaskExecutor:
        means = replace(job, remote=job.remote or self._job.remote, url=job.url or self._job.url)
        return DaskExecutor(means, replace(self._cluster, close=_leave_open))

    @property
    def stopped(self) -> bool:
        return self._stopped or self._lost is not None

    @property
    def corrupt(self) -> int:
        return self._corrupt + self._here.corrupt

    def stop(self) -> None:
        with self._changed:
            if self._stopped:
                return
            self._stopped = True
            futures = list(self._futures)
        self._crew.close()
        self._wake()
        self._here.stop()
        with contextlib.suppress(Exception):
            if futures and self._lost is None:
                self._cluster.client.cancel(futures)
        with contextlib.suppress(Exception):
            self._cluster.close()

    # where

    def _belongs_here(self, action: Action) -> bool:
        """Whether an action reads what only this machine has: a user's function, or files outside of the store."""
        return action.stage.kind is Kind.SOURCE or bool(action.places) or action.post == HERE

    def _placed(self, action: Action, asked: Needs) -> list[str]:
        """The workers that may run an action; none where it is to be run here."""
        if action.post and not self._cluster.is_here:
            return self._posted(action, asked)
        if not self._crew.workers and not self._crew.await_(lambda: self._crew.workers or self.stopped, _GRACE):
            self._lose(ExecutorError(f"all workers of {self._cluster.name} are gone", hint=self._how_to_start()))
        self._require_running(action)
        fit = self._crew.fit(asked)
        if fit or not asked.labels:
            if not fit:
                self._tell_once(action.stage.name, f"{self._crew.why_not(asked)}: {action.stage.name} is done here")
            return fit
        if self._crew.has_had(asked.labels) and self._crew.await_(lambda: self._crew.fit(asked), _GRACE):
            return self._crew.fit(asked)
        self._require_running(action)
        raise ExecutorError(
            f"{action.stage.name} of {action.subject} needs a worker labelled {', '.join(asked.labels)}, and none is "
            f"there; workers of {self._cluster.name}: {self._crew.listed()}",
            hint=self._how_to_start("".join(f" --label {label}" for label in asked.labels)),
        )

    def _posted(self, action: Action, asked: Needs) -> list[str]:
        """The one worker that is to run an action. Where it is the last post of its device, it may come back."""
        if not self._crew.names(asked.device):
            self._crew.await_(lambda: self._crew.named(action.post) or self.stopped, _GRACE)
        self._require_running(action)
        fit = self._crew.fit(asked)
        if there := [address for address in self._crew.named(action.post) if address in fit]:
            return there
        raise WorkerLostError(f"worker {action.post} is gone", hint="see who is there: doit cluster status")

    def _how_to_start(self, options: str = "") -> str:
        return f"start one: doit cluster worker {self._cluster.client.scheduler.address}{options}"

    def _await_workers(self) -> None:
        """Waits for the first worker that can be of use. Raises ExecutorError where there is none."""
        self._crew.look()
        until = time.monotonic() + self._cluster.patience
        while not self._crew.workers and not self._crew.strangers and time.monotonic() < until:
            time.sleep(0.1)
            self._crew.look()
        strangers = self._crew.strangers
        said = "; ".join(f"{name} {why}" for name, why in sorted(strangers.items())[:3])
        if not self._crew.workers and strangers:
            raise ExecutorError(
                f"no worker of {self._cluster.name} is like this machine: {said}",
                hint="have the same versions of tvmake and what it needs on both sides: doit cluster status",
            )
        if not self._crew.workers:
            raise ExecutorError(f"{self._cluster.name} has no workers", hint=self._how_to_start())
        if strangers:
            self._tell_once("strangers", f"workers that are not used: {said}")

    # giving out, and waiting

    def _answered(self, order: Order, asked: Needs, places: list[str]) -> Answer | None:
        """What a worker answered; None where it has to be asked again."""
        done = threading.Event()
        restricted = [] if self._crew.is_all(places) and not order.action.post else places
        with self._changed:
            self._waiting.add(done)
        future = None
        try:
            future = self._submitted(order, asked, restricted)
            future.add_done_callback(lambda _: done.set())
            return self._awaited(future, order, asked, restricted, done)
        finally:
            with self._changed:
                self._waiting.discard(done)
                self._futures.discard(future)
            if future is not None:
                self._release(future, is_shared=order.way.durable)

    def _release(self, future: Any, is_shared: bool) -> None:
        """Has the scheduler forget an answer: until it is told, whoever asks again gets the same, not another."""
        with self._changed:
            others = any(each.key == future.key for each in self._futures)
        with contextlib.suppress(Exception):
            future.release()
            if is_shared and not others:
                told = threading.Event()
                self._cluster.client.loop.add_callback(told.set)  # after what the release has put there
                told.wait(_FORGET)

    def _submitted(self, order: Order, asked: Needs, restricted: list[str]) -> Any:
        from pipeline.executors.working import perform

        wanted = dict.fromkeys((*asked.labels, *asked.slots), 1) or None
        try:
            future = self._cluster.client.submit(
                perform,
                order.packed(),
                key=_task_of(order),
                workers=restricted or None,
                resources=wanted,
                priority=int(order.action.stage.alone),  # what a machine is kept quiet for does not wait for the rest
            )
        except (TypeError, AttributeError, pickle.PicklingError):
            raise  # what cannot be sent: the action's fault
        except Exception as error:
            self._lose(self._crew.gone(error))
            self._require_running(order.action)
            raise
        with self._changed:
            self._futures.add(future)
        return future

    def _awaited(
        self, future: Any, order: Order, asked: Needs, restricted: list[str], done: threading.Event
    ) -> Answer | None:
        seen = time.monotonic()
        while not done.wait(_LOOK):
            self._require_running(order.action)
            if self._crew.has_any(restricted):
                seen = time.monotonic()
            elif time.monotonic() - seen > _GRACE or self._crew.fit(asked) or order.action.post:
                # None of those that may run it is left: they are gone for good, or came back as others.
                future.cancel()
                if order.action.post:
                    raise WorkerLostError(f"worker {order.action.post} went while it worked")
                return None
        self._require_running(order.action)
        if future.status == "error":
            raise self._blamed(future.exception(timeout=_GRACE), order)
        try:
            answer: Answer = pickle.loads(future.result(timeout=_GRACE))
        except Exception:  # cancelled by another, or the worker that had it died just now
            self._crew.await_(lambda: self.stopped, _LOOK)
            self._require_running(order.action)
            return None
        if answer.unfit:
            self._tell_once(answer.unfit, answer.unfit)
            self._crew.refuse(answer.worker)
        if answer.lacks and self._carrier is not None:
            self._carrier.forget(answer.lacks)
        return answer

    def _blamed(self, error: BaseException, order: Order) -> Exception:
        """What it means that dask itself could not run a task."""
        action = order.action
        if type(error).__name__ == "KilledWorker":
            return WorkerDiedError(
                f"{ALLOWED_FAILURES + 1} workers of {self._cluster.name} died while they ran it",
                stage=action.stage.name,
                subject=action.subject,
                key=order.key,
                hint="see the workers' own output; perhaps it wants more memory than they have",
            )
        return ExecutorError(
            f"{self._cluster.name} could not run {action.stage.name} of {action.subject}: "
            f"{type(error).__name__}: {error}",
            hint="have the same tvmake on workers and scheduler: doit cluster status",
        )

    def _taken(self, order: Order, answer: Answer) -> ActionEntry:
        with self._changed:
            self._corrupt += answer.corrupt
        if not isinstance(answer.result, ActionEntry):
            assert answer.result is not None
            raise self._placed_error(answer.result, answer.worker)
        if self._carrier is not None:
            self._carrier.fetch(answer.result, answer.blobs)
            self._job.store.commit(order.key, answer.result)
        return answer.result

    def _placed_error(self, error: Exception, address: str) -> Exception:
        """What a worker raised; its name with it, where the fault may be its machine's."""
        worker = self._crew.workers.get(address)
        if isinstance(error, SetupError | StoreError) and worker is not None and not self._cluster.is_here:
            error.message = f"worker {worker.name}: {error.message}"
        return error

    # ends

    def _require_running(self, action: Action) -> None:
        """Raises what there is to say where nothing is performed any more."""
        if self._stopped:
            raise StageError("the build was stopped", stage=action.stage.name, subject=action.subject)
        if self._lost is not None:
            raise ExecutorError(self._lost.message, hint=self._lost.hint) from self._lost

    def _lose(self, why: ExecutorError) -> None:
        with self._changed:
            if self._lost is not None or self._stopped:
                return
            self._lost = why
        self._crew.close()
        self._wake()

    def _wake(self) -> None:
        with self._changed:
            for done in self._waiting:
                done.set()

    def _tell_once(self, about: str, sentence: str) -> None:
        with self._changed:
            if about in self._told:
                return
            self._told.add(about)
        self.say(sentence)


def _way(job: Job, cluster: Cluster) -> tuple[Way, Carries | None]:
    """How blobs get to the workers of a cluster, and who carries them where they must be carried."""
    temporary = str(job.temporary or "")
    if cluster.is_here:
        return Way(str(job.store.root), durable=job.durable, temporary=temporary), None
    carrier = Carrier(job.store, require_remote(job.remote, cluster.name))
    if job.durable:
        return Way(remote=job.url), carrier
    return Way(remote=job.url, run=secrets.token_hex(8), durable=False), Passer(job.store, carrier)


def _task_of(order: Order) -> str:
    """What the scheduler knows an order by. What is for one run of a driver is nobody else's."""
    return f"tvmake-{order.key}{'' if order.way.durable else f'-{secrets.token_hex(8)}'}"


def _leave_open() -> None:
    """Whoever opened the cluster closes it."""
