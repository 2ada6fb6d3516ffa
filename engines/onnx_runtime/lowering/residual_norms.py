"""The sum of a residual stream and the norm behind it as one `SkipSimplifiedLayerNormalization`.

The operator gives the sum too, which the next residual reads. It applies to an RMS norm of the last axis in float32.
"""

import onnx
from onnx import helper

from spike_export.engines.onnx_runtime.lowering.graph_index import GraphIndex
from spike_export.engines.onnx_runtime.lowering.own_operators import DOMAIN, import_domain

OPERATOR = "SkipSimplifiedLayerNormalization"

_LAST_AXIS = -1


def fuse_residual_norms(model: onnx.ModelProto) -> None:
    """Fuse sums and norms in place."""
    graph, index = model.graph, GraphIndex(model.graph)
    fused: dict[str, onnx.NodeProto] = {}
    for norm in [node for node in graph.node if node.op_type == "RMSNormalization"]:
        residual = index.producer(norm.input[0], "Add")
        if residual is None or residual.name in fused or not _fits(index, residual, norm):
            continue
        epsilon = next(each.f for each in norm.attribute if each.name == "epsilon")
        fused[residual.name] = helper.make_node(
            OPERATOR,
            [*residual.input, norm.input[1]],
            [norm.output[0], "", "", residual.output[0]],
            name=f"{norm.name}.{OPERATOR}",
            domain=DOMAIN,
            epsilon=epsilon,
        )
        graph.node.remove(norm)
    for node in graph.node:
        if node.name in fused:
            node.CopyFrom(fused[node.name])
    if fused:
        import_domain(model)


def _fits(index: GraphIndex, residual: onnx.NodeProto, norm: onnx.NodeProto) -> bool:
    """Tell whether two tensors are added, and the norm is one that the operator computes."""
    attributes = {each.name: helper.get_attribute_value(each) for each in norm.attribute}
    gain = index.initializers.get(norm.input[1])
    return (
        not any(name in index.initializers for name in residual.input)
        and gain is not None
        and gain.data_type == onnx.TensorProto.FLOAT
        and "epsilon" in attributes
        and attributes.get("axis", _LAST_AXIS) == _LAST_AXIS
        and attributes.get("stash_type", onnx.TensorProto.FLOAT) == onnx.TensorProto.FLOAT
    )
