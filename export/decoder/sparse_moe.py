"""A mixture of experts as a graph of fixed shapes: an expert is computed for all tokens of a call, or for none.

One product chain per expert, so that each linear keeps its own name, scale and precision. The chain is a branch that is
skipped where the router sends the expert no token at all, as in decode with most; no shape depends on the routing.
"""

from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from spike_export.checkpoint.families import Experts
from spike_export.export.decoder.feed_forward import feed_forward
from spike_export.export.graph.emission import Emission

FLOAT, BOOL = ir.DataType.FLOAT, ir.DataType.BOOL


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
    b = emission.builder
    shares = _shares(emission, module, normed)
    rows_and_tokens, drop = b.integers(0, 1), {"keepdims": 0}
    largest = b.op("ReduceMax", [shares, rows_and_tokens], module, label="largest_shares", attributes=drop)
    used = b.op("Greater", [largest, b.float32(0.0)], module, dtype=BOOL, label="used")
    shape = b.op("Shape", [normed], module, dtype=ir.DataType.INT64, label="states_shape")
    total = b.op("Expand", [b.float32(0.0), shape], module, label="no_states")
    for index in range(emission.config.num_experts):
        expert = _Expert(emission, f"{module}.experts.{index}", index, experts, shares)
        is_used = b.op("Gather", [used, b.integer(index)], expert.module, label="is_used")
        total = b.conditional(is_used, partial(expert.add, normed, total), total, expert.module)
    return total


@dataclass(frozen=True)
class _Expert:
    """One expert, and the shares [batch, sequence, experts] of all."""

    emission: Emission
    module: str
    index: int
    names: Experts
    shares: ir.Value

    def add(self, normed: ir.Value, total: ir.Value) -> ir.Value:
        """Append total + share * expert(normed)."""
        b, names = self.emission.builder, self.names
        output = feed_forward(self.emission, self.module, normed, (names.gate, names.up, names.down))
        bounds = [b.integers(self.index), b.integers(self.index + 1), b.integers(-1)]
        share = b.op("Slice", [self.shares, *bounds], self.module, label="share")
        # Of a token that the router sent elsewhere nothing may get through: in 16 bit it can overflow, because
        # calibration never saw this expert with such a token, and 0 * inf is NaN.
        sent = b.op("Greater", [share, b.float32(0.0)], self.module, dtype=BOOL, label="sent_here")
        output = b.op(
            "Where", [sent, b.cast(output, FLOAT), b.float32(0.0)], self.module, dtype=FLOAT, label="output_if_sent"
        )
        weighed = b.op("Mul", [output, share], self.module, label="weighed")
        return b.op("Add", [total, weighed], self.module, label="sum")


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
