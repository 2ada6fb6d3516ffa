"""Root-mean-square normalization in torch, rounded where each family rounds."""

import torch
from torch import nn

from spike_export.checkpoint.decoder_config import DecoderConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * (offset + weight) over the last axis, in float32. Source: arXiv 1910.07467, eq. 4.

    Args:
        width: Channels.
        eps: Added to the mean square.
        offset: Added to the stored weight.
        float32_gain: Whether the result is rounded to the input's dtype after the gain instead of before.
    """

    def __init__(self, width: int, eps: float, offset: float = 0.0, float32_gain: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self._eps, self._offset, self._float32_gain = eps, offset, float32_gain

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Normalize [..., width]."""
        wide = states.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps)
        gain = self.weight.float() if self._float32_gain else self.weight
        if self._offset:
            gain = self._offset + gain
        return (gain * (normed if self._float32_gain else normed.to(states.dtype))).to(states.dtype)


def family_norm(config: DecoderConfig, width: int) -> RMSNorm:
    """Return a norm over `width` channels as the family computes it."""
    family = config.family
    return RMSNorm(width, config.rms_norm_eps, family.norm_offset, family.float32_gain)
