"""What this machine works with: its store, the remote behind it, devices, and who runs stages."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.doctor.findings import Finding, by_limits, gigabytes, ok, warning
from pipeline.errors import DeviceError, RemoteError, StoreError
from pipeline.store import Store, default_root

if TYPE_CHECKING:
    from pipeline.devices.tracker import Standing

OTHER_STORE = "set TVMAKE_CACHE to another folder, or delete this one: it holds only what can be built again"

_LOW_DISK, _NO_DISK = 5_000_000_000, 200_000_000  # bytes


def store() -> Finding:
    """Opens the store, which makes it where there is none, writes a new blob, reads it and removes it."""
    root = default_root()
    found = Store(root)
    written = b"tvmake doctor " + secrets.token_bytes(16)
    digest = found.put(written)
    if found.get(digest) != written:
        raise StoreError(f"{root} does not give back what was written to it", hint="look for a failing disk: `dmesg`")
    path = found.path(digest)
    if path is not None:
        path.unlink(missing_ok=True)
    return ok(f"{root}, can be written")


def store_disk() -> Finding:
    root = default_root()
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    hint = "free some space, or set TVMAKE_CACHE to a folder on a larger disk"
    return by_limits(free, _LOW_DISK, _NO_DISK, f"{gigabytes(free)} free", hint)


def quarantine() -> Finding:
    folder = default_root() / "quarantine"
    try:
        count = len(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        count = 0
    if count:
        said = f"{count} file{'s' * (count > 1)} in {folder} did not pass the check of every reading"
        return warning(said, f"look for a failing disk (`dmesg`); to forget them: rm -rf {shlex.quote(str(folder))}")
    return ok("nothing in the store was found damaged")


def remote() -> Finding:
    """Asks the remote that a build here would use for an entry that nobody has."""
    from pipeline.remotes import Terms, open_remote
    from pipeline.remotes.settings import load

    settings = load(Path.cwd())
    if not settings.uses_remote or settings.url is None:
        return ok("none is used: only this machine has what is built here")
    opened = open_remote(settings.url, Terms(settings.connect, settings.stall, settings.secrets or {}))
    begun = time.monotonic()
    try:
        opened.action(secrets.token_hex(32))
        return ok(f"{opened.name} answers in {1e3 * (time.monotonic() - begun):.0f} ms; policy {settings.policy}")
    except RemoteError as error:
        return warning(error.message, error.hint or "builds go on without it; see whether the server runs")
    finally:
        opened.close()


def devices() -> Finding:
    """Asks the trackers that the targets of the workspace name who is there: all at once, each for some seconds."""
    from concurrent.futures import ThreadPoolExecutor

    from pipeline.config import load_target

    found = [load_target(path).device for path in sorted(Path.cwd().glob("targets/*.toml"))]
    wanted = list(dict.fromkeys((each.tracker, each.key) for each in found if each is not None and each.tracker))
    if not wanted:
        return ok("no target of this folder is measured on devices behind a tracker")
    trackers = list(dict.fromkeys(tracker for tracker, _ in wanted))
    with ThreadPoolExecutor(len(trackers)) as threads:
        answers = dict(zip(trackers, threads.map(_asked_tracker, trackers), strict=True))
    told = [_devices_of(answers[tracker], tracker, key) for tracker, key in wanted]
    said, hints = "; ".join(each.said for each in told), [each.hint for each in told if each.hint]
    return warning(said, hints[0]) if hints else ok(said)


def _asked_tracker(address: str) -> dict[str, Standing] | DeviceError:
    from pipeline.devices.tracker import Tracker

    try:
        with Tracker(address) as tracker:
            return tracker.standings()
    except DeviceError as error:
        return error


def _devices_of(answer: dict[str, Standing] | DeviceError, tracker: str, key: str) -> Finding:
    """What a tracker has of a key: how many devices, and what they are at."""
    from pipeline.devices.tracker import serve

    if isinstance(answer, DeviceError):
        return warning(answer.message, answer.hint)
    there = answer.get(key)
    if there is None or not there.total:
        others = ", ".join(name for name, each in answer.items() if each.total) or "none at all"
        return warning(f"the RPC tracker {tracker} has no device {key}; it has {others}", serve(tracker, key))
    waiting = f", {there.waiting} waiting for one" if there.waiting else ""
    return ok(f"{key} at {tracker}: {there.total} there, {there.free} free, {there.busy} busy{waiting}")


def executor() -> Finding:
    """Looks at who would run the stages of a build here."""
    from pipeline.executors import VARIABLE, require_meant

    named = os.environ.get(VARIABLE, "")
    require_meant(named)
    if "://" not in named:
        return ok(f"{named or 'processes of this machine'}")
    from pipeline.executors.dask import address_of
    from pipeline.executors.placing import unlike
    from pipeline.executors.serving import look

    seen = [each.worker for each in look(address_of(named))]
    wrong = [f"{worker.name} {why}" for worker in seen if (why := unlike(worker, {}))]
    said = f"{len(seen)} worker{'s' * (len(seen) != 1)} at {named}"
    if wrong or not seen:
        return warning("; ".join([said, *wrong]), f"doit cluster status {address_of(named)}")
    return ok(said)
