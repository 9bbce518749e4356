"""Has a device asked what it is: workers of a cluster have said it already; a device behind a tracker is asked by a
child, as this process must not load TVM.

python -m pipeline.devices.asking DEVICE TRIPLE    the child: JSON in, one line of JSON out
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from pipeline.config import Device
from pipeline.devices import identity
from pipeline.errors import DeviceError, ExecutorError, TvmakeError

if TYPE_CHECKING:
    from pipeline.executors import Executor


def require_known(device: Device, triple: str, by: Executor) -> None:
    """Has a device asked what it is where that was never done. Raises DeviceError where none comes, and where it is
    another than it was; ExecutorError where no worker is one."""
    if device.label:
        _require_known_worker(device, by)
    elif identity.said(device) is None:
        ask(device, triple)


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


def ask(device: Device, triple: str) -> str:
    """What the device says of itself, now remembered. Raises DeviceError where none comes."""
    # The child finds this package where the parent found it, installed or not.
    package = str(Path(__file__).resolve().parent.parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pipeline.devices.asking", msgspec.json.encode(device).decode(), triple]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise DeviceError(f"the device {device.key} could not be asked what it is: {last}") from error
    if "said" in answer:
        return str(answer["said"])
    raise DeviceError(answer["message"], hint=answer["hint"])


def _main(written: str, triple: str) -> None:
    from pipeline.devices import rpc

    answer: dict[str, str]
    try:
        answer = {"said": rpc.ask(msgspec.json.decode(written, type=Device), triple)}
    except TvmakeError as error:
        answer = {"message": error.message, "hint": error.hint}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main(*sys.argv[1:])
