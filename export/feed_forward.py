"""The feed-forward block of a layer: a gated linear unit."""

import onnx_ir as ir

from spike_export.export.activation import ACTIVATIONS
from spike_export.export.emission import Emission
from spike_export.export.graph_builder import ELEMENT_TYPES, element_type
from spike_export.export.projections import split_projection


def feed_forward(emission: Emission, module: str, normed: ir.Value) -> ir.Value:
    """Append down(f(gate(x)) * up(x)), f being the family's activation.

    Where gate or up is INT8 their product stays in FP32: spikes reach thousands and FP16 ends at 65,504.

    Args:
        emission: The graph.
        module: HF name of the block, e.g. `model.layers.0.mlp`.
        normed: [batch, sequence, hidden], x.

    Returns:
        [batch, sequence, hidden] in down_proj's precision.
    """
    b, linears, family = emission.builder, emission.linears, emission.config.family
    if family.fused_projections:
        both = linears.emit(f"{module}.gate_up_proj", normed)
        inner = emission.config.intermediate_size
        gate, up = split_projection(b, module, both, {"gate": inner, "up": inner})
    else:
        gate = linears.emit(f"{module}.gate_proj", normed)
        up = linears.emit(f"{module}.up_proj", normed)
    kept = element_type(gate)
    precision = emission.plan.modules[f"{module}.down_proj"].precision
    alike = element_type(up) == kept and precision != "int8" and ELEMENT_TYPES[precision] == kept
    product_type = kept if alike else ir.DataType.FLOAT
    gate, up = b.cast(gate, product_type), b.cast(up, product_type)
    activated = ACTIVATIONS[family.activation](b, module, gate)
    product = b.op("Mul", [activated, up], module, label="product")
    return linears.emit(f"{module}.down_proj", product)
