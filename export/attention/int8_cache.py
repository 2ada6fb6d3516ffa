"""Keys and values in INT8: both are divided by the steps of their channels in front of the cache.

With q and k of a query and a key, s the steps of the keys' channels and r rounding, the score is
sum(q * s * r(k / s)): the query takes up the steps of the keys, and attention's result those of the values. What lies
between the cache and attention is therefore a round trip with the step 1.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from spike_export.calibration.decoder.kv_cache import CacheSteps, Floats, cache_steps
from spike_export.export.graph.emission import Emission

FLOAT, INT8 = ir.DataType.FLOAT, ir.DataType.INT8

STEPS = "steps"
"""Last part of the names of what holds steps; a key's and a value's are [kv_heads, 1, head_dim] float32."""


@dataclass(frozen=True)
class Int8Cache:
    """Writes what an INT8 cache needs around itself; a layer's block is told by its index."""

    emission: Emission

    def steps(self, index: int) -> CacheSteps:
        """Return the steps of a layer's keys and values."""
        config, block = self.emission.config, _block(index)
        return cache_steps(block, self.emission.plan.kv_cache[block], config.num_key_value_heads, config.head_dim)

    def query(self, index: int, query: ir.Value) -> ir.Value:
        """Append the product of queries [batch, heads, sequence, head_dim] with the steps of the keys they read."""
        return self._multiplied(index, "query", query, self.steps(index).key)

    def result(self, index: int, mixed: ir.Value) -> ir.Value:
        """Append the product of attention's result [batch, heads, sequence, head_dim] with the values' steps."""
        return self._multiplied(index, "mixed", mixed, self.steps(index).value)

    def written(self, index: int, kind: str, states: ir.Value) -> ir.Value:
        """Append the quantizer of new keys or values [batch, kv_heads, sequence, head_dim]: → INT8."""
        b, module = self.emission.builder, _block(index)
        steps = b.initializer(f"{module}.{kind}_{STEPS}", getattr(self.steps(index), kind))
        return self.rounded(index, kind, b.op("Div", [b.cast(states, FLOAT), steps], module, label=f"{kind}_in_steps"))

    def rounded(self, index: int, stem: str, in_steps: ir.Value) -> ir.Value:
        """Append the quantizer of numbers of steps: → INT8, saturated."""
        b, module = self.emission.builder, _block(index)
        one = b.initializer(f"{module}.{stem}_scale", np.array(1, np.float32))
        zero = b.initializer(f"{module}.{stem}_zero_point", np.array(0, np.int8))
        scaled = b.cast(in_steps, FLOAT)
        return b.op("QuantizeLinear", [scaled, one, zero], module, dtype=INT8, label=f"{stem}_QuantizeLinear")

    def read(self, index: int, kind: str, present: ir.Value) -> ir.Value:
        """Append what turns a cache [batch, kv_heads, slots, head_dim] into numbers of steps, in the graph's type."""
        b, module = self.emission.builder, _block(index)
        # Without a zero point: ONNX Runtime 1.31 moves the node behind an Unsqueeze, and puts a quantizer in its place
        # whose own zero point has another type.
        one = b.initializer(f"{module}.cached_{kind}_scale", np.array(1, np.float32))
        label = f"cached_{kind}_DequantizeLinear"
        return self.emission.cast(b.op("DequantizeLinear", [present, one], module, dtype=FLOAT, label=label))

    def _multiplied(self, index: int, name: str, states: ir.Value, steps: Floats) -> ir.Value:
        b, module, emission = self.emission.builder, _block(index), self.emission
        groups = emission.config.num_attention_heads // emission.config.num_key_value_heads
        factors = np.repeat(steps, groups, axis=0).astype(emission.numpy_dtype)
        constant = b.initializer(f"{module}.{name}_{STEPS}", factors)
        return b.op("Mul", [states, constant], module, label=f"{name}_restored")


def _block(index: int) -> str:
    return f"model.layers.{index}.self_attn"
