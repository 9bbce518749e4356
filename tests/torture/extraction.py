"""Every function that the models' extraction meets, before equal ones are merged. Also a script:

python extraction.py MODEL…             the digests of each model's functions, as JSON
python extraction.py --objects FILE…    the digest of the object of each saved function, as JSON
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tvm
from tvm.relax.frontend import nn

from pipeline.compiler import ir, lowering, targets
from pipeline.hashing import Digest
from pipeline.stages import codegen, extract, read


class Mlp(nn.Module):
    """Two layers of one shape, so that equal functions occur under several names."""

    def __init__(self) -> None:
        self.layers = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 10)])

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        for layer in self.layers:
            x = nn.op.relu(layer(x))
        return nn.op.softmax(x)


def mlp() -> Any:
    net = Mlp()
    net.to("float32")
    for _, parameter in net.named_parameters():
        parameter.data = np.ones(parameter.shape, "float32")
    return net, {"forward": {"x": nn.spec.Tensor([1, 32], "float32")}}


@functools.cache
def native() -> Mapping[str, object]:
    return targets.resolve("native")


class _Blobs(dict[str, bytes]):
    """A stage's inputs that are in memory."""


def functions(name: str) -> list[tvm.tirx.PrimFunc]:
    """What extraction hands to `ir.canonical`, in order: the functions under their own names, equal ones included."""
    met: list[tvm.tirx.PrimFunc] = []
    canonical = ir.canonical

    def noted(func: tvm.tirx.PrimFunc) -> bytes:
        met.append(func)
        return canonical(func)

    options: dict[str, object] = {"shapes": {}, "cases": [], "import path": []}
    if name == "mlp":
        options |= {"kind": "relax", "function": _called(mlp)}
    else:
        from bench import zoo

        options |= {"kind": "onnx", "function": _called(functools.partial(zoo.load, name))}
    made = read.run(_Blobs(), options)
    weights = [spec["name"] for spec in json.loads(bytes(made["weights"]))]
    with mock.patch.object(lowering.ir, "canonical", noted):
        extract.run(
            _Blobs(skeleton=bytes(made["skeleton"])),
            {"kind": options["kind"], "weights": weights, "target": native()},
        )
    return met


def _called(function: Callable[[], Any]) -> bytes:
    import cloudpickle

    data: bytes = cloudpickle.dumps(function)
    return data


def object_of(canonical: bytes) -> str:
    """The digest of what codegen makes of a function."""
    options = {"symbol": f"tvmake_{Digest.of(canonical).hash[:32]}", "target": native()}
    made = codegen.run(_Blobs(function=canonical), options)
    return hashlib.sha256(made["object"]).hexdigest()


def main(arguments: list[str]) -> Iterator[tuple[str, object]]:
    if arguments[0] == "--objects":
        for path in arguments[1:]:
            yield path, object_of(Path(path).read_bytes())
    else:
        for name in arguments:
            yield name, [Digest.of(ir.canonical(func)).hash for func in functions(name)]


if __name__ == "__main__":
    print(json.dumps(dict(main(sys.argv[1:]))))
