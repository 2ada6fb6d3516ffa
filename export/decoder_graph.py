"""The decoder as an ONNX graph: constructed, not traced; one graph for prefill, chunked prefill and decode.

Inputs: `input_ids` [batch, sequence] int64, `attention_mask` [batch, total_sequence] int64 (the caller's own tokens,
past and new), `past_key_values.N.key|value` [batch, kv_heads, past, head_dim]. Outputs: `logits` [batch, sequence,
vocab] float32, `present.N.key|value`. An empty past means a fresh sequence; `present` then starts with the prefix,
and from then on `past` is longer by P than the caller's own past. A graph whose prefix lives in attention has no prefix
in `present`: there, `past` is as long as the caller's own past.
"""

from collections.abc import Mapping
from importlib.metadata import version

import onnx_ir as ir

from spike_export.calibration.checkpoint import EMBEDDING, Checkpoint
from spike_export.export.attached_prefix import AttachedPrefixCache
from spike_export.export.attention import AttentionEmitter
from spike_export.export.attention_context import ContextEmitter
from spike_export.export.emission import Emission
from spike_export.export.feed_forward import feed_forward
from spike_export.export.graph_builder import GraphBuilder
from spike_export.export.graph_plan import GraphPlan, PrefixHome
from spike_export.export.head import emit_head
from spike_export.export.kv_cache import DynamicCache
from spike_export.export.norm import rms_norm
from spike_export.export.rope import rope_tables

PRODUCER = "spike-export"

INT64 = ir.DataType.INT64

_CACHES: Mapping[PrefixHome, type[DynamicCache]] = {"cache": DynamicCache, "attention": AttachedPrefixCache}


def build_decoder(checkpoint: Checkpoint, plan: GraphPlan) -> ir.Model:
    """Return the decoder's graph; its weights are read when it is saved."""
    emission = Emission(GraphBuilder(), checkpoint, plan)
    b, config = emission.builder, emission.config
    ids = b.input("input_ids", INT64, ["batch", "sequence"])
    mask = b.input("attention_mask", INT64, ["batch", "total_sequence"])
    cache = _CACHES[plan.prefix_in].declare(emission)
    cached = plan.prefix_in == "cache"
    context_emitter = ContextEmitter(b, ids, mask, plan.prefix_length, config.windows, prefix_cached=cached)
    context = context_emitter.emit(cache.pasts[0][0], config.num_key_value_heads, config.head_dim)
    attention = AttentionEmitter(emission, context, cache, _rope_tables(emission))
    shape = (config.vocab_size, config.hidden_size)
    embedding = b.lazy(EMBEDDING, emission.dtype, shape, lambda: emission.tensor(EMBEDDING))
    hidden = b.op("Gather", [embedding, ids], "model.embed_tokens", dtype=emission.dtype)
    for index in range(config.num_hidden_layers):
        hidden = _layer(emission, attention, index, hidden)
    emit_head(emission, hidden, embedding)
    cache.declare_outputs()
    return b.model("decoder", PRODUCER, version(PRODUCER))


def _rope_tables(emission: Emission) -> tuple[ir.Value, ir.Value]:
    # The caller may use every position the model knows; the prefix comes on top of them.
    positions = emission.config.max_position_embeddings + emission.plan.prefix_length
    cos, sin = rope_tables(emission.config, positions)
    b, kept = emission.builder, emission.numpy_dtype
    return (
        b.initializer("model.rotary_emb.cos", cos.astype(kept)),
        b.initializer("model.rotary_emb.sin", sin.astype(kept)),
    )


def _layer(emission: Emission, attention: AttentionEmitter, index: int, hidden: ir.Value) -> ir.Value:
    b, layer = emission.builder, f"model.layers.{index}"
    normed = rms_norm(emission, f"{layer}.input_layernorm", hidden)
    attended = attention.emit(index, normed)
    hidden = b.op("Add", [hidden, emission.cast(attended)], layer, label="attention_residual")
    normed = rms_norm(emission, f"{layer}.post_attention_layernorm", hidden)
    fed = feed_forward(emission, f"{layer}.mlp", normed)
    return b.op("Add", [hidden, emission.cast(fed)], layer, label="mlp_residual")
