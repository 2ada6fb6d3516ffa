"""Positions, masks and write slots where the cache is a static buffer.

Slots of the buffer are: the prefix (P), then the caller's own tokens in order. A token's position is its slot, so that
one comparison of slots with positions hides what lies behind a query: later tokens, right padding, slots never written
and the remains of earlier sequences.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from spike_export.artifacts.manifest import CACHE_SLOTS
from spike_export.export.attention.attention_context import (
    MODULE,
    AttentionContext,
    PrefixExtent,
    near_or_prefix,
    prefix_extent,
)
from spike_export.export.graph.graph_builder import GraphBuilder

INT64, BOOL = ir.DataType.INT64, ir.DataType.BOOL


@dataclass(frozen=True)
class StaticContextEmitter:
    """Emits the `AttentionContext` of a static cache.

    Attributes:
        input_ids: [batch, sequence] int64.
        write_indices: [batch] int64; own tokens each row has in the buffer already.
        fresh: [F] bool, read for its length only: 1 for new sequences, else 0; None when there is no prefix.
        prefix_length: P; with 0 no node of the prefix is emitted.
        slots: Of the buffer: P and the capacity.
        windows: Slots a query sees, itself included, or None for all: each that some layer has.
    """

    builder: GraphBuilder
    input_ids: ir.Value
    write_indices: ir.Value
    fresh: ir.Value | None
    prefix_length: int
    slots: int
    windows: tuple[int | None, ...]

    def emit(self) -> AttentionContext:
        """Append the nodes."""
        b = self.builder
        first = self.write_indices
        if self.prefix_length:
            first = self._op("Add", first, b.integers(self.prefix_length), label="first_slots")
        positions = self._positions(first)
        prefix = self._prefix(self.fresh) if self.fresh is not None else None
        return AttentionContext(
            positions=positions,
            masks=self._masks(positions),
            prefix=prefix,
            write_slots=self._write_slots(first, prefix) if prefix else first,
        )

    def _op(
        self, kind: str, *inputs: ir.Value, label: str, dtype: ir.DataType | None = None, **attributes: int
    ) -> ir.Value:
        return self.builder.op(kind, inputs, MODULE, dtype=dtype, label=label, attributes=attributes)

    def _positions(self, first: ir.Value) -> ir.Value:
        b = self.builder
        sequence = self._op("Shape", self.input_ids, label="sequence", dtype=INT64, start=1, end=2)
        limit = self._op("Squeeze", sequence, b.integers(0), label="sequence_limit")
        columns = self._op("Range", b.integer(0), limit, b.integer(1), label="columns")
        return self._op("Add", self._op("Unsqueeze", first, b.integers(1), label="rows"), columns, label="positions")

    def _masks(self, positions: ir.Value) -> dict[int | None, ir.Value]:
        b = self.builder
        slots = b.initializer(CACHE_SLOTS, np.arange(self.slots, dtype=np.int64))
        queries = self._op("Unsqueeze", positions, b.integers(1, 3), label="queries")
        causal = self._op("LessOrEqual", slots, queries, label="mask", dtype=BOOL)
        return {
            window: causal if window is None else self._window(window, causal, slots, queries)
            for window in self.windows
        }

    def _window(self, window: int, causal: ir.Value, slots: ir.Value, queries: ir.Value) -> ir.Value:
        near = near_or_prefix(self.builder, window, self.prefix_length, slots, queries)
        return self._op("And", causal, near, label="window_mask")

    def _prefix(self, fresh: ir.Value) -> PrefixExtent:
        batch = self._op("Shape", self.input_ids, label="batch", dtype=INT64, start=0, end=1)
        count = self._op("Shape", fresh, label="fresh_count", dtype=INT64)
        return prefix_extent(self.builder, batch, count)

    def _write_slots(self, first: ir.Value, prefix: PrefixExtent) -> ir.Value:
        """Append where the update begins: with the prefix, where that enters."""
        length = self._op("Mul", prefix.times, self.builder.integers(self.prefix_length), label="prefix_length")
        return self._op("Sub", first, length, label="write_slots")
