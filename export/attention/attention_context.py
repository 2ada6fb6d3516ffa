"""What all layers share: positions, the attention mask, and how much of the prefix enters the cache.

The prefix is invisible to the caller, whose attention mask and token counts speak of its own tokens only. Slots of
the cache are: the prefix (P), the caller's earlier tokens, the new tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from spike_export.export.graph.graph_builder import GraphBuilder

MODULE = "model.context"

INT64, BOOL = ir.DataType.INT64, ir.DataType.BOOL


@dataclass(frozen=True)
class PrefixExtent:
    """How much of the prefix this call puts before the past.

    Attributes:
        times: [1] int64; how often the prefix enters: once for a fresh sequence, else not at all. Always once where the
            past never holds it.
        repeats: [4] int64; batch, 1, `times`, 1: of the constant [1, kv_heads, P, head_dim].
    """

    times: ir.Value
    repeats: ir.Value


@dataclass(frozen=True)
class AttentionContext:
    """Computed once per call.

    Attributes:
        positions: [batch, sequence] int64.
        masks: Sliding window (None: all slots) → [batch, 1, sequence, slots] bool; True where a query sees a slot.
            A dynamic cache has P + total_sequence slots, a static one P + capacity.
        prefix: None when there is no prefix.
        write_slots: [batch] int64; where each row of a static cache is written from; None for a dynamic one.
    """

    positions: ir.Value
    masks: Mapping[int | None, ir.Value]
    prefix: PrefixExtent | None
    write_slots: ir.Value | None = None


@dataclass(frozen=True)
class ContextEmitter:
    """Emits the `AttentionContext` of a dynamic cache.

    Attributes:
        prefix_length: P; with 0 no node of the prefix is emitted.
        prefix_cached: Whether the past of a sequence that is not fresh holds the prefix.
        windows: Slots a query sees, itself included, or None for all: each that some layer has.
    """

    builder: GraphBuilder
    input_ids: ir.Value
    attention_mask: ir.Value
    prefix_length: int
    windows: tuple[int | None, ...]
    prefix_cached: bool = True

    def emit(self, past_key: ir.Value) -> AttentionContext:
        """Append the nodes; `past_key` is any layer's past, read for its length only."""
        # Only a prefix has to be repeated for every row.
        batch = None
        if self.prefix_length:
            batch = self._op("Shape", self.input_ids, label="batch", dtype=INT64, start=0, end=1)
        sequence = self._op("Shape", self.input_ids, label="sequence", dtype=INT64, start=1, end=2)
        total = self._op("Shape", self.attention_mask, label="total", dtype=INT64, start=1, end=2)
        earlier = self._op("Sub", total, sequence, label="earlier")
        return AttentionContext(
            positions=self._positions(earlier, total),
            masks=self._masks(batch, earlier, total),
            prefix=None if batch is None else self._prefix(batch, past_key),
        )

    def _op(
        self, kind: str, *inputs: ir.Value, label: str, dtype: ir.DataType | None = None, **attributes: int
    ) -> ir.Value:
        return self.builder.op(kind, inputs, MODULE, dtype=dtype, label=label, attributes=attributes)

    def _positions(self, earlier: ir.Value, total: ir.Value) -> ir.Value:
        b = self.builder
        counted = self._op("CumSum", self.attention_mask, b.integer(1), label="counted")
        counted = self._op("Slice", counted, earlier, total, b.integers(1), label="counted_new")
        if self.prefix_length:
            # At least P - 1, even in left padding; a prefix of one token needs no offset at all.
            if self.prefix_length == 1:
                return counted
            return self._op("Add", counted, b.integers(self.prefix_length - 1), label="positions")
        shifted = self._op("Sub", counted, b.integers(1), label="shifted")
        return self._op("Max", shifted, b.integers(0), label="positions")

    def _masks(self, batch: ir.Value | None, earlier: ir.Value, total: ir.Value) -> dict[int | None, ir.Value]:
        b, p = self.builder, self.prefix_length
        slots_total = self._op("Add", total, b.integers(p), label="slots_total") if p else total
        first_query = self._op("Add", earlier, b.integers(p), label="first_query") if p else earlier
        limit = self._op("Squeeze", slots_total, b.integers(0), label="slots_limit")
        slots = self._op("Range", b.integer(0), limit, b.integer(1), label="slots")
        queries = self._op("Slice", slots, first_query, slots_total, b.integers(0), label="query_slots")
        queries = self._op("Unsqueeze", queries, b.integers(1), label="queries")
        causal = self._op("LessOrEqual", slots, queries, label="causal", dtype=BOOL)
        visible = self._visible(batch)
        # Each query sees itself: a row of left padding would otherwise see nothing, and the NaN of its softmax would
        # reach later layers through the values of its slot.
        itself = self._op("Equal", slots, queries, label="itself", dtype=BOOL)
        masks: dict[int | None, ir.Value] = {}
        for window in self.windows:
            stem = "" if window is None else "window_"
            reach = causal if window is None else self._window(window, causal, slots, queries)
            seen = self._op("And", visible, reach, label=f"{stem}seen")
            masks[window] = self._op("Or", seen, itself, label=f"{stem}mask")
        return masks

    def _window(self, window: int, causal: ir.Value, slots: ir.Value, queries: ir.Value) -> ir.Value:
        near = near_or_prefix(self.builder, window, self.prefix_length, slots, queries)
        return self._op("And", causal, near, label="window_causal")

    def _visible(self, batch: ir.Value | None) -> ir.Value:
        b, columns = self.builder, self.attention_mask
        if batch is not None:
            shape = self.builder.op(
                "Concat", [batch, b.integers(self.prefix_length)], MODULE, label="ones_shape", attributes={"axis": 0}
            )
            one = b.initializer("prefix.visible", np.ones((1, 1), np.int64))
            ones = self._op("Expand", one, shape, label="prefix_columns")
            columns = self._op("Concat", ones, columns, label="columns", axis=1)
        visible = self._op("Greater", columns, b.integers(0), label="visible", dtype=BOOL)
        return self._op("Unsqueeze", visible, b.integers(1, 2), label="visible_columns")

    def _prefix(self, batch: ir.Value, past_key: ir.Value) -> PrefixExtent:
        b = self.builder
        times = b.integers(1)
        if self.prefix_cached:
            past = self._op("Shape", past_key, label="past", dtype=INT64, start=2, end=3)
            fresh = self._op("Equal", past, b.integers(0), label="fresh", dtype=BOOL)
            times = self._op("Where", fresh, times, b.integers(0), label="prefix_times", dtype=INT64)
        return prefix_extent(b, batch, times)


def prefix_extent(b: GraphBuilder, batch: ir.Value, times: ir.Value) -> PrefixExtent:
    """Append how often a prefix that enters `times` [1] is repeated in the cache of `batch` [1] rows."""
    parts = [batch, b.integers(1), times, b.integers(1)]
    return PrefixExtent(times, b.op("Concat", parts, MODULE, label="prefix_repeats", attributes={"axis": 0}))


def near_or_prefix(b: GraphBuilder, window: int, prefix: int, slots: ir.Value, queries: ir.Value) -> ir.Value:
    """Append which slots a sliding window leaves to a query: those near it, and a prefix's `prefix` slots always.

    Args:
        b: The graph.
        window: Slots a query sees, itself included.
        prefix: P.
        slots: [slots] int64; their numbers.
        queries: int64; the slots of the queries, with a last dimension of one.
    """
    edge = b.op("Sub", [queries, b.integers(window)], MODULE, label="window_edge")
    near = b.op("Greater", [slots, edge], MODULE, label="window_near", dtype=BOOL)
    if not prefix:
        return near
    in_prefix = b.op("Less", [slots, b.integers(prefix)], MODULE, label="in_prefix", dtype=BOOL)
    return b.op("Or", [near, in_prefix], MODULE, label="window_near_or_prefix")
