"""transformers' forward pass over a cache of what stands before."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from tests.support.tiny.models import TinyModel


def cached_forward(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Return the logits [batch, tokens, vocab] of `ids` behind what the cache holds, which grows by them.

    Args:
        model: transformers' causal language model.
        ids: [batch, tokens] int64.
        cache: transformers' `DynamicCache`.
    """
    # transformers 5.24 renamed the argument.
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    logits: torch.Tensor = model(ids, use_cache=True, **{name: cache}).logits
    return logits


def cached_logits(
    model: TinyModel, ids: NDArray[np.int64], chunks: Sequence[int], prefix: tuple[int, ...] = ()
) -> NDArray[np.float32]:
    """transformers' logits of `ids` fed in chunks, the prefix in a call of its own before them."""
    cache, found, start = DynamicCache(), [], 0
    with torch.inference_mode():
        if prefix:
            before = torch.tensor([prefix] * len(ids))
            cached_forward(model.reference, before, cache)
        for size in chunks:
            part = torch.from_numpy(ids[:, start : start + size])
            found.append(cached_forward(model.reference, part, cache).numpy())
            start += size
    return np.concatenate(found, axis=1)
