"""What families do to the head's product: Granite divides it, Gemma 2 bounds it."""

import onnx_ir as ir

from spike_export.export.graph.emission import Emission

FLOAT = ir.DataType.FLOAT


def scaled_logits(emission: Emission, product: ir.Value) -> ir.Value:
    """Append c * tanh(product / divisor / c), as far as the family has these factors: an FP32 island.

    Args:
        emission: The graph.
        product: [batch, sequence, vocab] in any precision.

    Returns:
        The logits, float32; the product's own values for most families.
    """
    b, factors, module = emission.builder, emission.config.factors, "lm_head"
    logits = b.cast(product, FLOAT)
    if factors.logits != 1:
        logits = b.op("Div", [logits, b.float32(factors.logits)], module, label="logits_divided")
    if factors.final_softcap is not None:
        cap = b.float32(factors.final_softcap)
        logits = b.op("Div", [logits, cap], module, label="logits_capped_in")
        logits = b.op("Tanh", [logits], module, label="logits_tanh")
        logits = b.op("Mul", [logits, cap], module, label="logits_capped")
    return logits
