"""From the last layer's states to the logits."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import onnx_ir as ir

from spike_export.artifacts.recipe import HEAD_WEIGHTS, Dtype, HeadScheme, ModulePlan
from spike_export.checkpoint.checkpoint import LM_HEAD
from spike_export.checkpoint.decoder_config import DecoderConfig
from spike_export.export.decoder.logits import scaled_logits
from spike_export.export.graph.emission import Emission
from spike_export.export.graph.linear import NUMPY_TYPES, LinearEmitter
from spike_export.export.graph.norm import rms_norm
from spike_export.export.graph.weight_layout import read_matrix
from spike_export.export.graph_plan import GraphPlan

MODULE = LM_HEAD.removesuffix(".weight")

_QUANTIZED: Mapping[HeadScheme, ModulePlan] = {
    # Products in float32 whatever the graph's precision: they read the norm's output and yield the logits without a
    # cast, and ONNX Runtime has no fused product of INT8 weights that are cast to 16 bit behind their float32 scales.
    "int8-weights": ModulePlan(precision="float32", weights="int8"),
    "int8-per-token-dynamic": ModulePlan(precision="int8", activations="per-token"),
}


def head_plan(scheme: HeadScheme, dtype: Dtype) -> ModulePlan:
    """Return what becomes of the head; `dtype` is the graph's precision."""
    return _QUANTIZED.get(scheme) or ModulePlan(precision=dtype)


def emit_head(emission: Emission, hidden: ir.Value, embedding: ir.Value) -> None:
    """Append the last norm and the head, and declare `logits` [batch, sequence or 1, vocab] float32.

    Args:
        emission: The graph.
        hidden: [batch, sequence, hidden], or [batch, 1, hidden] where only the last token's logits are wanted.
        embedding: [vocab, hidden]; the head's weight where they are tied and the head is not quantized.
    """
    b, config, plan = emission.builder, emission.config, emission.plan
    normed = rms_norm(emission, "model.norm", hidden, plan.head_scales)
    if plan.head == "unquantized":
        logits = b.op("MatMul", [emission.cast(normed), _weight(emission, embedding)], MODULE)
    else:
        logits = _quantized(emission).emit(MODULE, normed)
    logits = scaled_logits(emission, logits)
    logits.name = "logits"
    b.output(logits, ["batch", "sequence" if plan.logits == "all" else 1, config.vocab_size])


def _weight(emission: Emission, embedding: ir.Value) -> ir.Value:
    b, config = emission.builder, emission.config
    if config.tie_word_embeddings:
        # One copy in the file. ONNX Runtime folds the transpose when it loads, so that memory holds both layouts
        # just as with two copies: SmolLM2-135M took 601 and 604 MB, and decoded equally fast.
        return b.op("Transpose", [embedding], MODULE, attributes={"perm": [1, 0]})
    shape = (config.hidden_size, config.vocab_size)
    fill = partial(read_matrix, emission.checkpoint, LM_HEAD, transposed=True)
    return b.streamed(LM_HEAD, emission.dtype, shape, fill)


def _quantized(emission: Emission) -> LinearEmitter:
    """Return the emitter of a head with an INT8 weight of its own, also where head and embedding are tied.

    The embedding cannot use it too: TensorRT gathers no INT8 constant, and dequantizing the whole table in front of
    the gathering costs ONNX Runtime more than the head itself.
    """
    config, plan = emission.config, emission.plan
    plans = {MODULE: head_plan(plan.head, plan.dtype)}
    shapes = {LM_HEAD: (config.vocab_size, config.hidden_size)}
    # ONNX Runtime may round the input of INT8 weights here, in blocks of 32 channels: the exact spelling decodes more
    # slowly than a head that is not quantized.
    return LinearEmitter(
        emission.builder,
        emission.checkpoint,
        plans,
        HEAD_WEIGHTS,
        shapes,
        exact_inputs=False,
        column_factors={} if plan.head_scales is None else {MODULE: plan.head_scales},
    )


def own_weight_bytes(config: DecoderConfig, plan: GraphPlan) -> int:
    """Return the bytes of the weight, scales and zero points that only the head reads.

    0 where it reads the embedding's.
    """
    weights = config.vocab_size * config.hidden_size
    if plan.head != "unquantized":
        return weights + config.vocab_size * (np.float32().itemsize + np.int8().itemsize)
    return 0 if config.tie_word_embeddings else weights * NUMPY_TYPES[plan.dtype].itemsize
