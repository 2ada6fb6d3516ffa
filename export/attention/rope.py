"""Rotary embedding: cosines and sines by position, from constant tables or, where they depend on the length, computed.

The length is each row's own, so that a row does not depend on its neighbours; transformers takes the longest row's.

The tables are those of the calibration's decoder, a factor on the attention (yarn, longrope) included.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spike_export.artifacts.errors import CheckpointError
from spike_export.artifacts.process.host_memory import require_available
from spike_export.checkpoint.rope_frequencies import RopeScaling, frequencies
from spike_export.export.graph.emission import Emission

FLOAT, BOOL = ir.DataType.FLOAT, ir.DataType.BOOL

Table = NDArray[np.float32]

_TABLE_BYTES = 8
"""For each position and channel: angle, cosine, sine and one of them rounded, in float32, of half of the channels."""


@dataclass(frozen=True)
class Rope:
    """The rotation of one kind of layer.

    Attributes:
        cos: [rows, channels / 2] where there are positions, else [batch, sequence, channels / 2].
        sin: Likewise.
        positions: Rows of the tables [batch, sequence] int64, or None.
        channels: How many of a head's channels are rotated, the first ones; None for all.
    """

    cos: ir.Value
    sin: ir.Value
    positions: ir.Value | None
    channels: int | None

    def rotate(self, emission: Emission, module: str, name: str, states: ir.Value, heads: int) -> ir.Value:
        """Append the rotation of queries or keys [batch, heads, sequence, head_dim]."""
        inputs = [states, self.cos, self.sin] + ([] if self.positions is None else [self.positions])
        # ONNX Runtime asks for the heads, which it could see, where some channels stay as they are.
        partial = None if self.channels is None else {"rotary_embedding_dim": self.channels, "num_heads": heads}
        return emission.builder.op("RotaryEmbedding", inputs, module, label=f"{name}_rotary", attributes=partial)


def rotary_tables(scaling: RopeScaling, positions: int) -> tuple[Table, Table]:
    """Return cos and sin of positions 0.., each [positions, rotated channels / 2] float32.

    Raises:
        CheckpointError: There is no memory for tables of so many positions.
    """
    from spike_export.calibration.decoder.layers.rotary import rotary_at

    require_available(
        _TABLE_BYTES * positions * scaling.channels,
        f"max_position_embeddings {positions:,}: rotary tables of so many positions",
        "correct the configuration, or export on a larger machine",
        CheckpointError,
    )
    found = rotary_at(scaling, 0, positions)
    return found.cos.numpy(), found.sin.numpy()


@dataclass(frozen=True)
class RopeEmitter:
    """Writes what the layers of one kind rotate with.

    Attributes:
        positions: [batch, sequence] int64.
        kind: The kind of layer, or None where all have the same rope.
    """

    emission: Emission
    positions: ir.Value
    kind: str | None

    def emit(self) -> Rope:
        """Append the nodes, computed once per call."""
        return _BY_TYPE.get(self._scaling.kind, RopeEmitter._tabulated)(self)

    @property
    def _scaling(self) -> RopeScaling:
        return self.emission.config.rope(self.kind)

    @property
    def _module(self) -> str:
        return "model.rotary_emb" + ("" if self.kind is None else f".{self.kind}")

    @property
    def _rows(self) -> int:
        # The caller may use every position the model knows; the prefix comes on top of them.
        return self.emission.config.max_position_embeddings + self.emission.plan.prefix_length

    def _rope(self, cos: Table, sin: Table, positions: ir.Value) -> Rope:
        b, kept = self.emission.builder, self.emission.numpy_dtype
        stored = (b.initializer(f"{self._module}.{name}", t.astype(kept)) for name, t in (("cos", cos), ("sin", sin)))
        cosines, sines = stored
        return Rope(cosines, sines, positions, self._partial(2 * cos.shape[1]))

    def _partial(self, channels: int) -> int | None:
        return None if channels == self.emission.config.head_dim else channels

    def _tabulated(self) -> Rope:
        """A position alone says how it is rotated."""
        return self._rope(*rotary_tables(self._scaling, self._rows), self.positions)

    def _longrope(self) -> Rope:
        """Two tables, one behind the other: of sequences within the original length, and of longer ones."""
        original = self._scaling.original_positions
        if self._rows <= original:
            return self._tabulated()
        both = (rotary_tables(self._scaling, rows) for rows in (original, self._rows))
        cos, sin = (np.concatenate(pair) for pair in zip(*both, strict=True))
        b = self.emission.builder
        last = self._op("ReduceMax", b.cast(self.positions, FLOAT), b.integers(1), label="last_position")
        long = self._op("GreaterOrEqual", last, b.float32(original), label="is_long", dtype=BOOL)
        first = self._op("Where", long, b.integers(original), b.integers(0), label="first_row", dtype=ir.DataType.INT64)
        return self._rope(cos, sin, self._op("Add", self.positions, first, label="rows"))

    def _dynamic(self) -> Rope:
        """The base grows with the sequence beyond the model's length, so that cosines and sines are computed.

        With n the length, L the model's and c the rotated channels, frequency i of the base becomes slower by
        (1 + factor * (n - L) / L) ** (2 i / (c - 2)); transformers writes this as a power of the base.
        """
        b, limit = self.emission.builder, self.emission.config.max_position_embeddings
        factor = float(self._scaling.parameters["factor"])
        plain = frequencies(self._scaling, limit).inverse.numpy()
        half = len(plain)
        positions = self._op("Unsqueeze", b.cast(self.positions, FLOAT), b.integers(2), label="columns")
        last = self._op("ReduceMax", positions, b.integers(1), label="last_position")
        # Reckoned from the excess, so that within the model's length the ratio is 1 exactly.
        excess = self._op("Sub", last, b.float32(limit - 1), label="excess")
        excess = self._op("Max", excess, b.float32(0), label="excess_or_none")
        stretch = self._op("Mul", excess, b.float32(factor / limit), label="stretch")
        ratio = self._op("Add", stretch, b.float32(1), label="ratio")
        exponents = b.initializer(f"{self._module}.exponents", -(np.arange(half) / (half - 1)).astype(np.float32))
        slower = self._op("Pow", ratio, exponents, label="slower")
        stored = b.initializer(f"{self._module}.inv_freq", plain)
        rotated = self._op("Mul", slower, stored, label="frequencies")
        angles = self._op("Mul", positions, rotated, label="angles")
        cos, sin = (self.emission.cast(self._op(kind, angles, label=kind.lower())) for kind in ("Cos", "Sin"))
        return Rope(cos, sin, None, self._partial(2 * half))

    def _op(self, kind: str, *inputs: ir.Value, label: str, dtype: ir.DataType | None = None) -> ir.Value:
        return self.emission.builder.op(kind, inputs, self._module, dtype=dtype, label=label)


_BY_TYPE: Mapping[str, Callable[[RopeEmitter], Rope]] = {
    "dynamic": RopeEmitter._dynamic,
    "longrope": RopeEmitter._longrope,
}
"""HF's rope types whose rotation depends on the length of the sequence; all others are tables."""
