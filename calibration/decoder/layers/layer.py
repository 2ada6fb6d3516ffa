"""The decoder in torch: its layers as the table of families describes them, under the names that checkpoints use."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import nn

from spike_export.calibration.decoder.equivalent.hadamard import transform_channels
from spike_export.calibration.decoder.layers.attention import Attention, AttentionContext
from spike_export.calibration.decoder.layers.experts import SparseMoe
from spike_export.calibration.decoder.layers.feed_forward import FeedForward
from spike_export.calibration.decoder.layers.norms import family_norm
from spike_export.checkpoint.decoder_config import DecoderConfig, linear_shapes
from spike_export.checkpoint.families import Experts
from spike_export.checkpoint.modules import block_inputs

Linears = Mapping[str, Mapping[str, nn.Linear]]
"""Block inside a layer → name inside the block → linear."""


class DecoderLayer(nn.Module):
    """Attention and a feed-forward block, each added to the residual stream, with the norms of the family.

    `batch` and `shape` [samples, tokens] tell the visits which batch is under way.
    """

    batch: int
    shape: tuple[int, ...]

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        family, linears = config.family, _linears(config)
        self._hadamard = tuple(
            config.input_hadamard.get(f"model.layers.{index}.{name}") for name in block_inputs(config)
        )
        self._feed_forward = family.feed_forward
        self._before = (family.attention_norm, family.mlp_norm)
        self._behind: tuple[str | None, ...] = family.post_norms or (None, None)
        self._residual = config.factors.residual
        self.self_attn = Attention(config, linears["self_attn"])
        self.add_module(family.feed_forward, _feed_forward(config, linears))
        for norm in (*self._before, *self._behind):
            if norm is not None:
                self.add_module(norm, family_norm(config, config.hidden_size))

    @property
    def feed_forward(self) -> nn.Module:
        """The feed-forward block, under whatever name."""
        return self.get_submodule(self._feed_forward)

    def forward(self, states: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Compute [batch, tokens, hidden] → [batch, tokens, hidden]."""
        (attention_norm, mlp_norm), (post_attention, post_mlp) = self._before, self._behind
        (at_attention, at_mlp) = self._hadamard
        attended = self.self_attn(_spread(self._normed(attention_norm, states), at_attention), context)
        states = self._added(states, self._normed(post_attention, attended))
        transformed = self.feed_forward(_spread(self._normed(mlp_norm, states), at_mlp))
        return self._added(states, self._normed(post_mlp, transformed))

    def _normed(self, name: str | None, states: torch.Tensor) -> torch.Tensor:
        if name is None:
            return states
        normed: torch.Tensor = self.get_submodule(name)(states)
        return normed

    def _added(self, residual: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        return residual + (branch if self._residual == 1 else branch * self._residual)


def _spread(states: torch.Tensor, block: int | None) -> torch.Tensor:
    return states if block is None else transform_channels(states, block)


def _linears(config: DecoderConfig) -> Linears:
    linears: dict[str, dict[str, nn.Linear]] = defaultdict(dict)
    for name, (outputs, inputs) in linear_shapes(config).items():
        block, _, leaf = name.rpartition(".")
        linears[block][leaf] = nn.Linear(inputs, outputs, bias=name in config.biased)
    return linears


def _feed_forward(config: DecoderConfig, linears: Linears) -> nn.Module:
    family = config.family
    if family.experts is not None:
        return _mixture(config, linears, family.experts)
    names = ("gate_up_proj",) * 2 if family.fused_projections else ("gate_proj", "up_proj")
    return FeedForward(linears["mlp"], (*names, "down_proj"), family.activation, config.hadamard_block)


def _mixture(config: DecoderConfig, linears: Linears, names: Experts) -> nn.Module:
    blocks = [linears[f"{names.block}.experts.{index}"] for index in range(config.num_experts)]
    inside, family = (names.gate, names.up, names.down), config.family
    experts = [FeedForward(block, inside, family.activation, config.hadamard_block) for block in blocks]
    return SparseMoe(config, linears[names.block]["gate"], experts)


class TorchDecoder(nn.Module):
    """Embedding, layers and final norm, without the head; the names are those of checkpoints behind `model.`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = family_norm(config, config.hidden_size)
        self._factor, self._rounded = config.factors.embedding, config.factors.rounds_embedding

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what the first layer reads: [batch, tokens] int64 → [batch, tokens, hidden]."""
        states: torch.Tensor = self.embed_tokens(tokens)
        if self._factor == 1:
            return states
        factor = torch.tensor(self._factor).to(states.dtype).item() if self._rounded else self._factor
        return states * factor


def empty_decoder(config: DecoderConfig, dtype: torch.dtype) -> TorchDecoder:
    """Return the decoder without weights, on the meta device (no memory)."""
    with torch.device("meta"):
        return TorchDecoder(config).to(dtype).eval().requires_grad_(False)
