"""ONNX: a ModelProto → a skeleton whose large initializers have become inputs, and those initializers' bytes."""

from __future__ import annotations

import contextlib
import io
import mmap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compiler.frontends import Case, Read, raw
from pipeline.errors import ModelError, SetupError, last_line
from pipeline.types import TensorSpec

if TYPE_CHECKING:
    import tvm
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

# Where TVM's importer reads the value of a floating-point argument: operator → positions. (It reads integers in many
# more places; those never move.)
VALUES_READ: Mapping[str, tuple[int, ...]] = {
    "AllClassNMS": (3, 4),
    "Clip": (1, 2),
    "Dropout": (1,),
    "NonMaxSuppression": (3, 4),
    "OneHot": (1, 2),
    "Pad": (2,),
    "Range": (0, 1, 2),
    "Resize": (1, 2),
    "Upsample": (1,),
}
# Operators that the importer computes at once when all their arguments are constants: what leads through them to a
# value that is read is read as well.
FOLDED = {
    *("Abs", "Add", "And", "BitwiseNot", "Cast", "CastLike", "Ceil", "Concat", "Div", "Equal", "Floor", "Gather"),
    *("Identity", "Log", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "Pow", "Reshape", "Sqrt", "Squeeze", "Sub", "Sum"),
    *("Transpose", "Unsqueeze", "Where"),
}
_INSTALL = "pip install 'tvmake[onnx]'"


def read(source: Path | Callable[[], Any], shapes: Mapping[str, Sequence[int]], cases: Sequence[Path]) -> Read:
    """Reads a model from a file, or from a function that returns a ModelProto or a path.

    `shapes` fixes the inputs whose shape the model leaves open; `cases` are folders in ONNX's layout, with
    input_0.pb … and output_0.pb …. Raises ModelError for what is missing, broken, empty or open.
    """
    _require_onnx()
    given = source if isinstance(source, Path) else source()
    folder = None
    files: list[Path] = []
    if isinstance(given, str | Path):
        files.append(Path(given))
        folder = Path(given).parent
        given = _load(Path(given))
    model = given
    if not hasattr(model, "graph"):
        raise ModelError(
            f"the function returned a {type(model).__name__}, not an ONNX model",
            hint="return an onnx.ModelProto or the path of a file",
        )
    graph = model.graph
    if not graph.node or not graph.output:
        raise ModelError("the model is empty: its graph has no nodes or no outputs")
    names = {tensor.name for tensor in graph.initializer}
    for declared in [value for value in graph.input if value.name in names]:
        graph.input.remove(declared)  # before IR version 4, initializers were declared as inputs too
    _fix_shapes(graph, shapes)
    recorded = tuple(_case(case, graph) for case in cases)
    files += [path for case in cases for path in sorted(case.glob("*.pb"))]
    if folder is not None:
        files += sorted({folder / e.value for t in graph.initializer for e in t.external_data if e.key == "location"})
    weights = _take_weights(graph, folder)
    del graph.value_info[:]
    model.doc_string = graph.doc_string = ""
    del model.metadata_props[:]
    return Read(model.SerializeToString(deterministic=True), weights, recorded, files)


def load(skeleton: bytes) -> tuple[tvm.IRModule, list[str]]:
    """Imports a skeleton; simplifies it first where TVM's importer needs that: where it refuses the model as it is, or
    leaves shapes open that simplifying would close. Returns the module and the names of its outputs.

    Raises ModelError that names the operator, and the node where there is one, which TVM's importer cannot take.
    """
    import onnx

    model = onnx.load_model_from_string(skeleton)
    outputs = [output.name for output in model.graph.output]
    mod = None
    with contextlib.suppress(ModelError):
        mod = _imported(model)
    if mod is None or not _is_static(mod):
        mod = _imported(_simplified(model))
    _require_fixed_outputs(mod, model.graph)
    return mod, outputs


def _imported(model: ModelProto) -> tvm.IRModule:
    from tvm.relax.frontend.onnx import from_onnx

    try:
        # The importer prints what it was working on when it fails; the error says so as well.
        with contextlib.redirect_stdout(io.StringIO()):
            return from_onnx(model, keep_params_in_input=False, sanitize_input_names=False)
    except Exception as error:
        raise _import_error(error, model.graph) from error


def _require_fixed_outputs(mod: tvm.IRModule, graph: GraphProto) -> None:
    """Names the node behind an output that is no tensor, or whose shape depends on values."""
    from tvm import relax

    from pipeline.compiler import passes

    returned = mod["main"].ret_ty
    types = list(returned.fields) if isinstance(returned, relax.TupleType) else [returned]
    makers = {name: node for node in graph.node for name in node.output}
    for output, ty in zip(graph.output, types, strict=False):
        if not passes.is_static(ty) and output.name in makers:
            what = "has a shape that depends on values" if isinstance(ty, relax.TensorType) else "is no tensor in TVM"
            raise ModelError(
                f"the output {output.name!r} of {_named([makers[output.name]])} {what}",
                hint="make constants of the inputs that decide shapes, or leave the node out",
            )


def _is_static(mod: tvm.IRModule) -> bool:
    """Whether every value that an operator gives is a tensor of known shape."""
    from pipeline.compiler import passes

    return all(passes.is_static(ty) for _, ty in passes.call_types(mod))


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise SetupError("reading ONNX models needs the package onnx", hint=_INSTALL) from error


def _load(path: Path) -> ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        if path.stat().st_size == 0:
            raise ModelError(f"{path} is empty")
        return onnx.load_model(str(path), load_external_data=False)
    except FileNotFoundError as error:
        raise ModelError(f"there is no file {path}", hint="check the path in dodo.py") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except (DecodeError, ValueError) as error:
        raise ModelError(f"{path} is truncated or no ONNX model: {error}") from error


def _fix_shapes(graph: GraphProto, shapes: Mapping[str, Sequence[int]]) -> None:
    known = [value.name for value in graph.input]
    for name in shapes:
        if name not in known:
            raise ModelError(f"shapes names {name!r}, but the inputs are {', '.join(map(repr, known)) or 'none'}")
    still_open = []
    for value in graph.input:
        if not value.type.HasField("tensor_type"):
            raise ModelError(
                f"the input {value.name!r} is not a tensor", hint="export the model with tensor inputs only"
            )
        tensor = value.type.tensor_type
        if value.name in shapes:
            wanted = list(shapes[value.name])
            declared = [dim.dim_value if _is_fixed(dim) else None for dim in tensor.shape.dim]
            if tensor.HasField("shape") and (
                len(wanted) != len(declared) or any(d not in (None, w) for d, w in zip(declared, wanted, strict=True))
            ):
                raise ModelError(f"shapes gives {value.name!r} {tuple(wanted)}, but the model says {_shown(tensor)}")
            del tensor.shape.dim[:]
            for extent in wanted:
                tensor.shape.dim.add().dim_value = extent
        elif not tensor.HasField("shape") or not all(_is_fixed(dim) for dim in tensor.shape.dim):
            still_open.append(f"{value.name!r} {_shown(tensor)}")
    if still_open:
        raise ModelError(
            f"the model leaves the shape of {', '.join(still_open)} open",
            hint="give it in dodo.py: shapes={" + ", ".join(f"{s.split()[0]}: (…)" for s in still_open) + "}",
        )


def _is_fixed(dim: Any) -> bool:
    return bool(dim.HasField("dim_value") and dim.dim_value >= 0)  # some exporters write -1 for open


def _shown(tensor: Any) -> str:
    dims = [str(dim.dim_value) if _is_fixed(dim) else dim.dim_param or "?" for dim in tensor.shape.dim]
    return f"({', '.join(dims)})"


def _take_weights(graph: GraphProto, folder: Path | None) -> list[tuple[TensorSpec, bytes | memoryview]]:
    """Makes inputs of the constants that a retrained model would change, and returns their bytes.

    Constants of one element stay, since they become part of the code; integers stay, since importers read shapes and
    indices from them; so do those that the importer reads, and empty ones, which it cannot have as inputs.
    """
    from onnx import TensorProto, helper

    _constants_to_initializers(graph)
    trained = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    stay = _read_by_importer(graph) | {value.name for value in graph.output}
    weights: list[tuple[TensorSpec, bytes | memoryview]] = []
    kept = []
    for tensor in graph.initializer:
        elements = int(np.prod(tensor.dims, dtype=np.int64))
        if tensor.data_type not in trained or elements <= 1 or tensor.name in stay:
            kept.append(_inlined(tensor, folder))
            continue
        spec = TensorSpec(tensor.name, tuple(tensor.dims), _dtype_name(tensor.data_type))
        weights.append((spec, _bytes(tensor, folder)))
        graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return weights


def _constants_to_initializers(graph: GraphProto) -> None:
    """Some exporters write every weight as a node of its own."""
    kept = []
    for node in graph.node:
        value = _constant_value(node) if node.op_type == "Constant" and node.domain in ("", "ai.onnx") else None
        if value is not None:
            value.name = node.output[0]
            graph.initializer.append(value)
        else:
            kept.append(node)
    if len(kept) < len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)


def _constant_value(node: NodeProto) -> TensorProto | None:
    from onnx import helper, numpy_helper

    attribute = node.attribute[0]
    if attribute.name == "value":
        return attribute.t
    dtype = {"value_float": "float32", "value_floats": "float32", "value_int": "int64", "value_ints": "int64"}
    if attribute.name not in dtype:
        return None
    return numpy_helper.from_array(np.asarray(helper.get_attribute_value(attribute), dtype[attribute.name]))


def _read_by_importer(graph: GraphProto) -> set[str]:
    """Names of the values that the importer reads, traced back through what it folds."""
    nodes = [node for each in _all_graphs(graph) for node in each.node]
    makers = {name: node for node in nodes for name in node.output}
    read: set[str] = set()
    front = [n.input[i] for n in nodes for i in VALUES_READ.get(n.op_type, ()) if i < len(n.input)]
    while front:
        name = front.pop()
        if name in read:
            continue
        read.add(name)
        maker = makers.get(name)
        if maker is not None and maker.op_type in FOLDED:
            front.extend(maker.input)
    return read


def _all_graphs(graph: GraphProto) -> list[GraphProto]:
    inner = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return [graph, *(found for sub in inner for found in _all_graphs(sub))]


def _dtype_name(data_type: int) -> str:
    from onnx import helper

    return str(np.dtype(helper.tensor_dtype_to_np_dtype(data_type)))


def _bytes(tensor: TensorProto, folder: Path | None) -> bytes | memoryview:
    from onnx import TensorProto, numpy_helper

    if tensor.data_location == TensorProto.EXTERNAL:
        return _external(tensor, folder)
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    return raw(numpy_helper.to_array(tensor))


def _external(tensor: TensorProto, folder: Path | None) -> memoryview:
    """A view of the file beside the model that holds a tensor. Mapped, never read as a whole."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    path = (folder or Path()) / entries.get("location", "")
    size = int(np.prod(tensor.dims, dtype=np.int64)) * np.dtype(_dtype_name(tensor.data_type)).itemsize
    begin = int(entries.get("offset", 0))
    if folder is None or folder.resolve() not in path.resolve().parents:
        raise ModelError(f"the weight {tensor.name!r} points outside the model's folder: {entries.get('location')!r}")
    try:
        with open(path, "rb") as stream:
            mapped = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise ModelError(f"the weight {tensor.name!r} lies in {path.name}, which cannot be read: {error}") from error
    if begin + size > len(mapped):
        raise ModelError(
            f"the weight {tensor.name!r} needs {begin + size} bytes of {path.name}, which has {len(mapped)}"
        )
    return mapped[begin : begin + size]


def _inlined(tensor: TensorProto, folder: Path | None) -> TensorProto:
    from onnx import TensorProto

    if tensor.data_location == TensorProto.EXTERNAL:
        data = bytes(_external(tensor, folder))
        del tensor.external_data[:]
        tensor.data_location = TensorProto.DEFAULT
        tensor.raw_data = data
    return tensor


def _case(folder: Path, graph: GraphProto) -> Case:
    import onnx
    from onnx import numpy_helper

    def tensors(role: str, names: Sequence[str]) -> dict[str, np.ndarray]:
        read = {}
        for i, name in enumerate(names):
            path = folder / f"{role}_{i}.pb"
            try:
                read[name] = numpy_helper.to_array(onnx.load_tensor(str(path)))
            except FileNotFoundError as error:
                raise ModelError(f"the recorded case {folder} lacks {path.name}") from error
            except Exception as error:
                raise ModelError(f"the recorded case {path} cannot be read: {error}") from error
        return read

    inputs = tensors("input", [value.name for value in graph.input])
    return Case(folder.name, inputs, tensors("output", [value.name for value in graph.output]))


def _simplified(model: ModelProto) -> ModelProto:
    """The model with shapes inferred and what is constant computed; as it was where the simplifier cannot take it."""
    try:
        import onnxsim
    except ImportError:
        return model
    inputs = [value.name for value in model.graph.input]
    try:
        simplified, _ = onnxsim.simplify(model, check_n=0)
    except Exception:
        return model
    # The order of the inputs is the order of the entry function's parameters.
    return simplified if [value.name for value in simplified.graph.input] == inputs else model


def _import_error(error: Exception, graph: GraphProto) -> ModelError:
    said = last_line(error)
    hint = "replace the operator, or export with another opset"
    if "not supported for frontend ONNX" in str(error):
        names = {name.strip() for name in str(error).rpartition(":")[2].split(",")}
        nodes = [node for node in graph.node if node.op_type in names]
        return ModelError(f"TVM's importer does not have {_named(nodes) or said}", hint=hint)
    node = _failing_node(error)
    where = _named([node]) if node is not None else "the model"
    return ModelError(f"TVM's importer cannot take {where}: {said}", hint=hint)


def _named(nodes: Sequence[NodeProto]) -> str:
    shown = [f"{node.op_type} (node {node.name or ', '.join(node.output)!r})" for node in nodes[:5]]
    return ", ".join(shown) + (f" and {len(nodes) - 5} more" if len(nodes) > 5 else "")


def _failing_node(error: BaseException) -> NodeProto | None:
    """The node that the importer was working on, found in the frames that the exception passed through."""
    found = None
    trace = error.__traceback__
    while trace is not None:
        node = trace.tb_frame.f_locals.get("node")
        if type(node).__name__ == "NodeProto":
            found = node
        trace = trace.tb_next
    return found
