"""The decoder as an ONNX graph: constructed, not traced; one graph for prefill, chunked prefill and decode.

Inputs: `input_ids` [batch, sequence] int64, `attention_mask` [batch, total_sequence] int64 (the caller's own tokens,
past and new), `past_key_values.N.key|value` [batch, kv_heads, past, head_dim]. Outputs: `logits` [batch, sequence,
vocab] float32, `present.N.key|value`. An empty past means a fresh sequence; `present` then starts with the prefix,
and from then on `past` is longer by P than the caller's own past.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spike_export.calibration.checkpoint import EMBEDDING, LM_HEAD, Checkpoint
from spike_export.calibration.decoder_config import DecoderConfig, tensor_shapes
from spike_export.calibration.recipe import AttentionPlan, Dtype, ModulePlan, WeightScheme
from spike_export.export.attention_context import AttentionContext, ContextEmitter
from spike_export.export.graph_builder import ELEMENT_TYPES, GraphBuilder, element_type
from spike_export.export.linear import NUMPY_TYPES, LinearEmitter, quantize_dequantize
from spike_export.export.rope import rope_tables

PRODUCER = "spike-export"

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64

PrefixCache = Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Per layer (key, value), each [kv_heads, P, head_dim] float32, keys rotated; empty when there is no prefix."""


@dataclass(frozen=True)
class GraphPlan:
    """What the graph is to be.

    Attributes:
        modules: Every decoder linear → its plan.
        weights: How INT8 weights are scaled.
        dtype: Precision of embeddings, residual stream, attention, cache and head.
        prefix: Key/values that stand before every sequence.
        attention: Attention block → steps of its products' operands; blocks that are not named stay as they are.
    """

    modules: Mapping[str, ModulePlan]
    weights: WeightScheme
    dtype: Dtype
    prefix: PrefixCache = ()
    attention: Mapping[str, AttentionPlan] = field(default_factory=dict)

    @property
    def prefix_length(self) -> int:
        """Number of prefix tokens, P."""
        return self.prefix[0][0].shape[1] if self.prefix else 0


def build_decoder(checkpoint: Checkpoint, plan: GraphPlan) -> ir.Model:
    """Return the decoder's graph; its weights are read when it is saved."""
    return _Decoder(checkpoint, plan).build()


class _Decoder:
    """One graph under construction."""

    def __init__(self, checkpoint: Checkpoint, plan: GraphPlan) -> None:
        self.checkpoint, self.plan = checkpoint, plan
        self.config: DecoderConfig = checkpoint.config
        self.dtype = ELEMENT_TYPES[plan.dtype]
        self.b = GraphBuilder()
        shapes = tensor_shapes(self.config)
        self.linears = LinearEmitter(self.b, checkpoint, plan.modules, plan.weights, shapes)

    def build(self) -> ir.Model:
        ids = self.b.input("input_ids", INT64, ["batch", "sequence"])
        mask = self.b.input("attention_mask", INT64, ["batch", "total_sequence"])
        pasts = [self._past(index) for index in range(self.config.num_hidden_layers)]
        emitter = ContextEmitter(self.b, ids, mask, self.plan.prefix_length, self.config.sliding_window)
        context = emitter.emit(pasts[0][0], self.config.num_key_value_heads, self.config.head_dim)
        tables = self._rope_tables()
        embedding = self._embedding()
        hidden = self.b.op("Gather", [embedding, ids], "model.embed_tokens", dtype=self.dtype)
        presents: list[ir.Value] = []
        for index, past in enumerate(pasts):
            hidden, present = self._layer(index, hidden, past, context, tables)
            presents += present
        self._head(hidden, embedding)
        for value in presents:
            self.b.output(value, ["batch", self.config.num_key_value_heads, "present", self.config.head_dim])
        return self.b.model("decoder", PRODUCER, version(PRODUCER))

    def _past(self, index: int) -> tuple[ir.Value, ir.Value]:
        shape: list[int | str] = ["batch", self.config.num_key_value_heads, "past", self.config.head_dim]
        key, value = (self.b.input(f"past_key_values.{index}.{kind}", self.dtype, shape) for kind in ("key", "value"))
        return key, value

    def _rope_tables(self) -> tuple[ir.Value, ir.Value]:
        # The caller may use every position the model knows; the prefix comes on top of them.
        cos, sin = rope_tables(self.config, self.config.max_position_embeddings + self.plan.prefix_length)
        kept = NUMPY_TYPES[self.plan.dtype]
        return (
            self.b.initializer("model.rotary_emb.cos", cos.astype(kept)),
            self.b.initializer("model.rotary_emb.sin", sin.astype(kept)),
        )

    def _embedding(self) -> ir.Value:
        shape = (self.config.vocab_size, self.config.hidden_size)
        return self.b.lazy(EMBEDDING, self.dtype, shape, lambda: self._kept(EMBEDDING))

    def _kept(self, name: str) -> NDArray[Any]:
        return self.checkpoint.tensor(name).astype(NUMPY_TYPES[self.plan.dtype], copy=False)

    def _norm(self, module: str, value: ir.Value) -> ir.Value:
        """Append an RMSNorm: an FP32 island, whose FP32 output feeds quantizers without a round trip."""
        name = f"{module}.weight"
        gain = self.b.lazy(name, FLOAT, (self.config.hidden_size,), lambda: self.checkpoint.tensor(name))
        inputs = [self.b.cast(value, FLOAT), gain]
        return self.b.op(
            "RMSNormalization", inputs, module, attributes={"axis": -1, "epsilon": self.config.rms_norm_eps}
        )

    def _layer(
        self,
        index: int,
        hidden: ir.Value,
        past: tuple[ir.Value, ir.Value],
        context: AttentionContext,
        tables: tuple[ir.Value, ir.Value],
    ) -> tuple[ir.Value, list[ir.Value]]:
        layer = f"model.layers.{index}"
        normed = self._norm(f"{layer}.input_layernorm", hidden)
        attended, present = self._attention(index, normed, past, context, tables)
        hidden = self.b.op("Add", [hidden, self.b.cast(attended, self.dtype)], layer, label="attention_residual")
        normed = self._norm(f"{layer}.post_attention_layernorm", hidden)
        fed = self._mlp(f"{layer}.mlp", normed)
        return self.b.op("Add", [hidden, self.b.cast(fed, self.dtype)], layer, label="mlp_residual"), present

    def _heads(self, attention: str, name: str, value: ir.Value, heads: int) -> ir.Value:
        """Append one projection: [batch, sequence, hidden] → [batch, heads, sequence, head_dim]."""
        projected = self.b.cast(self.linears.emit(f"{attention}.{name}_proj", value), self.dtype)
        shape = self.b.integers(0, 0, heads, self.config.head_dim)
        split = self.b.op("Reshape", [projected, shape], attention, label=f"{name}_heads")
        return self.b.op("Transpose", [split], attention, label=f"{name}_transpose", attributes={"perm": [0, 2, 1, 3]})

    def _attention(
        self,
        index: int,
        normed: ir.Value,
        past: tuple[ir.Value, ir.Value],
        context: AttentionContext,
        tables: tuple[ir.Value, ir.Value],
    ) -> tuple[ir.Value, list[ir.Value]]:
        module, config = f"model.layers.{index}.self_attn", self.config
        query = self._heads(module, "q", normed, config.num_attention_heads)
        key = self._heads(module, "k", normed, config.num_key_value_heads)
        value = self._heads(module, "v", normed, config.num_key_value_heads)
        query, key = (
            self.b.op("RotaryEmbedding", [x, *tables, context.positions], module, label=f"{name}_rotary")
            for name, x in (("q", query), ("k", key))
        )
        query, key, value = self._operands(module, query, key, value)
        present = [
            self._present(index, kind, new, past[slot], context)
            for slot, (kind, new) in enumerate((("key", key), ("value", value)))
        ]
        mixed = self.b.op("Attention", [query, *present, context.mask], module)
        mixed = self.b.op("Transpose", [mixed], module, label="o_transpose", attributes={"perm": [0, 2, 1, 3]})
        shape = self.b.integers(0, 0, config.num_attention_heads * config.head_dim)
        merged = self.b.op("Reshape", [mixed, shape], module, label="o_merged")
        return self.linears.emit(f"{module}.o_proj", merged), present

    def _operands(self, module: str, query: ir.Value, key: ir.Value, value: ir.Value) -> tuple[ir.Value, ...]:
        """Append the round trips of query, key and value through INT8, where the block's plan asks for them.

        Keys and values pass theirs once, on the way into the cache, whose prefix never meets a quantizer.
        """
        plan = self.plan.attention.get(module)
        if plan is None:
            return query, key, value
        operands = (("query", query, plan.query), ("key", key, plan.key), ("value", value, plan.value))
        return tuple(
            self.b.cast(quantize_dequantize(self.b, module, self.b.cast(states, FLOAT), scale, stem=name), self.dtype)
            for name, states, scale in operands
        )

    def _present(self, index: int, kind: str, new: ir.Value, past: ir.Value, context: AttentionContext) -> ir.Value:
        """Append the cache after this call: the prefix when the sequence is fresh, the past, the new tokens."""
        module, parts = f"model.layers.{index}.self_attn", [past, new]
        if context.prefix is not None:
            cached = self.plan.prefix[index][0 if kind == "key" else 1][None]
            stored = self.b.initializer(f"{module}.prefix_{kind}", cached.astype(NUMPY_TYPES[self.plan.dtype]))
            ends = [self.b.integers(0), context.prefix.length, self.b.integers(2)]
            part = self.b.op("Slice", [stored, *ends], module, label=f"prefix_{kind}_slice")
            part = self.b.op("Expand", [part, context.prefix.shape], module, label=f"prefix_{kind}_expand")
            parts = [part, *parts]
        return self.b.op(
            "Concat", parts, module, label=f"present_{kind}", output=f"present.{index}.{kind}", attributes={"axis": 2}
        )

    def _mlp(self, module: str, normed: ir.Value) -> ir.Value:
        """Append down(silu(gate(x)) * up(x)).

        Where gate or up is INT8 their product stays in FP32: spikes reach thousands and FP16 ends at 65,504.
        """
        gate = self.linears.emit(f"{module}.gate_proj", normed)
        up = self.linears.emit(f"{module}.up_proj", normed)
        kept = element_type(gate)
        precision = self.plan.modules[f"{module}.down_proj"].precision
        alike = element_type(up) == kept and precision != "int8" and ELEMENT_TYPES[precision] == kept
        product_type = kept if alike else FLOAT
        gate, up = self.b.cast(gate, product_type), self.b.cast(up, product_type)
        sigmoid = self.b.op("Sigmoid", [gate], module)
        silu = self.b.op("Mul", [gate, sigmoid], module, label="silu")
        product = self.b.op("Mul", [silu, up], module, label="product")
        return self.linears.emit(f"{module}.down_proj", product)

    def _head(self, hidden: ir.Value, embedding: ir.Value) -> None:
        normed = self.b.cast(self._norm("model.norm", hidden), self.dtype)
        if self.config.tie_word_embeddings:
            # One copy in the file. ONNX Runtime folds the transpose when it loads, so that memory holds both layouts
            # just as with two copies: SmolLM2-135M took 601 and 604 MB, and decoded equally fast.
            weight = self.b.op("Transpose", [embedding], "lm_head", attributes={"perm": [1, 0]})
        else:
            shape = (self.config.hidden_size, self.config.vocab_size)
            weight = self.b.lazy(LM_HEAD, self.dtype, shape, lambda: np.ascontiguousarray(self._kept(LM_HEAD).T))
        exact = self.dtype == FLOAT
        logits = self.b.op("MatMul", [normed, weight], "lm_head", output="logits" if exact else None)
        logits = self.b.cast(logits, FLOAT, output="logits")
        self.b.output(logits, ["batch", "sequence", self.config.vocab_size])
