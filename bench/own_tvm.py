"""TVM's own way from an ONNX file to a library, timed phase by phase: what a rebuild costs without a build system.

Run it in a fresh process for each figure; everything, TVM's import included, is paid for here.

    python -m bench.own_tvm MODEL [--seed N] [--passes tvm|ours] [--no-onnxsim] [--json]

MODEL is a name of the zoo or an ONNX file with fixed shapes. A zoo model is written to a file before the first phase.
Owns the order of the phases below; knows nothing of tvmake's stages and caches. With `--passes ours` the Relax passes
are those of pipeline.compiler.lowering, in one module with its weights, which FoldConstant computes as TVM does.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import zoo
from bench.cpu import table


@dataclass
class Build:
    """What the phases hand on. Each fills in one part."""

    source: Path
    library: Path
    model: Any = None  # onnx.ModelProto
    target: Any = None  # tvm.target.Target
    module: Any = None  # tvm.IRModule
    executable: Any = None
    facts: dict[str, Any] = field(default_factory=dict)


def _import_tvm(build: Build) -> None:
    import tvm

    codegen = tvm.target.codegen
    machine = {"mcpu": codegen.llvm_get_system_cpu(), "mtriple": codegen.llvm_get_system_triple()}
    build.target = tvm.target.Target({"kind": "llvm", **machine})
    build.facts["target"] = machine


def _read(build: Build) -> None:
    import onnx

    build.model = onnx.load(build.source)


def _simplify(build: Build) -> None:
    import onnxsim

    build.model, equivalent = onnxsim.simplify(build.model)
    if not equivalent:
        raise RuntimeError("onnxsim's result does not compute what the model does")


def _import_model(build: Build) -> None:
    from tvm.relax.frontend.onnx import from_onnx

    build.module = from_onnx(build.model, keep_params_in_input=False)


def _pass(name: str) -> Callable[[Build], None]:
    def run(build: Build) -> None:
        from tvm import relax

        with build.target:
            build.module = getattr(relax.transform, name)()(build.module)

    return run


def _ours(name: str) -> Callable[[Build], None]:
    def run(build: Build) -> None:
        import tvm

        from pipeline.compiler import lowering

        with build.target, tvm.transform.PassContext(opt_level=3):
            for phase in getattr(lowering, name):
                build.module = phase(build.module)

    return run


def _build(build: Build) -> None:
    import tvm

    build.facts["functions"] = sum(isinstance(f, tvm.tirx.PrimFunc) for f in build.module.functions.values())
    build.executable = tvm.relax.build(build.module, build.target)


def _export(build: Build) -> None:
    build.executable.export_library(str(build.library))


Phase = tuple[str, Callable[[Build], None]]

BEFORE: tuple[Phase, ...] = (
    ("import tvm", _import_tvm),
    ("read", _read),
    ("onnxsim", _simplify),
    ("from_onnx", _import_model),
)
TVM_PASSES: tuple[Phase, ...] = (
    ("DecomposeOpsForInference", _pass("DecomposeOpsForInference")),
    ("LegalizeOps", _pass("LegalizeOps")),
    ("AnnotateTIROpPattern", _pass("AnnotateTIROpPattern")),
    ("FoldConstant", _pass("FoldConstant")),
    ("FuseOps", _pass("FuseOps")),
    ("FuseTIR", _pass("FuseTIR")),
)
OUR_PASSES: tuple[Phase, ...] = (
    ("canonicalise", _ours("CANONICALISE")),
    ("legalise", _ours("LEGALISE")),
    ("FoldConstant", _pass("FoldConstant")),
    ("fuse", _ours("FUSE")),
)
AFTER: tuple[Phase, ...] = (
    ("relax.build", _build),
    ("export_library", _export),
)


def compile_model(source: Path, library: Path, passes: tuple[Phase, ...], simplify: bool) -> dict[str, Any]:
    """Runs all phases on an ONNX file; returns wall and CPU seconds of each, their totals, and facts of the build.

    The CPU time is this process's and its finished children's, such as the linker's.
    """
    build = Build(source, library)
    phases = {}
    for name, phase in (*BEFORE, *passes, *AFTER):
        if name == "onnxsim" and not simplify:
            continue
        wall, cpu = time.perf_counter(), _cpu()
        phase(build)
        phases[name] = {"wall": time.perf_counter() - wall, "cpu": _cpu() - cpu}
    total = {clock: sum(phase[clock] for phase in phases.values()) for clock in ("wall", "cpu")}
    return {**build.facts, "phases": phases, "total": total, "library_bytes": library.stat().st_size}


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.own_tvm", description="TVM's own way, timed.")
    parser.add_argument("model", help=f"an ONNX file, or one of {', '.join(zoo.NAMES)}")
    parser.add_argument("--seed", type=int, default=0, help="of the weights of a light model")
    parser.add_argument("--passes", choices=("tvm", "ours"), default="tvm", help="which Relax passes (default tvm)")
    parser.add_argument("--no-onnxsim", action="store_true", help="import the model as it is")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    passes = OUR_PASSES if arguments.passes == "ours" else TVM_PASSES
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(arguments.model)
        if arguments.model in zoo.NAMES:
            source = Path(scratch, "model.onnx")
            source.write_bytes(zoo.load(arguments.model, arguments.seed).SerializeToString(deterministic=True))
        report = compile_model(source, Path(scratch, "model.so"), passes, not arguments.no_onnxsim)
    if arguments.json:
        print(json.dumps(report))
        return
    rows = [*report["phases"].items(), ("total", report["total"])]
    title = f"{Path(arguments.model).name}: {report['functions']} functions for {report['target']['mcpu']}"
    table(title, ("phase", "cpu s", "wall s"), [(name, used["cpu"], used["wall"]) for name, used in rows])


if __name__ == "__main__":
    _main()
