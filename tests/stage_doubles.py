"""Small stages for the tests of what runs stages. Worker processes import it too: put its folder on PYTHONPATH."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ModelError
from pipeline.notices import Wait
from pipeline.stages import Home, Inputs, Kind, Options, Outputs, Run, Stage


@dataclass(frozen=True)
class Double(Stage):
    """A stage whose function is the one of this module that has its name."""

    def load(self) -> Run:
        run: Run = globals()[self.name]
        return run


def double(
    run: Callable[[Inputs, Options], Outputs],
    *,
    kind: Kind = Kind.BINARY,
    home: Home = Home.COMPILER,
    tools: tuple[str, ...] = (),
) -> Double:
    return Double(run.__name__, 1, kind, home, tools)


class UnsendableError(ModelError):
    """An error that holds what cannot be pickled."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.held = lambda: None


def wait_aloud(inputs: Inputs, options: Options) -> Outputs:
    """Says twice that it waits, the second time too soon after the first."""
    wait = Wait(first=0.0)
    for name in ("rain", "snow"):
        wait.tell(f"waiting for {name}")
    return {"done": b"1"}


def echo(inputs: Inputs, options: Options) -> Outputs:
    """The inputs, and the process that ran."""
    return {**{name: inputs[name] for name in inputs}, "pid": b"%d" % os.getpid()}


def count(inputs: Inputs, options: Options) -> Outputs:
    """Leaves one file in the folder `ran` for each run, after `seconds`."""
    time.sleep(float(str(options.get("seconds", 0))))
    Path(str(options["ran"]), f"{os.getpid()}-{time.monotonic_ns()}").touch()
    return {"out": str(options.get("out", "made")).encode() * 100}


def refuse(inputs: Inputs, options: Options) -> Outputs:
    raise ModelError("the model is open", hint="close it")


def refuse_unsendably(inputs: Inputs, options: Options) -> Outputs:
    raise UnsendableError("the model holds a lambda")


def fail(inputs: Inputs, options: Options) -> Outputs:
    raise ValueError("a frame of C++\nthe thing itself\n")


def chatter(inputs: Inputs, options: Options) -> Outputs:
    """Prints more than a pipe holds, from Python and from below it."""
    print("x" * 300_000, flush=True)
    os.write(2, b"y" * 300_000)
    return {"out": b"said"}


def segfault(inputs: Inputs, options: Options) -> Outputs:
    ctypes.string_at(0)
    return {}


def leave(inputs: Inputs, options: Options) -> Outputs:
    print("the last words", flush=True)
    sys.exit(7)


def vanish(inputs: Inputs, options: Options) -> Outputs:
    os._exit(0)


def daemonize_and_die(inputs: Inputs, options: Options) -> Outputs:
    """Dies while a process that it forked still holds all its files."""
    if os.fork() == 0:
        Path(str(options["started"])).write_text(str(os.getpid()))
        time.sleep(60)
        os._exit(0)
    while not Path(str(options["started"])).exists():
        time.sleep(0.005)
    os._exit(3)


def sleep(inputs: Inputs, options: Options) -> Outputs:
    """Says its process in the file `started`, then sleeps."""
    Path(str(options["started"])).write_text(str(os.getpid()))
    time.sleep(float(str(options.get("seconds", 60))))
    return {"out": b"slept"}


def sleep_in_a_tool(inputs: Inputs, options: Options) -> Outputs:
    """As a linker does: the time passes in a process that the stage started."""
    with subprocess.Popen(["sleep", "60"]) as tool:
        Path(str(options["started"])).write_text(str(tool.pid))
    return {}


def give_an_object(inputs: Inputs, options: Options) -> Outputs:
    return {"out": object()}  # type: ignore[dict-item]


def give_nothing(inputs: Inputs, options: Options) -> Outputs:
    return None  # type: ignore[return-value]


def give_several(inputs: Inputs, options: Options) -> Outputs:
    return {"a": b"first", "b": memoryview(b"second"), "none": b""}


def read_set(inputs: Inputs, options: Options) -> Outputs:
    """Reads a set of the store, and then each input."""
    members = [name for name, _ in inputs._store.sets.read(str(options["set"]))]
    return {"members": " ".join(members).encode(), **inputs}
