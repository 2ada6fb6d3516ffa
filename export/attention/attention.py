"""The attention block of a layer."""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from spike_export.export.attention.attention_context import AttentionContext
from spike_export.export.attention.int8_cache import Int8Cache
from spike_export.export.attention.kv_cache import KvCache
from spike_export.export.attention.rope import Rope
from spike_export.export.attention.softcap_attention import softcap_attention
from spike_export.export.graph.emission import Emission
from spike_export.export.graph.linear import quantize_dequantize
from spike_export.export.graph.norm import rms_norm
from spike_export.export.graph.projections import split_projection

FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class AttentionEmitter:
    """Writes attention blocks.

    Attributes:
        ropes: Kind of layer (None where there is but one) → its rotation.
    """

    emission: Emission
    context: AttentionContext
    cache: KvCache
    ropes: Mapping[str | None, Rope]

    def emit(self, index: int, normed: ir.Value) -> ir.Value:
        """Append layer `index`'s block: [batch, sequence, hidden] → the same, in o_proj's precision."""
        b, config, module = self.emission.builder, self.emission.config, f"model.layers.{index}.self_attn"
        projections = self._projections(module, normed)
        query, key, value = (self._heads(module, name, states) for name, states in zip("qkv", projections, strict=True))
        rope = self.ropes[config.layer_rope(index)]
        query, key = (
            rope.rotate(self.emission, module, name, states, self._counts[name])
            for name, states in (("q", query), ("k", key))
        )
        query, key, value = self._operands(module, query, key, value)
        key, value = self.cache.append(index, key, value, self.context)
        in_steps = Int8Cache(self.emission) if self.emission.plan.kv_cache else None
        query = in_steps.query(index, query) if in_steps else query
        mixed = self._attend(module, query, key, value, self.context.masks[config.layer_window(index)])
        mixed = in_steps.result(index, mixed) if in_steps else mixed
        mixed = b.op("Transpose", [mixed], module, label="o_transpose", attributes={"perm": [0, 2, 1, 3]})
        shape = b.integers(0, 0, config.num_attention_heads * config.head_dim)
        merged = b.op("Reshape", [mixed, shape], module, label="o_merged")
        return self.emission.linears.emit(f"{module}.o_proj", merged)

    @property
    def _counts(self) -> Mapping[str, int]:
        """Heads of queries, keys and values."""
        config = self.emission.config
        return {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}

    def _projections(self, module: str, normed: ir.Value) -> tuple[ir.Value, ...]:
        """Append the linears of queries, keys and values: [batch, sequence, heads * head_dim] each."""
        emission = self.emission
        if not emission.config.family.fused_projections:
            return tuple(emission.linears.emit(f"{module}.{name}_proj", normed) for name in self._counts)
        fused = emission.linears.emit(f"{module}.qkv_proj", normed)
        widths = {name: heads * emission.config.head_dim for name, heads in self._counts.items()}
        return split_projection(emission.builder, module, fused, widths)

    def _heads(self, module: str, name: str, projected: ir.Value) -> ir.Value:
        """Append norm and split of one projection: → [batch, heads, sequence, head_dim] in the graph's precision."""
        b, emission = self.emission.builder, self.emission
        normed = None if name == "v" else emission.config.family.qk_norm
        if normed == "projection":
            projected = rms_norm(emission, f"{module}.{name}_norm", projected)
        if normed != "head":
            projected = emission.cast(projected)
        shape = b.integers(0, 0, self._counts[name], emission.config.head_dim)
        split = b.op("Reshape", [projected, shape], module, label=f"{name}_heads")
        if normed == "head":
            split = emission.cast(rms_norm(emission, f"{module}.{name}_norm", split))
        return b.op("Transpose", [split], module, label=f"{name}_transpose", attributes={"perm": [0, 2, 1, 3]})

    def _attend(self, module: str, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value) -> ir.Value:
        """Append attention itself: → [batch, heads, sequence, head_dim]."""
        b, factors = self.emission.builder, self.emission.config.factors
        if factors.attention_softcap is None:
            scale = None if factors.attention is None else {"scale": float(factors.attention)}
            return b.op("Attention", [query, key, value, mask], module, attributes=scale)
        factor = self.emission.config.head_dim**-0.5 if factors.attention is None else factors.attention
        query = b.op("Mul", [query, self.emission.number(factor)], module, label="query_scaled")
        return softcap_attention(self.emission, module, query, key, value, mask, factors.attention_softcap)

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
