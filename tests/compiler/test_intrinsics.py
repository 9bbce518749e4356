"""Intrinsics: those of a target's processor are there, the package is not, and can still be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_IN_A_FRESH_PROCESS = """
import sys
import tvm
from pipeline.compiler import intrinsics

package = "tvm.s_tir.tensor_intrin"
intrinsics.register(tvm.target.Target({{"kind": "llvm", "mtriple": "{triple}"}}))
print([name for name in sys.modules if name.startswith(package) and not name.endswith("_common")])
with intrinsics.standing_in():
    import tvm.s_tir.tensor_intrin
    with intrinsics.standing_in():
        pass
    print(package in sys.modules)
print(package in sys.modules)
"""


@pytest.mark.parametrize(
    ("triple", "module"),
    [
        ("x86_64-linux-gnu", "x86"),
        ("arm64-apple-macos", "arm_cpu"),
        ("aarch64-linux-gnu", "arm_cpu"),
        ("wasm32-unknown-unknown-wasm", None),
        ("armv7l-linux-gnueabihf", None),
    ],
)
def test_only_those_of_the_processor_are_registered(triple: str, module: str | None) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _IN_A_FRESH_PROCESS.format(triple=triple)],
        cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    registered = [f"tvm.s_tir.tensor_intrin.{module}"] if module else []
    assert done.stdout.splitlines() == [str(registered), "True", "False"], done.stderr
