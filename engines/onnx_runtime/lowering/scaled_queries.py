"""Queries that bring the scale of the scores, so that `GroupQueryAttention` multiplies by one.

ONNX Runtime multiplies one query with the keys in a kernel of its own where the scale is one; with any other scale it
first copies the keys into the order of a matrix product, for every head and every token. Scores of one token behind 256
take a third less time that way.

The scale goes into what makes the queries, where that costs nothing: the scales of INT8 weights and a bias, or the gain
of a norm. Elsewhere it is a product, which ONNX Runtime fuses into a MatMul in front of it. A scale that is a power of
two, as of heads of 64 and 256 channels, changes no bit of a score; another one rounds the queries instead.

It applies to keys in float32. Scores of keys in INT8 have kernels of their own, to which the scale makes no difference.
"""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from spike_export.engines.onnx_runtime.lowering.given_weights import Values, given
from spike_export.engines.onnx_runtime.lowering.graph_index import GraphIndex

_CACHE = 3
"""Place of the keys' cache among the operator's inputs."""

_Constants = list[tuple[onnx.NodeProto, int]]
"""Nodes, and which of their inputs is a constant that takes the scale."""


def scale_queries(model: onnx.ModelProto, values: Values) -> dict[str, NDArray[Any]]:
    """Move the scales in place.

    Args:
        model: Its attention is lowered already; its products are not packed yet.
        values: Reads its initializers.

    Returns:
        Initializer → values that the session is to be given, because no file has them.
    """
    graph, index = model.graph, GraphIndex(model.graph)
    types = {each.name: each.type.tensor_type for each in graph.input}
    scaled: dict[str, NDArray[Any]] = {}
    for node in [each for each in graph.node if each.op_type == "GroupQueryAttention"]:
        cache = types[node.input[_CACHE]]
        if cache.elem_type != onnx.TensorProto.FLOAT:
            continue
        scale = _take_scale(node, cache.shape.dim[3].dim_value)
        constants = _constants(index, node.input[0])
        if constants is None:
            _insert_product(graph, node, scale)
        for user, place in constants or []:
            name = f"{user.input[place]}.scaled"
            scaled[name] = values(index.initializers[user.input[place]]) * np.float32(scale)
            graph.initializer.append(given(name, scaled[name]))
            user.input[place] = name
    return scaled


def _take_scale(node: onnx.NodeProto, head_dim: int) -> float:
    """Return the scale of an operator's scores and let it be one."""
    found = next((each for each in node.attribute if each.name == "scale"), None)
    scale = head_dim**-0.5 if found is None else found.f
    if found is not None:
        node.attribute.remove(found)
    node.attribute.append(helper.make_attribute("scale", 1.0))
    return float(scale)


def _constants(index: GraphIndex, queries: str) -> _Constants | None:
    """Return the constants by which queries are multiplied: of a norm, or else of a product and its bias.

    Returns:
        Each float32 and read by this node alone in this place; None where something else makes the queries.
    """
    node = index.producers.get(queries)
    if node is None or len(index.users[queries]) != 1:
        return None
    if node.op_type == "Reshape":
        return _constants(index, node.input[0])
    if node.op_type == "RMSNormalization":
        return _with_constant(index, node, 1, [])
    if node.op_type == "Add":
        bias = next((place for place, name in enumerate(node.input) if name in index.initializers), None)
        return None if bias is None else _with_constant(index, node, bias, _constants(index, node.input[1 - bias]))
    if node.op_type == "Mul":  # a token's scale
        product = next((name for name in node.input if index.producer(name, "MatMul")), None)
        return None if product is None else _constants(index, product)
    weight = index.producer(node.input[1], "DequantizeLinear") if node.op_type == "MatMul" else None
    return None if weight is None or len(index.users[node.input[1]]) != 1 else _with_constant(index, weight, 1, [])


def _with_constant(index: GraphIndex, node: onnx.NodeProto, place: int, rest: _Constants | None) -> _Constants | None:
    tensor = index.initializers.get(node.input[place])
    if rest is None or tensor is None or tensor.data_type != onnx.TensorProto.FLOAT:
        return None
    return [*rest, (node, place)]


def _insert_product(graph: onnx.GraphProto, node: onnx.NodeProto, scale: float) -> None:
    name = f"{node.name}.scaled_query"
    graph.initializer.append(numpy_helper.from_array(np.array(scale, np.float32), f"{name}.scale"))
    product = helper.make_node("Mul", [node.input[0], f"{name}.scale"], [f"{name}.output"], name=name)
    node.input[0] = product.output[0]
    place = next(number for number, each in enumerate(graph.node) if each.name == node.name)
    graph.node.insert(place, product)
