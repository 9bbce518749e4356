"""dump: what extract and apply do, shown as TVMScript after each step. Asked for by `doit build --dump`."""

from __future__ import annotations

from typing import Any

from pipeline.compiler import ir
from pipeline.stages import Inputs, Options, Outputs
from pipeline.stages.extract import lower_skeleton


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: skeleton, and functions under the names that they shall have. Options: as extract's.

    Outputs: 1_imported.py, 2_canonical.py, …, and operators/<name>.py for each function.
    """
    texts: dict[str, bytes] = {}

    def watch(name: str, mod: Any) -> None:
        texts[f"{len(texts) + 1}_{name}.py"] = _script(mod)

    lower_skeleton(inputs["skeleton"], options, watch=watch)
    for name in inputs:
        if name != "skeleton":
            texts[f"operators/{name}.py"] = _script(ir.load(inputs[name]))
    return texts


def _script(shown: Any) -> bytes:
    text: str = shown.script()
    return text.encode() + b"\n"
