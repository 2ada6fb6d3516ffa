"""The feed-forward block of a layer: a gated linear unit."""

import onnx_ir as ir

from spike_export.export.emission import Emission
from spike_export.export.graph_builder import ELEMENT_TYPES, element_type


def feed_forward(emission: Emission, module: str, normed: ir.Value) -> ir.Value:
    """Append down(silu(gate(x)) * up(x)).

    Where gate or up is quantized their product stays in FP32: spikes reach thousands and FP16 ends at 65,504.

    Args:
        emission: The graph.
        module: HF name of the block, e.g. `model.layers.0.mlp`.
        normed: [batch, sequence, hidden], x.

    Returns:
        [batch, sequence, hidden] in down_proj's precision.
    """
    b, linears = emission.builder, emission.linears
    gate = linears.emit(f"{module}.gate_proj", normed)
    up = linears.emit(f"{module}.up_proj", normed)
    kept = element_type(gate)
    wanted = ELEMENT_TYPES[emission.plan.modules[f"{module}.down_proj"].product_dtype]
    alike = element_type(up) == kept == wanted
    product_type = kept if alike else ir.DataType.FLOAT
    gate, up = b.cast(gate, product_type), b.cast(up, product_type)
    sigmoid = b.op("Sigmoid", [gate], module)
    silu = b.op("Mul", [gate, sigmoid], module, label="silu")
    product = b.op("Mul", [silu, up], module, label="product")
    return linears.emit(f"{module}.down_proj", product)
