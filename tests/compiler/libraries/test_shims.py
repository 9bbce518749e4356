"""Shims compile to the same bytes, say why they do not, and are known without TVM."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tvm
from operators import TARGET, driver, matmul, one, pool, ready

from pipeline.compiler.libraries import LIBRARIES, POOL, Installed, Library, by_name, compile_source, load_shim
from pipeline.errors import SetupError


def installed() -> list[Library]:
    return [library for library in LIBRARIES if library.find() is not None]


def test_there_is_one_name_for_each() -> None:
    assert len({library.name for library in LIBRARIES}) == len(LIBRARIES)
    assert all(by_name(library.name) is library and library.shim.is_file() for library in LIBRARIES)


@pytest.mark.parametrize("library", installed(), ids=lambda library: library.name)
def test_a_plan_of_nonsense_is_none(library: Library) -> None:
    shim = ready(library)[2]
    for text in (
        "",
        "conv",
        "matmul x=",
        "conv x=1:1 w=1:1 y=1:1",
        "matmul x=8:1 w=8:1 y=8:1",
        "matmul x=8x8:8 w=8x8:8x1 y=8x8:8x1",
        "matmul x=8x8:8x1 w=8x8:8x1 y=8x8:8x1 then=add:8:1",
        "matmul x=8x8:8x1 w=8x8:8x1 y=8x8:8x1 then=cube",
        "pool x=8:1 y=8:1",
        "nonsense x=8x8:8x1",
    ):
        assert shim.plan(text) is None


def test_the_same_source_gives_the_same_bytes() -> None:
    assert compile_source(POOL, Installed("", (), {}, ("-fopenmp",)), driver()) == pool()


def test_a_source_that_does_not_compile_says_so(tmp_path: Path) -> None:
    broken = tmp_path / "broken.cc"
    broken.write_text("int main( {")
    with pytest.raises(RuntimeError, match=r"broken\.cc does not compile"):
        compile_source(broken, Installed("", (), {}), driver())


def test_a_library_that_cannot_be_loaded_says_what_to_type(tmp_path: Path) -> None:
    (library,) = installed()[:1] or [pytest.skip("no library is installed")]
    found, made, _ = ready(library)
    with pytest.raises(SetupError, match=library.name):
        load_shim(library, made, replace(found, shared={"libnone.so": tmp_path / "libnone.so"}), driver())


@pytest.mark.parametrize(
    "library", [each for each in installed() if each.name != "attention"], ids=lambda library: library.name
)
def test_other_architectures_are_left_alone(library: Library) -> None:
    func = one(matmul("relu"), [(16, 32), (32, 48)], [1])
    assert library.match(func, TARGET, ready(library)[2]) is not None
    for triple in ("aarch64-linux-gnu", "riscv64-linux-gnu"):
        target = tvm.target.Target({"kind": "llvm", "mtriple": triple})
        assert library.match(func, target, ready(library)[2]) is None


_WITHOUT_TVM = """
import sys
from pipeline.compiler.libraries import LIBRARIES
for library in LIBRARIES:
    library.find()
assert not {"tvm", "tvm_ffi", "numpy"} & set(sys.modules), set(sys.modules)
"""


def test_libraries_are_found_without_tvm() -> None:
    subprocess.run([sys.executable, "-c", _WITHOUT_TVM], check=True)
