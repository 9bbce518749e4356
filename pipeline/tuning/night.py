"""The loop of a night: batches are prepared side by side, measured one at a time at each post, and written at once.

    pick ─ claim ─ prepare ┐   ┌ post ─ measure ─ add records ─ retest the leader ─ learn ─ pick …
    pick ─ claim ─ prepare ┼───┤
    pick ─ claim ─ prepare ┘   └ post ─ measure ─ …

One thread picks, claims, writes and tells; the engine's calls run elsewhere, and the loop goes on with whichever has
ended. What a batch goes through at its post: pipeline.tuning.batch. At which post: pipeline.tuning.posts.

What is measured is written before anything else happens, so that a night that is killed loses the running batches at
most. A first `stop()` lets the batches end that are being measured, with one retest each of what leads in them, and
drops those in preparation; a second one gives up at once. What one sees of it are events: pipeline.tuning.events.

An engine that fails for one operator puts that operator aside. Three failures of one kind in a row are the machine's,
and end the night. The store's errors end it at once, and so does the loss of what runs stages elsewhere. Where a post
is lost its batch is as if it had not been begun, and a retest is made again; whoever loses three in a row is put aside,
and a night without a post ends. Needs no TVM.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import ExecutorError, StoreError, last_line
from pipeline.tuning.account import POST_LOST, Account
from pipeline.tuning.batch import Batch as Batch
from pipeline.tuning.batch import Course, Courses, RetestLostError
from pipeline.tuning.batch import Engine as Engine
from pipeline.tuning.batch import Ledger as Ledger
from pipeline.tuning.batch import PostLostError as PostLostError
from pipeline.tuning.calls import Calls, InTurn, Threads
from pipeline.tuning.claims import Claims
from pipeline.tuning.events import End, Ended, Watcher
from pipeline.tuning.posts import Post, Posts
from pipeline.tuning.records import CompletedRecord, Outcome
from pipeline.tuning.scheduler import Scheduler, Turn
from pipeline.tuning.states import Operator, State, Terms, Why

_POLL = 0.1  # seconds until a stop is seen while something is waited for
_ELSEWHERE = 0.5  # seconds until operators that another run has are asked for again
_IN_A_ROW = 3  # failures of one kind that are no longer an operator's own; posts that one operator may lose


@dataclass(eq=False)
class _Pending:
    """A batch in preparation, or ready."""

    turn: Turn
    picked: float
    batch: Future[Batch]
    is_ready: bool = False


@dataclass(eq=False)
class _Running:
    """A batch at a post."""

    post: Post
    course: Course[None]


class _GivenUpError(Exception):
    """stop() was called twice."""


class Night:
    """One run of `doit tune`. Closes the engine at its end."""

    def __init__(
        self,
        operators: Sequence[Operator],
        engine: Engine,
        ledger: Ledger,
        terms: Terms,
        watcher: Watcher,
        run: str = "",
        scheduler: Scheduler | None = None,
        calls: Calls | None = None,
    ) -> None:
        """`calls` for simulations alone; a `scheduler` that is given has terms with as many posts as the engine."""
        terms = replace(terms, posts=max(1, engine.posts))
        self.scheduler = scheduler or Scheduler(operators, ledger.standing, terms)
        self._engine = engine
        self._ledger = ledger
        self._run = run
        self._stops = 0
        self._calls = calls or (Threads() if engine.workers else InTurn())
        self._account = Account(self.scheduler, watcher, engine.now)
        self._courses = Courses(
            engine, ledger, self.scheduler, self._account, self._calls, run, lambda: bool(self._stops)
        )
        self._posts = Posts(engine)
        self._pending: list[_Pending] = []
        self._preparing: dict[Future[Batch], _Pending] = {}
        self._running: dict[Future[Any], _Running] = {}  # by the call that they wait for
        # Whose post was lost, or whose run ended, before what leads of them was retested.
        self._unretested = deque(self.scheduler.owed_retests())
        self._elsewhere: list[Turn] = []
        self._waits = False  # for other runs, and has said so
        self._claims = Claims(ledger.claim)
        self._in_hand: dict[str, Collection[str]] = {}  # digests that are being measured, by operator
        self._row: tuple[str, int] = ("", 0)  # kind of the last failures, and how many there were in a row
        self._lost: Counter[str] = Counter()  # posts in a row, by operator
        self._last_lost = ""  # what was said of the last post that was lost
        self._is_deserted = False  # no post is left
        self._broken = ""

    def stop(self) -> None:
        """Ends the night at the next safe point; called again, at once. From a signal handler or any thread."""
        self._stops += 1

    def run(self) -> Ended:
        """Works until all is done, the budget is spent or it is stopped.

        Raises StoreError, and whatever is not the engine's, after what was measured is written and the end is told.
        """
        self._posts.muster(self._engine.now())
        self._account.begin(self._run, self._posts.names)
        try:
            self._work_and_leave()
        except BaseException as error:
            self._broken = last_line(error)
            self._account.tell_ended(self._account.ended(self._end(), self._broken))
            raise
        ended = self._account.ended(self._end(), self._broken)
        if ended.end is not End.STOPPED and not self._broken:
            self._complete()
        self._account.tell_ended(ended)
        return ended

    def _complete(self) -> None:
        """Notes that the budget was used to its end: the same one again gives these operators nothing."""
        budget = self.scheduler.terms.budget
        for state in self.scheduler.states.values():
            if budget is not None and state.why is not Why.PUT_ASIDE and state.completed < budget:
                record = CompletedRecord(budget=budget, at=self._engine.now(), run=self._run)
                self._ledger.add(state.operator.key, state.operator.about, [record])

    # The loop.

    def _work_and_leave(self) -> None:
        with contextlib.ExitStack() as leaving:
            leaving.callback(self._engine.close)
            leaving.callback(self._claims.release_all)
            leaving.callback(self._write_what_is_ready)
            leaving.callback(self._give_up_what_runs)
            with contextlib.suppress(_GivenUpError):
                self._work()

    def _work(self) -> None:
        while True:
            while (ended := self._calls.ended(0.0)) is not None:
                self._go_on(ended)
            if not self._running and (self._stops or self._broken):
                return
            if not (self._stops or self._broken) and self._begin():
                continue
            if self._running or self._preparing:
                self._await()
            elif self._elsewhere and not self._is_over() and not self._broken:
                self._wait_for_others()
            else:
                return

    def _begin(self) -> bool:
        """Whether a batch was taken up, or dropped. Where posts are free, others are put in preparation for them."""
        self._muster()
        if not self._posts.has_free or self._broken:
            return False
        self._fill()
        if self._unretested and not self._stops:
            post = self._posts.take()
            self._step(_Running(post, self._retested(self._unretested.popleft(), post)))
            return True
        coming = (each for each in self._pending if each.turn.operator.key not in self._in_hand)
        ready = next((each for each in coming if each.is_ready), None)
        if ready is None:
            self._posts.rest(sum(each.turn.operator.key not in self._in_hand for each in self._pending))
            return False
        if not self._stops:
            self._pending.remove(ready)
            post = self._posts.take()
            self._step(_Running(post, self._taken_up(ready, post)))
        return True

    def _fill(self) -> None:
        """Has as many batches in preparation as the engine takes, and ready as there are posts."""
        workers = max(1, self._engine.workers)
        while True:
            most = min(max(workers, self._posts.count) - len(self._pending), workers - len(self._preparing))
            turns = list(self._picked(most))
            if not turns:
                return
            claimed = self._claims.take_all([turn.operator.key for turn in turns])
            for turn, is_ours in zip(turns, claimed, strict=True):
                if is_ours:
                    self._prepare(turn)
                else:
                    self._elsewhere.append(turn)

    def _picked(self, most: int) -> Iterator[Turn]:
        """What is next, at most so many: claims are asked for together, as each may take a moment."""
        for _ in range(most):
            turn = self.scheduler.pick(self._account.elapsed) if not self._stops else None
            if turn is None:
                return
            yield turn

    def _prepare(self, turn: Turn) -> None:
        """Has the engine prepare a batch of an operator that this run has claimed."""
        key = turn.operator.key
        standing = self._ledger.standing(key)
        if len(standing.trials) != self.scheduler.states[key].trials:  # another run was there in the meantime
            self.scheduler.put_back(turn)
            self._account.note_ended(self.scheduler.update(turn.operator, standing))
            self._claims.release(key)
            return
        known = replace(standing, tried=standing.tried.union(self._in_hand.get(key, ())))
        self._account.tell_phase(turn.operator, "preparing")
        picked = self._engine.now()
        batch = self._calls.begin(self._engine.prepare, turn.operator, known, turn.count)
        self._preparing[batch] = pending = _Pending(turn, picked, batch)
        self._pending.append(pending)

    def _await(self) -> None:
        """Waits a moment for a call to end."""
        if self._stops > 1:
            raise _GivenUpError
        ended = self._calls.ended(_POLL)
        if ended is not None:
            self._go_on(ended)

    def _go_on(self, ended: Future[Any]) -> None:
        """Something is prepared, or a batch has what it waits for."""
        if ended in self._preparing:
            self._preparing.pop(ended).is_ready = True
        elif ended in self._running:
            self._step(self._running.pop(ended))

    def _step(self, running: _Running) -> None:
        waits_for = next(running.course, None)
        if waits_for is not None:
            self._running[waits_for] = running
        else:
            self._posts.give_back(running.post)

    def _is_over(self) -> bool:
        budget = self.scheduler.terms.budget
        return budget is not None and self._account.elapsed >= budget

    def _wait_for_others(self) -> None:
        """Other runs have all operators that are left. To wait for them costs no operator anything."""
        if not self._waits:
            self._account.tell_paused("another run is at all operators that are left")
            self._waits = True
        for _ in range(round(_ELSEWHERE / _POLL)):
            if not self._stops:
                time.sleep(_POLL)
        self._account.counted = self._engine.now()
        self._ask_for_others()

    def _ask_for_others(self) -> None:
        """Sees what became of operators that another run had, and lets them be picked again."""
        asked, self._elsewhere = self._elsewhere, []
        for turn in asked:
            self.scheduler.put_back(turn)
            self._account.note_ended(self.scheduler.update(turn.operator, self._ledger.standing(turn.operator.key)))

    # One batch.

    def _taken_up(self, pending: _Pending, post: Post) -> Course[None]:
        turn, operator = pending.turn, pending.turn.operator
        self._waits = False
        try:
            if not self.scheduler.may_go_on(turn, self._account.elapsed):
                self.scheduler.put_back(turn)
                return  # the budget was spent, or the operator ended, while it was prepared
            before = self._ledger.standing(operator.key)
            batch = pending.batch.result().without(before.tried)
            self.scheduler.prepared(turn)
            self._in_hand[operator.key] = set(batch.candidates)
            if self._engine.workers:
                self._fill()  # others are prepared while this one is measured
            if self._stops:
                self._pending.append(pending)  # built, and not measured
                return
            post.begin(pending.picked)
            known = {each.candidate for each in (*before.trials, *before.claims)}
            yield from self._watched(operator, post, self._courses.follow(turn, batch, known, post))
        except (StoreError, ExecutorError):
            raise
        except Exception as error:  # an engine may fail in any way: that is the operator's, until it is everyone's
            self._put_aside(operator, error)
        finally:
            self._leave(operator, post)
        self._ask_for_others()

    def _retested(self, operator: Operator, post: Post) -> Course[None]:
        """What leads of an operator, once more after its post was lost; also of one that has ended."""
        if not self._claims.take(operator.key):
            return  # another run has it, and sees to it
        self._in_hand[operator.key] = ()
        post.begin(self._engine.now())
        try:
            yield from self._watched(operator, post, self._courses.retest(operator, post))
        except (StoreError, ExecutorError):
            raise
        except Exception as error:
            self._put_aside(operator, error)
        finally:
            self._leave(operator, post)

    def _watched(self, operator: Operator, post: Post, course: Course[None]) -> Course[None]:
        """A course, and what becomes of it where its post is lost."""
        try:
            yield from course
        except PostLostError as error:
            self._lose(post, operator, last_line(error))
            if isinstance(error, RetestLostError) and self.scheduler.states[operator.key].why is not Why.PUT_ASIDE:
                self._unretested.append(operator)
        else:
            self._row = ("", 0)
            del self._lost[operator.key]

    def _leave(self, operator: Operator, post: Post) -> None:
        self._in_hand.pop(operator.key, None)
        self._claims.release(operator.key)
        self._account.tell_phase(operator, "", post.name)

    def _give_up_what_runs(self) -> None:
        """What is known of batches that are at a post is written, before they are measured to their ends or not."""
        for running in self._running.values():
            running.course.close()

    def _write_what_is_ready(self) -> None:
        """What is known of batches that were built and will not be measured."""
        for each in self._pending:
            if each.batch.done() and each.batch.exception() is None:
                tried = self._ledger.standing(each.turn.operator.key).tried
                records = each.batch.result().without(tried).records
                self._courses.add(each.turn.operator, records, self._posts.any())

    # What goes wrong.

    def _put_aside(self, operator: Operator, error: Exception) -> None:
        kind, said = type(error).__name__, last_line(error)
        self._row = (kind, self._row[1] + 1 if self._row[0] == kind else 1)
        self._account.note_failure(kind, operator, said)
        self._account.note_ended(self.scheduler.end(operator, Why.PUT_ASIDE, said))
        if self._row[1] >= _IN_A_ROW:
            self._broken = f"{_IN_A_ROW} operators in a row failed, the last with: {said}"

    def _lose(self, post: Post, operator: Operator, said: str) -> None:
        """A post is gone, with the batch that it had. The operator may be picked again, but not for ever: it may be
        what posts die of."""
        self._posts.lose(post)
        self._last_lost = said
        self._account.note_failure(POST_LOST, operator, said)
        self._account.tell_post(post, self._posts.count, operator.name, said)
        self._lost[operator.key] += 1
        if (times := self._lost[operator.key]) >= _IN_A_ROW:
            why = f"its post was lost {times} times in a row, the last time: {said}"
            self._account.note_ended(self.scheduler.end(operator, Why.PUT_ASIDE, why))

    def _muster(self) -> None:
        """Asks the engine for its posts, and ends the night where there is none."""
        for post in self._posts.muster(self._engine.now()):
            self._account.tell_post(post, self._posts.count)
        count = self._posts.count
        if not count:
            last = f"; the last one: {self._last_lost}" if self._last_lost else ""
            self._broken = f"there is no post to measure at{last}"
            self._is_deserted = True
        elif count > self.scheduler.terms.posts:
            self.scheduler.terms = replace(self.scheduler.terms, posts=count)

    def _end(self) -> End:
        states, account = self.scheduler.states.values(), self._account
        if self._stops:
            return End.STOPPED
        if self._is_deserted:
            return End.DESERTED
        if any(_is_all_wrong(state) for state in states):
            return End.VALIDATION_FAILED
        if not account.timed and (account.fresh or any(state.why is Why.PUT_ASIDE for state in states)):
            return End.NOTHING_MEASURED
        return End.BROKEN if self._broken else End.DONE


def _is_all_wrong(state: State) -> bool:
    """Whether every candidate of an operator gave another result than the default."""
    return 0 < state.trials == state.failures.get(Outcome.WRONG, 0)
