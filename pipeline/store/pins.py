"""Pins: action keys whose entries and blobs upkeep never removes, because a lock or a release names them.

    pins/<name>.json    {"format": 1, "name": …, "about": …, "keys": [<key>, …]}

A pin may name keys that are not here. One file that cannot be read keeps everything: it cannot be known what it pinned.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec

from pipeline.errors import ConfigError, explain_os_error
from pipeline.hashing import is_sha256
from pipeline.store.files import written_atomically

FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9._-]{1,80}").fullmatch
_END = ".json"


class Pin(msgspec.Struct, frozen=True):
    """What is pinned under one name, and why."""

    format: int
    name: str
    about: str
    keys: list[str]


class Pins:
    """The pins of the store in a folder. Safe for any number of processes: the last who writes a name wins.

    Raises StoreError where the folder cannot be read or written.
    """

    def __init__(self, root: Path) -> None:
        self._folder = root / "pins"
        self._scratch = root / "tmp"

    def add(self, name: str, keys: Iterable[str], about: str = "") -> None:
        """Pins these keys under a name, in place of what had the name. Raises ConfigError for what is none."""
        pin = Pin(FORMAT, name, about, sorted(set(keys)))
        for key in pin.keys:
            if not is_sha256(key):
                raise ConfigError(f"the pin {name} names {key!r}, which is no key", hint="a key has 64 digits, 0-9 a-f")
        try:
            with written_atomically(self._path(name), self._scratch) as stream:
                stream.write(msgspec.json.format(msgspec.json.encode(pin), indent=1) + b"\n")
        except OSError as error:
            raise explain_os_error(error, f"writing the pin {name}") from error

    def remove(self, name: str) -> bool:
        """Ends a pin; whether there was one."""
        try:
            self._path(name).unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise explain_os_error(error, f"removing the pin {name}") from error
        return True

    def names(self) -> list[str]:
        """The names of all pins, whether they can be read or not, in order."""
        try:
            return sorted(name[: -len(_END)] for name in os.listdir(self._folder) if name.endswith(_END))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise explain_os_error(error, "reading the pins") from error

    def read(self, name: str) -> Pin | None:
        """One pin, or None where there is none that can be read."""
        with contextlib.suppress(OSError, msgspec.MsgspecError, UnicodeError):
            pin = msgspec.json.decode((self._folder / f"{name}{_END}").read_bytes(), type=Pin)
            if pin.format == FORMAT and all(map(is_sha256, pin.keys)):
                return pin
        return None

    def keys(self) -> set[str]:
        """All keys that are pinned, as far as they can be read; see `broken`."""
        return self.survey()[0]

    def broken(self) -> list[Path]:
        """The files that should say what is pinned and cannot be read."""
        return self.survey()[1]

    def survey(self) -> tuple[set[str], list[Path]]:
        """Keys and broken files, seen at one time. A pin that is removed meanwhile is neither."""
        keys: set[str] = set()
        broken = []
        for name in self.names():
            path = self._folder / f"{name}{_END}"
            if (pin := self.read(name)) is not None:
                keys.update(pin.keys)
            elif os.path.lexists(path):
                broken.append(path)
        return keys, broken

    def stamp(self) -> list[tuple[str, int, int]]:
        """What lies in the folder, without reading it: other than before once a pin was added, changed or removed."""
        try:
            with os.scandir(self._folder) as entries:
                found = [(entry.name, entry.stat()) for entry in entries if entry.name.endswith(_END)]
        except FileNotFoundError:  # no folder, or a pin that was removed meanwhile
            return []
        return sorted((name, stat.st_ino, stat.st_mtime_ns) for name, stat in found)

    def _path(self, name: str) -> Path:
        if not _NAME(name):
            raise ConfigError(
                f"{name!r} cannot be the name of a pin",
                hint="take letters, digits, points, hyphens and underscores, 80 of them at most",
            )
        return self._folder / f"{name}{_END}"
