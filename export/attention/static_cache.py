"""The cache as a buffer of fixed size that belongs to the caller and is written in place."""

from dataclasses import dataclass

import onnx_ir as ir

from spike_export.export.attention.attention_context import AttentionContext
from spike_export.export.attention.kv_cache import KINDS, KvCache, declare_pasts, prefix_part
from spike_export.export.attention.static_context import StaticContextEmitter
from spike_export.export.graph.emission import Emission

WRITE_INDICES, FRESH = "write_indices", "fresh"
"""The inputs that only a graph with a static cache has."""


@dataclass(frozen=True)
class StaticCache(KvCache):
    """A buffer per layer and kind: `past` and `present` have one shape, and may be the same memory.

    Attributes:
        slots: P and the capacity.
    """

    slots: int

    @property
    def _present_slots(self) -> int:
        return self.slots

    def _present(self, index: int, slot: int, new: ir.Value, context: AttentionContext) -> ir.Value:
        """Write the prefix, when the sequences are fresh, and the new tokens with one TensorScatter.

        One, because TensorRT aliases past and present only where the scatter's result is the graph's output.
        """
        assert context.write_slots is not None, "the context was emitted for a static cache"
        b, module, kind = self.emission.builder, f"model.layers.{index}.self_attn", KINDS[slot]
        prefix = prefix_part(self.emission, index, slot, context)
        if prefix is not None:
            new = b.op("Concat", [prefix, new], module, label=f"update_{kind}", attributes={"axis": 2})
        return b.op(
            "TensorScatter",
            [self.pasts[index][slot], new, context.write_slots],
            module,
            label=f"present_{kind}",
            output=f"present.{index}.{kind}",
            attributes={"axis": -2, "mode": "linear"},
        )


def static_cache(emission: Emission, ids: ir.Value, capacity: int) -> tuple[StaticCache, AttentionContext]:
    """Declare a static cache's inputs behind `input_ids`, and emit what all layers share."""
    b, config, plan = emission.builder, emission.config, emission.plan
    indices = b.input(WRITE_INDICES, ir.DataType.INT64, ["batch"])
    fresh = b.input(FRESH, ir.DataType.BOOL, [FRESH]) if plan.prefix_length else None
    slots = plan.prefix_length + capacity
    cache = StaticCache(emission, declare_pasts(emission, slots), slots)
    emitter = StaticContextEmitter(b, ids, indices, fresh, plan.prefix_length, slots, config.windows)
    return cache, emitter.emit()
