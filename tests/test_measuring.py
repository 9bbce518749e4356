"""Candidates tried in children of this process: compared with a reference, timed in turn, put aside by name and cause.

They are small functions in C, each compiled in a tenth of a second: y = what BODY makes of x, four floats.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from pipeline import measuring
from pipeline.linker import compile_source
from pipeline.linker import link as link_in_earnest
from pipeline.measuring import Contender, measure, wait_for_quiet
from pipeline.types import Cause, TensorSpec, Terms, Trial

SPECS = [TensorSpec("x", (4,), "float32"), TensorSpec("y", (4,), "float32")]
COMPARED = Terms(seeds=(0, 1), seconds=0.0, patience=20.0)  # and not timed

_SOURCE = """
#include <stdio.h>
#include <stdlib.h>
#include <tvm/ffi/c_api.h>

static const float* x_of(const TVMFFIAny* args, int i) {{
  char* at = (char*)args[i].v_obj;
  if (args[i].type_index != kTVMFFIDLTensorPtr) at += sizeof(TVMFFIObject);
  return (const float*)((DLTensor*)at)->data;
}}

int __tvm_ffi_main(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {{
  static int calls = 0;
  const float* x = x_of(args, 0);
  float* y = (float*)x_of(args, 1);
  ++calls;
  (void)self, (void)count, (void)result;
  {body}
  return 0;
}}
"""
DOUBLE = "for (int i = 0; i < 4; ++i) y[i] = 2 * x[i];"
TRIPLE = "for (int i = 0; i < 4; ++i) y[i] = 3 * x[i];"
CRASH = "*(volatile int*)0 = 1;"
HANG = "for (volatile int go = 1; go;) {}"
UNLINKABLE = "extern void nowhere(float*); nowhere(y);"


@pytest.fixture(autouse=True)
def _nothing_is_known_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_known", type(measuring._known)())


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., Contender]:
    """Makes a contender of a function's body. Its object's name tells what is in it, as the store's do."""

    def make(name: str, body: str, symbol: str = "main") -> Contender:
        path = tmp_path / f"{hash(body):x}.o"
        if not path.exists():
            path.write_bytes(compile_source(_SOURCE.format(body=body).encode()))
        return Contender(name, symbol, {"f.o": path})

    return make


def counted(path: Path, body: str) -> str:
    """A body that also tells of every call, as one more byte of a file."""
    return f'FILE* told = fopen("{path}", "a"); fputc(\'.\', told); fclose(told); {body}'


def told(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def tried(reference: Contender, *contenders: Contender, terms: Terms = COMPARED) -> dict[str, Trial]:
    return measure(SPECS, [1], reference, contenders, terms)


def causes(trials: Mapping[str, Trial]) -> dict[str, Cause | None]:
    return {name: trial.cause for name, trial in trials.items()}


# what becomes of a candidate


def test_every_cause_is_told_and_the_others_go_on(compiled: Callable[..., Contender]) -> None:
    given = {
        "right": DOUBLE,
        "wrong": TRIPLE,
        "unwritten": "(void)y;",
        "says an error": 'TVMFFIErrorSetRaisedFromCStr("RuntimeError", "no room"); return -1;',
        "crashes": CRASH,
        "leaves": "exit(3);",
        "hangs": HANG,
        "also right": DOUBLE,
    }
    contenders = [compiled(name, body) for name, body in given.items()]
    contenders.append(compiled("without its function", DOUBLE, symbol="other"))
    contenders.append(compiled("cannot be linked", UNLINKABLE))
    trials = tried(compiled("reference", DOUBLE), *contenders, terms=Terms((0, 1), 0.0, 1.0))
    assert causes(trials) == {
        "right": None,
        "wrong": Cause.WRONG,
        "unwritten": Cause.WRONG,
        "says an error": Cause.FAILED,
        "crashes": Cause.CRASHED,
        "leaves": Cause.CRASHED,
        "hangs": Cause.TIMED_OUT,
        "also right": None,
        "without its function": Cause.FAILED,
        "cannot be linked": Cause.FAILED,
    }
    words = {
        "wrong": "gives another result than the default",
        "unwritten": "not a number",
        "says an error": "fails: no room",
        "cannot be linked": "nowhere",
        "crashes": "crashed with SIGSEGV",
        "leaves": "exit code 3",
        "hangs": "had not ended after 1 s",
    }
    for name, said in words.items():
        assert said in trials[name].refused, trials[name]
        assert trials[name].seconds is None
    assert (trials["right"].error, trials["right"].refused) == (0.0, "")


def test_one_that_cannot_be_linked_is_in_nobodys_way(compiled: Callable[..., Contender]) -> None:
    trials = tried(
        compiled("reference", DOUBLE), compiled("cannot be linked", UNLINKABLE), compiled("right", f"{{ {DOUBLE} }}")
    )
    assert causes(trials) == {"cannot be linked": Cause.FAILED, "right": None}


def test_what_crashes_only_while_it_is_timed_is_told_as_well(compiled: Callable[..., Contender]) -> None:
    late = compiled("late", f"{DOUBLE} if (calls > 4) {{ {CRASH} }}")
    good = compiled("good", DOUBLE)
    trials = tried(good, good, late, terms=Terms((0, 1), 0.01, 10.0))
    assert causes(trials) == {"good": None, "late": Cause.CRASHED}
    assert trials["good"].seconds is not None


@pytest.mark.parametrize(("body", "said"), [(CRASH, "SIGSEGV"), (HANG, "had not ended")])
def test_a_reference_that_cannot_be_run_is_an_error(compiled: Callable[..., Contender], body: str, said: str) -> None:
    with pytest.raises(RuntimeError, match=f"compared with .*{said}"):
        tried(compiled("reference", body), compiled("good", DOUBLE), terms=Terms((0,), 0.0, 1.0))


# linked once


def test_contenders_with_the_same_objects_are_linked_once(
    compiled: Callable[..., Contender], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = tmp_path / "linked"  # a file, as it is a child that links

    def link(objects: Mapping[str, Path], **given: object) -> memoryview:
        with open(linked, "a") as stream:
            stream.write(".")
        return link_in_earnest(objects, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(measuring, "link", link)
    double, triple = compiled("double", DOUBLE), compiled("triple", TRIPLE)
    again = [Contender(f"double {i}", double.symbol, dict(double.objects)) for i in range(3)]
    trials = tried(double, double, *again, triple)
    assert causes(trials) == {"double": None, **{each.name: None for each in again}, "triple": Cause.WRONG}
    assert told(linked) == 2


# what the reference gives


def test_what_the_reference_gives_is_computed_once_in_a_process(
    compiled: Callable[..., Contender], tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    reference = compiled("reference", counted(calls, DOUBLE))
    first = tried(reference, compiled("right", DOUBLE), compiled("crashes", CRASH), compiled("leaves", "exit(1);"))
    assert causes(first) == {"right": None, "crashes": Cause.CRASHED, "leaves": Cause.CRASHED}
    assert told(calls) == len(COMPARED.seeds), "not again after each crash"
    assert causes(tried(reference, compiled("wrong", TRIPLE), compiled("right", DOUBLE))) == {
        "wrong": Cause.WRONG,
        "right": None,
    }
    assert told(calls) == len(COMPARED.seeds)
    tried(reference, compiled("right", DOUBLE), terms=Terms((2, 3, 4), 0.0, 20.0))
    assert told(calls) == len(COMPARED.seeds) + 3, "other seeds are another question"


def test_what_another_reference_gives_is_not_mixed_up_with_it(compiled: Callable[..., Contender]) -> None:
    double, triple = compiled("double", DOUBLE), compiled("triple", TRIPLE)
    for _ in range(2):
        assert causes(tried(double, double, triple)) == {"double": None, "triple": Cause.WRONG}
        assert causes(tried(triple, double, triple)) == {"double": Cause.WRONG, "triple": None}
    # The same reference on other shapes: the body sees to four elements of each.
    wide = [TensorSpec("x", (2, 4), "float32"), TensorSpec("y", (2, 2), "float32")]
    assert causes(measure(wide, [1], double, [double, triple], COMPARED)) == {"double": None, "triple": Cause.WRONG}


def test_what_takes_too_much_room_is_forgotten_and_computed_again(
    compiled: Callable[..., Contender], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_KEPT_BYTES", 1)
    calls = tmp_path / "calls"
    double, triple = compiled("double", counted(calls, DOUBLE)), compiled("triple", TRIPLE)
    for count in (1, 2):
        assert causes(tried(double, triple)) == {"triple": Cause.WRONG}
        assert causes(tried(triple, compiled("three times", TRIPLE))) == {"three times": None}
        assert len(measuring._known) == 1
        assert told(calls) == count * len(COMPARED.seeds)


def test_a_child_that_dies_while_it_keeps_results_leaves_none_that_count(
    compiled: Callable[..., Contender], tmp_path: Path
) -> None:
    """The first seed's results are there, the second's are not: what is known is known whole."""
    mark = tmp_path / "died"
    body = f'FILE* told = fopen("{mark}", "a"); if (ftell(told) == 1) {{ fputc(0, told); fclose(told); {CRASH} }}'
    reference = compiled("reference", f"{body} fputc(0, told); fclose(told); {DOUBLE}")
    with pytest.raises(RuntimeError, match="SIGSEGV"):
        tried(reference, compiled("right", DOUBLE))
    assert causes(tried(reference, compiled("right", DOUBLE))) == {"right": None}


# rounds


def fake_rounds(
    monkeypatch: pytest.MonkeyPatch, seconds: Mapping[str, float], budget: float
) -> tuple[list[str], dict[str, tuple[float, float]]]:
    """Who was at work, in order, from the first round on; and what was found. A call takes what is said of it."""
    monkeypatch.setattr(measuring, "_once", lambda call, count: call())
    order: list[str] = []
    found = measuring._timed({name: lambda each=each: each for name, each in seconds.items()}, budget, order.append)
    return order[len(seconds) :], found


@pytest.mark.parametrize("slowest", ["first", "second", "third"])
def test_the_first_takes_part_in_every_round(monkeypatch: pytest.MonkeyPatch, slowest: str) -> None:
    seconds = {name: 1.0 if name == slowest else 0.01 for name in ("first", "second", "third")}
    order, found = fake_rounds(monkeypatch, seconds, 0.2)
    rounds = order.count("first")
    assert rounds == max(order.count(name) for name in seconds)
    for i, name in enumerate(order):
        if name == "second":
            assert order[i - 1] == "first"
    if slowest != "first":
        assert order.count(slowest) < rounds, "what is hopeless is soon left alone"
    assert {name: least for name, (least, _) in found.items()} == seconds


def test_times_are_those_of_the_functions(compiled: Callable[..., Contender]) -> None:
    busy = "for (volatile int i = 0; i < %d; ++i) {} " + DOUBLE
    quick, slow = compiled("quick", busy % 20_000), compiled("slow", busy % 200_000)
    trials = tried(slow, slow, quick, terms=Terms((0,), 0.05, 20.0))
    assert trials["slow"].seconds is not None
    assert trials["quick"].seconds is not None
    assert 3 < trials["slow"].seconds / trials["quick"].seconds < 30
    assert trials["slow"].error == trials["quick"].error == 0.0


# quiet


def busy_for(monkeypatch: pytest.MonkeyPatch, looks: float) -> list[float]:
    """Others use the processors of this process for so many looks at it, and those of others afterwards."""
    looked: list[float] = []

    def cpu_percent(interval: float, percpu: bool) -> list[float]:
        time.sleep(interval / 5)
        looked.append(interval)
        ours = 100.0 if len(looked) <= looks else 5.0
        return [ours if number in usable else 100.0 - ours for number in range(max(usable) + 2)]

    usable = os.sched_getaffinity(0)
    monkeypatch.setattr(measuring.psutil, "cpu_percent", cpu_percent)
    return looked


def test_waiting_for_quiet_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    busy_for(monkeypatch, float("inf"))
    began = time.monotonic()
    assert not wait_for_quiet(0.1)
    assert 0.1 <= time.monotonic() - began < 0.5


def test_waiting_for_quiet_ends_when_it_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = busy_for(monkeypatch, 3)
    assert wait_for_quiet(30)
    assert len(looked) == 4


def test_a_disturbed_machine_is_met_with_more_rounds(
    compiled: Callable[..., Contender], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seconds of each candidate are twice what was asked for."""
    budgets = []

    def timed(calls: Mapping[str, object], budget: float, at: object) -> dict[str, tuple[float, float]]:
        return dict.fromkeys(calls, (budget, 0.0))

    monkeypatch.setattr(measuring, "_timed", timed)
    good = compiled("good", DOUBLE)
    for quiet in (True, False):
        monkeypatch.setattr(measuring, "wait_for_quiet", lambda limit, quiet=quiet: quiet)
        budgets.append(tried(good, good, terms=Terms((0,), 0.25, 20.0))["good"].seconds)
    assert budgets == [0.25, 0.5]


# errors


@pytest.mark.parametrize(
    ("ours", "theirs", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([1.0, float("nan")], [1.0, 2.0], float("inf")),
        ([1.0, float("nan")], [1.0, float("nan")], 0.0),
        ([1.0, float("inf")], [1.0, float("-inf")], float("inf")),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
    ],
)
def test_how_far_two_results_are_apart(ours: list[float], theirs: list[float], error: float) -> None:
    assert measuring._error(np.array(ours, np.float32), np.array(theirs, np.float32)) == pytest.approx(error)


def test_whole_numbers_are_the_same_or_not() -> None:
    assert measuring._error(np.array([1, 2]), np.array([1, 2])) == 0.0
    assert measuring._error(np.array([1, 2]), np.array([1, 3])) == float("inf")
