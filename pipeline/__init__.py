"""tvmake: a build system for Apache TVM operators.

    from pipeline import DOIT_CONFIG, Model, Workspace    in dodo.py
    from pipeline import load                             where a built artifact runs

Names are imported when they are first used, so that neither costs what the other needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.models import Model
    from pipeline.runtime import load
    from pipeline.workspace import DOIT_CONFIG, Workspace

__version__ = "0.1.0"
__all__ = ["DOIT_CONFIG", "Model", "Workspace", "__version__", "load"]

_HOMES = {
    "DOIT_CONFIG": "pipeline.workspace",
    "Model": "pipeline.models",
    "Workspace": "pipeline.workspace",
    "load": "pipeline.runtime",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
