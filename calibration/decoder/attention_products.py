"""Attention as the decoder runs it in torch: scaled dot product with a place to observe or quantize Q, K and V.

Registered with transformers under a name of ours, so that every family calls it. `module.operands`, where set, gets
(query, key, value) after rope and returns what the products use.
"""

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "spike_export"


@functools.cache
def registered_attention() -> str:
    """Register the function with transformers (once) and return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def _attention(
    module: Any,
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: "torch.Tensor | None",
    softcap: float | None = None,
    **options: Any,
) -> "tuple[torch.Tensor, None]":
    """Attend: query [batch, heads, tokens, head_dim], key and value [batch, kv_heads, past + tokens, head_dim]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    operands = getattr(module, "operands", None)
    if operands is not None:
        query, key, value = operands(query, key, value)
    if softcap is None:
        mixed: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
        return mixed, None
    return _softcapped(query, key, value, attention_mask, softcap, options["scaling"]), None


def _softcapped(
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    mask: "torch.Tensor | None",
    softcap: float,
    scaling: float,
) -> "torch.Tensor":
    """Attend with scores bounded by c * tanh(scores / c) (Gemma 2), which torch's fused kernels lack."""
    import torch

    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scaling / softcap))
    if mask is None:  # transformers leaves it out where plain causality says it all
        rows, columns = scores.shape[-2:]
        mask = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril(columns - rows)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (probabilities @ value).transpose(1, 2)
