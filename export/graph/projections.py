"""Fused projections: one linear whose output channels are several tensors side by side."""

from collections.abc import Mapping

import onnx_ir as ir

from spike_export.export.graph.graph_builder import GraphBuilder


def split_projection(
    builder: GraphBuilder, module: str, fused: ir.Value, widths: Mapping[str, int]
) -> tuple[ir.Value, ...]:
    """Append one Slice for each part of a fused projection.

    Args:
        builder: The graph.
        module: HF name of the block, e.g. `model.layers.0.self_attn`.
        fused: [batch, sequence, sum of the widths].
        widths: Name of a part → its channels, in the order of the output.

    Returns:
        The parts, each [batch, sequence, width], in the precision of `fused`.
    """
    parts, start = [], 0
    for name, width in widths.items():
        bounds = [builder.integers(start), builder.integers(start + width), builder.integers(2)]
        parts.append(builder.op("Slice", [fused, *bounds], module, label=f"{name}_slice"))
        start += width
    return tuple(parts)
