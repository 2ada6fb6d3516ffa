"""Hadamard transforms of what linears read, computed at run time."""

import onnx_ir as ir

from spike_export.calibration.decoder.equivalent.hadamard import hadamard_matrix
from spike_export.export.graph.graph_builder import GraphBuilder


def hadamard_transform(
    builder: GraphBuilder, module: str, value: ir.Value, channels: int, block: int | None
) -> ir.Value:
    """Append the transform, block by block, in float32: a sum over a block may exceed what 16 bit hold where no channel
    does.

    Args:
        builder: The graph.
        module: HF name of the block that reads the result.
        value: [batch, sequence, channels] in any precision.
        channels: Their number.
        block: Channels of a block; None for no transform.

    Returns:
        The same shape in float32; `value` itself without a transform.
    """
    if block is None:
        return value
    b, count = builder, channels // block
    matrix = b.constant(f"hadamard.{block}", hadamard_matrix(block))
    blocks = b.op(
        "Reshape", [b.cast(value, ir.DataType.FLOAT), b.integers(0, 0, count, block)], module, label="hadamard_blocks"
    )
    product = b.op("MatMul", [blocks, matrix], module, label="hadamard")
    return b.op("Reshape", [product, b.integers(0, 0, channels)], module, label="hadamard_joined")
