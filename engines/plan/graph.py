"""The bundle's graph as the plan builder sees it: structure only, the weights stay in their file."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.files.inner_paths import leads_outside
from spike_export.artifacts.manifest import CACHE_SLOTS, INT8_WEIGHTS
from spike_export.engines.plan.branches import inline_branches
from spike_export.engines.plan.build_profiles import GraphInput
from spike_export.engines.plan.graph_file import read_graph

_PRECISIONS: Mapping[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}

_QUANTIZED: Mapping[int, str] = {TensorProto.INT8: "int8", TensorProto.FLOAT8E4M3FN: "fp8"}

_PASSED_THROUGH = ("Transpose", "Cast", "Unsqueeze")
"""Operators that may stand between a stored weight and its product."""


def load_graph(path: Path) -> onnx.ModelProto:
    """Read model.onnx as `load_structure` does, and see that all weights are in the files beside it.

    Raises:
        EngineError: The file is not an ONNX model, or a weight lies outside its data file.
    """
    model = load_structure(path)
    _require_weights(model, path.parent)
    return model


def load_structure(path: Path) -> onnx.ModelProto:
    """Read model.onnx without its weights, which need not be there, and without its branches.

    Raises:
        EngineError: The file is not an ONNX model.
    """
    model = read_graph(path)
    inline_branches(model)
    return model


def _require_weights(model: onnx.ModelProto, folder: Path) -> None:
    # TensorRT maps the data file and would read beyond its end: a bus error instead of a message.
    sizes: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        location, end = _place(tensor, folder)
        file = folder / location
        if location not in sizes:
            sizes[location] = file.stat().st_size if file.is_file() else -1
        size = sizes[location]
        if size < 0:
            raise EngineError(f"{file} is missing; the bundle is incomplete, export it again")
        if end > size:
            raise EngineError(
                f"{file} is truncated: {tensor.name} ends at byte {end} and the file at {size}; export the bundle again"
            )


def _place(tensor: TensorProto, folder: Path) -> tuple[str, int]:
    """Return the file of a tensor's data, inside the bundle's folder, and the byte behind them."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    try:
        start, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    except ValueError:
        start = length = -1
    if not location or min(start, length) < 0:
        raise EngineError(
            f"{folder}: tensor {tensor.name} has no readable place in a data file; export the bundle again"
        )
    if leads_outside(location) or not (folder / location).resolve().is_relative_to(folder.resolve()):
        raise EngineError(f"{folder}: tensor {tensor.name} lies outside the bundle, in {location}; export it again")
    return location, start + length


def graph_inputs(model: onnx.ModelProto) -> tuple[GraphInput, ...]:
    """Return the inputs in the graph's order."""
    return tuple(
        GraphInput(
            value.name,
            tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim),
        )
        for value in model.graph.input
    )


def serialize_for_tensorrt(model: onnx.ModelProto) -> bytes:
    """Return the graph as TensorRT gets it, without its weights; the model itself is not changed.

    It may take Attention apart where it has no fused kernel. Without that attribute such a build fails: all of
    float32, and float16 with few heads in decode. Where there is a fused kernel it is taken with and without. ONNX
    Runtime refuses the attribute, so no file may contain it.
    """
    given = onnx.ModelProto()
    given.CopyFrom(model)
    for node in given.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(onnx.helper.make_attribute("TRT_decomposable", 1))
    return bytes(given.SerializeToString())


def resize_cache(model: onnx.ModelProto, slots: int) -> None:
    """Give a static cache's buffers another length: in the inputs, in the outputs, and where a mask lists the slots.

    A plan's buffer has one length only: TensorRT refuses a cache whose length a profile would set.

    Raises:
        EngineError: The graph has no static cache.
    """
    listed = next((tensor for tensor in model.graph.initializer if tensor.name == CACHE_SLOTS), None)
    if listed is None:
        raise EngineError(f"the graph has no static cache (no {CACHE_SLOTS!r}); export the bundle again")
    listed.CopyFrom(numpy_helper.from_array(np.arange(slots, dtype=np.int64), CACHE_SLOTS))
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[2].dim_value = slots


def planned_precisions(model: onnx.ModelProto) -> dict[str, str]:
    """Return the number format of every product with a stored weight, by HF module name.

    It is `int8`, `fp8`, `float16`, `bfloat16` or `float32`; or one of the last three with `+int8-weights` (W8A16).
    What the exporter wrote into the node's metadata counts; without it, the quantizers around the product do.
    """
    types = {tensor.name: int(tensor.data_type) for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    planned: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type != "MatMul" or not node.name.endswith(".MatMul"):
            continue
        precision = _precision(node, types, producers)
        if precision is not None:
            noted = {entry.key: entry.value for entry in node.metadata_props}.get("precision")
            planned[node.name.removesuffix(".MatMul")] = noted or precision
    return planned


def _precision(
    product: onnx.NodeProto, types: Mapping[str, int], producers: Mapping[str, onnx.NodeProto]
) -> str | None:
    """Return the number format of one product, or None where its second operand is no stored weight."""
    name, cast_to = product.input[1], None
    while name not in types:
        node = producers.get(name)
        if node is None:
            return None
        if node.op_type == "DequantizeLinear":
            first = producers.get(product.input[0])
            if first is not None and first.op_type == "DequantizeLinear":
                return _QUANTIZED.get(types.get(node.input[0], TensorProto.UNDEFINED))
            # A weight is restored in the type of its scale.
            kept = _PRECISIONS.get(cast_to or types.get(node.input[1], TensorProto.UNDEFINED))
            return kept and kept + INT8_WEIGHTS
        if node.op_type not in _PASSED_THROUGH:
            return None
        if node.op_type == "Cast":
            # Walking upwards, the first Cast met is the last one applied.
            cast_to = cast_to or next(attribute.i for attribute in node.attribute if attribute.name == "to")
        name = node.input[0]
    return _PRECISIONS.get(cast_to or types[name])
