"""Reading models: what a file holds, or what a function of the user's makes, as the stage `read` tells it.

A file is named by what is in it, wherever it lies, and read by a worker; what is not in the file but beside it (weights
of their own) is found out by reading, and then counts as well. A function travels to the worker by value.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pipeline import closures, stages
from pipeline.errors import ConfigError, ModelError
from pipeline.hashing import key_of
from pipeline.memoizer import Action, Memoizer
from pipeline.modelfiles import ModelFile, is_within
from pipeline.models import Model
from pipeline.store import ActionEntry
from pipeline.types import ModelKind, ModelSource, TensorSpec, Weight


class Reader:
    """Reads the models of the workspace in a folder."""

    def __init__(self, folder: Path, memoizer: Memoizer) -> None:
        self.folder = folder
        self.memoizer = memoizer

    def read(self, model: Model) -> tuple[ModelSource, list[Path]]:
        """What a model is, and the files that reading it depended on. Raises ModelError where it cannot be read."""
        entry, files = self._read_file(model) if isinstance(model.source, Path) else self._read_made(model)
        specs = msgspec.json.decode(self.memoizer.blob(entry.outputs["weights"]), type=tuple[TensorSpec, ...])
        weights = tuple(Weight(spec, entry.outputs[f"w{i}"]) for i, spec in enumerate(specs))
        cases = tuple(entry.outputs[f"case{i}"] for i in range(sum(name.startswith("case") for name in entry.outputs)))
        return ModelSource(ModelKind(model.kind), entry.outputs["skeleton"], weights, cases), files

    def _read_made(self, model: Model) -> tuple[ActionEntry, list[Path]]:
        """What a function of the user's makes, and the files that it depended on."""
        assert not isinstance(model.source, Path)
        options = {**self._reading(model), **self._places(model), "function": _pickled(model.source)}
        entry = self.memoizer.run(Action(stages.READ, model.name, options=options))
        return entry, [Path(name) for name in json.loads(self.memoizer.blob(entry.outputs["files"]))]

    def _read_file(self, model: Model) -> tuple[ActionEntry, list[Path]]:
        """What a file holds, and the files that were read."""
        entry, files = self._read_files(model, ())
        if beside := json.loads(self.memoizer.blob(entry.outputs["beside"])):
            entry, files = self._read_files(model, beside)
        return entry, files

    def _read_files(self, model: Model, beside: Sequence[str]) -> tuple[ActionEntry, list[Path]]:
        assert isinstance(model.source, Path)
        cases = tuple(self.folder / case for case in model.cases)
        seen = ModelFile(self.folder / model.source, cases, tuple(filter(is_within, beside)))
        places: dict[str, object] = {**self._places(model), "path": str(seen.path)}
        try:
            places["looks"] = seen.looks()
            options = {**self._reading(model), **seen.content()}
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            said = f"there is no file {error.filename}" if missing else f"{error.filename} cannot be read"
            raise ModelError(said, hint="check the path in dodo.py" if missing else f"{error.strerror}") from error
        action = Action(stages.READ_FILE, model.name, options=options, places=places)
        self._expect_read(action)
        return self.memoizer.run(action), seen.files()

    def _reading(self, model: Model) -> dict[str, object]:
        return {"kind": model.kind, "shapes": {name: list(shape) for name, shape in model.shapes.items()}}

    def _places(self, model: Model) -> dict[str, object]:
        return {
            "cases": [str(self.folder / case) for case in model.cases],
            # A worker finds the modules that dodo.py finds: those beside it, and where it looked itself.
            "import path": [str(self.folder), *sys.path],
        }

    def _expect_read(self, action: Action) -> None:
        """Asks for all at once that a file holds, where a remote knows it and the store does not."""
        remote, key = self.memoizer.remote, key_of(action.components(self.memoizer.toolchain))
        if remote is None or self.memoizer.store.lookup(key) is not None:
            return
        if (read := closures.ask(remote, self.memoizer.store, closures.key_of_one(key))) is not None:
            remote.expect(read.said, read.bundles)


def _pickled(function: Callable[[], Any]) -> bytes:
    """A function of the user's as bytes that a worker can call: what dodo.py defines travels by value."""
    import cloudpickle

    module = sys.modules.get(getattr(function, "__module__", ""))
    by_value = module is not None and getattr(module, "__name__", "") == "dodo"
    if by_value:
        cloudpickle.register_pickle_by_value(module)
    try:
        data: bytes = cloudpickle.dumps(function)
        return data
    except Exception as error:
        raise ConfigError(
            f"the function {getattr(function, '__name__', function)!r} cannot be sent to a worker: {error}",
            hint="do not close over open files, locks or sessions; make them inside the function",
        ) from error
    finally:
        if by_value:
            cloudpickle.unregister_pickle_by_value(module)
