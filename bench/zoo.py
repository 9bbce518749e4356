"""Real networks found inside PyPI packages, for benchmarks.

Owns where the files lie, which input shapes they are run at, and how the weightless networks of the onnx package get
weights. Finds packages without importing them, and imports onnx and NumPy only inside functions, since a dodo.py
imports this. Compiles nothing.

    light(name)      architectures of the onnx package; their weights are seeded noise
    magika()         file type detection, trained
    rapidocr(part)   PP-OCR detection, recognition, classification, trained
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, SetupError

if TYPE_CHECKING:
    import numpy as np
    import onnx

LIGHT = (
    "squeezenet",
    "shufflenet",
    "resnet50",
    "densenet121",
    "inception_v1",
    "inception_v2",
    "bvlc_alexnet",
    "zfnet512",
    "vgg19",
)

# Inputs of the networks whose files leave their shapes open, by the network's name here.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "magika": {"bytes": (1, 2048)},  # int32: a byte, or 256 for padding
    "det": {"x": (1, 3, 320, 320)},
    "rec": {"x": (1, 3, 48, 320)},
    "cls": {"x": (1, 3, 48, 192)},
}

NAMES = (*LIGHT, *SHAPES)

_RAPIDOCR = {
    "det": "ch_PP-OCRv4_det_infer.onnx",
    "rec": "ch_PP-OCRv4_rec_infer.onnx",
    "cls": "ch_ppocr_mobile_v2.0_cls_infer.onnx",
}

# Initializers need not be graph inputs from this version of the format on (the rule itself dates from 4).
_IR_VERSION = 8


def load(name: str, seed: int = 0) -> onnx.ModelProto:
    """The network called `name`, one of NAMES, with fixed input shapes; `seed` matters to the light ones alone."""
    import onnx

    if name in LIGHT:
        return light(name, seed)
    if name in SHAPES:
        return fixed(onnx.load(magika() if name == "magika" else rapidocr(name)), SHAPES[name])
    raise ConfigError(f"the zoo has no {name}", hint=f"choose one of {', '.join(NAMES)}")


def magika() -> Path:
    """The newest model file in the magika package."""
    found = sorted((_package("magika", "zoo") / "models").glob("*/model.onnx"))
    if not found:
        raise SetupError("the magika package holds no model", hint="pip install --force-reinstall magika")
    return found[-1]


def rapidocr(part: str) -> Path:
    """The file of one network of PP-OCR: "det", "rec" or "cls"."""
    if part not in _RAPIDOCR:
        raise ConfigError(f"PP-OCR has no part {part}", hint=f"choose one of {', '.join(_RAPIDOCR)}")
    return _file(_package("rapidocr_onnxruntime", "zoo") / "models" / _RAPIDOCR[part])


def light(name: str, seed: int = 0) -> onnx.ModelProto:
    """An architecture of the onnx package with weights: every float tensor is drawn anew from `seed`.

    Shapes come from the file, values from the tensor's role: He-scaled normal for convolutions and products, uniform
    between positive bounds for scales and variances, small normal for what is added. A tensor's values hang on
    `seed`, its name and its shape, so that a change to one layer leaves the others as they are. The bytes are the
    same in every process.
    """
    import onnx

    if name not in LIGHT:
        raise ConfigError(f"there is no light model {name}", hint=f"choose one of {', '.join(LIGHT)}")
    model = onnx.load(_file(_package("onnx", "onnx") / "backend" / "test" / "data" / "light" / f"light_{name}.onnx"))
    graph = model.graph
    shapes = dict(_weight_shapes(graph))
    roles = _roles(graph, shapes, {**_DRAWS, ("BatchNormalization", 4): _from(_LEAST_VARIANCE.get(name, 0.5))})
    nodes = [node for node in graph.node if node.output[0] not in shapes]
    used = {tensor for node in nodes for tensor in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used and tensor.name not in shapes]
    drawn = [_draw(name, shape, roles.get(name, _added), seed) for name, shape in shapes.items() if name in used]
    constant = {tensor.name for tensor in (*kept, *drawn)}
    inputs = [tensor for tensor in graph.input if tensor.name in used and tensor.name not in constant]
    for field, items in ((graph.node, nodes), (graph.initializer, kept + drawn), (graph.input, inputs)):
        del field[:]
        field.extend(items)
    model.ir_version = max(model.ir_version, _IR_VERSION)
    return model


def densenet121_changed(seed: int = 0) -> onnx.ModelProto:
    """densenet121 with one of its convolutions, 3x3 with a padding of 1 in the third block, made 1x1 without padding.

    Shapes outside the layer and all other weights are those of `light("densenet121", seed)`.
    """
    model = light("densenet121", seed)
    weight = "conv4_12/x2_w_0"
    node = next(node for node in model.graph.node if node.op_type == "Conv" and weight in node.input)
    changed = {"kernel_shape": (1, 1), "pads": (0, 0, 0, 0)}
    for attribute in node.attribute:
        if attribute.name in changed:
            attribute.ints[:] = changed[attribute.name]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == weight)
    tensor.CopyFrom(_draw(weight, (*tensor.dims[:2], 1, 1), _convolved, seed))
    return model


def fixed(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """A copy of `model` whose inputs have the shapes given; what the file says of other extents is dropped."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.input:
        if tensor.name in shapes:
            kind = tensor.type.tensor_type.elem_type
            tensor.CopyFrom(onnx.helper.make_tensor_value_info(tensor.name, kind, shapes[tensor.name]))
    for tensor in copy.graph.output:
        for axis in tensor.type.tensor_type.shape.dim:
            axis.Clear()
    del copy.graph.value_info[:]
    return copy


Draw = Callable[["np.random.Generator", tuple[int, ...]], "np.ndarray"]


def _normal(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    return (rng.standard_normal(shape, "float32") * deviation).astype("float32")


def _convolved(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return _normal(rng, shape, math.sqrt(2 / math.prod(shape[1:])))


def _multiplied(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    # The weights of a product are (out, in) here, in one network behind axes of 1 that a Reshape takes away.
    return _normal(rng, shape, math.sqrt(2 / shape[-1]))


def _added(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return _normal(rng, shape, 0.1)


def _from(least: float) -> Draw:
    return lambda rng, shape: (rng.random(shape, "float32") + least).astype("float32")


# How the values at an operator's input are drawn. What is not here is added to something.
_DRAWS: dict[tuple[str, int], Draw] = {
    ("Conv", 1): _convolved,
    ("Gemm", 1): _multiplied,
    ("BatchNormalization", 1): _from(0.5),  # scale; the variance, input 4, hangs on the network
    ("Mul", 0): _from(0.5),
    ("Mul", 1): _from(0.5),
}

# Networks whose activations would grow so far over their depth that the final Softmax answers 0 and 1 alone, which
# hides every numeric error: there the variances that activations are divided by start higher than 0.5.
_LEAST_VARIANCE = {"shufflenet": 1.5, "resnet50": 1.5, "inception_v2": 0.8}


def _weight_shapes(graph: onnx.GraphProto) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each weight: float initializers, and what ConstantOfShape makes of an initializer."""
    import onnx

    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "ConstantOfShape" and node.input[0] in constants:
            yield node.output[0], tuple(int(n) for n in onnx.numpy_helper.to_array(constants[node.input[0]]))
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            yield tensor.name, tuple(tensor.dims)


def _roles(
    graph: onnx.GraphProto, weights: Mapping[str, tuple[int, ...]], draws: Mapping[tuple[str, int], Draw]
) -> dict[str, Draw]:
    """How each weight is drawn, from where it is used, be it through Unsqueeze or Reshape."""
    origin = {tensor: tensor for tensor in weights}
    roles: dict[str, Draw] = {}
    for node in graph.node:  # in topological order
        if node.op_type in ("Unsqueeze", "Reshape") and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
            continue
        for position, tensor in enumerate(node.input):
            if tensor in origin and (node.op_type, position) in draws:
                roles[origin[tensor]] = draws[node.op_type, position]
    return roles


def _draw(name: str, shape: tuple[int, ...], draw: Draw, seed: int) -> onnx.TensorProto:
    import numpy as np
    import onnx

    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), *shape])
    return onnx.numpy_helper.from_array(draw(rng, shape), name)


def _package(name: str, extra: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SetupError(f"the package {name} is not installed", hint=f"pip install 'tvmake[{extra}]'")
    return Path(spec.submodule_search_locations[0])


def _file(path: Path) -> Path:
    if not path.is_file():
        raise SetupError(f"the installed packages hold no {path.name}", hint="install the versions of the zoo extra")
    return path
