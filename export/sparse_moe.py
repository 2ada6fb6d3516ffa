"""A mixture of experts as a graph of fixed shapes: every expert is computed for every token, and the router weighs.

One product chain per expert, so that each linear keeps its own name, scale and precision. What depends on the routing
is only which numbers are added up; no shape does.
"""

import onnx_ir as ir

from spike_export.calibration.families import Experts
from spike_export.export.emission import Emission
from spike_export.export.feed_forward import feed_forward

FLOAT = ir.DataType.FLOAT


def sparse_moe(emission: Emission, module: str, normed: ir.Value, experts: Experts) -> ir.Value:
    """Append the sum of the experts' outputs, each times the share that the router gives it.

    Args:
        emission: The graph.
        module: HF name of the block, e.g. `model.layers.0.block_sparse_moe`.
        normed: [batch, sequence, hidden], float32.
        experts: The names of an expert's linears.

    Returns:
        [batch, sequence, hidden] float32, whatever the experts' precisions.
    """
    b, names = emission.builder, (experts.gate, experts.up, experts.down)
    shares = _shares(emission, module, normed)
    total: ir.Value | None = None
    for index in range(emission.config.num_experts):
        expert = f"{module}.experts.{index}"
        output = b.cast(feed_forward(emission, expert, normed, names), FLOAT)
        bounds = [b.integers(index), b.integers(index + 1), b.integers(-1)]
        share = b.op("Slice", [shares, *bounds], expert, label="share")
        # Of an expert that the router did not pick nothing may get through: in 16 bit it can overflow, because
        # calibration never saw it with such a token, and 0 * inf is NaN.
        picked = b.op("Greater", [share, b.float32(0.0)], expert, dtype=ir.DataType.BOOL, label="picked")
        output = b.op("Where", [picked, output, b.float32(0.0)], expert, dtype=FLOAT, label="output_if_picked")
        weighed = b.op("Mul", [output, share], expert, label="weighed")
        # A chain, not one sum of all: an engine then holds one expert's output at a time.
        total = weighed if total is None else b.op("Add", [total, weighed], expert, label="sum")
    assert total is not None
    return total


def _shares(emission: Emission, module: str, normed: ir.Value) -> ir.Value:
    """Append the router, a float32 island: [batch, sequence, experts], 0 for all but the picked experts."""
    b, config = emission.builder, emission.config
    logits = b.cast(emission.linears.emit(f"{module}.gate", normed), FLOAT)
    chances = b.op("Softmax", [logits], module, attributes={"axis": -1})
    # Indices, not a threshold: of equal chances a threshold would pick more experts than the model does.
    picked, indices = b.top_k(chances, config.experts_per_token, module)
    if config.renormalized_routing:
        total = b.op("ReduceSum", [picked, b.integers(-1)], module, label="picked_sum", attributes={"keepdims": 1})
        picked = b.op("Div", [picked, total], module, label="picked_shares")
    shape = b.op("Shape", [chances], module, dtype=ir.DataType.INT64)
    nothing = b.op("Expand", [b.float32(0.0), shape], module, label="no_shares")
    return b.op("ScatterElements", [nothing, indices, picked], module, label="shares", attributes={"axis": -1})
