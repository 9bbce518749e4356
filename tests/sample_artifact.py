"""A small real artifact for tests: every dtype the runtime treats specially, aligned and misaligned weights.

    main(x f32[1,8], s f32[], h bf16[4], m bool[4], w f32[8,16], b f32[3], c bf16[4])
        -> (x @ w + s, h + c, not m, b + b, x, w)

`other.so` is the same program with x @ w - s.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np

from pipeline import weightfile
from pipeline.hashing import Digest
from pipeline.types import MANIFEST_FORMAT, CheckState, Manifest, Reference, TensorSpec

BF16 = np.dtype(ml_dtypes.bfloat16)
INPUTS = (
    TensorSpec("x", (1, 8), "float32"),
    TensorSpec("s", (), "float32"),
    TensorSpec("h", (4,), "bfloat16"),
    TensorSpec("m", (4,), "bool"),
)
WEIGHTS = {
    "w": np.arange(128, dtype=np.float32).reshape(8, 16),
    "b": np.asarray([1, 2, 3], np.float32),  # stands behind c, at a place that is not a multiple of 64
    "c": np.asarray([0.5, 1, 1.5, 2], BF16),
}
OUTPUTS = (
    TensorSpec("y", (1, 16), "float32"),
    TensorSpec("z", (4,), "bfloat16"),
    TensorSpec("n", (4,), "bool"),
    TensorSpec("d", (3,), "float32"),
    TensorSpec("same_x", (1, 8), "float32"),
    TensorSpec("same_w", (8, 16), "float32"),
)

_BUILDER = """
import subprocess, sys
import tvm
from tvm import relax
from tvm.relax import op
from tvm.script import relax as R

def build(join, path, **options):
    shapes = [("x", (1, 8), "float32"), ("s", (), "float32"), ("h", (4,), "bfloat16"), ("m", (4,), "bool"),
              ("w", (8, 16), "float32"), ("b", (3,), "float32"), ("c", (4,), "bfloat16")]
    x, s, h, m, w, b, c = params = [relax.Var(n, R.Tensor(shape, dtype)) for n, shape, dtype in shapes]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            parts = [join(op.matmul(x, w), s), op.add(h, c), op.logical_not(m), op.add(b, b)]
            result = builder.emit_output(relax.Tuple([*map(builder.emit, parts), x, w]))
        builder.emit_func_output(result)
    module = relax.transform.LegalizeOps()(builder.get())
    tvm.compile(module, target=tvm.target.Target({"kind": "llvm"})).export_library(path, **options)

build(op.add, "lib.so")
build(op.subtract, "other.so")
subprocess.run(["gcc", "-c", "inside.S", "-o", "inside.o"], check=True)
build(op.add, "inside.so", addons=["inside.o"])
"""
_INSIDE = """
    .section .rodata
    .balign 64
    .globl tvmake_weights_begin
    .globl tvmake_weights_end
tvmake_weights_begin:
    .incbin "weights.safetensors"
tvmake_weights_end:
    .section .note.GNU-stack,"",@progbits
"""


@cache
def parts(session: Path) -> Path:
    """A folder with the libraries and weights that artifacts are put together from; built once a session."""
    folder = session / "parts"
    folder.mkdir()
    weights = []
    for name, array in WEIGHTS.items():
        (folder / name).write_bytes(array.tobytes())
        weights.append((TensorSpec(name, array.shape, array.dtype.name), folder / name))
    weightfile.write(folder / "weights.safetensors", weights)
    (folder / "inside.S").write_text(_INSIDE)
    subprocess.run([sys.executable, "-c", _BUILDER], cwd=folder, check=True)
    return folder


def assemble(parts: Path, folder: Path, *, library: str = "lib.so", inside: bool = False) -> Path:
    """An artifact in a new folder."""
    folder.mkdir()
    shutil.copyfile(parts / library, folder / "lib.so")
    if not inside:
        shutil.copyfile(parts / "weights.safetensors", folder / "weights.safetensors")
    write_manifest(folder, weights_in="inside" if inside else "beside")
    return folder


def write_manifest(folder: Path, **changes: object) -> Manifest:
    """A manifest for what is in a folder, with changed fields."""
    manifest = Manifest(
        format=MANIFEST_FORMAT,
        model="sample",
        target="here",
        target_spec={"kind": "llvm"},
        toolchain={},
        inputs=INPUTS,
        outputs=OUTPUTS,
        weights=tuple(TensorSpec(name, array.shape, array.dtype.name) for name, array in WEIGHTS.items()),
        weights_in="beside",
        files={path.name: Digest.of_file(path) for path in folder.iterdir() if path.name != "manifest.json"},
        reference=Reference(CheckState.SKIPPED),
        operators=(),
    )
    manifest = msgspec.structs.replace(manifest, **changes)
    (folder / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    return manifest
