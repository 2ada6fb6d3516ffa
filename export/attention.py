"""The attention block of a layer."""

from dataclasses import dataclass

import onnx_ir as ir

from spike_export.export.attention_context import AttentionContext
from spike_export.export.emission import Emission
from spike_export.export.kv_cache import KvCache
from spike_export.export.linear import quantize_dequantize

FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class AttentionEmitter:
    """Writes attention blocks.

    Attributes:
        tables: Cosines and sines of the rotary embedding, [positions, head_dim / 2].
    """

    emission: Emission
    context: AttentionContext
    cache: KvCache
    tables: tuple[ir.Value, ir.Value]

    def emit(self, index: int, normed: ir.Value) -> ir.Value:
        """Append layer `index`'s block: [batch, sequence, hidden] → the same, in o_proj's precision."""
        b, config, module = self.emission.builder, self.emission.config, f"model.layers.{index}.self_attn"
        query = self._heads(module, "q", normed, config.num_attention_heads)
        key = self._heads(module, "k", normed, config.num_key_value_heads)
        value = self._heads(module, "v", normed, config.num_key_value_heads)
        query, key = (
            b.op("RotaryEmbedding", [x, *self.tables, self.context.positions], module, label=f"{name}_rotary")
            for name, x in (("q", query), ("k", key))
        )
        query, key, value = self._operands(module, query, key, value)
        present = self.cache.append(index, key, value, self.context)
        mask = self.context.masks[config.layer_window(index)]
        mixed = b.op("Attention", [query, *present, mask], module)
        mixed = b.op("Transpose", [mixed], module, label="o_transpose", attributes={"perm": [0, 2, 1, 3]})
        shape = b.integers(0, 0, config.num_attention_heads * config.head_dim)
        merged = b.op("Reshape", [mixed, shape], module, label="o_merged")
        return self.emission.linears.emit(f"{module}.o_proj", merged)

    def _heads(self, module: str, name: str, value: ir.Value, heads: int) -> ir.Value:
        """Append one projection: [batch, sequence, hidden] → [batch, heads, sequence, head_dim]."""
        b, emission = self.emission.builder, self.emission
        projected = emission.cast(emission.linears.emit(f"{module}.{name}_proj", value))
        shape = b.integers(0, 0, heads, emission.config.head_dim)
        split = b.op("Reshape", [projected, shape], module, label=f"{name}_heads")
        return b.op("Transpose", [split], module, label=f"{name}_transpose", attributes={"perm": [0, 2, 1, 3]})

    def _operands(self, module: str, query: ir.Value, key: ir.Value, value: ir.Value) -> tuple[ir.Value, ...]:
        """Append the round trips of query, key and value through INT8, where the block's plan asks for them.

        Keys and values pass theirs once, on the way into the cache, whose prefix never meets a quantizer.
        """
        b, emission = self.emission.builder, self.emission
        plan = emission.plan.attention.get(module)
        if plan is None:
            return query, key, value
        operands = (("query", query, plan.query), ("key", key, plan.key), ("value", value, plan.value))
        return tuple(
            emission.cast(quantize_dequantize(b, module, b.cast(states, FLOAT), scale, stem=name))
            for name, states, scale in operands
        )
