"""Models that are files, named by what is in them: so that nobody reads again what somebody has read.

    the model's file, its shapes, its cases         → key
    the same, and the files of its weights          → key, where the model's file says that it has some

What a file is called and where it lies is in no key. Which files hold weights is known only to who has read the model's
file: the first answer names them, relative to it, and the second has them in its key.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.errors import ModelError
from pipeline.hashing import Digest


@dataclass(frozen=True)
class ModelFile:
    """The files of one model as they were seen when they were hashed.

    path    the model's own
    cases   folders with recorded inputs and outputs
    beside  files of weights, by their names relative to the model's folder
    """

    path: Path
    cases: tuple[Path, ...] = ()
    beside: tuple[str, ...] = ()

    def files(self) -> list[Path]:
        """All of them."""
        recorded = [path for case in self.cases for path in _recorded(case)]
        return [self.path, *recorded, *(self.path.parent / name for name in self.beside)]

    def content(self) -> dict[str, object]:
        """What is in them, as the options of a stage. Raises OSError where one cannot be read."""
        return {
            "file": _digest(self.path),
            # In the order in which inputs and outputs are numbered; a case is called by its folder.
            "recorded": [[case.name, *([path.name, _digest(path)] for path in _recorded(case))] for case in self.cases],
            "beside": {name: _digest(self.path.parent / name) for name in self.beside},
        }

    def looks(self) -> list[list[object]]:
        """How they look, to see later whether one was written meanwhile."""
        return [[str(path), *_look(path)] for path in self.files()]


def require_unchanged(looks: Iterable[Sequence[object]]) -> None:
    """Raises ModelError where a file does not look as it did: what was read may not be what was hashed."""
    for name, *look in looks:
        try:
            now = _look(Path(str(name)))
        except OSError:
            now = []
        if now != list(look):
            raise ModelError(f"{name} was written while it was read", hint="run the same command again")


def is_within(name: object) -> bool:
    """Whether a relative name leads to nowhere but the folder that it is relative to, and what is under it."""
    if not isinstance(name, str) or "\0" in name:
        return False
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts


def _recorded(case: Path) -> list[Path]:
    return sorted(case.glob("*.pb"))


def _digest(path: Path) -> str:
    return Digest.of_file(path).hash


def _look(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]
