"""Logits of the calibration's decoder, and those of transformers' whole model to compare them with."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spike_export.calibration.decoder.layerwise import BATCH_TOKENS, Decoder


def logits(
    decoder: Decoder, ids: NDArray[np.int64], prefix: tuple[int, ...] = (), batch_tokens: int = BATCH_TOKENS
) -> torch.Tensor:
    """Return [windows, tokens, vocab], layer by layer."""
    states = decoder.run(ids, prefix, batch_tokens=batch_tokens)
    head = decoder.head()
    return torch.cat([head.logits(states.get(index)) for index in range(len(states))])


def whole_logits(reference: Any, ids: NDArray[np.int64], **arguments: Any) -> torch.Tensor:
    """Return [windows, tokens, vocab] of transformers' model in one call."""
    with torch.inference_mode():
        found: torch.Tensor = reference(torch.from_numpy(ids), use_cache=False, **arguments).logits
    return found


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference as a part of the largest logit."""
    return float((one - other).abs().max() / other.abs().max())
