"""`doit cluster`: workers and schedulers by hand, and a look at who is there. Needs no dodo.py."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from doit.cmd_base import Command

from pipeline.commands.arguments import OptionsAnywhere, Verb, the_verb
from pipeline.errors import ConfigError, TvmakeError

if TYPE_CHECKING:
    from pipeline.executors.serving import Seen

OK, ERROR, INTERRUPTED = 0, 2, 130
_PORT = 8786

opt_label = {
    "name": "labels",
    "short": "l",
    "long": "label",
    "type": list,
    "default": [],
    "help": "worker: also known by this label, cuda-sm_90 say; may be given several times",
}
opt_threads = {
    "name": "threads",
    "short": "j",
    "long": "threads",
    "type": int,
    "default": 0,
    "help": "worker: actions at once [default: TVMAKE_JOBS, or the number of processors]",
}
opt_name = {
    "name": "called",
    "short": "",
    "long": "name",
    "type": str,
    "default": "",
    "help": "worker: what it is called in messages [default: this machine's name]",
}
opt_host = {
    "name": "host",
    "short": "",
    "long": "host",
    "type": str,
    "default": "",
    "help": "scheduler: listen on this address only [default: on all of this machine's]",
}
opt_port = {
    "name": "port",
    "short": "p",
    "long": "port",
    "type": int,
    "default": _PORT,
    "help": f"scheduler: where it listens [default: {_PORT}; 0: any that is free]",
}
opt_json = {"name": "json", "short": "", "long": "json", "type": bool, "default": False, "help": "status: print JSON"}


@dataclass(frozen=True)
class Asked:
    """What was typed."""

    address: str
    labels: Sequence[str]
    threads: int
    name: str
    host: str
    port: int
    json: bool


class Cluster(OptionsAnywhere, Command):
    """One command with a verb for each thing that can be done."""

    doc_purpose = "start workers and a scheduler for builds on many machines, and look at them"
    doc_usage = "VERB [ADDRESS]"
    doc_description = """\
A build can leave its work to other machines:
  doit build --executor dask://HOST:8786
  doit tune --executor dask://HOST:8786   workers like this machine measure

One machine has the scheduler, others are workers. All need the same
tvmake (pip install 'tvmake[cluster]') and the same remote, through
which inputs and results go: see `doit help cache`.

  doit cluster scheduler [--port 8786]    on one machine
  doit cluster worker tcp://HOST:8786     on each that is to work
  doit cluster worker tcp://HOST:8786 --label cuda-sm_90
                                          with more to say of itself
  doit cluster status tcp://HOST:8786     who is there, at what

A worker is known by the targets that it runs code of, which it
finds out by itself (llvm, llvm-znver5), and by the labels that it
is given. One for a machine is enough: it performs as many actions
at once as there are processors; what is timed is alone on it. A
target is measured on workers of a label where its file says so:

  [device]
  label = "llvm-znver4"

One machine by itself needs nothing of this:
  doit build --executor dask-local:4

Whoever can reach a scheduler can run code on all its machines:
keep it within a network that you trust.

Exit code: 0 done, 2 nobody answers, or something is missing or
wrong, 130 interrupted.
"""
    cmd_options = (opt_label, opt_threads, opt_name, opt_host, opt_port, opt_json)
    from_zero = frozenset({"port"})
    name = "cluster"

    def execute(self, params: Any, args: list[str]) -> int:
        try:
            act, _, names = the_verb(self, VERBS, args)
            asked = Asked(
                _address(args[0], names),
                params["labels"],
                params["threads"],
                params["called"] or socket.gethostname(),
                params["host"],
                params["port"],
                params["json"],
            )
            act(asked)
            return OK
        except TvmakeError as error:
            _say(f"ERROR: {error}")
            return ERROR
        except KeyboardInterrupt:
            return INTERRUPTED


def _address(verb: str, rest: Sequence[str]) -> str:
    """The address that was typed; the one that builds use by TVMAKE_EXECUTOR where none was."""
    if verb == "scheduler":
        return ""
    from pipeline.executors import VARIABLE
    from pipeline.executors.dask import address_of

    named = [*rest, *([] if rest else filter(lambda text: "://" in text, [os.environ.get(VARIABLE, "")]))]
    if len(named) != 1:
        raise ConfigError(
            f"`doit cluster {verb}` wants the address of a scheduler",
            hint=f"write: doit cluster {verb} tcp://HOST:{_PORT}",
        )
    return address_of(named[0])


def _worker(asked: Asked) -> None:
    from pipeline.config import is_label
    from pipeline.executors.serving import run_worker
    from pipeline.toolchain import detect
    from pipeline.workspace import jobs

    detect()  # what is wrong with this machine is said before it is asked to work
    for label in asked.labels:
        if not is_label(label):
            raise ConfigError(f"{label!r} is no label", hint="write a word without spaces and colons: cuda-sm_90")
    run_worker(asked.address, asked.threads or jobs(), asked.labels, asked.name, _say)


def _scheduler(asked: Asked) -> None:
    from pipeline.executors.serving import run_scheduler

    run_scheduler(asked.host, asked.port, _say)


def _status(asked: Asked) -> None:
    from pipeline.executors.serving import look

    seen = look(asked.address)
    if asked.json:
        print(json.dumps([_plain(each) for each in seen], indent=2))
        return
    for each in seen:
        print(_line(each))
        for action in each.doing:
            print(f"  {action}")
    threads = sum(each.worker.threads for each in seen)
    print(f"{asked.address}: {len(seen)} worker{'s' * (len(seen) != 1)}, {threads} threads")


def _line(seen: Seen) -> str:
    from pipeline.executors.placing import unlike

    worker = seen.worker
    if why := unlike(worker, {}):
        return f"{worker.name} at {worker.address} {why}"
    tools = (
        f"tvmake {worker.identities['tvmake']}, tvm {worker.identities['tvm']}, Python {worker.identities['python']}"
    )
    labels = ", ".join(sorted(worker.labels))
    return f"{worker.name} at {worker.address}: {labels}; {worker.device}; {tools}; {seen.done} done"


def _plain(seen: Seen) -> dict[str, Any]:
    worker = dataclasses.asdict(seen.worker)
    return {**worker, "labels": sorted(seen.worker.labels), "doing": seen.doing, "done": seen.done}


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


VERBS: dict[str, Verb[Callable[[Asked], None]]] = {
    "worker": Verb(_worker, frozenset({"labels", "threads", "called"}), takes_names=True),
    "scheduler": Verb(_scheduler, frozenset({"host", "port"})),
    "status": Verb(_status, frozenset({"json"}), takes_names=True),
}
