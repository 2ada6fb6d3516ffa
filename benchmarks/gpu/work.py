"""What a call of the decoder costs at least: bytes moved and operations, and the time that a GPU needs for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from spike_export.checkpoint.decoder_config import DecoderConfig

Phase = Literal["prefill", "decode"]
Product = Literal["float16", "int8", "fp8"]

_HALF = 2
"""Bytes of a float16."""

_SCALE = 4
"""Bytes of the float32 scale that an output channel of a quantized weight has."""


@dataclass(frozen=True)
class Variant:
    """How the linears of the decoder layers are stored and multiplied; all else is float16.

    Attributes:
        weight_bytes: Of one weight.
        product: Format of the operands.
    """

    name: str
    weight_bytes: int
    product: Product


VARIANTS = (
    Variant("FP16", 2, "float16"),
    Variant("W8A8", 1, "int8"),
    Variant("W8A16", 1, "float16"),
    Variant("FP8", 1, "fp8"),
)


@dataclass(frozen=True)
class Call:
    """One call with logits of the last tokens only.

    Attributes:
        batch: Sequences.
        tokens: New ones of each.
        past: Tokens of each that are in the cache already.
        slots: Length of the buffer that attention reads, for a static cache.
    """

    phase: Phase
    batch: int
    tokens: int
    past: int
    slots: int

    @property
    def name(self) -> str:
        """For reading."""
        return f"{self.phase}, batch {self.batch}"


def calls(batches: Sequence[int], prompt: int, slots: int) -> tuple[Call, ...]:
    """Return what is measured: per batch size a prefill of `prompt` tokens and one step behind them."""
    return tuple(
        call
        for batch in batches
        for call in (Call("prefill", batch, prompt, 0, slots), Call("decode", batch, 1, prompt, slots))
    )


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder.

    Attributes:
        linears: (out_features, in_features) of every linear of the layers.
    """

    linears: tuple[tuple[int, int], ...]
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int

    @classmethod
    def of(cls, config: "DecoderConfig") -> "Model":
        """Read a checkpoint's configuration."""
        from spike_export.checkpoint.decoder_config import tensor_shapes
        from spike_export.checkpoint.modules import linears

        shapes = tensor_shapes(config)
        sizes = [shapes[f"{name}.weight"] for name in linears(config)]
        return cls(
            linears=tuple((rows, columns) for rows, columns in sizes),
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            hidden=config.hidden_size,
            vocab=config.vocab_size,
        )


@dataclass(frozen=True)
class Work:
    """What a call cannot do without; activations between kernels are left out, since they may stay in caches.

    Attributes:
        weights: Bytes read, each once: layers and head.
        cache: Bytes of keys and values, read and written.
        logits: Bytes written.
        operations: Format of the operands → multiplications and additions.
    """

    weights: int
    cache: int
    logits: int
    operations: Mapping[Product, int]

    @property
    def moved(self) -> int:
        """Return all bytes."""
        return self.weights + self.cache + self.logits


@dataclass(frozen=True)
class Peaks:
    """What this GPU was seen to do.

    Attributes:
        bandwidth: Bytes per second, reads and writes of a large copy.
        operations: Format of the operands → operations per second of a large product; without those it cannot do.
    """

    bandwidth: float
    operations: Mapping[Product, float]


@dataclass(frozen=True)
class Bound:
    """The least time of a call: memory and arithmetic at their peaks, side by side.

    Attributes:
        memory: Seconds for the bytes.
        arithmetic: Seconds for the operations.
    """

    memory: float
    arithmetic: float

    @property
    def seconds(self) -> float:
        """Return the larger of the two."""
        return max(self.memory, self.arithmetic)

    @property
    def by(self) -> str:
        """Return which of them it is."""
        return "memory" if self.memory >= self.arithmetic else "arithmetic"


def work(model: Model, variant: Variant, call: Call) -> Work:
    """Count what a call needs. Attention reads the whole of a static cache, and multiplies all of it."""
    rows = call.batch * call.tokens
    weights = sum(map(prod, model.linears))
    scales = 0 if variant.weight_bytes == _HALF else sum(_SCALE * outputs for outputs, _ in model.linears)
    head = model.vocab * model.hidden
    slot = 2 * model.layers * model.kv_heads * model.head_dim * _HALF
    attention = 2 * 2 * model.layers * model.heads * model.head_dim * rows * call.slots
    operations: dict[Product, int] = {"float16": 2 * call.batch * head + attention}
    operations[variant.product] = operations.get(variant.product, 0) + 2 * rows * weights
    return Work(
        weights=variant.weight_bytes * weights + scales + _HALF * head,
        cache=slot * call.batch * (call.slots + call.tokens),
        logits=call.batch * model.vocab * _HALF,
        operations=operations,
    )


def bound(needed: Work, peaks: Peaks) -> Bound | None:
    """Return the least time on this GPU; None where it was not seen to multiply the format."""
    if not needed.operations.keys() <= peaks.operations.keys():
        return None
    seconds = sum(count / peaks.operations[product] for product, count in needed.operations.items())
    return Bound(needed.moved / peaks.bandwidth, seconds)
