"""Where the candidates of a night are made: stages run by the build's executor, with a store of their own.

Candidates are many and only few are ever wanted again, so all that is made of them lies in a store that ends with the
run. What they are made from and measured against comes from the user's store: it is what a build has made.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline import stages
from pipeline.compiler import search
from pipeline.errors import ConfigError, StoreError
from pipeline.executors import Job
from pipeline.hashing import Digest
from pipeline.memoizer import Action, Memoizer
from pipeline.store import ActionEntry, Store
from pipeline.store.scratch import Scratch
from pipeline.tuning.states import Operator

if TYPE_CHECKING:
    from pipeline.build import Build
    from pipeline.composition import Target
    from pipeline.executors.contract import Executor

_log = logging.getLogger(__name__)

_TIDY = 600.0  # seconds after which what was made of a candidate is of no use


class Workshop:
    """Runs stages by the means of a build, at most `jobs` at once; 0: as many as its executor takes.

    Every method may be called from any thread.
    """

    def __init__(self, build: Build, jobs: int = 0) -> None:
        self.build = build
        self._scratch = Scratch()
        self._taken: set[str] = set()  # blobs of the user's store that are in this one
        self._tidied = time.monotonic()
        by, temporary = build.memoizer, self._scratch.temporary
        store = Store(self._scratch.folder, durable=False)
        job = Job(store, by.toolchain, jobs or by.workers.limit, temporary=temporary, durable=False, say=_log.warning)
        self.memoizer = Memoizer(store, by.workers.beside(job), by.toolchain)

    @property
    def store(self) -> Store:
        return self.memoizer.store

    @property
    def workers(self) -> Executor:
        return self.memoizer.workers

    def stop(self) -> None:
        """Ends the processes, whatever they are at."""
        self.workers.stop()

    def close(self) -> None:
        """Throws away what was made of candidates. To be called last."""
        self._scratch.close()

    def tidy(self, wanted: Iterable[Digest]) -> None:
        """Now and then, throws away what was made of candidates some time ago, but for what others are measured
        against and what is wanted."""
        if time.monotonic() - self._tidied > _TIDY:
            self._tidied = time.monotonic()
            self.memoizer.forget()
            self._scratch.remove_old(self._taken | {digest.hash for digest in wanted}, _TIDY)

    def take(self, digests: Iterable[Digest]) -> None:
        """Has the workshop's store hold these blobs of the user's."""
        ours = self.build.memoizer.store
        for digest in digests:
            self._taken.add(digest.hash)
            if not self.store.has(digest):
                path = ours.path(digest)
                if path is None:
                    raise StoreError(f"blob {digest} is missing from the store", hint="run: doit build")
                self.store.put_file(path)

    def run(
        self,
        stage: stages.Stage,
        operator: Operator,
        inputs: Mapping[str, Digest],
        options: Mapping[str, object],
        limit: float = 0.0,
    ) -> ActionEntry:
        """Runs a stage for an operator, within so many seconds, by default those that its target's file gives."""
        limit = limit or self.target(operator).file.timeout
        return self.memoizer.run(Action(stage, operator.name, inputs, options, limit))

    def runs_here(self, stage: stages.Stage, operator: Operator) -> bool:
        """Whether this machine would run a stage for an operator."""
        return self.workers.runs_here(Action(stage, operator.name))

    def blob(self, digest: Digest) -> bytes:
        return self.memoizer.blob(digest)

    def target(self, operator: Operator) -> Target:
        return self.build.target(operator.target)

    # search spaces

    def spaces(self, operator: Operator) -> Sequence[str]:
        """The names of those that are searched for it, in order."""
        target = self.target(operator)
        return target.file.tune.spaces or search.usual(str(target.attributes["kind"]))

    def space(self, operator: Operator, name: str) -> search.Space:
        return self._composed(operator, name)[0]

    def has_space(self, operator: Operator, name: str) -> bool:
        """Whether a search space can be asked: another workspace that shares the store may have one of its own."""
        try:
            self._composed(operator, name)
        except ConfigError:
            return False
        return True

    def source(self, operator: Operator, name: str) -> Mapping[str, Digest]:
        """The file of a space, where it is the workspace's."""
        source = self._composed(operator, name)[1]
        self.take(source.values())
        return source

    def _composed(self, operator: Operator, name: str) -> tuple[search.Space, Mapping[str, Digest]]:
        return self.build.composition(operator.target).space(name)
