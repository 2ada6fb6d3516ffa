"""From the last layer's states to the logits."""

import onnx_ir as ir

from spike_export.calibration.checkpoint import LM_HEAD
from spike_export.export.emission import Emission
from spike_export.export.norm import rms_norm
from spike_export.export.weight_layout import transposed_tensor

FLOAT = ir.DataType.FLOAT


def emit_head(emission: Emission, hidden: ir.Value, embedding: ir.Value) -> None:
    """Append the last norm and the head, and declare `logits` [batch, sequence, vocab] float32.

    Args:
        emission: The graph.
        hidden: [batch, sequence, hidden].
        embedding: [vocab, hidden]; the head's weight where they are tied.
    """
    b, config = emission.builder, emission.config
    normed = emission.cast(rms_norm(emission, "model.norm", hidden))
    if config.tie_word_embeddings:
        # One copy in the file. ONNX Runtime folds the transpose when it loads, so that memory holds both layouts
        # just as with two copies: SmolLM2-135M took 601 and 604 MB, and decoded equally fast.
        weight = b.op("Transpose", [embedding], "lm_head", attributes={"perm": [1, 0]})
    else:
        shape = (config.hidden_size, config.vocab_size)
        weight = b.lazy(
            LM_HEAD,
            emission.dtype,
            shape,
            lambda: transposed_tensor(emission.checkpoint, LM_HEAD, emission.numpy_dtype),
        )
    exact = emission.dtype == FLOAT
    logits = b.op("MatMul", [normed, weight], "lm_head", output="logits" if exact else None)
    logits = b.cast(logits, FLOAT, output="logits")
    b.output(logits, ["batch", "sequence", config.vocab_size])
