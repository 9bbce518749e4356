"""What a workspace's dodo.py says of its models."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError

KINDS = ("onnx", "relax", "torch")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z")

Source = str | os.PathLike[str] | Callable[[], Any]


@dataclass(frozen=True)
class Model:
    """One model of a workspace, made by `Model.onnx`, `Model.relax` or `Model.torch`.

    What is wrong with it is said when the workspace makes its tasks.

    name     names its tasks and its artifact's folder: letters, digits, `_`, `-` and `.`
    kind     one of KINDS
    source   a file, relative to dodo.py, or a function without arguments
    shapes   shapes of inputs that the model leaves open, by name
    depends  files that the function reads, relative to dodo.py: when one changes, the function is called again
    cases    folders with recorded inputs and outputs, in ONNX's layout, that artifacts are checked against as well
    high     integer inputs are drawn from [0, high) when the artifact is checked; 0 lets the check find what fits
    """

    name: str
    kind: str
    source: Path | Callable[[], Any]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    depends: tuple[Path, ...] = ()
    cases: tuple[Path, ...] = ()
    high: int = 0

    def require_valid(self) -> None:
        """Raises ConfigError that says what is wrong with the declaration."""
        if not isinstance(self.name, str) or not _NAME.match(self.name):
            raise ConfigError(
                f"{self.name!r} cannot name a model",
                hint="use letters, digits, '_', '-' and '.', beginning with a letter or digit",
            )
        if not (isinstance(self.source, Path) or callable(self.source)):
            raise ConfigError(
                f"the source of model {self.name!r} is a {type(self.source).__name__}", hint="give a path or a function"
            )
        if self.kind == "relax" and isinstance(self.source, Path):
            raise ConfigError(f"model {self.name!r}: Model.relax takes a function, not a path")
        for role, paths in (("depends", self.depends), ("cases", self.cases)):
            if not isinstance(paths, tuple):
                raise ConfigError(f"model {self.name!r}: {role} is {paths!r}", hint="give a list of paths")
        if not isinstance(self.high, int) or isinstance(self.high, bool) or self.high < 0:
            raise ConfigError(f"model {self.name!r}: high is {self.high!r}", hint="give a number of 0 or more")
        for key, shape in self.shapes.items():
            if not isinstance(shape, tuple) or not all(type(extent) is int and extent >= 0 for extent in shape):
                raise ConfigError(
                    f"shapes of model {self.name!r}: {key!r} is {shape!r}",
                    hint="give the extents: (1, 3, 224, 224)",
                )

    @classmethod
    def onnx(
        cls,
        name: str,
        source: Source,
        *,
        shapes: Mapping[str, Sequence[int]] | None = None,
        depends: Sequence[str | os.PathLike[str]] = (),
        cases: Sequence[str | os.PathLike[str]] = (),
        high: int = 0,
    ) -> Model:
        """An ONNX file, or a function that returns a ModelProto or the path of one."""
        fixed: dict[str, Any] = {
            str(key): tuple(value) if _is_list(value) else value for key, value in (shapes or {}).items()
        }
        return cls(name, "onnx", _source(source), fixed, _paths(depends), _paths(cases), high)

    @classmethod
    def relax(cls, name: str, function: Callable[[], Any], *, depends: Sequence[str | os.PathLike[str]] = ()) -> Model:
        """A function that returns an IRModule, (IRModule, {weight: array}), or (nn.Module, spec for export_tvm)."""
        return cls(name, "relax", _source(function), depends=_paths(depends))

    @classmethod
    def torch(cls, name: str, source: Source, *, depends: Sequence[str | os.PathLike[str]] = ()) -> Model:
        """A saved exported program (.pt2), or a function that returns a torch.export.ExportedProgram."""
        return cls(name, "torch", _source(source), depends=_paths(depends))


def _source(source: Source) -> Path | Callable[[], Any]:
    return Path(source) if isinstance(source, str | os.PathLike) else source


def _paths(paths: Sequence[str | os.PathLike[str]]) -> tuple[Path, ...]:
    return tuple(Path(path) for path in paths) if _is_list(paths) else paths  # type: ignore[return-value]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
