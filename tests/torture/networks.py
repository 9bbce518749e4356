"""Small ONNX networks with seeded weights: made in milliseconds, and compiled to real operators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPERATORS = 8  # distinct ones of a convolutional network, after fusion


class _Graph:
    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._weights: list[onnx.TensorProto] = []
        self._nodes: list[onnx.NodeProto] = []

    def weight(self, *shape: int) -> str:
        name = f"w{len(self._weights)}"
        values = self._random.standard_normal(shape, np.float32) * np.float32(0.3)
        self._weights.append(numpy_helper.from_array(values, name))
        return name

    def add(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"t{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def save(self, path: Path, given: tuple[int, ...], returned: str, shape: tuple[int, ...]) -> None:
        floats = TensorProto.FLOAT
        self._nodes.append(helper.make_node("Identity", [returned], ["y"]))
        inputs = [helper.make_tensor_value_info("x", floats, given)]
        outputs = [helper.make_tensor_value_info("y", floats, shape)]
        graph = helper.make_graph(self._nodes, "net", inputs, outputs, self._weights)
        opset = [helper.make_opsetid("", 17)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)


def convolutional(path: Path, width: int, seed: int = 0) -> None:
    """A network of OPERATORS distinct operators; another width changes most of them, another seed the weights alone."""
    g = _Graph(seed)
    x = g.add("Relu", g.add("Conv", "x", g.weight(width, 3, 3, 3), pads=[1] * 4))
    x = g.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    y = g.add("Relu", g.add("Conv", x, g.weight(width, width, 1, 1)))
    y = g.add("Conv", y, g.weight(width, width, 3, 3), pads=[1] * 4)
    x = g.add("Relu", g.add("Add", y, x))
    x = g.add("Sigmoid", g.add("Conv", x, g.weight(2 * width, width, 3, 3), strides=[2, 2]))
    x = g.add("Flatten", g.add("GlobalAveragePool", x))
    x = g.add("Softmax", g.add("Gemm", x, g.weight(2 * width, 10), g.weight(10)))
    g.save(path, (1, 3, 16, 16), x, (1, 10))


def tiny(path: Path, seed: int = 0) -> None:
    """One product whose weight is transposed before: the smallest network for which every stage works."""
    g = _Graph(seed)
    g.save(path, (1, 4), g.add("Relu", g.add("Gemm", "x", g.weight(8, 4), g.weight(8), transB=1)), (1, 8))
