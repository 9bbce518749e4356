"""Tries candidates of one operator: are they right, and how fast. What is tried may crash or hang.

    child process        links and loads each candidate, lays out its weights, compares it with the reference on seeded
                         inputs, then times all that are right, in turn
    this process         watches: a candidate that kills the child or keeps it busy past the limit is put aside by name,
                         and a new child goes on with the others

All candidates are timed interleaved, round after round, so that a machine that is slower for a second is so for all of
them. The time of a candidate is the least of its rounds; how far the least of the odd and of the even rounds are apart
says how far to trust it.

What the reference gives is kept for as long as this process lives: hundreds of candidates of one operator are compared
with it, and it is the slowest of all.

Where the candidates run is a site's matter (see pipeline.devices.contract). `measure` has this machine for one; those
of pipeline.devices.rpc are elsewhere, and the child then only speaks with them.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import pickle
import select
import signal
import struct
import tempfile
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

from pipeline.devices.contract import At, Loaded, RefusedError, Site
from pipeline.errors import last_line
from pipeline.linker import link
from pipeline.runtime import find_runtime, open_library
from pipeline.samples import seeded_inputs
from pipeline.tensors import Array, aligned_copy, array_over, tensor_over
from pipeline.types import LIBRARY, Cause, TensorSpec, Terms, Trial
from pipeline.weightfile import ALIGNMENT, dtype_of

# Largest error allowed, max |y - r| / max |r|, by dtype: some hundred times its rounding error. Other dtypes: exact.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}

_ROUNDS = 5  # at least
_SLICE = 2e-3  # seconds that one round of one candidate takes, or one call where that is longer
_HOPELESS = 4.0  # times the fastest: more rounds would not change the choice
_QUIET, _WINDOW, _WAIT = 0.2, 0.05, 1.0  # share of processors that others use, and seconds: to look, to wait at most
_KEPT_BYTES = 256 << 20  # of what references give
_ENDED = ("crashed", "ended")


@dataclass(frozen=True)
class Contender:
    """A compiled candidate: its objects by file name, shared libraries by name, and how it takes its weights.

    Contenders with the same objects are linked once.

    packed  for each parameter in a layout of its own: index, symbol of the function that lays it out, spec
    """

    name: str
    symbol: str
    objects: Mapping[str, Path]
    libraries: Mapping[str, Path] = field(default_factory=dict)
    packed: Sequence[tuple[int, str, TensorSpec]] = ()


def measure(
    parameters: Sequence[TensorSpec],
    written: Sequence[int],
    reference: Contender,
    contenders: Sequence[Contender],
    terms: Terms,
) -> dict[str, Trial]:
    """What became of each contender, by name. The reference may be one of them.

    Raises RuntimeError where the reference itself cannot be run.
    """
    expected = expected_of(reference, [parameters[i] for i in written], terms.seeds)
    refused: dict[str, Trial] = {}
    while True:
        left = [each for each in contenders if each.name not in refused]
        with tempfile.TemporaryDirectory(prefix="tvmake-") as folder:
            here = _Here(parameters, written, Path(folder))
            comparison = Comparison(parameters, written, reference, left, terms, expected, here)
            found, at, said = watched(comparison.run, comparison.names, lambda _: terms.patience)
        if found is not None:
            return {**found, **refused}
        if at == reference.name or at not in {each.name for each in left}:
            raise RuntimeError(f"the function that candidates are compared with {said}")
        refused[at] = Trial(at, refused=said, cause=Cause.CRASHED if said.startswith(_ENDED) else Cause.TIMED_OUT)


class Expected:
    """What the reference gives for each seed, in memory that the child which runs it shares with this process."""

    def __init__(self, specs: Sequence[TensorSpec], seeds: Sequence[int]) -> None:
        self._specs = specs
        self._seeds = seeds
        # Shared with children. The first byte says whether the rest is there.
        self._memory = mmap.mmap(-1, ALIGNMENT + len(seeds) * sum(_nbytes(spec) + ALIGNMENT for spec in specs))

    @property
    def size(self) -> int:
        return len(self._memory)

    @property
    def is_known(self) -> bool:
        return self._memory[0] == 1

    def keep(self, results: Sequence[Sequence[Array]]) -> None:
        """Called in the child."""
        for ours, theirs in zip(self.results(), results, strict=True):
            for mine, other in zip(ours, theirs, strict=True):
                mine[...] = other
        self._memory[0] = 1

    def results(self) -> list[list[Array]]:
        """Of each seed, the arrays that are written."""
        place, found = ALIGNMENT, []
        for _ in self._seeds:
            arrays = []
            for spec in self._specs:
                count = math.prod(spec.shape)
                arrays.append(np.frombuffer(self._memory, dtype_of(spec.dtype), count, place).reshape(spec.shape))
                place += -(-_nbytes(spec) // ALIGNMENT) * ALIGNMENT
            found.append(arrays)
        return found


def _nbytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * dtype_of(spec.dtype).itemsize


_known: OrderedDict[object, Expected] = OrderedDict()


def expected_of(reference: Contender, specs: Sequence[TensorSpec], seeds: Sequence[int], device: str = "") -> Expected:
    """What is known of a reference, whose objects are named by what is in them, on a device: "" is this machine."""
    question = (device, reference.symbol, tuple(sorted(reference.objects.items())), tuple(specs), tuple(seeds))
    if question not in _known:
        _known[question] = Expected(specs, seeds)
    _known.move_to_end(question)
    while len(_known) > 1 and sum(each.size for each in _known.values()) > _KEPT_BYTES:
        _known.popitem(last=False)
    return _known[question]


T = TypeVar("T")


class _Whereabouts:
    """What a child is at, in memory that its parent sees: to tell costs neither of them a switch of processes."""

    _FORMAT = struct.Struct("qq")  # how often it was told, and the index of the name

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._memory = mmap.mmap(-1, self._FORMAT.size)

    def tell(self, name: str) -> None:
        times, _ = self.seen()
        self._memory[:] = self._FORMAT.pack(times + 1, self._names.index(name))

    def seen(self) -> tuple[int, str]:
        times, index = self._FORMAT.unpack(self._memory[:])
        return times, self._names[index]


def watched(
    run: Callable[[At], T], names: Sequence[str], patience: Callable[[str], float]
) -> tuple[T | None, str, str]:
    """Runs in a child. Returns what it found; or None, what it was at when it ended, and how it ended.

    `patience` says for how many seconds it may be at the same.
    """
    whereabouts = _Whereabouts(names)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _be_child(run, whereabouts, reader, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        seen, since = whereabouts.seen(), time.monotonic()
        while not select.select([stream], [], [], min(limit := patience(seen[1]), 0.5))[0]:
            if (now := whereabouts.seen()) != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > limit:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None, seen[1], f"had not ended after {limit:g} s"
        try:
            found: T | None = pickle.load(stream)
        except (EOFError, pickle.UnpicklingError):
            found = None
    status = os.waitpid(child, 0)[1]
    return found, whereabouts.seen()[1], "" if found is not None else _ended(status)


def _be_child(run: Callable[[At], object], whereabouts: _Whereabouts, reader: int, writer: int) -> None:
    """Never returns."""
    code = 1
    try:
        os.close(reader)
        with os.fdopen(writer, "wb") as stream:
            pickle.dump(run(whereabouts.tell), stream)
        code = 0
    except BaseException:  # nothing may get back into the parent's code
        traceback.print_exc()
    finally:
        os._exit(code)


def _ended(status: int) -> str:
    if os.WIFSIGNALED(status):
        with contextlib.suppress(ValueError):
            return f"crashed with {signal.Signals(os.WTERMSIG(status)).name}"
        return f"crashed with signal {os.WTERMSIG(status)}"
    return f"ended the process with exit code {os.waitstatus_to_exitcode(status)}"


class Comparison:
    """What the child does: every contender is compared with the reference, and all that are right are timed."""

    def __init__(
        self,
        parameters: Sequence[TensorSpec],
        written: Sequence[int],
        reference: Contender,
        contenders: Sequence[Contender],
        terms: Terms,
        expected: Expected,
        site: Site,
    ) -> None:
        self._parameters = parameters
        self._written = written
        self._reference = reference
        self._contenders = contenders
        self._terms = terms
        self._expected = expected
        self._site = site

    @property
    def names(self) -> list[str]:
        """All that the child may be at."""
        return list(dict.fromkeys([self._reference.name, *(each.name for each in self._contenders)]))

    def run(self, at: At) -> dict[str, Trial]:
        """What became of each contender, by name. Raises RefusedError where the reference itself cannot be run."""
        trials: dict[str, Trial] = {}
        at(self._reference.name)
        given = [self._inputs(seed) for seed in self._terms.seeds]
        harmful = self._harmful(given[0], at)
        at(self._reference.name)
        is_timed = any(each.name == self._reference.name for each in self._contenders)
        if is_timed or not self._expected.is_known:
            reference = self._site.load(self._reference)
        if not self._expected.is_known:
            self._expected.keep([reference(each) for each in given])
        expected = list(zip(given, self._expected.results(), strict=True))
        ready: dict[str, Callable[[int], float]] = {}
        for contender in self._contenders:
            at(contender.name)
            try:
                if contender.name in harmful:
                    raise harmful[contender.name]
                is_reference = contender.name == self._reference.name
                call = reference if is_reference else self._site.load(contender)
                error = 0.0 if is_reference else self._compared(call, expected)
                trials[contender.name] = Trial(contender.name, error=error)
                ready[contender.name] = call.timer(given[0])
            except RefusedError as refusal:
                trials[contender.name] = Trial(contender.name, refused=str(refusal), cause=refusal.cause)
        if self._terms.seconds:
            # What disturbs for a moment is waited for, what goes on is met with more rounds.
            quiet = self._site.is_quiet(min(_WAIT, self._terms.patience / 3))
            budget = self._terms.seconds * (1 if quiet else 2)
            for name, (seconds, noise) in _timed(ready, budget, at).items():
                trials[name] = Trial(name, seconds, "", trials[name].error, noise)
        return trials

    def _inputs(self, seed: int) -> list[Array]:
        return [aligned_copy(array) for array in seeded_inputs(self._parameters, seed).values()]

    def _harmful(self, given: Sequence[Array], at: At) -> Mapping[str, RefusedError]:
        named = {each.name: each for each in (self._reference, *self._contenders)}
        harmful = self._site.probe(list(named.values()), given, at)
        if self._reference.name in harmful:
            raise harmful[self._reference.name]
        return harmful

    def _compared(self, call: Loaded, expected: Sequence[tuple[list[Array], list[Array]]]) -> float:
        worst = 0.0
        for seed, (given, results) in zip(self._terms.seeds, expected, strict=True):
            for index, ours, theirs in zip(self._written, call(given), results, strict=True):
                allowed = TOLERANCE.get(self._parameters[index].dtype, 0.0)
                error = _error(ours, theirs)
                if not error <= allowed:
                    raise RefusedError(
                        f"gives another result than the default: {_difference(error, ours)}, seed {seed}", Cause.WRONG
                    )
                worst = max(worst, error)
        return worst


class _Here:
    """This machine, as a site."""

    def __init__(self, parameters: Sequence[TensorSpec], written: Sequence[int], folder: Path) -> None:
        self._parameters = parameters
        self._written = written
        self._folder = folder
        self._linked: dict[object, Any] = {}

    def probe(self, contenders: Sequence[Contender], given: Sequence[Array], at: At) -> Mapping[str, RefusedError]:
        """Nothing is known before: what dies takes the child with it, and another goes on without it."""
        return {}

    def load(self, contender: Contender) -> _Call:
        try:
            return _Call(self._library(contender), contender, self._parameters, self._written)
        except (OSError, RuntimeError, AttributeError) as error:
            raise RefusedError(f"cannot be loaded: {last_line(error)}", Cause.FAILED) from error

    def is_quiet(self, limit: float) -> bool:
        return wait_for_quiet(limit)

    def _library(self, contender: Contender) -> Any:
        parts = (tuple(contender.objects.items()), tuple(contender.libraries.items()))
        if parts not in self._linked:
            folder = Path(tempfile.mkdtemp(dir=self._folder))
            for path in contender.libraries.values():
                ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
            (folder / LIBRARY).write_bytes(link(contender.objects, libraries=contender.libraries))
            self._linked[parts] = open_library(folder, (), find_runtime())[0]
        return self._linked[parts]


class _Call:
    """One candidate that is loaded here."""

    def __init__(
        self, library: Any, contender: Contender, parameters: Sequence[TensorSpec], written: Sequence[int]
    ) -> None:
        self._function = library[contender.symbol]
        self._packed = [(index, library[symbol], spec) for index, symbol, spec in contender.packed]
        self._parameters = parameters
        self._written = written

    def __call__(self, given: Sequence[Array]) -> list[Array]:
        tensors = self._tensors(given)
        self._run(self._function, tensors)
        return [array_over(tensors[index]).copy() for index in self._written]

    def timer(self, given: Sequence[Array]) -> Callable[[int], float]:
        """Nothing is laid out or allocated in what is timed."""
        tensors = self._tensors(given)
        function = self._function
        return partial(_took, lambda: function(*tensors))

    def _tensors(self, given: Sequence[Array]) -> list[Any]:
        # What is written begins as not-a-number, so that what was left unwritten is seen.
        arrays = [spoilt(array) if i in self._written else array for i, array in enumerate(given)]
        tensors = [tensor_over(array) for array in arrays]
        for index, function, spec in self._packed:
            room = tensor_over(_empty(spec))
            self._run(function, [tensors[index], room])
            tensors[index] = room
        return tensors

    def _run(self, function: Any, tensors: Sequence[Any]) -> None:
        try:
            function(*tensors)
        except Exception as error:
            raise RefusedError(f"fails: {last_line(error)}", Cause.FAILED) from error


def _empty(spec: TensorSpec) -> Array:
    return aligned_copy(np.zeros(spec.shape, dtype_of(spec.dtype)))


def spoilt(array: Array) -> Array:
    """As many bytes that make no sense."""
    copy = aligned_copy(array)
    copy.reshape(-1).view(np.uint8)[...] = 0xFF
    return copy


def wait_for_quiet(limit: float) -> bool:
    """Waits, so many seconds at most, until other programs leave the machine alone; whether they do."""
    end = time.monotonic() + limit
    while _busy() > _QUIET:
        if time.monotonic() > end:
            return False
    return True


def _busy() -> float:
    """The share of the processors that this process may use which others use now."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    each: list[float] = psutil.cpu_percent(_WINDOW, percpu=True)
    ours = [each[i] for i in usable if i < len(each)] if usable is not None else each
    return sum(ours) / max(1, len(ours)) / 100


def _timed(calls: Mapping[str, Callable[[int], float]], budget: float, at: At) -> dict[str, tuple[float, float]]:
    """Least seconds and noise of each call, in rounds."""
    counts = {}
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        at(name)
        took = _once(call, 1)
        if took < _SLICE:  # what is done once at the first call is a part of it
            took = _once(call, 1)
        else:
            rounds[name].append(took)
        counts[name] = max(1, int(_SLICE / max(took, 1e-7)))
    spent = {name: sum(taken) for name, taken in rounds.items()}
    first = next(iter(calls), "")
    while going := [name for name in calls if _goes_on(name, rounds, spent, budget)]:
        # The first is what the others are held against: it runs as long as any of them does.
        for name in dict.fromkeys([first, *going]):
            at(name)
            took = _once(calls[name], counts[name])
            rounds[name].append(took)
            spent[name] += took * counts[name]
    return {name: (min(taken), _noise(taken)) for name, taken in rounds.items()}


def _goes_on(name: str, rounds: Mapping[str, list[float]], spent: Mapping[str, float], budget: float) -> bool:
    taken = rounds[name]
    if not taken:
        return True
    best = min(min(each) for each in rounds.values() if each)
    if min(taken) > _HOPELESS * best and (len(taken) >= _ROUNDS or spent[name] > budget / 2):
        return False
    return len(taken) < _ROUNDS or spent[name] < budget


def _once(call: Callable[[int], float], count: int) -> float:
    return call(count)


def _took(call: Callable[[], object], count: int) -> float:
    """Seconds of one call of so many."""
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def _noise(taken: Sequence[float]) -> float:
    """How far the least of the even rounds and of the odd ones are apart, relative."""
    if len(taken) < 2:
        return 0.0
    even, odd = min(taken[::2]), min(taken[1::2])
    return abs(even - odd) / min(even, odd)


def _error(ours: Array, theirs: Array) -> float:
    """max |y - r| / max |r|; infinite where one is not finite and the other is not the same."""
    if ours.dtype.kind not in "fcV" and "float" not in ours.dtype.name:
        return 0.0 if np.array_equal(ours, theirs) else float("inf")
    if ours.dtype == np.float32 and ours.size:
        with np.errstate(all="ignore"):
            apart, largest = np.abs(np.subtract(ours, theirs)).max(), np.abs(theirs).max()
        if np.isfinite(apart) and np.isfinite(largest):  # so is every element
            return float(apart) / max(float(largest), 1e-30)
    mine, other = ours.astype(np.float64), theirs.astype(np.float64)
    finite = np.isfinite(other)
    if not np.array_equal(mine[~finite], other[~finite], equal_nan=True) or not np.isfinite(mine[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    return float(np.abs(mine[finite] - other[finite]).max() / max(np.abs(other[finite]).max(), 1e-30))


def _difference(error: float, ours: Array) -> str:
    if ours.dtype.kind == "f" and np.isnan(ours).any():
        return "not a number"
    return f"{error:.3g} off, relative" if error < float("inf") else "another value"
