"""Which worker may run which action: what a worker says of itself, what an action needs, and why the two do not fit.

A worker says which tools it has, which device it is, and by which labels it is known:

    llvm, llvm-znver5     it runs code for this kind of target, and for this processor: found out by itself
    cuda-sm_90, …         given by who starts it
    measure               a slot: what is timed has the machine to itself

An action needs
    the tools in its key  the result stands under a key that names them: another TVM would make it a wrong entry
    the device in its key where it times something
    the driver's host     where it runs code that was built for the driver's machine
    its labels            where it says so: `Action.needs`

Knows nothing of how a cluster is reached.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pipeline
from pipeline import stages
from pipeline.stages import Kind
from pipeline.toolchain import ABSENT, Toolchain

if TYPE_CHECKING:
    from pipeline.memoizer import Action

MEASURE = "measure"  # the label of which a worker has one
# Without these alike on both sides nothing can be left to a worker.
BASE = ("tvmake", "python", "tvm", "tvm-ffi", "libtvm")
HOST = "host"
# Stages that run code which was built for the driver's machine, whatever their keys name.
_RUNS_CODE = frozenset(stage.name for stage in (stages.MEASURE, stages.CHECK, stages.PROFILE, stages.PACK))
_SHOWN = 40  # characters of an identity in a message


@dataclass(frozen=True)
class Worker:
    """A worker as it said what it is: `name` for a person, identities of its tools, and labels with how many it has."""

    address: str
    name: str
    threads: int = 1
    identities: Mapping[str, str] = field(default_factory=dict)
    device: str = ""
    labels: frozenset[str] = frozenset()
    why: str = ""  # it cannot work at all

    @property
    def is_ours(self) -> bool:
        """Whether it said anything at all: a worker of dask alone does not."""
        return bool(self.identities)


@dataclass(frozen=True)
class Needs:
    """What an action asks of who runs it. None of it enters a key by itself."""

    identities: Mapping[str, str]
    device: str = ""
    labels: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()


def identities(toolchain: Toolchain) -> dict[str, str]:
    """The tools of this machine, and what runs them."""
    python = ".".join(map(str, sys.version_info[:2]))
    return {**toolchain.identities, "tvmake": pipeline.__version__, "python": python}


def needs(action: Action, own: Mapping[str, str]) -> Needs:
    """What an action asks of a worker, for a driver with tools `own`."""
    tools = [*BASE, *(action.stage.tools if action.stage.kind is Kind.BINARY else ())]
    if action.stage.name in _RUNS_CODE and not action.needs:
        tools.append(HOST)
    return Needs(
        {name: own.get(name, ABSENT) for name in tools},
        _device_of(action) if action.stage.name in _RUNS_CODE else "",
        tuple(action.needs),
        (MEASURE,) if action.stage.alone else (),
    )


def _device_of(action: Action) -> str:
    """The device that the key of an action names: "worker llvm-znver5: <device>" where it goes by a label."""
    device = action.options.get("device", "")
    said = device if isinstance(device, str) else ""
    return said.partition(": ")[2] if action.needs else said


def unlike(worker: Worker, wanted: Mapping[str, str]) -> str:
    """How a worker's tools differ from those that are wanted, in words; "" where they do not."""
    if not worker.is_ours:
        return f"cannot work: {worker.why}" if worker.why else "is no worker of tvmake"
    differ = [name for name, value in wanted.items() if worker.identities.get(name, ABSENT) != value]
    if not differ:
        return ""
    return "has " + "; ".join(
        f"{name} {_short(worker.identities.get(name, ABSENT))}, not {_short(wanted[name])}" for name in differ
    )


def unfit(worker: Worker, asked: Needs) -> str:
    """Why a worker cannot run what asks for this, in words; "" where it can."""
    missing = [label for label in asked.labels if label not in worker.labels]
    if missing:
        return f"is not labelled {', '.join(missing)}"
    if why := unlike(worker, asked.identities):
        return why
    if asked.device and worker.device != asked.device:
        return f"is {worker.device}, not {asked.device}"
    return ""


def label_of(attributes: Mapping[str, Any]) -> str:
    """The label of who can run a target's code: llvm-znver5, cuda-sm_90, or its kind alone."""
    of = attributes.get("mcpu") or attributes.get("arch") or attributes.get("device")
    return f"{attributes['kind']}-{of}" if of else str(attributes["kind"])


def listed(workers: Iterable[Worker]) -> str:
    """What workers there are, for a message."""
    shown = [f"{each.name} ({', '.join(sorted(each.labels - {MEASURE})) or 'no labels'})" for each in workers]
    return "; ".join(sorted(shown)) or "none"


def _short(identity: str) -> str:
    return identity if len(identity) <= _SHOWN else identity[: _SHOWN - 1] + "…"
