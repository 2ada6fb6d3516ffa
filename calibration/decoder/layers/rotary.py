"""Rotary embedding in torch: cosines and sines of a sequence, and the rotation of queries and keys."""

from dataclasses import dataclass

import torch

from spike_export.checkpoint.rope_frequencies import RopeScaling, frequencies


@dataclass(frozen=True)
class Rotary:
    """What the tokens of a sequence are rotated by.

    Attributes:
        cos: [tokens, rotated channels / 2], float32 or the decoder's dtype.
        sin: Likewise.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def to(self, target: str | torch.dtype) -> "Rotary":
        """Return the same on a device, or in a dtype."""
        return Rotary(self.cos.to(target), self.sin.to(target))

    def rotated(self, states: torch.Tensor) -> torch.Tensor:
        """Rotate channel i with channel i + half of queries or keys [batch, heads, tokens, head_dim].

        Channels beyond those of the tables stay as they are.
        """
        half = self.cos.shape[-1]
        first, second, rest = states[..., :half], states[..., half : 2 * half], states[..., 2 * half :]
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        # A product of float32 tables and half-precision states is float32.
        return torch.cat([part.to(states.dtype) for part in (*turned, rest)], dim=-1)


def rotary_at(rope: RopeScaling, first: int, tokens: int) -> Rotary:
    """Return the float32 rotation of `tokens` tokens at positions `first`, `first` + 1, ... of one sequence."""
    found = frequencies(rope, first + tokens)
    angles = torch.arange(first, first + tokens).float()[:, None] * found.inverse
    return Rotary(angles.cos() * found.magnitude, angles.sin() * found.magnitude)
