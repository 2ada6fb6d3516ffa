"""A mixture of experts in torch with one linear per product, so that every expert can be observed and quantized.

transformers holds all experts in two stacked tensors; a checkpoint names each expert's linears, and so do recipes.
"""

from typing import TYPE_CHECKING, Any

from spike_export.checkpoint.decoder_config import DecoderConfig
from spike_export.checkpoint.modules import expert_of

if TYPE_CHECKING:
    import torch
    from torch import nn


def sparse_moe(config: DecoderConfig) -> "nn.Module":
    """Return the block: softmax over the router's logits, the top k (renormalized), experts `down(act(gate) * up)`.

    The module has `gate`, the router, and `experts.N` with three linears, all as the family's checkpoints name them;
    and `routed`: after a forward, expert → the flat token positions [tokens] it was given, in the order of its rows.
    """
    import torch
    from torch import nn
    from transformers.activations import ACT2FN

    names = config.family.experts
    if names is None:
        raise ValueError(f"{config.family.model_type} has no experts")
    gate, up, down = names.gate, names.up, names.down

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            hidden, inner = config.hidden_size, config.expert_size
            for name, inputs, outputs in ((gate, hidden, inner), (up, hidden, inner), (down, inner, hidden)):
                self.add_module(name, nn.Linear(inputs, outputs, bias=False))
            self.activation: Any = ACT2FN[config.family.activation]

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            gated = self.activation(self.get_submodule(gate)(states)) * self.get_submodule(up)(states)
            product: torch.Tensor = self.get_submodule(down)(gated)
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
            if config.renormalized_routing:
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


def routed_positions(layer: Any, module: str) -> "torch.Tensor | None":
    """Return the flat token positions [tokens] of a module's input rows in the forward under way.

    Args:
        layer: The decoder layer.
        module: A linear's name, inside the layer or in full; None is returned where it is no expert's.
    """
    expert = expert_of(module)
    if expert is None:
        return None
    positions: torch.Tensor = layer.mlp.routed[expert]
    return positions
