"""A cache that never holds the prefix: attention puts it before the cache in every call.

Runtimes that allocate `present` themselves, from the tokens they fed, cannot take one that is longer by the prefix.
"""

from dataclasses import dataclass, replace

import onnx_ir as ir

from spike_export.export.attention.attention_context import AttentionContext, PrefixExtent
from spike_export.export.attention.kv_cache import KINDS, DynamicCache, stored_prefix


@dataclass(frozen=True)
class AttachedPrefixCache(DynamicCache):
    """A `DynamicCache` of the caller's own tokens; each call copies the cache once more, behind the prefix."""

    def append(self, index: int, key: ir.Value, value: ir.Value, context: AttentionContext) -> tuple[ir.Value, ...]:
        """Append a layer's new keys and values; return all of them behind the prefix."""
        own = super().append(index, key, value, replace(context, prefix=None))
        if context.prefix is None:
            return own
        return tuple(self._behind_prefix(index, slot, present, context.prefix) for slot, present in enumerate(own))

    def _behind_prefix(self, index: int, slot: int, present: ir.Value, prefix: PrefixExtent) -> ir.Value:
        b, module, kind = self.emission.builder, f"model.layers.{index}.self_attn", KINDS[slot]
        stored = stored_prefix(self.emission, index, slot)
        part = b.op("Tile", [stored, prefix.repeats], module, label=f"prefix_{kind}")
        return b.op("Concat", [part, present], module, label=f"attended_{kind}", attributes={"axis": 2})
