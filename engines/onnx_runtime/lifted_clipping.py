"""A bundle's graph without clipping: what lies beyond the range of a static scale is added to the rounded value."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from spike_export.engines.onnx_runtime.clipped_activations import quantized_sites

_LOWEST, _HIGHEST = -128, 127
"""The range of INT8, in steps."""

_AXIS = "lifted.first_axis"


def lift_clipping(graph: onnx.GraphProto, bundle: Path) -> None:
    """Let products see x_q + (x - clip(x)) for each input with a static INT8 scale, changed in place.

    The rounding stays as it is, so that such a graph differs from the bundle's by the clipping alone.

    Args:
        graph: Changed in place.
        bundle: Folder that has the graph's weights.
    """
    known = {site.tensor for site in quantized_sites(graph, bundle)}
    scales = {tensor.name: tensor for tensor in graph.initializer}
    quantizers = {node.output[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        quantizer = quantizers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantizer is not None and quantizer.input[0] in known:
            scale = float(numpy_helper.to_array(scales[quantizer.input[1]], str(bundle)))
            nodes.extend(_lifted(graph, quantizer.input[0], scale, node, readers[node.output[0]]))
    graph.initializer.append(numpy_helper.from_array(np.array([0]), _AXIS))
    del graph.node[:]
    graph.node.extend(nodes)


def _lifted(
    graph: onnx.GraphProto, tensor: str, scale: float, restored: onnx.NodeProto, products: list[onnx.NodeProto]
) -> Iterator[onnx.NodeProto]:
    """Yield the nodes that add the excess to a restored value, and let the products read the sum."""
    name = restored.name.removesuffix(".DequantizeLinear")
    bounds = {f"{name}.{edge}": np.float32(steps * scale) for edge, steps in (("low", _LOWEST), ("high", _HIGHEST))}
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), key) for key, value in bounds.items())
    yield helper.make_node("Clip", [tensor, *bounds], [f"{name}.clipped"], name=f"{name}.Clip")
    yield helper.make_node("Sub", [tensor, f"{name}.clipped"], [f"{name}.excess"], name=f"{name}.excess")
    yield helper.make_node("Add", [restored.output[0], f"{name}.excess"], [f"{name}.lifted"], name=f"{name}.lifted")
    for product in products:
        # As a batch of one: ONNX Runtime would make of a 2-D product one that rounds its input to INT8 once more.
        weight = f"{product.name}.weight"
        yield helper.make_node("Unsqueeze", [product.input[1], _AXIS], [weight], name=f"{product.name}.Unsqueeze")
        product.input[:] = [f"{name}.lifted", weight]
