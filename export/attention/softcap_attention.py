"""Attention whose scores are bounded, c * tanh(scores / c), as Gemma 2 has it.

The operator's own `softcap` is refused by TensorRT, so that the products are written out.
"""

import onnx_ir as ir

from spike_export.export.graph.emission import Emission

FLOAT = ir.DataType.FLOAT

_HIDDEN = -1e9
"""Score of a slot that a query does not see; others stay within the bound, a few dozen."""


def softcap_attention(
    emission: Emission, module: str, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value, softcap: float
) -> ir.Value:
    """Append the mixture of the values.

    From the bound to the softmax all is FP32: tanh would lose the small differences of large scores.

    Args:
        emission: The graph.
        module: HF name of the block, e.g. `model.layers.0.self_attn`.
        query: [batch, heads, sequence, head_dim], multiplied by the attention's scale.
        key: [batch, kv_heads, slots, head_dim].
        value: Likewise.
        mask: [batch, 1, sequence, slots] bool; True where a query sees a slot, at least one each.
        softcap: c.

    Returns:
        [batch, heads, sequence, head_dim].
    """
    b, config = emission.builder, emission.config
    groups = config.num_attention_heads // config.num_key_value_heads
    # The query heads of a group on an axis of their own: keys and values broadcast along it and are not copied.
    grouped = b.integers(0, config.num_key_value_heads, groups, -1, config.head_dim)
    query = b.op("Reshape", [query, grouped], module, label="query_groups")
    key, value, mask = (
        b.op("Unsqueeze", [states, b.integers(axis)], module, label=f"{name}_group")
        for name, states, axis in (("key", key, 2), ("value", value, 2), ("mask", mask, 1))
    )
    key = b.op("Transpose", [key], module, label="key_transpose", attributes={"perm": [0, 1, 2, 4, 3]})
    scores = b.cast(b.op("MatMul", [query, key], module, label="scores"), FLOAT)
    scores = b.op("Div", [scores, b.float32(softcap)], module, label="scores_capped_in")
    scores = b.op("Tanh", [scores], module, label="scores_tanh")
    scores = b.op("Mul", [scores, b.float32(softcap)], module, label="scores_capped")
    hidden = b.float32(_HIDDEN)
    scores = b.op("Where", [mask, scores, hidden], module, dtype=FLOAT, label="scores_masked")
    weights = emission.cast(b.op("Softmax", [scores], module, attributes={"axis": -1}))
    mixed = b.op("MatMul", [weights, value], module, label="mixed")
    heads = b.integers(0, config.num_attention_heads, -1, config.head_dim)
    return b.op("Reshape", [mixed, heads], module, label="mixed_heads")
