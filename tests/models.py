"""Tiny models for end-to-end tests, and what NumPy says of them.

The Relax ones are written into a dodo.py by their source, so each is complete in itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def weights(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def graph(
    nodes: list[onnx.NodeProto],
    initializers: dict[str, np.ndarray] | None = None,
    inputs: dict[str, tuple[int | str, ...]] | None = None,
    outputs: dict[str, tuple[int | str, ...]] | None = None,
) -> onnx.ModelProto:
    """A float32 model; x (2, 4) → y (2, 8) where nothing else is said."""

    def infos(shapes: dict[str, tuple[int | str, ...]]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]

    tensors = [numpy_helper.from_array(array, name) for name, array in (initializers or {}).items()]
    made = helper.make_graph(
        nodes, "tiny", infos(inputs or {"x": (2, 4)}), infos({"y": (2, 8)} if outputs is None else outputs), tensors
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def dense(seed: int = 0, activation: str = "Relu", rows: int | str = 2) -> onnx.ModelProto:
    """y = activation(x w + b): one fused operator; x (rows, 4), y (rows, 8)."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="multiply"),
        helper.make_node("Add", ["h", "b"], ["s"], name="add"),
        helper.make_node(activation, ["s"], ["y"], name="last"),
    ]
    arrays = {"w": weights((4, 8), seed), "b": weights((8,), seed + 100)}
    return graph(nodes, arrays, {"x": (rows, 4)}, {"y": (rows, 8)})


def dense_of(x: np.ndarray, seed: int = 0) -> np.ndarray:
    return np.maximum(x @ weights((4, 8), seed) + weights((8,), seed + 100), 0)


def chain(*activations: str) -> onnx.ModelProto:
    """One operator for each activation, kept apart by a matrix product: x (2, 4) → y (2, 4)."""
    nodes, arrays, last = [], {}, "x"
    for i, activation in enumerate(activations):
        out = "y" if i == len(activations) - 1 else f"out{i}"
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"product{i}"], name=f"product{i}"))
        nodes.append(helper.make_node(activation, [f"product{i}"], [out], name=f"layer{i}"))
        arrays[f"w{i}"] = weights((4, 4), i)
        last = out
    return graph(nodes, arrays, outputs={"y": (2, 4)})


def net():
    """relu(x w^T + b), as an nn.Module with seeded weights."""
    import numpy as np
    from tvm.relax.frontend import nn

    class Net(nn.Module):
        def __init__(self):
            self.layer = nn.Linear(4, 8)

        def forward(self, x: nn.Tensor):
            return nn.op.relu(self.layer(x))

    made = Net()
    made.to("float32")
    random = np.random.default_rng(0)
    for _, parameter in made.named_parameters():
        parameter.data = random.standard_normal(parameter.shape).astype("float32")
    return made, {"forward": {"x": nn.spec.Tensor([2, 4], "float32")}}


def net_of(x: np.ndarray, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    w, b = random.standard_normal((8, 4)).astype("float32"), random.standard_normal(8).astype("float32")
    return np.maximum(x @ w.T + b, 0)


def module():
    """x w + 1, as an IRModule with the constants in it."""
    import numpy as np
    from tvm import relax

    x = relax.Var("x", relax.TensorType([2, 4], "float32"))
    w = np.random.default_rng(0).standard_normal((4, 8)).astype("float32")
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            product = builder.emit(relax.op.matmul(x, relax.const(w)))
            result = builder.emit_output(relax.op.add(product, relax.const(1.0, "float32")))
        builder.emit_func_output(result)
    return builder.get()


def module_and_weights():
    """The same, with w as a parameter of the entry function, before the input."""
    import numpy as np
    from tvm import relax

    w = relax.Var("w", relax.TensorType([4, 8], "float32"))
    x = relax.Var("x", relax.TensorType([2, 4], "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [w, x]):
        with builder.dataflow():
            product = builder.emit(relax.op.matmul(x, w))
            result = builder.emit_output(relax.op.add(product, relax.const(1.0, "float32")))
        builder.emit_func_output(result)
    return builder.get(), {"w": np.random.default_rng(0).standard_normal((4, 8)).astype("float32")}


def module_of(x: np.ndarray) -> np.ndarray:
    return x @ weights((4, 8)) + 1


def save_case(folder: Any, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> None:
    """A recorded case in ONNX's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    for role, arrays in (("input", inputs), ("output", outputs)):
        for i, array in enumerate(arrays):
            (folder / f"{role}_{i}.pb").write_bytes(numpy_helper.from_array(array).SerializeToString())
