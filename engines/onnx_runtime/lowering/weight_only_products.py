"""Products of INT8 weights alone, `MatMulNBits`, in place of INT8 products: faster for one row, slower for several.

The operator rounds its input by itself, in blocks of channels with a scale for each block of each row, which is finer
than one constant or one scale for each row. The quantizers and the nodes that compute scales of tokens go. Weights and
their scales are the same, in another order: a session of its own holds them once more.
"""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from spike_export.engines.onnx_runtime.lowering.given_weights import Values, given
from spike_export.engines.onnx_runtime.lowering.graph_index import GraphIndex, remove_unused
from spike_export.engines.onnx_runtime.lowering.own_operators import DOMAIN, import_domain

OPERATOR = "MatMulNBits"

BLOCK = 128
"""Channels of a block: of 32, 64 and 128 the fastest."""

_ROUNDED = 4
"""The operator's accuracy level that multiplies INT8 by INT8."""

_ZERO = 128
"""The zero point of weights as unsigned bytes."""


def weigh_only(
    model: onnx.ModelProto, values: Values, block: int = BLOCK, level: int = _ROUNDED
) -> dict[str, NDArray[Any]]:
    """Replace INT8 products in place.

    Args:
        model: Its products are packed already, and their weights signed.
        values: Reads its initializers.
        block: Channels of a block: a power of two from 16 on.
        level: The operator's accuracy level.

    Returns:
        Initializer → values that the session is to be given; none where the graph has no INT8 product.
    """
    graph, index = model.graph, GraphIndex(model.graph)
    made: dict[str, NDArray[Any]] = {}
    for node in [each for each in graph.node if each.op_type == "MatMul" and len(each.input) == 2]:
        activation, weight = (index.producer(name, "DequantizeLinear") for name in node.input)
        quantizer = activation and index.producer(activation.input[0], "QuantizeLinear")
        if quantizer is None or weight is None or not _by_output(index, weight):
            continue
        weights, scales = (values(index.initializers[name]) for name in weight.input[:2])
        source, result = _ends(index, node, quantizer)
        names = (f"{node.name}.blocks", f"{node.name}.block_scales")
        spread = np.repeat(scales.astype(np.float32), -(-len(weights) // block))
        made |= dict(zip(names, (blocks(weights, block), spread), strict=True))
        graph.initializer.extend(given(name, made[name]) for name in names)
        output, result.output[0] = result.output[0], f"{result.output[0]}.unused"
        inputs, outputs = weights.shape
        product = helper.make_node(
            OPERATOR,
            [source, *names],
            [output],
            name=f"{node.name}.{OPERATOR}",
            domain=DOMAIN,
            K=inputs,
            N=outputs,
            bits=8,
            block_size=block,
            accuracy_level=level,
        )
        place = next(number for number, each in enumerate(graph.node) if each.name == node.name)
        graph.node.insert(place, product)
    if made:
        remove_unused(graph)
        import_domain(model)
    return made


def blocks(weight: NDArray[np.int8], size: int) -> NDArray[np.uint8]:
    """Return weights [inputs, outputs] as MatMulNBits reads them, [outputs, blocks, size]; the last block is padded."""
    inputs, outputs = weight.shape
    count = -(-inputs // size)
    padded = np.full((count * size, outputs), _ZERO, np.uint8)
    padded[:inputs] = weight.view(np.uint8) ^ np.uint8(_ZERO)
    return np.ascontiguousarray(padded.T).reshape(outputs, count, size)


def _by_output(index: GraphIndex, weight: onnx.NodeProto) -> bool:
    """Tell whether weights [inputs, outputs] are signed and have a scale for each output."""
    tensors = [index.initializers.get(name) for name in weight.input[:2]]
    axes = [(each.name, each.i) for each in weight.attribute]
    return (
        all(each is not None for each in tensors)
        and [each.data_type for each in tensors if each] == [onnx.TensorProto.INT8, onnx.TensorProto.FLOAT]
        and [len(each.dims) for each in tensors if each] == [2, 1]
        and axes == [("axis", 1)]
    )


def _ends(index: GraphIndex, node: onnx.NodeProto, quantizer: onnx.NodeProto) -> tuple[str, onnx.NodeProto]:
    """Return what is rounded, and the node that gives the result: behind a token's scale where there is one."""
    scaled, rescaled = index.producer(quantizer.input[0], "Div"), index.only_user(node.output[0], "Mul")
    if scaled is None or rescaled is None or scaled.input[1] not in rescaled.input:
        return str(quantizer.input[0]), node
    return str(scaled.input[0]), rescaled
