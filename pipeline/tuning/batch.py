"""A batch of candidates: what it is, who makes, measures and keeps it, and its course at the post that measures it.

    measure ─ add records ─ retest the leader ─ learn

What is measured is written before anything else happens. A course is a generator that yields whatever call it waits
for, so that one thread follows as many as there are posts, and alone touches the scheduler and the ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec

from pipeline.errors import TvmakeError
from pipeline.tuning.account import Account
from pipeline.tuning.calls import Calls
from pipeline.tuning.posts import Post
from pipeline.tuning.records import Outcome, Record, RetestRecord, Standing, TrialRecord
from pipeline.tuning.scheduler import Scheduler, Turn
from pipeline.tuning.states import Operator, State, Terms, Why

T = TypeVar("T")
Course = Generator[Future[Any], None, T]

_FRUITLESS = 3  # batches in a row without anything new, until an operator has ended
_RETESTS = 2  # of one batch at most


class PostLostError(TvmakeError):
    """The post that measured a batch is gone, and nothing is known of the batch: it is nobody's fault. Raised by
    `Engine.measure` and `Engine.retest`; says which post, and what became of it."""


class RetestLostError(PostLostError):
    """The post is gone that retested what leads of a batch; the batch itself was written before."""


@dataclass(frozen=True)
class Batch:
    """Candidates of one operator, built and ready to be measured.

    candidates  by digest: whatever the engine needs to measure one
    records     what is known without measuring: what could not be built, a space that has nothing more
    """

    candidates: Mapping[str, Any] = field(default_factory=dict)
    records: tuple[Record, ...] = ()

    def without(self, tried: Collection[str]) -> Batch:
        """What of it nobody has tried."""
        return Batch(
            {digest: each for digest, each in self.candidates.items() if digest not in tried},
            tuple(each for each in self.records if not (isinstance(each, TrialRecord) and each.candidate in tried)),
        )


class Engine(Protocol):
    """How candidates are proposed, built and measured. Records leave `cost`, `at` and `run` to the night.

    posts       how many batches it can measure at once. Asked anew all the time: a post that is lost counts no more,
                one that is back counts again; 0 says that none will come back, and ends the night
    post_names  their names, as many; none where they have none
    """

    workers: int  # how many prepare() may run at once; 0: each in turn, in the night's own thread

    @property
    def posts(self) -> int: ...

    @property
    def post_names(self) -> Sequence[str]: ...

    def prepare(self, operator: Operator, standing: Standing, count: int) -> Batch:
        """Proposes and builds at most `count` candidates, none that the standing says was tried. In any thread."""
        ...

    def measure(self, operator: Operator, batch: Batch) -> Sequence[Record]:
        """Tries every candidate of a batch. Called for one batch at a time at each post, never for one operator at two:
        the post is quiet. Raises PostLostError where the post is lost. Its name: pipeline.tuning.calls.post()."""
        ...

    def retest(self, operator: Operator, standing: Standing, leader: TrialRecord) -> Sequence[Record]:
        """Times the leader longer, in turn with the best winner and the baseline. At a post as `measure` is."""
        ...

    def learn(self, operator: Operator, records: Sequence[Record]) -> None:
        """Takes in what was measured. May return before it is done."""
        ...

    def now(self) -> float:
        """Unix time in seconds, as a clock that only goes forward."""
        ...

    def close(self) -> None:
        """Ends what still runs; calls that are under way may raise."""
        ...


class Ledger(Protocol):
    """The sets of records, as the night uses them. Called from the night's thread alone, but for `claim`."""

    def standing(self, key: str) -> Standing:
        """Where the operator with this key stands, records of other runs included."""
        ...

    def add(self, key: str, about: Mapping[str, Any], records: Sequence[Record]) -> object:
        """Writes records; they are safe when it returns. `about` says in words what the set is of."""
        ...

    def claim(self, key: str) -> AbstractContextManager[bool]:
        """Yields whether no other run is at this operator; keeps others from it within the block. May be entered for
        several operators at once, each in a thread of its own."""
        ...


class Courses:
    """The courses of a night's batches."""

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        scheduler: Scheduler,
        account: Account,
        calls: Calls,
        run: str,
        stopped: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._ledger = ledger
        self._scheduler = scheduler
        self._account = account
        self._calls = calls
        self._run = run
        self._stopped = stopped
        self._visited: set[str] = set()
        self._fruitless: Counter[str] = Counter()

    @property
    def _terms(self) -> Terms:
        return self._scheduler.terms

    def follow(self, turn: Turn, batch: Batch, known: Collection[str], post: Post) -> Course[None]:
        """Measures a batch that was `prepared` at a post, and does all that follows. `known` was tried before.

        Raises PostLostError where the post is lost: the batch is as if it had not been begun. Once it is written,
        RetestLostError.
        """
        operator = turn.operator
        try:
            written = yield from self._measured(operator, batch, post)
        except PostLostError:
            self._scheduler.lose(turn, self._ledger.standing(operator.key))
            raise
        state = self._scheduler.finish(turn, self._ledger.standing(operator.key))
        self._account.take_in(state, written, known, post.name)
        try:
            retests = yield from self._retested(operator, written, post)
        except PostLostError as error:
            raise RetestLostError(error.message) from error
        state = self._scheduler.update(operator, self._ledger.standing(operator.key))
        if written and not self._stopped():
            yield from self._called(post, self._engine.learn, operator, [*written, *retests])
        self._end_where_fruitless(state, bool(written))

    def retest(self, operator: Operator, post: Post) -> Course[None]:
        """Retests what leads of an operator whose last retest was lost. Raises RetestLostError where this one is."""
        self._visited.discard(operator.key)
        try:
            yield from self._retested(operator, (), post)
        except PostLostError as error:
            raise RetestLostError(error.message) from error
        self._account.note_ended(self._scheduler.update(operator, self._ledger.standing(operator.key)))

    def _measured(self, operator: Operator, batch: Batch, post: Post) -> Course[list[Record]]:
        """Everything that came of a batch, written."""
        written = [*batch.records]
        try:
            if batch.candidates:
                self._account.tell_phase(operator, "measuring", post.name)
                written += yield from self._called(post, self._engine.measure, operator, batch)
        finally:
            written = self.add(operator, written, post)
        return written

    def _retested(self, operator: Operator, records: Sequence[Record], post: Post) -> Course[list[Record]]:
        """Retests what of a batch seems better than the best winner, the best first, until one is."""
        written: list[Record] = []
        standing = self._ledger.standing(operator.key)
        left = _RETESTS
        for leader in self._leaders(operator, records, standing):
            if not left or not standing.leads(leader, self._terms.noise):
                break
            if written and self._stopped():
                break  # one was enough to wait for
            self._account.tell_phase(operator, "retesting", post.name)
            again = self.add(
                operator, (yield from self._called(post, self._engine.retest, operator, standing, leader)), post
            )
            self._account.note_failures(operator, again)  # a second look may find that it is wrong
            written += again
            left -= not any(_is_gone(record) for record in again)
            standing = self._ledger.standing(operator.key)
            state = self._scheduler.update(operator, standing)
            won = standing.best is not None and standing.best.trial.candidate == leader.candidate
            gain = next((_gain(record) for record in again if _is_retest_of(record, leader)), 0.0)
            self._account.tell_retest(state, leader, gain, won, post.name)
            if won:
                break
        return written

    def _leaders(self, operator: Operator, records: Sequence[Record], standing: Standing) -> list[TrialRecord]:
        """What may be worth a retest, the best first: of a batch, or at the first one of an operator in this run of
        all, as an earlier run may have been killed before it came to this."""
        trials = [each for each in records if isinstance(each, TrialRecord)]
        if operator.key not in self._visited:
            self._visited.add(operator.key)
            return standing.leaders()
        return standing.leaders(trials)

    def _end_where_fruitless(self, state: State, is_new: bool) -> None:
        key = state.operator.key
        self._fruitless[key] = 0 if is_new else self._fruitless[key] + 1
        if state.why is None and self._fruitless[key] >= _FRUITLESS:
            self._scheduler.end(state.operator, Why.EXHAUSTED, "nothing new was proposed")
        self._account.note_ended(state)

    def add(self, operator: Operator, records: Sequence[Record], post: Post) -> list[Record]:
        """Writes records. The time of their post since the last ones is their cost."""
        if not records:
            return []
        self._account.counted = self._engine.now()
        begun, seconds = post.charge(self._account.counted)
        each = seconds / len(records)
        written: list[Record] = [
            msgspec.structs.replace(record, cost=each, at=begun + each * (i + 1), run=self._run)
            for i, record in enumerate(records)
        ]
        self._ledger.add(operator.key, operator.about, written)
        return written

    def _called(self, post: Post, call: Callable[..., T], *arguments: Any) -> Course[T]:
        """What a call of the engine's returns, once it has ended."""
        future = self._calls.begin(call, *arguments, post=post.name)
        yield future
        return future.result()


def _is_gone(record: Record) -> bool:
    """Whether a candidate cannot be made again, by this compiler or this version of its space: that costs no quiet."""
    return isinstance(record, TrialRecord) and record.outcome is Outcome.NOT_BUILT


def _is_retest_of(record: Record, leader: TrialRecord) -> bool:
    return isinstance(record, RetestRecord) and record.candidate == leader.candidate


def _gain(record: Record) -> float:
    return record.baseline / record.seconds if isinstance(record, RetestRecord) else 0.0
