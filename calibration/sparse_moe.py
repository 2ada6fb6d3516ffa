"""A mixture of experts in torch with one linear per product, so that every expert can be observed and quantized.

transformers holds all experts in two stacked tensors; a checkpoint names each expert's linears, and so do recipes.
"""

from typing import TYPE_CHECKING, Any

from spike_export.calibration.decoder_config import DecoderConfig

if TYPE_CHECKING:
    from torch import nn


def sparse_moe(config: DecoderConfig) -> "nn.Module":
    """Return Mixtral's block: softmax over the router's logits, the top k renormalized, experts `w2(act(w1) * w3)`.

    The module has `gate` and `experts.N.w1|w2|w3`, as the checkpoint names them, and `routed`: after a forward,
    expert → the flat token positions [tokens] it was given, in the order of its rows.
    """
    import torch
    from torch import nn
    from transformers.activations import ACT2FN

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            hidden, inner = config.hidden_size, config.intermediate_size
            self.w1 = nn.Linear(hidden, inner, bias=False)
            self.w2 = nn.Linear(inner, hidden, bias=False)
            self.w3 = nn.Linear(hidden, inner, bias=False)
            self.activation: Any = ACT2FN[config.family.activation]

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            product: torch.Tensor = self.w2(self.activation(self.w1(states)) * self.w3(states))
            return product

    class SparseMoe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
            self.experts = nn.ModuleList(Expert() for _ in range(config.num_experts))
            self.routed: dict[int, torch.Tensor] = {}

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            flat = states.reshape(-1, states.shape[-1])
            weights, chosen = torch.topk(torch.softmax(self.gate(flat).float(), -1), config.experts_per_token, -1)
            weights = weights / weights.sum(-1, keepdim=True)
            mixed = torch.zeros(flat.shape, dtype=torch.float32, device=flat.device)
            self.routed = {}
            for index, expert in enumerate(self.experts):
                tokens, slots = torch.where(chosen == index)
                if len(tokens):
                    self.routed[index] = tokens
                    mixed.index_add_(0, tokens, expert(flat[tokens]).float() * weights[tokens, slots, None])
            return mixed.to(states.dtype).reshape(states.shape)

    return SparseMoe()
