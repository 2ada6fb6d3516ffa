"""The cache of keys and values as graph inputs and outputs."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import onnx_ir as ir

from spike_export.calibration.decoder.kv_cache import quantize_cache
from spike_export.export.attention.attention_context import AttentionContext
from spike_export.export.attention.int8_cache import INT8, Int8Cache
from spike_export.export.graph.emission import Emission

KINDS = ("key", "value")


@dataclass(frozen=True)
class KvCache(ABC):
    """A cache of all layers: `past` comes in, `present` goes out.

    Attributes:
        pasts: Per layer the inputs `past_key_values.N.key|value` [batch, kv_heads, slots, head_dim].
    """

    emission: Emission
    pasts: list[tuple[ir.Value, ir.Value]]
    _presents: list[ir.Value] = field(default_factory=list, init=False, repr=False)

    @property
    @abstractmethod
    def _present_slots(self) -> int | str:
        """How many slots `present` has: a number, or the name of a free dimension."""

    @abstractmethod
    def _present(self, index: int, slot: int, new: ir.Value, context: AttentionContext) -> ir.Value:
        """Append a layer's cache after this call: of its keys (slot 0) or values (1)."""

    def append(self, index: int, key: ir.Value, value: ir.Value, context: AttentionContext) -> tuple[ir.Value, ...]:
        """Add a layer's new keys and values [batch, kv_heads, sequence, head_dim]; return all that attention reads.

        In an INT8 cache both are numbers of steps (`Int8Cache`).
        """
        new: tuple[ir.Value, ...] = (key, value)
        if self.emission.plan.kv_cache:
            new = tuple(self._int8.written(index, kind, states) for kind, states in zip(KINDS, new, strict=True))
        presents = tuple(self._present(index, slot, states, context) for slot, states in enumerate(new))
        self._presents.extend(presents)
        if not self.emission.plan.kv_cache:
            return presents
        return tuple(self._int8.read(index, kind, present) for kind, present in zip(KINDS, presents, strict=True))

    @property
    def _int8(self) -> Int8Cache:
        return Int8Cache(self.emission)

    def declare_outputs(self) -> None:
        """Declare `present.N.key|value` of all layers; comes after every layer's `append`."""
        config = self.emission.config
        for value in self._presents:
            shape: list[int | str] = ["batch", config.num_key_value_heads, self._present_slots, config.head_dim]
            self.emission.builder.output(value, shape)


@dataclass(frozen=True)
class DynamicCache(KvCache):
    """A cache that grows: `present` is longer by the new tokens and, when fresh, the prefix."""

    @classmethod
    def declare(cls, emission: Emission) -> "DynamicCache":
        """Declare the inputs of all layers."""
        return cls(emission, declare_pasts(emission, "past"))

    @property
    def _present_slots(self) -> str:
        return "present"

    def _present(self, index: int, slot: int, new: ir.Value, context: AttentionContext) -> ir.Value:
        """Append the cache after this call: the prefix when the sequence is fresh, the past, the new tokens."""
        b, module, kind = self.emission.builder, f"model.layers.{index}.self_attn", KINDS[slot]
        parts = [self.pasts[index][slot], new]
        prefix = prefix_part(self.emission, index, slot, context)
        if prefix is not None:
            parts = [prefix, *parts]
        return b.op(
            "Concat", parts, module, label=f"present_{kind}", output=f"present.{index}.{kind}", attributes={"axis": 2}
        )


def declare_pasts(emission: Emission, length: int | str) -> list[tuple[ir.Value, ir.Value]]:
    """Declare per layer the inputs `past_key_values.N.key|value` [batch, kv_heads, length, head_dim]."""
    config, pasts = emission.config, []
    dtype = INT8 if emission.plan.kv_cache else emission.dtype
    shape: list[int | str] = ["batch", config.num_key_value_heads, length, config.head_dim]
    for index in range(config.num_hidden_layers):
        names = (f"past_key_values.{index}.{kind}" for kind in KINDS)
        key, value = (emission.builder.input(name, dtype, shape) for name in names)
        pasts.append((key, value))
    return pasts


def prefix_part(emission: Emission, index: int, slot: int, context: AttentionContext) -> ir.Value | None:
    """Append what of a layer's prefix enters the cache: [batch, kv_heads, 0 or P, head_dim]; None without a prefix.

    Args:
        emission: The graph.
        index: The layer.
        slot: Which of `KINDS`.
        context: Says how much of it enters.
    """
    if context.prefix is None:
        return None
    b, module, kind = emission.builder, f"model.layers.{index}.self_attn", KINDS[slot]
    # One node that repeats it for the rows and drops it where it does not enter: in decode nodes cost by their number.
    # In float16 ONNX Runtime's CPU tiles float32 and casts behind it: there it runs as many nodes as Slice and Expand.
    part = b.op("Tile", [stored_prefix(emission, index, slot), context.prefix.repeats], module, label=f"prefix_{kind}")
    # TensorRT takes no constant in INT8 but a weight.
    return Int8Cache(emission).rounded(index, f"prefix_{kind}", part) if emission.plan.kv_cache else part


def stored_prefix(emission: Emission, index: int, slot: int) -> ir.Value:
    """Add a layer's prefix keys (slot 0) or values (1) as a constant [1, kv_heads, P, head_dim], as the cache has it.

    Around an INT8 cache they are numbers of steps, and whole ones where the cache holds them.
    """
    states, numbers = emission.plan.prefix[index][slot][None], emission.numpy_dtype
    name = f"model.layers.{index}.self_attn.prefix_{KINDS[slot]}"
    if not emission.plan.kv_cache:
        return emission.builder.initializer(name, states.astype(numbers))
    steps = getattr(Int8Cache(emission).steps(index), KINDS[slot])
    kept = quantize_cache(states, steps) if emission.plan.prefix_in == "cache" else states / steps
    return emission.builder.initializer(name, kept.astype(numbers))
