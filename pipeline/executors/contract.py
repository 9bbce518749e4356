"""What runs stages: the contract that processes of this machine, dask and whatever comes next have in common.

    perform   one action in a process that may die, its results in the store; waits for it
    limit     how many actions may be given at once
    posts     who can time something, each beside the others
    serving   what the workers of a label are
    beside    another executor for another store, with the same machines
    stop      ends all of it; from then on nothing is performed

`perform` raises what the stage raised, under its own name. WorkerDiedError: the process that ran the stage died, or
ran past the action's time limit. ExecutorError: what was to run it is not there or cannot; nothing is wrong with the
action. WorkerLostError: so it is with the one post that was to run it, and others may be there.

Every method may be called from any thread. The same action may be asked for by many at once: it is then run once or
several times, with the same result. tests/executors runs one suite over every executor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pipeline.executors import Job
    from pipeline.memoizer import Action
    from pipeline.store import ActionEntry

Say = Callable[[str], None]
HERE = "this machine"  # the post of an executor that has no other


def warn(sentence: str) -> None:
    """Where nobody else shows what is said."""
    print(f"WARNING {sentence}", file=sys.stderr)


class Executor(Protocol):
    """`say` is told, in sentences, what a person should know; whoever shows them may put another in its place."""

    limit: int
    say: Say

    def perform(self, action: Action, key: str, components: dict[str, object]) -> ActionEntry: ...

    def runs_here(self, action: Action) -> bool:
        """Whether an action would run on this machine, so that what is timed must not run beside it."""
        ...

    def posts(self, device: str, label: str = "") -> tuple[str, ...]:
        """The names of those that can time what is for a device, and have a label where one is given, each without
        disturbing the others: `Action.post` is one of them. None where there were some and they are gone for good.
        Cheap: it may be asked all the time."""
        ...

    def serving(self, label: str) -> str:
        """The device that the workers of a label are, as `processor.device()` says it there. Raises ExecutorError where
        there are none."""
        ...

    def beside(self, job: Job) -> Executor:
        """An executor that works for another store by the same means. It is stopped by itself, and first."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether nothing is performed any more: because of `stop`, or because all that performed is lost."""
        ...

    @property
    def corrupt(self) -> int:
        """How many files of stores were found damaged and set aside."""
        ...

    def stop(self) -> None:
        """Ends what runs, and what this executor started. What was finished is in the store. May be called twice."""
        ...
