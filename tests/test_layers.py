"""Imports go strictly down. Read from the source, so that an import inside a function counts as well."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
L0 = {"pipeline.amounts", "pipeline.errors", "pipeline.hashing", "pipeline.types", "pipeline.config", "pipeline.models"}
L0_LIBRARIES = {"xxhash", "msgspec"}
L1_LIBRARIES = {"platformdirs", "filelock"}
REMOTES_LIBRARIES = {"cryptography", "google", "grpc", "obstore", "urllib3", "zstandard"}
DASK = {"dask", "distributed", "dask_jobqueue"}
FFI_ALLOWED = {"pipeline.runtime", "pipeline.tensors", "pipeline.devices.session"}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(tree: ast.AST, module: str, lazily: bool = True) -> Iterator[str]:
    """Names of the modules that a module imports: `from a import b` gives a.b where that is a module, otherwise a."""
    for node in ast.walk(tree) if lazily else at_import(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: no bodies of functions, nothing for the type checker alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from at_import(node)


def imports(module: str, lazily: bool = True) -> set[str]:
    return set(imported(ast.parse(MODULES[module].read_text()), module, lazily))


def outside(names: set[str]) -> set[str]:
    tops = {name.partition(".")[0] for name in names}
    return tops - set(sys.stdlib_module_names) - {"pipeline"}


def inside(names: set[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] == "pipeline"}


def test_the_layers_are_there() -> None:
    assert set(MODULES) >= L0 | {"pipeline.store.local", "pipeline.compiler", "pipeline.stages"}


@pytest.mark.parametrize("module", sorted(L0))
def test_vocabulary_imports_only_itself(module: str) -> None:
    assert inside(imports(module)) <= L0
    assert outside(imports(module)) <= L0_LIBRARIES


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("pipeline.store")])
def test_the_store_imports_only_the_vocabulary_and_itself(module: str) -> None:
    assert {name for name in inside(imports(module)) if not name.startswith("pipeline.store")} <= L0
    assert outside(imports(module)) <= L0_LIBRARIES | L1_LIBRARIES


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("pipeline.remotes")])
def test_remotes_know_the_store_and_nothing_above_it(module: str) -> None:
    below = {name for name in inside(imports(module)) if not name.startswith(("pipeline.remotes", "pipeline.store"))}
    assert below <= L0
    assert outside(imports(module)) <= L0_LIBRARIES | L1_LIBRARIES | REMOTES_LIBRARIES


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("pipeline.compiler")])
def test_only_the_compiler_imports_tvm(module: str) -> None:
    found = {name.partition(".")[0] for name in imports(module)}
    assert "tvm" not in found
    assert "tvm_ffi" not in found or module in FFI_ALLOWED


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("pipeline.compiler")])
def test_the_compiler_knows_nothing_of_what_is_above_it(module: str) -> None:
    above = {"pipeline.stages", "pipeline.memoizer", "pipeline.workers", "pipeline.build", "pipeline.tasks"}
    assert not {name for name in imports(module) if name in above or name.startswith("pipeline.commands")}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_dask_is_imported_by_executors_alone_and_only_when_it_is_used(module: str) -> None:
    assert not outside(imports(module, lazily=False)) & DASK
    assert module.startswith("pipeline.executors.") or not outside(imports(module)) & DASK


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("pipeline.executors")])
def test_executors_know_nothing_of_the_compiler_nor_of_what_is_built(module: str) -> None:
    above = {"pipeline.build", "pipeline.tasks", "pipeline.workspace", "pipeline.composition", "pipeline.dispatch"}
    found = imports(module)
    assert not {name for name in found if name in above or name.startswith(("pipeline.compiler", "pipeline.commands"))}


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module: {name for name in imports(module, lazily=False) if name in MODULES} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join((*way[way.index(module) :], module))
        if module not in done:
            for name in sorted(graph[module] - {module}):
                visit(name, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    assert graph["pipeline.memoizer"] >= {"pipeline.hashing", "pipeline.stages"}


def test_the_reader_sees_imports_in_functions_and_tells_them_apart() -> None:
    tree = ast.parse(
        "import a.b\nif TYPE_CHECKING:\n  import c\ndef f():\n  from pipeline import errors\nclass K:\n  import d\n"
    )
    assert set(imported(tree, "m")) == {"a.b", "c", "pipeline.errors", "d"}
    assert set(imported(tree, "m", lazily=False)) == {"a.b", "d"}


def test_the_machinery_of_the_cache_loads_neither_tvm_nor_what_comes_with_it() -> None:
    program = (
        "import sys, pipeline.memoizer, pipeline.workers, pipeline.config, pipeline.freshness, pipeline.executors;"
        "print(*sys.modules)"
    )
    loaded = set(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True).split())
    assert "pipeline.memoizer" in loaded
    assert not loaded & {"tvm", "tvm_ffi", "numpy", "onnx", "torch", "doit", *REMOTES_LIBRARIES, *DASK}
