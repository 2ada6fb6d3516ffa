"""A mixture of experts in torch with one linear per product, so that every expert can be observed and quantized.

transformers holds all experts in two stacked tensors; a checkpoint names each expert's linears, and so do recipes.
"""

from collections.abc import Sequence

import torch
from torch import nn

from spike_export.checkpoint.decoder_config import DecoderConfig


class SparseMoe(nn.Module):
    """Softmax over the router's logits, the top k of them (renormalized), their experts' outputs mixed in float32.

    Args:
        config: The decoder's.
        router: Linear from hidden channels to experts.
        experts: One feed-forward block each.

    After a forward, `routed` maps an expert to the flat token positions [tokens] it was given, in the order of its
    rows; experts that were given none are left out.
    """

    def __init__(self, config: DecoderConfig, router: nn.Linear, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.gate = router
        self.experts = nn.ModuleList(experts)
        self._picked, self._renormalized = config.experts_per_token, config.renormalized_routing
        self.routed: dict[int, torch.Tensor] = {}

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Compute [..., hidden] → [..., hidden]."""
        flat = states.reshape(-1, states.shape[-1])
        weights, chosen = torch.topk(torch.softmax(self.gate(flat).float(), -1), self._picked, -1)
        if self._renormalized:
            weights = weights / weights.sum(-1, keepdim=True)
        mixed = torch.zeros(flat.shape, dtype=torch.float32, device=flat.device)
        self.routed = {}
        for index, expert in enumerate(self.experts):
            tokens, slots = torch.where(chosen == index)
            if len(tokens):
                self.routed[index] = tokens
                mixed.index_add_(0, tokens, expert(flat[tokens]).float() * weights[tokens, slots, None])
        return mixed.to(states.dtype).reshape(states.shape)
