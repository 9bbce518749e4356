"""What devices behind a tracker said of themselves, remembered; and how many of them are used at once.

Times hold for a kind of device, not for the machine that has them taken: results are keyed by the user's name for the
kind, which is its key at the tracker or a label of workers, and by what the device said of itself. That is remembered
in the store's folder, so that keys are known without asking. Every session asks again, and what has changed is said.

    <store>/locks/devices/<name>.json    what a device said, by tracker and key
    <store>/locks/devices/<name>.<n>     locked while the n-th device of that tracker and key is used
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import Device, TargetFile
from pipeline.errors import explain_os_error
from pipeline.hashing import key_of
from pipeline.notices import Wait
from pipeline.processor import device as this_machine
from pipeline.store import Store, default_root
from pipeline.store.files import written_atomically

_UNASKED = "not asked yet what it is"
_FOLDER = Path("locks", "devices")  # of what a store makes for itself, so that two at once may open it
_LOOK = 0.1  # seconds between looks for a device that nobody here uses


def device_of(file: TargetFile) -> str:
    """What times that are taken for a target hold for: this machine, or the devices behind its tracker."""
    return this_machine() if file.device is None else named(file.device, said(file.device))


def named(device: Device, said: str | None) -> str:
    """What results of a device are keyed by."""
    where = f"worker {device.label}" if device.label else f"rpc {device.key}"
    return f"{where}: {said or _UNASKED}"


def said(device: Device) -> str | None:
    """What the device said of itself when it was last asked; None where it never was."""
    try:
        read = json.loads(file_of(device).read_text())
    except (OSError, ValueError):
        return None
    found = read.get("said") if isinstance(read, dict) else None
    return found if isinstance(found, str) else None


def file_of(device: Device) -> Path:
    """Where that is remembered."""
    return default_root() / _FOLDER / f"{_name(device)}.json"


def remember(device: Device, said: str) -> None:
    """Notes what a device says of itself."""
    scratch = _made_folder().parent.parent / "tmp"
    written = {**_place(device), "said": said}
    try:
        with written_atomically(file_of(device), scratch, sync=False) as stream:
            stream.write(json.dumps(written).encode())
    except OSError as error:
        raise explain_os_error(error, f"noting what the device {device.label or device.key} is") from error


@contextlib.contextmanager
def slot(device: Device) -> Iterator[None]:
    """One of the `parallel` devices that are used from this store at once; waits for it. Ends with the process."""
    folder, name = _made_folder(), _name(device)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"{name}.{n}", "a")) for n in range(device.parallel)]
        waiting = Wait()
        while not any(map(_is_locked, files)):
            waiting.tell(f"waiting for the device {device.key}: {device.parallel} at once (device.parallel) are in use")
            time.sleep(_LOOK)
        yield


def _is_locked(file: object) -> bool:
    """Whether the lock could be had."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[arg-type]
    except OSError as error:
        return not isinstance(error, BlockingIOError)  # a disk that cannot lock stops nobody
    return True


def _name(device: Device) -> str:
    return key_of(_place(device))[:32]


def _place(device: Device) -> dict[str, object]:
    return {"label": device.label} if device.label else {"tracker": device.tracker, "key": device.key}


def _made_folder() -> Path:
    folder = Store(default_root()).root / _FOLDER  # a store makes itself only where there is nothing yet
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise explain_os_error(error, f"making {folder}") from error
    return folder
