"""The decoder as an ONNX graph: constructed, not traced; one graph for prefill, chunked prefill and decode.

With a dynamic cache. Inputs: `input_ids` [batch, sequence] int64, `attention_mask` [batch, total_sequence] int64 (the
caller's own tokens, past and new), `past_key_values.N.key|value` [batch, kv_heads, past, head_dim]. Outputs: `logits`
[batch, sequence, vocab] float32 (or [batch, 1, vocab], of the last token alone), `present.N.key|value`. An empty past
means a fresh sequence; `present` then starts with the prefix, and from then on `past` is longer by P than the caller's
own past. A graph whose prefix lives in attention has no prefix in `present`: there, `past` is as long as the caller's.

With a static cache. Inputs: `input_ids`, `write_indices` [batch] int64 (own tokens each row has in the buffer), `fresh`
[F] bool (F is 1 for new sequences, else 0; absent without a prefix), `past_key_values.N.key|value` [batch, kv_heads,
P + capacity, head_dim]. Outputs: `logits`, and `present.N.key|value` of the pasts' shape, which may be their memory.
"""

from collections.abc import Mapping
from functools import partial
from importlib.metadata import version

import onnx_ir as ir

from spike_export.checkpoint.checkpoint import EMBEDDING, Checkpoint
from spike_export.checkpoint.modules import block_inputs
from spike_export.export.attention.attached_prefix import AttachedPrefixCache
from spike_export.export.attention.attention import AttentionEmitter
from spike_export.export.attention.attention_context import AttentionContext, ContextEmitter
from spike_export.export.attention.kv_cache import DynamicCache, KvCache
from spike_export.export.attention.rope import RopeEmitter
from spike_export.export.attention.static_cache import static_cache
from spike_export.export.decoder.feed_forward import feed_forward
from spike_export.export.decoder.head import emit_head
from spike_export.export.decoder.last_token import last_token
from spike_export.export.decoder.sparse_moe import sparse_moe
from spike_export.export.graph.emission import Emission
from spike_export.export.graph.graph_builder import GraphBuilder, element_type
from spike_export.export.graph.hadamard import hadamard_transform
from spike_export.export.graph.norm import rms_norm
from spike_export.export.graph.weight_layout import read_matrix
from spike_export.export.graph_plan import GraphPlan, PrefixHome

PRODUCER = "spike-export"

INT64 = ir.DataType.INT64

_CACHES: Mapping[PrefixHome, type[DynamicCache]] = {"cache": DynamicCache, "attention": AttachedPrefixCache}


def build_decoder(checkpoint: Checkpoint, plan: GraphPlan) -> ir.Model:
    """Return the decoder's graph; its weights are read when it is saved."""
    emission = Emission(GraphBuilder(), checkpoint, plan)
    b, config = emission.builder, emission.config
    ids = b.input("input_ids", INT64, ["batch", "sequence"])
    cache, context = _cache(emission, ids)
    ropes = {kind: RopeEmitter(emission, context.positions, kind).emit() for kind in config.ropes}
    attention = AttentionEmitter(emission, context, cache, ropes)
    shape = (config.vocab_size, config.hidden_size)
    embedding = b.streamed(EMBEDDING, emission.dtype, shape, partial(read_matrix, checkpoint, EMBEDDING))
    hidden = b.op("Gather", [embedding, ids], "model.embed_tokens", dtype=emission.dtype)
    hidden = _scaled(emission, "model.embed_tokens", "embedding_scaled", hidden, config.factors.embedding)
    for index in range(config.num_hidden_layers):
        hidden = _layer(emission, attention, index, hidden)
    emit_head(emission, hidden, embedding)
    cache.declare_outputs()
    return b.model("decoder", PRODUCER, version(PRODUCER))


def _cache(emission: Emission, ids: ir.Value) -> tuple[KvCache, AttentionContext]:
    b, config, plan = emission.builder, emission.config, emission.plan
    if plan.cache.capacity is not None:
        return static_cache(emission, ids, plan.cache.capacity)
    mask = b.input("attention_mask", INT64, ["batch", "total_sequence"])
    cache = _CACHES[plan.prefix_in].declare(emission)
    cached = plan.prefix_in == "cache"
    emitter = ContextEmitter(b, ids, mask, plan.prefix_length, config.windows, prefix_cached=cached)
    return cache, emitter.emit(cache.pasts[0][0])


def _layer(emission: Emission, attention: AttentionEmitter, index: int, hidden: ir.Value) -> ir.Value:
    """Append a layer: [batch, sequence, hidden] → the same; its norms stand where the family has them."""
    family, layer = emission.config.family, f"model.layers.{index}"
    after_attention, after_mlp = family.post_norms or (None, None)
    at_attention, at_mlp = block_inputs(emission.config)
    normed = _normed(emission, layer, family.attention_norm, hidden)
    attended = attention.emit(index, _spread(emission, layer, at_attention, normed))
    hidden = _joined(emission, layer, "attention", hidden, _normed(emission, layer, after_attention, attended))
    if emission.plan.logits == "last" and index == emission.config.num_hidden_layers - 1:
        hidden = last_token(emission, hidden)
    normed = _normed(emission, layer, family.mlp_norm, hidden)
    fed = _feed_forward(emission, layer, _spread(emission, layer, at_mlp, normed))
    return _joined(emission, layer, "mlp", hidden, _normed(emission, layer, after_mlp, fed))


def _feed_forward(emission: Emission, layer: str, normed: ir.Value) -> ir.Value:
    family = emission.config.family
    block = f"{layer}.{family.feed_forward}"
    if family.experts is None:
        return feed_forward(emission, block, normed)
    return sparse_moe(emission, block, normed, family.experts)


def _normed(emission: Emission, layer: str, norm: str | None, value: ir.Value) -> ir.Value:
    return value if norm is None else rms_norm(emission, f"{layer}.{norm}", value)


def _spread(emission: Emission, layer: str, read_by: str | None, value: ir.Value) -> ir.Value:
    """Append the Hadamard transform of a block's input, where an equivalent model has one."""
    config, module = emission.config, f"{layer}.{read_by}"
    return hadamard_transform(emission.builder, module, value, config.hidden_size, config.input_hadamard.get(module))


def _joined(emission: Emission, layer: str, block: str, hidden: ir.Value, output: ir.Value) -> ir.Value:
    """Append the sum of the residual stream and a block's output."""
    output = _scaled(emission, layer, f"{block}_scaled", output, emission.config.factors.residual)
    return emission.builder.op("Add", [hidden, emission.cast(output)], layer, label=f"{block}_residual")


def _scaled(emission: Emission, module: str, label: str, value: ir.Value, factor: float) -> ir.Value:
    """Append a product with a factor that is rounded to the value's precision; nothing where it is 1."""
    if factor == 1:
        return value
    b = emission.builder
    return b.op("Mul", [value, b.number(factor, element_type(value).numpy())], module, label=label)
