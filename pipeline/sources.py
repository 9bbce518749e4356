"""Python files of a workspace as modules, from their bytes: what they do depends on nothing beside them."""

from __future__ import annotations

import linecache
import sys
from types import ModuleType

from pipeline.errors import ConfigError, first_line
from pipeline.hashing import Digest


def object_of(source: bytes, shown: str, attribute: str, file: str = "") -> object:
    """The object of this name in a file, which lies at `file` where that matters to it.

    Raises ConfigError that names the file where it has none.
    """
    found = getattr(module_of(source, shown, file), attribute, None)
    if found is None:
        raise ConfigError(f"{shown} has no object {attribute!r}", hint=f"write: {attribute} = …")
    return found


def module_of(source: bytes, shown: str, file: str = "") -> ModuleType:
    """A file of the workspace as a module, from its bytes: what it does depends on nothing beside it.

    TVMScript reads a function's source from its file; the line cache answers for one. Raises ConfigError with what went
    wrong in it.
    """
    name = f"tvmake_workspace_{Digest.of(source).hash[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    file = file or f"{name}.py"
    module = ModuleType(name)
    module.__file__ = file
    try:
        text = source.decode()
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        sys.modules[name] = module
        exec(compile(text, file, "exec"), module.__dict__)
    except BaseException as error:
        sys.modules.pop(name, None)
        if not isinstance(error, Exception):
            raise
        raise ConfigError(f"{shown} cannot be loaded: {type(error).__name__}: {first_line(error)}") from error
    return module
