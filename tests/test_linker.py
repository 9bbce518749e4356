"""Objects become a library: for whom, with what beside it, and what is said where something is missing."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline import linker, symbols, toolchain
from pipeline.errors import ConfigError, SetupError
from pipeline.linker import NoLinkerError, compile_source, link
from pipeline.weightfile import WEIGHTS_BEGIN

pytestmark = pytest.mark.skipif(toolchain.compiler() is None, reason="there is no compiler")


@functools.cache
def compiled(source: str, *options: str, driver: str = "gcc") -> bytes:
    """The object file of some C."""
    with tempfile.TemporaryDirectory() as folder:
        command = [driver, "-x", "c", "-c", "-fPIC", *options, "-", "-o", "object.o"]
        subprocess.run(command, cwd=folder, input=source.encode(), check=True)
        return (Path(folder) / "object.o").read_bytes()


def shared(folder: Path, name: str, source: str, *options: str) -> Path:
    """A shared library in a folder of its own, where nothing looks for it."""
    folder.mkdir(exist_ok=True)
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", name, f"-Wl,-soname,{name}", "-x", "none", *options]
    subprocess.run(command, input=source.encode(), cwd=folder, check=True)
    return folder / name


def placed(folder: Path, library: memoryview, *beside: Path) -> Path:
    """A library in a new folder with others beside it."""
    folder.mkdir()
    (folder / "lib.so").write_bytes(library)
    for other in beside:
        shutil.copy(other, folder)
    return folder / "lib.so"


def called(library: Path, function: str) -> int:
    """What a function gives in a process of its own that is told of no folder to look for libraries in."""
    program = f"import ctypes; print(ctypes.CDLL({str(library)!r}).{function}())"
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


ONE = "int one(void) { return 1; }"
TWO = "int one(void); int two(void) { return one() + 1; }"


def test_the_same_objects_give_the_same_library_whatever_their_order_and_place(tmp_path: Path) -> None:
    (tmp_path / "stored").write_bytes(compiled(ONE))
    first = link({"a.o": compiled(ONE), "b.o": compiled(TWO)})
    assert link({"b.o": compiled(TWO), "a.o": tmp_path / "stored"}) == first
    assert called(placed(tmp_path / "out", first), "two") == 2
    assert b"tvmake-link" not in bytes(first)
    assert str(tmp_path).encode() not in bytes(first)


def test_generated_source_is_compiled_to_the_same_bytes_anywhere(tmp_path: Path) -> None:
    source = b"#include <tvm/runtime/c_backend_api.h>\n" + ONE.encode()
    made = compile_source(source)
    assert compile_source(source) == made
    assert called(placed(tmp_path / "out", link({"a.o": made, "b.o": compiled(TWO)})), "two") == 2
    with pytest.raises(RuntimeError, match=r"refused: .*function\.c"):
        compile_source(b"no C")
    with pytest.raises(NoLinkerError, match="wasm32"):
        compile_source(source, "wasm32-unknown-unknown")


def test_weights_lie_in_the_library(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"\x2a" + bytes(99))
    library = placed(tmp_path / "out", link({"a.o": compiled(ONE)}, tmp_path / "w"))
    weights = ctypes.c_char.in_dll(ctypes.CDLL(str(library)), WEIGHTS_BEGIN)
    assert weights.value == b"\x2a"
    assert ctypes.addressof(weights) % 64 == 0


@pytest.mark.parametrize("source", ["int f(void);", "#include <math.h>\nint f(void);"], ids=["bare", "with libm"])
def test_a_function_that_nothing_has_is_named_with_who_calls_it(source: str) -> None:
    caller = compiled(f"{source} double cos(double); int g(double x) {{ return f() + (int)cos(x); }}")
    with pytest.raises(RuntimeError, match=r"has f, which o12\.o calls$"):
        link({"a.o": compiled(ONE), "o12.o": caller})


def test_several_missing_functions_are_counted() -> None:
    caller = compiled("int f(void), g(void), h(void); int all(void) { return f() + g() + h(); }")
    with pytest.raises(RuntimeError, match=r"has f, which a\.o calls \(and 2 more: g, h\)"):
        link({"a.o": caller})


def test_what_the_system_and_the_runtime_have_is_not_missed() -> None:
    source = """
        #include <stdlib.h>
        int TVMBackendParallelBarrier(int, void*); void TVMFFIErrorSetRaisedFromCStr(const char*, const char*);
        double exp(double); int __cxa_guard_acquire(void*);
        int f(double x) {
            TVMFFIErrorSetRaisedFromCStr("", ""); free(malloc(8));
            return TVMBackendParallelBarrier(0, 0) + (int)exp(x) + __cxa_guard_acquire(0);
        }
    """
    assert link({"a.o": compiled(source)})


def test_what_needs_openmp_gets_it(tmp_path: Path) -> None:
    source = """
        int f(void) {
            int sum = 0;
            #pragma omp parallel for reduction(+:sum)
            for (int i = 0; i < 10; ++i) sum += i;
            return sum;
        }
    """
    library = placed(tmp_path / "out", link({"a.o": compiled(source, "-fopenmp")}))
    assert "libgomp.so.1" in symbols.needed(library)
    assert called(library, "f") == 45
    alone = placed(tmp_path / "alone", link({"a.o": compiled(ONE)}))
    assert "libgomp.so.1" not in symbols.needed(alone)


def test_libraries_beside_are_found_with_what_they_need_themselves(tmp_path: Path) -> None:
    deep = shared(tmp_path / "p", "libdeep.so.1", "int deep(void) { return 40; }")
    near = shared(tmp_path / "q", "libnear.so.2", "int deep(void); int near(void) { return deep() + 1; }", str(deep))
    caller = compiled("int near(void); int f(void) { return near() + 1; }")
    beside = {"libnear.so.2": near, "libdeep.so.1": deep}
    library = link({"a.o": caller}, libraries=beside)
    assert called(placed(tmp_path / "out", library, near, deep), "f") == 42
    assert link({"a.o": caller}, libraries=beside) == library
    assert str(tmp_path).encode() not in bytes(library)


def test_a_library_that_no_object_calls_is_loaded_as_well(tmp_path: Path) -> None:
    plugin = shared(tmp_path / "p", "libplugin.so", "int plugin;")
    library = placed(tmp_path / "out", link({"a.o": compiled(ONE)}, libraries={"libplugin.so": plugin}), plugin)
    assert "libplugin.so" in symbols.needed(library)


def test_a_library_under_a_name_that_is_not_its_own_is_refused(tmp_path: Path) -> None:
    other = shared(tmp_path / "p", "libother.so.3", "int other;")
    with pytest.raises(RuntimeError, match=r"another name inside.*libother\.so"):
        link({"a.o": compiled(ONE)}, libraries={"libother.so": other})


def test_a_function_that_only_a_library_wants_is_not_asked_of_the_objects(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="has near"):
        link({"a.o": compiled("int near(void); int f(void) { return near(); }")})


def test_what_the_linker_refuses_is_told_in_its_words() -> None:
    with pytest.raises(RuntimeError, match=r"refused: .*one"):
        link({"a.o": compiled(ONE), "b.o": compiled(ONE)})


@pytest.mark.parametrize(
    ("triple", "package"),
    [
        ("s390x-linux-gnu", "g++-s390x-linux-gnu"),
        ("aarch64-linux-gnu", "g++-aarch64-linux-gnu"),
        ("wasm32-unknown-unknown", "emscripten"),
        ("arm64-apple-macos", "a machine of that system"),
    ],
)
def test_where_nothing_links_for_a_triple_it_is_said_what_to_install(
    triple: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolchain._cross_driver.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NoLinkerError, match=triple) as caught:
        link({"a.o": b""}, triple=triple)
    assert package in caught.value.hint
    assert isinstance(caught.value, SetupError)
    assert toolchain.driver_identity(triple) == toolchain.ABSENT
    toolchain._cross_driver.cache_clear()


@pytest.mark.parametrize(("machine", "number"), [("aarch64", 183), ("riscv64", 243)])
def test_objects_for_another_processor_are_linked_where_a_cross_compiler_is(machine: str, number: int) -> None:
    triple, driver = f"{machine}-linux-gnu", f"{machine}-linux-gnu-gcc"
    if toolchain.driver_for(triple) is None or shutil.which(driver) is None:
        pytest.skip(f"needs {driver}")
    assert triple in toolchain.driver_identity(triple)
    caller = compiled("double exp(double); int f(double x) { return (int)exp(x); }", driver=driver)
    library = link({"a.o": caller}, triple=triple)
    assert library[:4] == b"\x7fELF"
    assert int.from_bytes(library[18:20], "little") == number
    with pytest.raises(RuntimeError, match=r"has f, which a\.o calls"):
        link({"a.o": compiled("int f(void); int g(void) { return f(); }", driver=driver)}, triple=triple)


def test_a_driver_that_finds_no_libraries_of_the_other_system_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolchain._cross_driver.cache_clear()
    broken = tmp_path / "clang++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setenv("CXX_s390x", "")
    assert toolchain.driver_for("s390x-linux-gnu") is None
    toolchain._cross_driver.cache_clear()
    monkeypatch.setenv("CXX_s390x", f"{shutil.which('true')} --target=s390x")
    named = toolchain.driver_for("s390x-linux-gnu")
    assert named is not None
    assert named.argv[1:] == ("--target=s390x",)
    toolchain._cross_driver.cache_clear()


def test_weights_cannot_lie_in_a_library_for_webassembly(tmp_path: Path) -> None:
    if toolchain.driver_for("wasm32-unknown-unknown") is None:
        pytest.skip("needs a linker for WebAssembly")
    with pytest.raises(ConfigError, match="cannot hold weights"):
        link({"a.o": b""}, tmp_path / "w", triple="wasm32-unknown-unknown")


def test_a_damaged_library_is_named(tmp_path: Path) -> None:
    (tmp_path / "libbad.so").write_bytes(b"no library")
    with pytest.raises(ValueError, match=r"libbad\.so is not an ELF file"):
        symbols.needed(tmp_path / "libbad.so")


def test_nvcc_is_known_by_its_build_or_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    toolchain.nvcc.cache_clear()
    if shutil.which("nvcc"):
        assert toolchain.nvcc_identity().startswith("Build cuda_")
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    toolchain.nvcc.cache_clear()
    assert toolchain.nvcc_identity() == toolchain.ABSENT
    toolchain.nvcc.cache_clear()


def test_the_driver_of_this_machine_is_the_compiler() -> None:
    assert toolchain.driver_identity() == toolchain.compiler_identity()
    assert linker.driver_for("") == toolchain.Driver((str(toolchain.compiler()),))
