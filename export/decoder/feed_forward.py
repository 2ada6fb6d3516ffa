"""The feed-forward block of a layer: a gated linear unit."""

import onnx_ir as ir

from spike_export.export.graph.activation import ACTIVATIONS
from spike_export.export.graph.emission import Emission
from spike_export.export.graph.graph_builder import ELEMENT_TYPES, element_type
from spike_export.export.graph.hadamard import hadamard_transform
from spike_export.export.graph.projections import split_projection

NAMES = ("gate_proj", "up_proj", "down_proj")
"""A block's linears, where it is no expert."""


def feed_forward(emission: Emission, module: str, normed: ir.Value, names: tuple[str, str, str] = NAMES) -> ir.Value:
    """Append down(f(gate(x)) * up(x)), f being the family's activation; an equivalent model may have a Hadamard
    transform in front of down.

    Where gate or up is quantized their product stays in FP32: spikes reach thousands and FP16 ends at 65,504.

    Args:
        emission: The graph.
        module: HF name of the block, e.g. `model.layers.0.mlp`.
        normed: [batch, sequence, hidden], x.
        names: Of gate, up and down inside the block.

    Returns:
        [batch, sequence, hidden] in down_proj's precision.
    """
    b, linears, family = emission.builder, emission.linears, emission.config.family
    gate_name, up_name, down = (f"{module}.{name}" for name in names)
    if family.fused_projections:
        both = linears.emit(f"{module}.gate_up_proj", normed)
        inner = emission.config.intermediate_size
        gate, up = split_projection(b, module, both, {"gate": inner, "up": inner})
    else:
        gate = linears.emit(gate_name, normed)
        up = linears.emit(up_name, normed)
    kept = element_type(gate)
    wanted = ELEMENT_TYPES[emission.plan.modules[down].product_dtype]
    alike = element_type(up) == kept == wanted
    product_type = kept if alike else ir.DataType.FLOAT
    gate, up = b.cast(gate, product_type), b.cast(up, product_type)
    activated = ACTIVATIONS[family.activation](b, module, gate)
    product = b.op("Mul", [activated, up], module, label="product")
    config = emission.config
    product = hadamard_transform(b, module, product, config.inner_size, config.hadamard_block)
    return linears.emit(down, product)
