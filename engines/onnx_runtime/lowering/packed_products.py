"""INT8 products of one tensor as one product: query, key and value, and gate and up of a feed-forward block.

The file has a quantizer and a product for each linear (docs/decisions/generation.md). Where the quantizers of one
tensor have the same scale to the last bit, their products are the columns of one product, whose weights and scales are
theirs side by side. A column's sum has the same terms in the same order: the results are equal bit for bit.

It applies to a static scale; a scale per token is computed for each linear by nodes of its own. While a session opens,
the packed weights take memory beside the file's. A model with more than `LARGEST_COPY` of them keeps its products: each
takes so long there that a node less is no gain.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from spike_export.engines.onnx_runtime.lowering.given_weights import Values, given
from spike_export.engines.onnx_runtime.lowering.graph_index import GraphIndex, remove_unused

LARGEST_COPY = 1 << 29
"""Bytes of weights that are packed."""

_INT8_WEIGHTS = (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT, onnx.TensorProto.INT8)
"""Types of weights, scales and zero points."""


@dataclass(frozen=True)
class _Product:
    """A product of INT8 operands.

    Attributes:
        node: The MatMul.
        quantizer: Of its input.
        weight: DequantizeLinear of INT8 weights [inputs, outputs], one scale for each output.
    """

    node: onnx.NodeProto
    quantizer: onnx.NodeProto
    weight: onnx.NodeProto


def pack_products(model: onnx.ModelProto, values: Values) -> dict[str, NDArray[Any]]:
    """Pack products in place.

    Args:
        model: Its attention is lowered already, where it can be: the operator takes query, key and value as one.
        values: Reads its initializers.

    Returns:
        Initializer → values that the session is to be given, because no file has them.
    """
    graph, index = model.graph, GraphIndex(model.graph)
    groups = [group for group in _groups(index) if len(group) > 1]
    if sum(_weight_bytes(index, each) for group in groups for each in group) > LARGEST_COPY:
        return {}
    packed: dict[str, NDArray[Any]] = {}
    for group in groups:
        packed |= _pack(graph, index, group, values)
    remove_unused(graph)
    return packed


def _groups(index: GraphIndex) -> list[list[_Product]]:
    """Return the products in the graph's order, together those of one tensor with one scale and zero point."""
    groups: dict[tuple[object, ...], list[_Product]] = {}
    for node in index.graph.node:
        product = _match(index, node)
        if product is not None:
            tensor, scale, zero = product.quantizer.input
            constants = (index.small_constant(scale), index.small_constant(zero))
            rows = index.initializers[product.weight.input[0]].dims[0]
            key = (tensor, rows, *(None if each is None else (each.dtype, each.tobytes()) for each in constants))
            groups.setdefault(key, []).append(product)
    return list(groups.values())


def _match(index: GraphIndex, node: onnx.NodeProto) -> _Product | None:
    """Return the product of a MatMul, if its operands are INT8: one with a static scale, one with constant weights."""
    if node.op_type != "MatMul" or len(node.input) != 2:  # a damaged graph is ONNX Runtime's to refuse
        return None
    activation, weight = (index.producer(name, "DequantizeLinear") for name in node.input)
    quantizer = activation and index.producer(activation.input[0], "QuantizeLinear")
    if not activation or not quantizer or not weight or len(quantizer.input) != 3 or len(weight.input) != 3:
        return None
    if any(index.small_constant(name) is None for name in quantizer.input[1:]) or quantizer.attribute:
        return None
    if activation.input[1:] != quantizer.input[1:] or activation.attribute:
        return None
    constants = [index.initializers.get(name) for name in weight.input]
    if tuple(each and each.data_type for each in constants) != _INT8_WEIGHTS:
        return None
    inputs_outputs, *columns = (list(each.dims) for each in constants if each is not None)
    by_column = [(each.name, each.i) for each in weight.attribute] == [("axis", 1)]
    if not by_column or len(inputs_outputs) != 2 or any(each != inputs_outputs[1:] for each in columns):
        return None
    return _Product(node, quantizer, weight)


def _weight_bytes(index: GraphIndex, product: _Product) -> int:
    rows, columns = index.initializers[product.weight.input[0]].dims
    return int(rows * columns)


def _pack(
    graph: onnx.GraphProto, index: GraphIndex, group: Sequence[_Product], values: Values
) -> dict[str, NDArray[Any]]:
    """Put one product in front of the first; what it gives takes the place of all results. Return its constants."""
    name, first = ", ".join(each.node.name for each in group), group[0]
    parts = zip(*(each.weight.input for each in group), strict=True)
    constants = [f"{name}.{kind}" for kind in ("weight", "weight_scale", "weight_zero_point")]
    packed = {
        constant: np.concatenate([values(index.initializers[each]) for each in together], axis=-1)
        for constant, together in zip(constants, parts, strict=True)
    }
    graph.initializer.extend(given(constant, array) for constant, array in packed.items())
    dequantized, result = f"{name}.weight.output", f"{name}.output"
    nodes = [
        helper.make_node("DequantizeLinear", constants, [dequantized], name=f"{name}.DequantizeLinear", axis=1),
        helper.make_node("MatMul", [first.node.input[0], dequantized], [result], name=name),
    ]
    outputs = [each.node.output[0] for each in group]
    attention = index.only_user(outputs[0], "GroupQueryAttention")
    if attention is not None and list(attention.input[:3]) == outputs:
        attention.input[:3] = [result, "", ""]
    else:
        sizes = [index.initializers[each.weight.input[0]].dims[1] for each in group]
        graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), f"{name}.sizes"))
        nodes.append(helper.make_node("Split", [result, f"{name}.sizes"], outputs, name=f"{name}.Split", axis=-1))
        for each in group:
            each.node.output[0] = f"{each.node.output[0]}.unpacked"
    place = next(number for number, node in enumerate(graph.node) if node.name == first.node.name)
    for node in reversed(nodes):
        graph.node.insert(place, node)
    return packed
