"""Tries candidates of one operator on this machine: are they right, and how fast. What is tried may crash or hang.

    child process        links and loads each candidate, lays out its weights, compares it with the reference on seeded
                         inputs, then times all that are right, in turn
    this process         watches: a candidate that kills the child or keeps it busy past the limit is put aside by name,
                         and a new child goes on with the others

All candidates are timed interleaved, round after round, so that a machine that is slower for a second is so for all of
them. The time of a candidate is the least of its rounds; how far the least of the odd and of the even rounds are apart
says how far to trust it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pickle
import select
import signal
import struct
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import last_line
from pipeline.hashing import Digest
from pipeline.linker import link
from pipeline.runtime import find_runtime, open_library
from pipeline.samples import seeded_inputs
from pipeline.tensors import Array, aligned_copy, array_over, tensor_over
from pipeline.types import LIBRARY, TensorSpec, Terms, Trial
from pipeline.weightfile import dtype_of

# Largest error allowed, max |y - r| / max |r|, by dtype: some hundred times its rounding error. Other dtypes: exact.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}

_ROUNDS = 5  # at least
_SLICE = 2e-3  # seconds that one round of one candidate takes, or one call where that is longer
_HOPELESS = 4.0  # times the fastest: more rounds would not change the choice


@dataclass(frozen=True)
class Contender:
    """A compiled candidate: its objects by file name, shared libraries by name, and how it takes its weights.

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
    refused: dict[str, Trial] = {}
    while True:
        left = [each for each in contenders if each.name not in refused]
        with tempfile.TemporaryDirectory(prefix="tvmake-") as folder:
            trial = _Trial(parameters, written, reference, left, terms, Path(folder))
            names = list(dict.fromkeys([reference.name, *(each.name for each in left)]))
            found, at, cause = _watched(trial.run, names, terms.patience)
        if found is not None:
            return {**found, **refused}
        if at == reference.name or at not in {each.name for each in left}:
            raise RuntimeError(f"the function that candidates are compared with {cause}")
        refused[at] = Trial(at, refused=cause)


At = Callable[[str], None]


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


def _watched(
    run: Callable[[At], dict[str, Trial]], names: Sequence[str], patience: float
) -> tuple[dict[str, Trial] | None, str, str]:
    """Runs in a child. Returns what it found; or None, what it was at when it ended, and how it ended."""
    whereabouts = _Whereabouts(names)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _be_child(run, whereabouts, reader, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        seen, since = whereabouts.seen(), time.monotonic()
        while not select.select([stream], [], [], min(patience, 0.5))[0]:
            if (now := whereabouts.seen()) != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > patience:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None, seen[1], f"had not ended after {patience:g} s"
        try:
            found: dict[str, Trial] | None = pickle.load(stream)
        except (EOFError, pickle.UnpicklingError):
            found = None
    status = os.waitpid(child, 0)[1]
    return found, whereabouts.seen()[1], "" if found is not None else _ended(status)


def _be_child(run: Callable[[At], dict[str, Trial]], whereabouts: _Whereabouts, reader: int, writer: int) -> None:
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


class _RefusedError(Exception):
    """A candidate is put aside; the message says why."""


class _Trial:
    """What the child does."""

    def __init__(
        self,
        parameters: Sequence[TensorSpec],
        written: Sequence[int],
        reference: Contender,
        contenders: Sequence[Contender],
        terms: Terms,
        folder: Path,
    ) -> None:
        self._parameters = parameters
        self._written = written
        self._reference = reference
        self._contenders = contenders
        self._terms = terms
        self._folder = folder

    def run(self, at: At) -> dict[str, Trial]:
        trials: dict[str, Trial] = {}
        at(self._reference.name)
        reference = self._loaded(self._reference)
        expected = [(given, reference(given)) for given in map(self._inputs, self._terms.seeds)]
        ready: dict[str, Callable[[], None]] = {}
        for contender in self._contenders:
            at(contender.name)
            try:
                call = reference if contender.name == self._reference.name else self._loaded(contender)
                error = 0.0 if call is reference else self._compared(call, expected)
                trials[contender.name] = Trial(contender.name, error=error)
                ready[contender.name] = call.prepared(expected[0][0])
            except _RefusedError as refusal:
                trials[contender.name] = Trial(contender.name, refused=str(refusal))
        if self._terms.seconds:
            for name, (seconds, noise) in _timed(ready, self._terms.seconds, at).items():
                trials[name] = Trial(name, seconds, "", trials[name].error, noise)
        return trials

    def _inputs(self, seed: int) -> list[Array]:
        return [aligned_copy(array) for array in seeded_inputs(self._parameters, seed).values()]

    def _loaded(self, contender: Contender) -> _Call:
        folder = self._folder / Digest.of(contender.name.encode()).hash[:16]
        folder.mkdir()
        try:
            for path in contender.libraries.values():
                ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
            (folder / LIBRARY).write_bytes(link(contender.objects, libraries=contender.libraries))
            library, _ = open_library(folder, (), find_runtime())
            return _Call(library, contender, self._parameters, self._written)
        except (OSError, RuntimeError, AttributeError) as error:
            raise _RefusedError(f"cannot be loaded: {last_line(error)}") from error

    def _compared(self, call: _Call, expected: Sequence[tuple[list[Array], list[Array]]]) -> float:
        worst = 0.0
        for seed, (given, results) in zip(self._terms.seeds, expected, strict=True):
            for index, ours, theirs in zip(self._written, call(given), results, strict=True):
                allowed = TOLERANCE.get(self._parameters[index].dtype, 0.0)
                error = _error(ours, theirs)
                if not error <= allowed:
                    raise _RefusedError(
                        f"gives another result than the default: {_difference(error, ours)}, seed {seed}"
                    )
                worst = max(worst, error)
        return worst


class _Call:
    """One loaded candidate: arrays of all parameters in, the arrays that it writes out."""

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

    def prepared(self, given: Sequence[Array]) -> Callable[[], None]:
        """A call to time: nothing is laid out or allocated in it."""
        tensors = self._tensors(given)
        function = self._function
        return lambda: function(*tensors)

    def _tensors(self, given: Sequence[Array]) -> list[Any]:
        # What is written begins as not-a-number, so that what was left unwritten is seen.
        arrays = [_spoilt(array) if i in self._written else array for i, array in enumerate(given)]
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
            raise _RefusedError(f"fails: {last_line(error)}") from error


def _empty(spec: TensorSpec) -> Array:
    return aligned_copy(np.zeros(spec.shape, dtype_of(spec.dtype)))


def _spoilt(array: Array) -> Array:
    spoilt = aligned_copy(array)
    spoilt.reshape(-1).view(np.uint8)[...] = 0xFF
    return spoilt


def _timed(calls: Mapping[str, Callable[[], None]], budget: float, at: At) -> dict[str, tuple[float, float]]:
    """Least seconds and noise of each call, in rounds."""
    counts = {}
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        at(name)
        took = _once(call, 1)
        if took < _SLICE:  # what is done once at the first call is a part of it
            took = _once(call, 1)
        counts[name] = max(1, int(_SLICE / max(took, 1e-7)))
    spent = dict.fromkeys(calls, 0.0)
    while going := [name for name in calls if _goes_on(name, rounds, spent, budget)]:
        for name in going:
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


def _once(call: Callable[[], None], count: int) -> float:
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
