"""INT8 weights as unsigned bytes, for processors whose products of signed ones are not exact.

There, a session is asked for exact products (docs/decisions/exact-products.md), and ONNX Runtime turns each weight w
into the byte w + 128 with a zero point that is 128 higher. That takes most of the time in which a session opens, and
numpy turns the same bytes several times as fast: the graph therefore brings them. What is computed is the same.

While a session opens, these weights take memory beside the file's; a model with more than `LARGEST_COPY` of them leaves
them to ONNX Runtime.
"""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from spike_export.engines.onnx_runtime.lowering.given_weights import given
from spike_export.engines.onnx_runtime.lowering.graph_index import GraphIndex, remove_unused

LARGEST_COPY = 1 << 29
"""Bytes of weights that are turned."""

_SIGN = 0x80
"""The bit that adds 128 to a signed byte read as an unsigned one."""


def unsigned_weights(model: onnx.ModelProto, values: Callable[[str], NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Turn the weights of INT8 products in place.

    Args:
        model: The graph.
        values: Reads an initializer by its name; what can be written of its values is changed.

    Returns:
        Initializer → values that the session is to be given, because no file has them.
    """
    graph, index = model.graph, GraphIndex(model.graph)
    weights = list(_weights(index))
    if sum(prod(index.initializers[node.input[0]].dims) for node in weights) > LARGEST_COPY:
        return {}
    turned: dict[str, NDArray[Any]] = {}
    for node in weights:
        for place in (0, 2):
            name = f"{node.input[place]}.unsigned"
            if name not in turned:
                turned[name] = _unsigned(values(node.input[place]))
                graph.initializer.append(given(name, turned[name]))
            node.input[place] = name
    remove_unused(graph)
    return turned


def _unsigned(weight: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Return the bytes of a weight that are 128 higher, in its own memory where that may be written."""
    signed = weight.view(np.uint8)
    return np.bitwise_xor(signed, np.uint8(_SIGN), out=signed if signed.flags.writeable else None)


def _weights(index: GraphIndex) -> Iterator[onnx.NodeProto]:
    """Yield each node that dequantizes constant INT8 weights of a product, with one zero point for each column."""
    for node in index.graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) != 3:
            continue
        weight, zero = (index.initializers.get(node.input[place]) for place in (0, 2))
        if weight is None or zero is None or index.only_user(node.output[0], "MatMul") is None:
            continue
        if weight.data_type == zero.data_type == onnx.TensorProto.INT8 and len(weight.dims) == 2:
            yield node
