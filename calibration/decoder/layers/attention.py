"""Self-attention in torch, as the families' table describes it, with a place to observe or replace Q, K and V."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from spike_export.calibration.decoder.layers.norms import RMSNorm, family_norm
from spike_export.calibration.decoder.layers.rotary import Rotary
from spike_export.checkpoint.decoder_config import DecoderConfig

Operands = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]
"""Gets (query, key, value) after rope, the prefix's keys and values included, and returns what is multiplied."""

_LARGEST_SHARED_HEAD = 256
"""Channels of a head up to which torch's fused kernels let query heads share a key/value head."""


@dataclass(frozen=True)
class KeyValue:
    """What attention caches of a sequence: key and value [batch, kv_heads, tokens, head_dim], keys rotated."""

    key: torch.Tensor
    value: torch.Tensor

    def to(self, device: str) -> "KeyValue":
        """Return the same on a device."""
        return KeyValue(self.key.to(device), self.value.to(device))

    def before(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return new keys and values behind these, which are the same for every sequence of the batch."""
        pairs = ((self.key, key), (self.value, value))
        joined = [torch.cat([old.expand(len(new), -1, -1, -1), new], dim=2) for old, new in pairs]
        return joined[0], joined[1]


@dataclass(frozen=True)
class AttentionContext:
    """What attention needs to know besides the states of the tokens.

    Attributes:
        rotary: Of the tokens' positions.
        mask: [1, 1, tokens, past + tokens] bool, what each token sees; None where all see what stands before them.
        past: Of the prefix, or None without one.
    """

    rotary: Rotary
    mask: torch.Tensor | None = None
    past: KeyValue | None = None

    def to(self, device: str) -> "AttentionContext":
        """Return the same on a device."""
        mask = None if self.mask is None else self.mask.to(device)
        return AttentionContext(self.rotary.to(device), mask, self.past and self.past.to(device))


def visible(past: int, tokens: int, window: int | None) -> torch.Tensor | None:
    """Return the mask [1, 1, tokens, past + tokens] of tokens behind a prefix, or None where causality says it all.

    Every token sees the prefix, also where a sliding window would have left it behind, as in the exported graph.

    Args:
        past: Tokens of the prefix.
        tokens: Tokens of the sequence.
        window: Positions that a token sees, itself included, or None for all.
    """
    whole = window is None or past + tokens < window
    if whole and (tokens == 1 or not past):
        return None
    query, key = torch.arange(past, past + tokens)[:, None], torch.arange(past + tokens)[None]
    seen = key <= query
    if window is not None:
        seen &= (key > query - window) | (key < past)
    return seen[None, None]


class Attention(nn.Module):
    """Grouped-query attention between the projections of the states and `o_proj`.

    Args:
        config: The decoder's.
        linears: The projections: `qkv_proj` or `q_proj`, `k_proj`, `v_proj`; and `o_proj`.

    `operands`, where set, sees and replaces what is multiplied.
    """

    qkv_proj: nn.Linear
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    operands: Operands | None = None

    def __init__(self, config: DecoderConfig, linears: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        family, width = config.family, config.head_dim
        heads, shared = config.num_attention_heads * width, config.num_key_value_heads * width
        self._width, self._widths = width, [heads, shared, shared]
        self._fused = family.fused_projections
        self._scale = width**-0.5 if config.factors.attention is None else config.factors.attention
        self._softcap = config.factors.attention_softcap
        for name, linear in linears.items():
            self.add_module(name, linear)
        normed = {"q_norm": heads, "k_norm": shared}
        for name, channels in normed.items():
            norm = family_norm(config, width if family.qk_norm == "head" else channels) if family.qk_norm else None
            self.add_module(name, norm)

    def forward(self, states: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Attend: [batch, tokens, hidden] → [batch, tokens, hidden]."""
        query, key, value = self._heads(states)
        query, key = context.rotary.rotated(query), context.rotary.rotated(key)
        if context.past is not None:
            key, value = context.past.before(key, value)
        if self.operands is not None:
            query, key, value = self.operands(query, key, value)
        mixed = attend(query, key, value, context.mask, self._scale, self._softcap)
        output: torch.Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return output

    @contextmanager
    def watched(self, seen: list[KeyValue]) -> Iterator[None]:
        """Within the block, append what each forward caches; for sequences that nothing stands before."""

        def watch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
            seen.append(KeyValue(key, value))
            return query, key, value

        self.operands = watch
        try:
            yield
        finally:
            self.operands = None

    def _heads(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values, each [batch, heads, tokens, head_dim], normalized where the family does."""
        if self._fused:
            query, key, value = self.qkv_proj(states).split(self._widths, dim=-1)
        else:
            query, key, value = self.q_proj(states), self.k_proj(states), self.v_proj(states)
        query, key = _normed(self.q_norm, query), _normed(self.k_norm, key)
        parts = [part.reshape(*states.shape[:-1], -1, self._width).transpose(1, 2) for part in (query, key, value)]
        return parts[0], parts[1], parts[2]


def _normed(norm: RMSNorm | None, states: torch.Tensor) -> torch.Tensor:
    """Normalize a projection [batch, tokens, channels] in groups as wide as the norm: a head, or all heads."""
    if norm is None:
        return states
    normed: torch.Tensor = norm(states.reshape(*states.shape[:-1], -1, len(norm.weight)))
    return normed.flatten(-2)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return softmax(query keyᵀ * scale) value [batch, heads, tokens, head_dim].

    Args:
        query: [batch, heads, tokens, head_dim].
        key: [batch, kv_heads, past + tokens, head_dim]; heads are a multiple of kv_heads.
        value: As `key`.
        mask: As in `AttentionContext`.
        scale: What scores are multiplied by.
        softcap: Bound c of the scores, c * tanh(scores / c), or None.
    """
    groups = query.shape[1] // key.shape[1]
    # With a mask, or wider heads, torch's fused kernels want a key/value head for each query head.
    shared = softcap is None and mask is None and key.shape[-1] <= _LARGEST_SHARED_HEAD
    if groups > 1 and not shared:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    if softcap is not None:
        return _softcapped(query, key, value, mask, scale, softcap)
    return nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        scale=scale,
        is_causal=mask is None and query.shape[2] > 1,
        enable_gqa=groups > 1 and shared,
    )


def _softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Attend with bounded scores (Gemma 2), which torch's fused kernels lack."""
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    if mask is None:
        rows, columns = scores.shape[-2:]
        mask = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril(columns - rows)
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value
