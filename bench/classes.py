"""How long one operator takes, class by class: what each strategy makes of it, against onnxruntime.

    python -m bench.classes [CLASS...] [--strategies default,rules,onednn,…] [--rounds 5] [--threads 2] [--json FILE]

Each class is an ONNX model of one operator, or of the few that are fused with it. It is built for one target file for
each strategy, whose order is that strategy and then what does the rest (the change to channels-last and back around a
convolution): rules, then loops as they are. Where the strategy does not take the operator there is a dash.

Two tables, in µs: a whole inference, as onnxruntime counts it too, with every change of layout; and the operator alone
within that inference, as it would be in the middle of a network.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cpu import table
from bench.engines import Engine, error_of, seeded, started
from bench.latency import BASE, build, said, taking_turns, workspace
from bench.workspaces import BenchError, Scratch

if TYPE_CHECKING:
    import onnx

_OPSET = 20
_TURN = 0.2  # seconds of a turn
_OWN = ("rules", "default")  # what does the rest, in this order


# --- the classes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graph:
    """A model of few nodes. Each node: operator, inputs, attributes; its output is `y`, or `t0`, `t1`, … before."""

    inputs: Mapping[str, tuple[int, ...]]
    nodes: Sequence[tuple[str, Sequence[str], Mapping[str, Any]]]
    weights: Mapping[str, tuple[int, ...]]

    def model(self) -> onnx.ModelProto:
        """The same bytes every time: weights are drawn from their shapes."""
        import numpy as np
        from onnx import TensorProto, helper, numpy_helper

        nodes = [
            helper.make_node(op, list(taken), ["y" if place == len(self.nodes) - 1 else f"t{place}"], **attributes)
            for place, (op, taken, attributes) in enumerate(self.nodes)
        ]
        inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in self.inputs.items()]
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        weights = []
        for name, shape in self.weights.items():
            random = np.random.default_rng(shape)
            weights.append(numpy_helper.from_array((random.standard_normal(shape) * 0.1).astype("float32"), name))
        graph = helper.make_graph(nodes, "operator", inputs, [output], weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=10)


def _matmul(m: int, k: int, n: int, then: str = "") -> Graph:
    nodes = [("MatMul", ("x", "w"), {})]
    if then:
        nodes += [("Add", ("t0", "b"), {}), (then, ("t1",), {})]
    return Graph({"x": (m, k)}, nodes, {"w": (k, n), **({"b": (n,)} if then else {})})


def _conv(channels: int, out: int, size: int, kernel: int, stride: int = 1, groups: int = 1) -> Graph:
    attributes = {
        "kernel_shape": [kernel] * 2,
        "pads": [kernel // 2] * 4,
        "strides": [stride] * 2,
        "group": groups,
    }
    weights = {"w": (out, channels // groups, kernel, kernel), "b": (out,)}
    return Graph(
        {"x": (1, channels, size, size)}, [("Conv", ("x", "w", "b"), attributes), ("Relu", ("t0",), {})], weights
    )


def _of(operator: str, *shapes: tuple[int, ...], **attributes: Any) -> Graph:
    inputs = {f"x{place}": shape for place, shape in enumerate(shapes)}
    return Graph(inputs, [(operator, tuple(inputs), attributes)], {})


_VECTOR = 1 << 20

CLASSES: dict[str, Callable[[], Graph]] = {
    "matmul-512": lambda: _matmul(512, 512, 512),
    "matmul-bias-relu-128x384x1536": lambda: _matmul(128, 384, 1536, "Relu"),
    "gemv-1x4096x1024": lambda: _matmul(1, 4096, 1024),
    "batch-matmul-8x128x64x128": lambda: _of("MatMul", (8, 128, 64), (8, 64, 128)),
    "conv3x3-64-64-at-56": lambda: _conv(64, 64, 56, 3),
    "conv1x1-64-256-at-56": lambda: _conv(64, 256, 56, 1),
    "conv7x7-s2-3-64-at-224": lambda: _conv(3, 64, 224, 7, stride=2),
    "depthwise3x3-144-at-56": lambda: _conv(144, 144, 56, 3, groups=144),
    "depthwise3x3-512-at-14": lambda: _conv(512, 512, 14, 3, groups=512),
    "max-pool3x3-s2-64-at-112": lambda: _of(
        "MaxPool", (1, 64, 112, 112), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4
    ),
    "softmax-128x1000": lambda: _of("Softmax", (128, 1000), axis=-1),
    "layer-norm-128x768": lambda: Graph(
        {"x": (128, 768)}, [("LayerNormalization", ("x", "scale", "shift"), {})], {"scale": (768,), "shift": (768,)}
    ),
    "add-relu-1M": lambda: Graph(
        {"x": (_VECTOR,), "z": (_VECTOR,)}, [("Add", ("x", "z"), {}), ("Relu", ("t0",), {})], {}
    ),
    "gelu-128x3072": lambda: _of("Gelu", (128, 3072)),
}


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """What one way to compute made of one class: least seconds of an inference and, of ours, of the operator alone."""

    seconds: float
    alone: float | None
    error: float


Figures = dict[str, dict[str, Figure]]  # by class, then strategy or onnxruntime


def strategies() -> tuple[str, ...]:
    """Every strategy that a class can be built with: loops as they are, rules, and the libraries installed here."""
    from pipeline.compiler.libraries import LIBRARIES

    return ("default", "rules", *(library.name for library in LIBRARIES if library.find() is not None))


def target(strategy: str) -> str:
    """A target's keys: the strategy, then what does the rest."""
    order = ("default",) if strategy == "default" else tuple(dict.fromkeys((strategy, *_OWN)))
    return f"order = {json.dumps(order)}\n"


def taken(artifact: Path, strategy: str) -> list[str]:
    """The symbols of the operators that the strategy computes in an artifact, changes of layout left aside."""
    from pipeline.runtime import read_manifest
    from pipeline.types import symbol_of

    return [
        symbol_of(operator.workload)
        for operator in read_manifest(artifact).operators
        if operator.implementation == strategy and operator.calls and operator.name.partition("-")[0] != "transpose"
    ]


def measure(place: Scratch, name: str, wanted: Sequence[str], rounds: int, threads: int) -> dict[str, Figure]:
    """Gives onnxruntime and each artifact of a class that its strategy computes their turns."""
    model, inputs = place.folder / f"{name}.onnx", place.folder / f"{name}.npz"
    seeded(model, inputs)
    artifacts = {each: place.folder / "artifacts" / each / name for each in wanted}
    symbols = {each: taken(path, each) for each, path in artifacts.items() if path.exists()}
    with ExitStack() as stack:
        running: dict[str, Engine] = {}
        for each in (BASE, *(each for each, found in symbols.items() if found)):
            kind, file = (BASE, model) if each == BASE else ("artifact", artifacts[each])
            running[each] = stack.enter_context(started(each, kind, file, inputs, threads))
            running[each].first()
        taking_turns(running, rounds, _TURN)
        reference = running[BASE].outputs()
        alone = {each: _alone(engine, symbols[each], rounds) for each, engine in running.items() if each != BASE}
        return {
            each: Figure(engine.best, alone.get(each), error_of(engine.outputs(), reference))
            for each, engine in running.items()
        }


def _alone(engine: Engine, symbols: Sequence[str], rounds: int) -> float:
    """Least seconds of these operators in an inference."""
    turns = [engine.profile(_TURN) for _ in range(rounds if engine.best < _TURN else 1)]
    return min(sum(turn[symbol] for symbol in symbols) for turn in turns)


# --- showing ----------------------------------------------------------------------------------------------------------


def show(figures: Figures, wanted: Sequence[str], title: str) -> None:
    """Whole inferences and operators alone. In brackets: the time over onnxruntime's whole inference."""
    columns = [each for each in wanted if any(each in row for row in figures.values())]

    def cells(row: Mapping[str, Figure], alone: bool) -> list[str]:
        base = row[BASE].seconds
        found = [f"{1e6 * base:.0f}"]
        for each in columns:
            seconds = (row[each].alone if alone else row[each].seconds) if each in row else None
            found.append(f"{1e6 * seconds:.0f} ({seconds / base:.2f})" if seconds is not None else "—")
        return found

    heads = ("class", BASE, *columns)
    table(f"µs an inference (over {BASE}'s); {title}", heads, [(n, *cells(row, False)) for n, row in figures.items()])
    table(
        f"µs of the operator alone (over {BASE}'s inference)", heads, [(n, *cells(r, True)) for n, r in figures.items()]
    )
    off = max((figure.error, name, each) for name, row in figures.items() for each, figure in row.items())
    print(f"largest error against {BASE}: {off[0]:.1e}, {off[1]} by {off[2]}")


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.classes", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("classes", nargs="*", default=list(CLASSES), help=f"of {', '.join(CLASSES)} (default: all)")
    parser.add_argument("--strategies", default=",".join(strategies()), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="of each (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    if unknown := [name for name in options.classes if name not in CLASSES]:
        parser.error(f"there is no class {', '.join(unknown)}; there are {', '.join(CLASSES)}")
    wanted = [each for each in options.strategies.split(",") if each]
    if unknown := [each for each in wanted if each not in strategies()]:
        parser.error(f"there is no strategy {', '.join(unknown)} here; there are {', '.join(strategies())}")
    with tempfile.TemporaryDirectory(prefix="tvmake-bench-") as folder:
        figures = _all(Path(folder), options.classes, wanted, options.rounds, options.threads)
    if not figures:
        return 1
    title = (
        f"{options.threads} threads, minima of {options.rounds} rounds in turn; onnxruntime {version('onnxruntime')}"
    )
    show(figures, wanted, title)
    if options.json:
        plain = {name: {each: asdict(figure) for each, figure in row.items()} for name, row in figures.items()}
        options.json.write_text(json.dumps({"title": title, "classes": plain}, indent=1) + "\n")
    return 0


def _all(folder: Path, names: Sequence[str], wanted: Sequence[str], rounds: int, threads: int) -> Figures:
    """Builds everything first, then measures class by class."""
    place = workspace(folder, names, {each: target(each) for each in wanted}, threads)
    for name in names:
        folder.joinpath(f"{name}.onnx").write_bytes(CLASSES[name]().model().SerializeToString(deterministic=True))
    build(place)
    figures: Figures = {}
    for name in names:
        try:
            figures[name] = measure(place, name, wanted, rounds, threads)
        except BenchError as error:
            said(f"{name}: {error}")
    return figures


if __name__ == "__main__":
    sys.exit(_main())
