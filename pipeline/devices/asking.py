"""Has a device asked what it is: workers of a cluster have said it already; a device behind a tracker is asked by a
child, as this process must not load TVM.

python -m pipeline.devices.asking DEVICE TRIPLE    the child: JSON in, lines of JSON out, of which the last is the
answer, and those before it say what is waited for
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from pipeline import notices
from pipeline.config import Device
from pipeline.devices import identity
from pipeline.errors import DeviceError, ExecutorError, TvmakeError

if TYPE_CHECKING:
    from pipeline.executors import Executor
    from pipeline.executors.contract import Say

_SAID, _WAITS = "said", "waits"


def require_known(device: Device, triple: str, by: Executor) -> None:
    """Has a device asked what it is where that was never done. Raises DeviceError where none comes, and where it is
    another than it was; ExecutorError where no worker is one."""
    if device.label:
        _require_known_worker(device, by)
    elif identity.said(device) is None:
        ask(device, triple, by.say)


def _require_known_worker(device: Device, by: Executor) -> None:
    known = identity.said(device)
    try:
        told = by.serving(device.label)
    except ExecutorError:
        if known is None:
            raise
        return  # what was measured may be all that is wanted
    if told != known:
        identity.remember(device, told)
    if known not in (None, told):
        raise DeviceError(
            f"workers labelled {device.label} are {told}; they were {known}",
            hint="run the same command again: it goes on with what they are now, and keeps the results apart",
        )


def ask(device: Device, triple: str, say: Say) -> str:
    """What the device says of itself, now remembered. Raises DeviceError where none comes."""
    # The child finds this package where the parent found it, installed or not.
    package = str(Path(__file__).resolve().parent.parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pipeline.devices.asking", msgspec.json.encode(device).decode(), triple]
    answer: dict[str, str] = {}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        ) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            answer = _read(line)
            if _WAITS in answer:
                say(answer[_WAITS])
        child.wait()
        log.seek(0)
        last = (log.read().strip().splitlines() or [f"exit code {child.returncode}"])[-1]
    if _SAID in answer:
        return answer[_SAID]
    if "message" in answer:
        raise DeviceError(answer["message"], hint=answer["hint"])
    raise DeviceError(f"the device {device.key} could not be asked what it is: {last}")


def _read(line: str) -> dict[str, str]:
    try:
        return msgspec.json.decode(line, type=dict[str, str])
    except msgspec.MsgspecError:
        return {}  # not ours: a library's, say


def _tell(**answer: str) -> None:
    print(msgspec.json.encode(answer).decode(), flush=True)


def _main(written: str, triple: str) -> None:
    from pipeline.devices import rpc

    notices.listen(lambda sentence: _tell(**{_WAITS: sentence}))
    try:
        _tell(**{_SAID: rpc.ask(msgspec.json.decode(written, type=Device), triple)})
    except TvmakeError as error:
        _tell(message=error.message, hint=error.hint)


if __name__ == "__main__":
    _main(*sys.argv[1:])
