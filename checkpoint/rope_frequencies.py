"""The frequencies of rotary embedding: one function for each kind of scaling that configurations name.

Float32 operations have the order of transformers', so that the frequencies agree with transformers' to the last bit.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RopeScaling:
    """The rotary embedding of the layers of one kind.

    Attributes:
        parameters: HF's `rope_parameters` of these layers.
        head_dim: Channels of a head.
        positions: The model's `max_position_embeddings`.
    """

    parameters: Mapping[str, Any]
    head_dim: int
    positions: int

    @property
    def kind(self) -> str:
        """The kind of scaling, a key of `ROPE_TYPES`."""
        return str(self.parameters.get("rope_type", "default"))

    @property
    def channels(self) -> int:
        """Channels of a head that are rotated, the first ones."""
        return int(self.head_dim * self.parameters.get("partial_rotary_factor", 1.0))

    @property
    def original_positions(self) -> int:
        """Positions that the model was trained with before its context was extended."""
        return int(self.parameters.get("original_max_position_embeddings", self.positions))


@dataclass(frozen=True)
class Frequencies:
    """How fast each pair of channels rotates.

    Attributes:
        inverse: [channels / 2] float32, radians per position.
        magnitude: What cosines and sines are multiplied by (the attention factor of yarn and longrope).
    """

    inverse: "torch.Tensor"
    magnitude: float = 1.0


def frequencies(rope: RopeScaling, length: int) -> Frequencies:
    """Return the frequencies for a sequence of `length` tokens, the prefix included.

    Raises:
        KeyError: The kind of scaling is not one of `ROPE_TYPES`, or a parameter is missing.
        TypeError, ValueError, ArithmeticError, RuntimeError: A parameter is not a number, or not one that makes
            frequencies.
    """
    found = _KINDS[rope.kind](rope, length)
    if not bool(found.inverse.isfinite().all()):
        raise ValueError("a frequency is not finite")
    return found


def _periods(base: "float | torch.Tensor", channels: int) -> "torch.Tensor":
    """Return base ** (2 i / channels) [channels / 2] float32: positions per radian."""
    import torch

    exponents = torch.arange(0, channels, 2, dtype=torch.int64).float() / channels
    periods: torch.Tensor = base**exponents
    return periods


def _unscaled(rope: RopeScaling) -> "torch.Tensor":
    inverse: torch.Tensor = 1.0 / _periods(rope.parameters["rope_theta"], rope.channels)
    return inverse


def _default(rope: RopeScaling, length: int) -> Frequencies:
    """Source: arXiv 2104.09864, eq. 15."""
    return Frequencies(_unscaled(rope))


def _linear(rope: RopeScaling, length: int) -> Frequencies:
    """Source: arXiv 2306.15595, eq. 4, applied to the frequencies instead of the positions."""
    return Frequencies(_unscaled(rope) / rope.parameters["factor"])


def _dynamic(rope: RopeScaling, length: int) -> Frequencies:
    """The base grows with the sequence. Source: arXiv 2309.00071, section 3.3 (dynamic NTK)."""
    import torch

    factor, channels, limit = rope.parameters["factor"], rope.channels, rope.positions
    # transformers computes with a tensor, in float32, where the sequence is longer than the model's length.
    size = torch.tensor(length) if length > limit else limit
    stretch = (factor * size / limit) - (factor - 1)
    base = rope.parameters["rope_theta"] * stretch ** (channels / (channels - 2))
    return Frequencies(1.0 / _periods(base, channels))


def _llama3(rope: RopeScaling, length: int) -> Frequencies:
    """Slow frequencies are divided by a factor, fast ones stay, those between are interpolated.

    Source: the published code of LLaMA 3.1, `apply_scaling`.
    """
    import torch

    factor = rope.parameters["factor"]
    low, high = rope.parameters["low_freq_factor"], rope.parameters["high_freq_factor"]
    original = rope.parameters["original_max_position_embeddings"]
    plain = _unscaled(rope)
    wavelengths = 2 * math.pi / plain
    slow, fast = wavelengths > original / low, wavelengths < original / high
    share = (original / wavelengths - low) / (high - low)
    between = (1 - share) * plain / factor + share * plain
    return Frequencies(torch.where(slow, plain / factor, torch.where(fast, plain, between)))


def _yarn(rope: RopeScaling, length: int) -> Frequencies:
    """Source: arXiv 2309.00071, section 3.2 (the ramp) and section 3.4 (the magnitude)."""
    parameters, channels = rope.parameters, rope.channels
    factor = _extension(rope)
    periods = _periods(parameters["rope_theta"], channels)
    kept = 1 - _yarn_ramp(rope)
    return Frequencies(1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept, _yarn_magnitude(rope, factor))


def _yarn_ramp(rope: RopeScaling) -> "torch.Tensor":
    """Return per frequency how far it is interpolated, 0 to 1 [channels / 2]."""
    import torch

    parameters, channels = rope.parameters, rope.channels
    original, base = parameters["original_max_position_embeddings"], parameters["rope_theta"]

    def channel(rotations: float) -> float:
        """Return the (fractional) channel that rotates as often within the original length."""
        return (channels * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(base))

    first, last = channel(parameters.get("beta_fast") or 32), channel(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    width = last - first or 0.001
    return ((torch.arange(channels // 2, dtype=torch.float32) - first) / width).clamp(0, 1)


def _yarn_magnitude(rope: RopeScaling, factor: float) -> float:
    stated = rope.parameters.get("attention_factor")
    if stated is not None:
        return float(stated)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scale, all_channels = rope.parameters.get("mscale"), rope.parameters.get("mscale_all_dim")
    return magnitude(scale) / magnitude(all_channels) if scale and all_channels else magnitude(1)


def _longrope(rope: RopeScaling, length: int) -> Frequencies:
    """A divisor for each frequency, of one list within the original length and of another beyond it.

    Source: arXiv 2402.13753, section 3 and eq. 3.
    """
    import torch

    parameters, original = rope.parameters, rope.parameters["original_max_position_embeddings"]
    periods = _periods(parameters["rope_theta"], rope.channels)
    divisors = torch.tensor(parameters["long_factor" if length > original else "short_factor"], dtype=torch.float32)
    # A single factor would be stretched to any number of channels.
    if divisors.shape != periods.shape:
        raise ValueError(f"there are {divisors.numel()} factors for {len(periods)} frequencies")
    return Frequencies(1.0 / (divisors * periods), _longrope_magnitude(rope))


def _longrope_magnitude(rope: RopeScaling) -> float:
    stated = rope.parameters.get("attention_factor")
    if stated is not None:
        return float(stated)
    factor = _extension(rope)
    original = rope.parameters["original_max_position_embeddings"]
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _extension(rope: RopeScaling) -> float:
    """Return how many times longer than the original length the context is."""
    factor = rope.parameters.get("factor")
    if factor is None:
        factor = rope.positions / rope.parameters["original_max_position_embeddings"]
    return float(factor)


_KINDS: Mapping[str, Callable[[RopeScaling, int], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}

ROPE_TYPES = tuple(_KINDS)
"""Kinds of scaling, as HF names them."""
